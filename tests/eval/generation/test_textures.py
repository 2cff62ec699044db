"""The distance of ground textures: by hand, and from scenes."""

import numpy as np
import pytest
import torch

from eval.generation.classifier import masks_of, pixels_of
from eval.generation.textures import GroundTextures, ground_pixels, statistics
from eval.scenes.scene import CLASSES, GROUNDS, OBJECTS, draw


def test_ground_keeps_a_pixel_away_from_objects():
    labels = torch.full((1, 8, 8), len(OBJECTS))
    labels[0, 2, 3] = 0
    ground = ground_pixels(labels, 16)[0]
    expected = torch.ones(16, 16, dtype=torch.bool)
    expected[2:8, 4:10] = False
    assert torch.equal(ground, expected)


def test_statistics_by_hand():
    """Columns of 0.2 and 0.6 in red, nothing else; the left half is no ground, and no ground at all has no texture."""
    picture = torch.zeros(2, 3, 4, 8)
    picture[:, 0, :, 0::2], picture[:, 0, :, 1::2] = 0.2, 0.6
    picture[:, :, :, :4] = 9
    ground = torch.zeros(2, 4, 8, dtype=torch.bool)
    ground[0, :, 4:] = True
    found = statistics(picture, ground)
    expected = [0.4, 0, 0, 0.2, 0, 0, 0.4 * 0.299, 0]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert found[1].isnan().all()


@pytest.fixture(scope="module")
def textures():
    scenes = [draw(seed, 32) for seed in range(160)]
    return GroundTextures(*of(scenes))


def of(scenes):
    names = torch.tensor([GROUNDS.index(each.ground) for each in scenes])
    return pixels_of(scenes) / 2 + 0.5, masks_of(scenes) >= len(OBJECTS), names


def test_scenes_are_near_their_own_ground_and_far_from_others(textures):
    pictures, ground, names = of([draw(seed, 32) for seed in range(1000, 1040)])
    own = textures.distance(pictures, ground, names)
    assert 0.6 < own.median() < 1.5
    assert (textures.distance(pictures, ground, (names + 1) % 8) > 2 * own.median()).float().mean() > 0.9


def test_more_contrast_is_farther(textures):
    pictures, ground, names = of([draw(seed, 32) for seed in range(1000, 1040)])
    mean = pictures.mean((2, 3), keepdim=True)
    assert (
        textures.distance(mean + 1.6 * (pictures - mean), ground, names).median()
        > 1.3 * textures.distance(pictures, ground, names).median()
    )


def test_a_ground_that_no_scene_has():
    scene = draw(0, 32)
    with pytest.raises(ValueError, match=f"two scenes on {GROUNDS[0]}.*got"):
        GroundTextures(*of([scene]))
    assert scene.ground in CLASSES
    assert np.asarray(scene.mask).max() < len(CLASSES)
