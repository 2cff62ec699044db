"""What is drawn of a step and of a segmentation."""

import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image

from goca_guidance.app import views
from goca_guidance.app.studio import Steps
from goca_guidance.pictures import colour


PICTURE = Image.new("RGB", (4, 2))


def test_equal_names_are_one_mask_and_what_is_nowhere_has_none():
    labels = np.array([[0, 1, 2, 2]] * 2, np.int16)
    image, masks = views.masks(PICTURE, ["cat</w>", "grass", "cat</w>", "nowhere"], labels)
    assert [name for _, name in masks] == ["cat", "grass"]
    assert ((masks[0][0] > 0) == [[True, False, True, True]] * 2).all()
    assert image is PICTURE


def test_background_is_pale():
    foreground = torch.tensor([[[True, False]]])
    steps = Steps(("cat",), torch.zeros(1, 1, 2, dtype=torch.int16), foreground, torch.ones(1, 1, 2))
    _, [(mask, _)] = views.regions_at(PICTURE, steps, 0)
    assert mask.shape == (2, 4)
    np.testing.assert_allclose(mask, [[views.OVER] * 2 + [views.PALE] * 2] * 2, rtol=1e-6)


def test_heat_goes_from_dark_to_bright_at_the_pictures_size():
    drawn = np.asarray(views.heat(torch.tensor([[2.0, 4.0]]), 2, 4, (4, 2))).astype(int).sum(-1)
    assert drawn.shape == (2, 4)
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 0] < drawn[:, 2]).all()


def test_colours_are_the_librarys():
    assert views.colours(["a", "b"]) == {"a": to_hex(colour(0)), "b": to_hex(colour(1))}


def test_small_pictures_are_enlarged_and_large_ones_reduced():
    assert views.shown(Image.new("RGB", (64, 64))).size == (256, 256)
    assert max(views.shown(Image.new("RGB", (3000, 2000))).size) == views.SHOWN
