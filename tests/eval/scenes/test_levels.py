"""What is asked of a scene at each level: the same at every time, names and masks that agree, borders, models' folders."""

import numpy as np
import pytest

from eval.scenes import models
from eval.scenes.levels import LEVELS, VOID, question, without_borders
from eval.scenes.models import checkpoint, weights_of
from eval.scenes.scene import CLASSES, GROUNDS, OBJECTS, scene
from goca_guidance import TINY_SD


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_a_question_is_the_same_at_every_time(level):
    one, again, other = (question(level, "test", index) for index in (3, 3, 4))
    assert one.image == again.image
    assert np.array_equal(one.mask, again.mask)
    assert (one.names, one.words) == (again.names, again.words)
    assert one.image != other.image


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("index", range(4))
def test_names_and_masks_agree(level, index):
    asked, drawn = question(level, "test", index), scene("test", index, 64 * level.enlarged, level.scenes)
    held = {level.classes[label] for label in np.unique(asked.mask) if label != VOID}
    assert asked.mask.shape == asked.image.size == (64 * level.enlarged,) * 2
    assert held <= {*asked.names, *(["background"] if asked.words else [])}
    assert len(set(asked.names)) == len(asked.names)
    others = {*asked.names} - {*drawn.names}
    if level.names == "absent":
        assert 2 <= len(others) <= 3
    elif level.names == "vocabulary":
        assert {*asked.names} == {*CLASSES}
    else:
        assert not others
    if level.names == "background":
        assert asked.words == GROUNDS
        assert asked.names == drawn.objects
        assert np.array_equal(
            asked.mask == OBJECTS.index(drawn.objects[0]), drawn.mask == CLASSES.index(drawn.objects[0])
        )
        assert np.array_equal(asked.mask == len(OBJECTS), drawn.mask >= len(OBJECTS))


def test_added_names_stand_anywhere():
    """A prompt in which they came last would tell them."""
    asked = [question(LEVELS["absent"], "test", index) for index in range(12)]
    drawn = [scene("test", index) for index in range(12)]
    places = [[name in each.names for name in one.names] for one, each in zip(asked, drawn, strict=True)]
    assert {place[0] for place in places} == {place[-1] for place in places} == {True, False}


def test_levels_differ_from_plain_in_what_they_are_about_alone():
    plain = question(LEVELS["plain"], "test", 7)
    for name in ("interior", "unnamed", "absent", "vocabulary"):
        assert question(LEVELS[name], "test", 7).image == plain.image
    assert question(LEVELS["fine"], "test", 7, home=32).image == plain.image


def test_pixels_within_the_border_do_not_count():
    mask = np.zeros((12, 16), np.uint8)
    mask[:, 10:] = 3
    found = without_borders(mask, 2)
    assert (found[:, :8] == 0).all()
    assert (found[:, 8:12] == VOID).all()
    assert (found[:, 12:] == 3).all()
    mask[0, 0] = 5  # a corner pixel: its neighbours up to two away, and itself
    found = without_borders(mask, 2)
    assert (found[:3, :3] == VOID).all()
    assert (found[3:, :8] == 0).all()
    assert (found[:3, 3:8] == 0).all()


def test_checkpoints_are_folders_that_are_there_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "CHECKPOINTS", tmp_path)
    assert str(checkpoint("tiny-sd")) == TINY_SD
    assert checkpoint("tiny-sd", 25) is None
    (tmp_path / "tiny-sd" / "25" / "unet").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a whole checkpoint in .*25, but got one without model_index.json"):
        checkpoint("tiny-sd", 25)
    index = tmp_path / "tiny-sd" / "25" / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}')
    (index.parent / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="without the files of its unet"):
        checkpoint("tiny-sd", 25)
    (index.parent / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert checkpoint("tiny-sd", 25) == index.parent
    with pytest.raises(ValueError, match=r"Expected models among tiny-sd, .*, but got 'huge'"):
        checkpoint("huge")


def test_weights_are_those_of_the_parts(tmp_path):
    """Cards, logs and samples beside them change nothing."""
    for name, content in {"a": b"1", "b": b"1", "c": b"2"}.items():
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "weights").write_bytes(content)
    (tmp_path / "b" / "README.md").write_text("a card")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") != weights_of(tmp_path / "c")
