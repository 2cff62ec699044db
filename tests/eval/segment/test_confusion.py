"""Counted pixels against torchmetrics and by hand; sums that do not depend on how the images were split."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from eval.segment import confusion
from eval.segment.confusion import Counts


CLASSES, VOID = 5, 255


def counted(pairs, names=None, values=1):
    """Counts of (prediction, truth) pairs, each prediction repeated for every value but the last ones shifted."""
    cells = []
    for image, (prediction, truth) in enumerate(pairs):
        shifted = torch.stack([(prediction + value) % CLASSES for value in range(values)])
        cells.append(confusion.cells_of(image, shifted, truth, CLASSES, VOID))
    return Counts(tuple(names or (f"image{i}" for i in range(len(pairs)))), np.concatenate(cells))


def drawn(count=6, seed=0, void=True):
    g = torch.Generator().manual_seed(seed)
    pairs = [tuple(torch.randint(CLASSES, (9, 7), generator=g) for _ in range(2)) for _ in range(count)]
    if void:
        for _, truth in pairs:
            truth[:2] = VOID
    return pairs


@pytest.mark.parametrize("void", [False, True])
def test_miou_is_the_dataset_level_jaccard_index(void):
    pairs = drawn(void=void)
    matrix = confusion.total(counted(pairs), 1, CLASSES)[0]
    prediction, truth = (torch.stack(each) for each in zip(*pairs, strict=True))
    expected = multiclass_jaccard_index(prediction, truth, CLASSES, average=None, ignore_index=VOID if void else None)
    assert confusion.iou(matrix) == pytest.approx(expected.numpy(), abs=1e-6)
    assert confusion.mean_iou(matrix) == pytest.approx(expected.mean().item(), abs=1e-6)
    kept = truth != VOID
    assert confusion.pixel_accuracy(matrix) == pytest.approx(
        (prediction == truth)[kept].float().mean().item(), abs=1e-6
    )


def test_every_value_is_counted():
    pairs = drawn()
    matrices = confusion.total(counted(pairs, values=3), 3, CLASSES)
    prediction, truth = (torch.stack(each) for each in zip(*pairs, strict=True))
    for value in range(3):
        expected = multiclass_confusion_matrix((prediction + value) % CLASSES, truth, CLASSES, ignore_index=VOID)
        assert np.array_equal(matrices[value], expected.numpy())


def test_iou_by_hand():
    """Class 0: 2 right of 2 + 1; class 1: 1 right of 1 + 1; class 2 occurs nowhere."""
    matrix = np.array([[2, 0, 0], [1, 1, 0], [0, 0, 0]])
    each = confusion.iou(matrix)
    assert each[:2] == pytest.approx([2 / 3, 1 / 2])
    assert np.isnan(each[2])
    assert confusion.mean_iou(matrix) == pytest.approx(7 / 12)
    assert confusion.mean_iou(matrix, absent_counts=True) == pytest.approx(7 / 18)


@given(st.permutations(range(6)), st.lists(st.integers(0, 6), min_size=2, max_size=3))
def test_any_split_has_the_same_sums(order, cuts):
    pairs = [drawn()[i] for i in order]
    bounds = [0, *sorted(cuts), 6]
    parts = [pairs[a:b] for a, b in pairwise(bounds)]
    split = confusion.joined(
        [counted(part, values=2) if part else Counts((), np.zeros((0, 5), np.int64)) for part in parts]
    )
    assert np.array_equal(confusion.total(split, 2, CLASSES), confusion.total(counted(drawn(), values=2), 2, CLASSES))
    assert len(split.images) == 6


def test_counts_survive_the_disk(tmp_path):
    counts = counted(drawn())
    whole = Counts(counts.images, counts.cells, {"bad": "its mask is missing"}, {"model": 1.5})
    whole.save(tmp_path / "a" / "chunk.npz")
    loaded = Counts.load(tmp_path / "a" / "chunk.npz")
    assert loaded.images == whole.images
    assert np.array_equal(loaded.cells, whole.cells)
    assert (loaded.skipped, loaded.seconds) == (whole.skipped, whole.seconds)
    assert not list(tmp_path.rglob(".part-*"))


def test_images_by_themselves():
    pairs = drawn(3)
    scores = confusion.image_scores(counted(pairs), 0, CLASSES)
    for i, (prediction, truth) in enumerate(pairs):
        expected = multiclass_jaccard_index(prediction, truth, CLASSES, average=None, ignore_index=VOID)
        assert scores[f"image{i}"] == pytest.approx(expected.mean().item(), abs=1e-6)


def test_interval_of_no_difference_is_zero():
    rows = confusion.by_image(counted(drawn()), 0, CLASSES, [f"image{i}" for i in range(6)])
    assert confusion.interval(rows, rows) == (0, 0)


def test_interval_against_a_plain_bootstrap():
    """Other draws, so equal up to the noise of a bootstrap."""
    names = [f"image{i}" for i in range(30)]
    truth = [t for _, t in drawn(30)]
    right = torch.rand(30, 9, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    better = [torch.where(here, t, 0) for here, t in zip(right, truth, strict=True)]
    ours, base = (
        confusion.by_image(counted(list(zip(p, truth, strict=True))), 0, CLASSES, names)
        for p in ([b.clamp(max=4) for b in better], [p for p, _ in drawn(30, seed=9)])
    )
    low, high = confusion.interval(ours, base, draws=2000)
    rng, found = np.random.default_rng(1), []
    for _ in range(2000):
        chosen = rng.integers(30, size=30)
        sums = [one.toarray()[chosen].sum(0).reshape(CLASSES, CLASSES) for one in (ours, base)]
        found.append(confusion.mean_iou(sums[0]) - confusion.mean_iou(sums[1]))
    assert (low, high) == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=0.01)
    assert 0 < low < high
