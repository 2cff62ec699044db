"""A CRF behind `segment`: borders move to the picture's own, at each picture's size, the background among them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from goca_guidance import CRF, Background, Segmentation
from goca_guidance.method.crf import labels_by_crf
from goca_guidance.method.maps import resize


WIDE = CRF(theta_beta=10.0)


@pytest.fixture
def halves() -> Segmentation:
    """A picture of two colours that meet at column 24 of 48; two classes that meet at column 27."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, 24:] = 200
    scores = torch.full((1, 2, 32, 48), 0.3)
    scores[:, 0, :, :27] = scores[:, 1, :, 27:] = 0.6
    pictures = (Image.fromarray(picture),)
    return Segmentation(scores, ("left", "right"), ((32, 48),), None, scores[:, :0], pictures, WIDE)


def right(labels: torch.Tensor) -> float:
    """Share of the pixels that are as the picture has them."""
    return (labels == (torch.arange(48) >= 24)).double().mean().item()


def test_borders_move_to_the_pictures_own(halves):
    assert right(replace(halves, crf=None).label_maps[0]) == 45 / 48
    assert right(halves.label_maps[0]) == 1


def test_the_background_has_a_share(halves):
    """At an offset that lifts it above one class it takes that class's side."""
    rule = Background(threshold=0.45)
    (labels,) = replace(halves, scores=halves.scores * torch.tensor([1, 0.5])[:, None, None], background=rule,
                        classes=(*halves.classes, "background")).label_maps  # fmt: skip
    assert (labels[:, :24] == 0).all()
    assert (labels[:, 24:] == 2).all()


def test_each_picture_at_its_own_size(pipe, image):
    pictures, names = [image, image.resize((30, 50))], ["cat", "grass", "bus"]
    plain = pipe.segment(pictures, names)
    found = pipe.segment(pictures, names, crf=WIDE)
    assert torch.equal(found.scores, plain.scores)
    assert [labels.shape for labels in found.label_maps] == [(40, 52), (50, 30)]
    for labels, picture, scores in zip(found.label_maps, pictures, plain.scores, strict=True):
        array = np.asarray(picture)
        expected = labels_by_crf(resize(scores[None], array.shape[:2])[0], torch.from_numpy(array.copy()), WIDE)
        assert torch.equal(labels, expected)
    assert torch.equal(replace(plain, crf=WIDE).label_maps[0], found.label_maps[0])


def test_a_crf_needs_the_pictures(halves):
    with pytest.raises(ValueError, match="Expected 1 pictures beside a `crf`, but got 0"):
        replace(halves, pictures=())
