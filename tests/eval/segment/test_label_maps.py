"""Scores to label maps: every background rule pixel by pixel, resizing before the argmax, matching of nameless segments."""

import numpy as np
import pytest
import torch
from PIL import Image

from eval.segment.confusion import cells_of, cells_of_values
from eval.segment.label_maps import best_classes, crf_label_maps, label_maps, matched_label_maps
from eval.segment.methods import BackgroundRule, Scores
from goca_guidance import CRF


G = torch.Generator().manual_seed(0)
MAPS, ENTITY = torch.rand(2, 4, 5, generator=G), 0.5 * torch.rand(4, 5, generator=G)
SCORES = Scores(MAPS, (3, 7), ENTITY)


@pytest.mark.parametrize("kind", ["offset", "constant", "max", "square"])
def test_rules_pixel_by_pixel(kind):
    values = (0.1, 0.4, 0.7)
    found = label_maps(SCORES, BackgroundRule(kind, values), 0, (4, 5))
    for value, labels in zip(values, found, strict=True):
        for y in range(4):
            for x in range(5):
                own, e = MAPS[:, y, x].tolist(), ENTITY[y, x].item()
                background = {
                    "offset": value + e, "constant": value, "max": max(value, e), "square": (2 * value - max(own)) ** 2
                }[kind]  # fmt: skip
                expected = 0 if background > max(own) else (3, 7)[own.index(max(own))]
                assert labels[y, x] == expected
    assert len({tuple(labels.flatten().tolist()) for labels in found}) == 3


def test_no_rule_no_background():
    (labels,) = label_maps(SCORES, None, None, (4, 5))
    assert torch.equal(labels, torch.tensor([3, 7])[MAPS.argmax(0)])


def test_scores_are_resized_not_labels():
    (labels,) = label_maps(SCORES, None, None, (16, 20))
    big = torch.nn.functional.interpolate(MAPS[None], (16, 20), mode="bilinear")[0]
    assert torch.equal(labels, torch.tensor([3, 7])[big.argmax(0)])


def test_stretched_scores_reach_from_0_to_1_at_the_pictures_size():
    (labels,) = label_maps(SCORES, BackgroundRule("constant", (0.5,)), 0, (16, 20), stretched=True)
    big = torch.nn.functional.interpolate(MAPS[None], (16, 20), mode="bilinear")[0].numpy()
    low, high = big.min((1, 2), keepdims=True), big.max((1, 2), keepdims=True)
    big = (big - low) / (high - low)
    expected = np.where(big.max(0) < 0.5, 0, np.array([3, 7])[big.argmax(0)])
    assert np.array_equal(labels.numpy(), expected)


def test_nothing_asked_for_is_background():
    found = label_maps(Scores(), BackgroundRule("constant", (0.5, 0.6)), 4, (2, 3))
    assert [labels.tolist() for labels in found] == [[[4] * 3] * 2] * 2


def test_a_crf_follows_the_picture():
    """A class border two pixels beside an edge of the picture moves to the edge."""
    picture = np.zeros((24, 24, 3), np.uint8)
    picture[:, 12:] = 255
    maps = torch.full((2, 24, 24), 0.3)
    maps[0, :, :14] = maps[1, :, 14:] = 0.7
    (labels,) = crf_label_maps(Scores(maps, (1, 2), torch.zeros(24, 24)), None, None, Image.fromarray(picture), CRF())
    assert (labels[:, :12] == 1).float().mean() > 0.95
    assert (labels[:, 12:] == 2).float().mean() > 0.95


def test_segments_get_the_classes_that_suit_them():
    truth = np.array([[0, 0, 4, 4], [0, 0, 4, 255]], np.uint8)
    segments = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    (labels,) = matched_label_maps(Scores(segments=segments), truth, 5, None)
    assert labels.tolist() == [[0, 0, 4, 4], [0, 0, 4, 4]]


@pytest.mark.parametrize("kind", ["offset", "constant", "max", "square"])
def test_all_values_are_counted_as_their_label_maps_are(kind):
    rule = BackgroundRule(kind, (0.1, 0.2, 0.4, 0.7))
    truth = torch.randint(8, (16, 20), generator=torch.Generator().manual_seed(2))
    truth[:3] = 255
    labels, kept = best_classes(SCORES, rule, 0, (16, 20))
    at_once = cells_of_values(5, labels, kept, 4, truth, 8, 255)
    one_by_one = cells_of(5, label_maps(SCORES, rule, 0, (16, 20)), truth, 8, 255)
    assert np.array_equal(at_once, one_by_one)
    assert set(at_once[:, 1]) == {0, 1, 2, 3}


def test_a_crf_sees_the_background_of_each_value():
    picture = Image.fromarray(np.zeros((12, 12, 3), np.uint8))
    scores = Scores(torch.full((1, 12, 12), 0.5), (3,), torch.zeros(12, 12))
    low, high = crf_label_maps(scores, BackgroundRule("constant", (0.1, 0.9)), 0, picture, CRF())
    assert (low == 3).all()
    assert (high == 0).all()
    assert crf_label_maps(Scores(), BackgroundRule("constant", (0.1, 0.9)), 0, picture, CRF()).shape == (2, 12, 12)


@pytest.mark.parametrize(
    ("kind", "values"), [("ofset", (0.1,)), ("offset", ()), ("offset", (0.2, 0.1)), ("max", (0.1, 0.1))]
)
def test_bad_rules(kind, values):
    with pytest.raises(ValueError, match=r"`kind` to be one of|`values`"):
        BackgroundRule(kind, values)
