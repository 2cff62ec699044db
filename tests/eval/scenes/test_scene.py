"""Scenes are deterministic, their masks are exact, their captions name what they show."""

import hashlib

import numpy as np
import pytest

from eval.scenes.scene import CLASSES, GROUNDS, KIN, OBJECTS, VISIBLE, _scaled_sprite, background, caption, draw, scene


def test_deterministic_by_seed():
    a, b, c = scene("test", 5), scene("test", 5), scene("test", 6)
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.mask, b.mask)
    assert a.caption == b.caption
    assert not np.array_equal(a.image, c.image)


@pytest.mark.parametrize("seed", range(20))
def test_masks_and_captions_agree(seed):
    s = draw(seed)
    assert {CLASSES[i] for i in np.unique(s.mask)} == set(s.names)
    assert all(name in s.caption for name in s.names)
    assert s.image.shape == (64, 64, 3)
    assert s.image.dtype == s.mask.dtype == np.uint8


def test_mask_is_the_sprite():
    """A scene of one object: outside the mask the picture is the untouched ground, inside it mostly is not."""
    s = next(s for s in map(draw, range(50)) if len(s.objects) == 1 and s.ground == "snow")
    inside = s.mask == CLASSES.index(s.objects[0])
    assert np.std(s.image[~inside].astype(float), axis=0).max() < 20
    assert np.abs(s.image[inside].astype(float) - (236, 240, 248)).mean() > 20


def test_objects_stay_visible():
    shares = []
    for seed in range(60):
        s = draw(seed)
        shares += [(s.mask == CLASSES.index(name)).sum() for name in s.objects]
    assert min(shares) > 64 * 64 * 0.01
    assert 0 < VISIBLE < 1


def test_names():
    assert len(OBJECTS) == 16
    assert {"potted plant", "tv monitor"} <= set(OBJECTS)
    assert len(set(CLASSES)) == len(CLASSES) == 24


@pytest.mark.parametrize("ground", GROUNDS)
def test_grounds_have_texture(ground):
    assert np.asarray(background(ground, np.random.default_rng(0), 64)).std() > 0.5


def test_sprites_fit():
    for name in OBJECTS:
        assert max(_scaled_sprite(name, 0.8, 64, flip=True).size) <= 52


def test_plain_scenes_are_those_of_before():
    """Results in results/ were measured on them."""
    digest = hashlib.sha256()
    for s in (scene("test", i) for i in range(8)):
        digest.update(s.image.tobytes() + s.mask.tobytes() + s.caption.encode())
    assert digest.hexdigest()[:16] == "4ed6dd9ef0bbaad2"


@pytest.mark.parametrize(("level", "counts"), [("crowd", {4, 5, 6}), ("lookalikes", {2, 3})])
def test_levels(level, counts):
    drawn = [draw(seed, 128, level) for seed in range(40)]
    assert {len(s.objects) for s in drawn} == counts
    for s in drawn:
        assert {CLASSES[i] for i in np.unique(s.mask)} == set(s.names)
        assert level == "crowd" or any(set(s.objects) <= set(kin) for kin in KIN)


def test_a_crowd_stands_in_two_rows():
    drawn = [draw(seed, 64, "crowd").mask < len(OBJECTS) for seed in range(20)]
    assert all(mask[:26].any() and mask[38:].any() for mask in drawn)


def test_unknown_level():
    with pytest.raises(ValueError, match="Expected a level among plain, crowd, lookalikes, but got 'easy'"):
        scene("test", 0, level="easy")


def test_captions_without_ground():
    captions = {caption(("cat", "dog"), None, np.random.default_rng(seed)) for seed in range(20)}
    assert {"cat, dog", "a cat and a dog"} <= captions
    assert not any(ground in text for text in captions for ground in GROUNDS)


@pytest.mark.parametrize(("split", "index"), [("nothing", 0), ("test", -1), ("test", 10_000_000)])
def test_bad_split(split, index):
    with pytest.raises(ValueError, match="Expected"):
        scene(split, index)
