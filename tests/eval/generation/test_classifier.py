"""The classifier of Scenes' pixels: what it is asked, how it learns, and how often it is right."""

import numpy as np
import pytest
import torch

from eval.generation import classifier
from eval.generation.classifier import ClassifierSettings, PixelClassifier
from eval.scenes.scene import CLASSES, OBJECTS, scene


def test_an_object_is_shown_by_a_hundredth_of_the_picture():
    """Of 32 x 32 pixels 11 are enough, 10 are not; a ground is no object."""
    scores = torch.zeros(1, 24, 32, 32)
    scores[0, CLASSES.index("snow")] = 1
    scores[0, CLASSES.index("cat"), 0, :11] = 2
    scores[0, CLASSES.index("dog"), 1, :10] = 2
    labels = classifier.classes(lambda images: scores.expand(len(images), -1, -1, -1), torch.zeros(2, 3, 64, 64))
    assert labels.shape == (2, 32, 32)
    share = classifier.shares(labels)
    assert share[1, CLASSES.index("cat")].item() == pytest.approx(11 / 1024)
    assert share.sum(1).tolist() == pytest.approx([1, 1])
    found = classifier.shown(lambda images: scores.expand(len(images), -1, -1, -1), torch.zeros(2, 3, 64, 64))
    assert [OBJECTS[i] for i in np.flatnonzero(found[0])] == ["cat"]


def test_pictures_are_spoiled_at_random_and_stay_pictures():
    torch.manual_seed(0)
    images = torch.linspace(-0.5, 0.5, 64).expand(4, 3, 64, 64)
    one, other = classifier.spoiled(images), classifier.spoiled(images)
    assert one.shape == images.shape
    assert not torch.equal(one, other)
    assert (one - images).abs().mean() < 0.2


def test_it_learns_and_is_what_was_written(tmp_path, monkeypatch):
    """A few steps on a few scenes bring the loss down from that of chance, log 24; weights come back in half precision."""
    scenes = [scene("train", number, level=level) for number, level in classifier.mixed(6)]
    assert {len(each.objects) > 3 for each in scenes} == {False, True}
    monkeypatch.setattr(classifier, "drawn", lambda split, places: scenes)
    model = classifier.train(ClassifierSettings(scenes=6, steps=6, batch=4), "cpu")
    scores = torch.nn.functional.interpolate(model(classifier.pixels_of(scenes)), scale_factor=2)
    assert torch.nn.functional.cross_entropy(scores, classifier.masks_of(scenes)) < np.log(24)
    classifier.write(model, tmp_path / "weights.safetensors")
    again = classifier.classifier("cpu", tmp_path / "weights.safetensors")
    for value, expected in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


def test_as_shipped_it_finds_the_objects_of_scenes():
    """0.965 of those of 200 scenes that an autoencoder shows; chance is far below."""
    scenes = [scene("test", number) for number in range(1000, 1024)]
    there, found = (
        classifier.named(scenes),
        classifier.shown(classifier.classifier("cpu"), classifier.pixels_of(scenes)),
    )
    assert (found & there).sum() / there.sum() > 0.9
    assert (found & ~there).sum() / len(scenes) < 1


def test_weights_that_are_not_there(tmp_path):
    (tmp_path / "bad.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match=r"bad\.safetensors.*python -m eval\.train_classifier"):
        classifier.classifier("cpu", tmp_path / "bad.safetensors")


def test_scenes_of_all_levels_are_drawn_by_all_cores():
    places = classifier.mixed(4)
    for each, (number, level) in zip(classifier.drawn("test", places, 32), places, strict=True):
        assert np.array_equal(each.image, scene("test", number, 32, level).image)


def test_named():
    scenes = [scene("test", 0), scene("test", 1)]
    assert [{OBJECTS[i] for i in np.flatnonzero(row)} for row in classifier.named(scenes)] == [
        set(s.objects) for s in scenes
    ]


def test_untrained_it_sees_every_second_pixel():
    assert PixelClassifier()(torch.zeros(1, 3, 64, 64)).shape == (1, 24, 32, 32)
