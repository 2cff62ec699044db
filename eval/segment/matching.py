"""From numbered segments to classes, by the truth: how methods that name nothing are scored (DiffCut, evaluation)."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def match(
    segments: np.ndarray, truth: np.ndarray, classes: int, void: int, background: int | None = None
) -> np.ndarray:
    """Classes [H W] of an image's segments [H W], by the assignment that gets most pixels right (DiffCut, evaluation).

    One-to-one (Hungarian) on the pixels that the truth [H W] knows. Without a `background` class all classes take part, those
    too that the image does not have, so that a segment too many is a false positive of one of them, as in the released
    evaluation; where segments outnumber classes, the surplus takes the class that it overlaps least, and gains nothing.

    With a `background` class, many to one: first the other classes are matched; the segments that none of them overlaps are
    merged, and the merged one and the others are matched to all classes. What overlaps nothing then is background.

    Args:
        segments: any whole numbers.
        truth: index of the class, below `classes`, or `void` where nothing is known.
    """
    truth, known = np.asarray(truth), np.asarray(truth) != void
    if segments.shape != truth.shape:
        raise ValueError(
            f"Expected segments of the truth's size {truth.shape}, but got {segments.shape}: resize them."
        )
    if known.any() and not 0 <= truth[known].min() <= truth[known].max() < classes:
        raise ValueError(f"Expected truth below {classes} or {void}, but got {sorted(set(truth[known].tolist()))}.")
    names, index = np.unique(segments, return_inverse=True)
    index = index.reshape(segments.shape)
    overlap = np.zeros((len(names), classes), dtype=np.int64)
    np.add.at(overlap, (index[known], truth[known]), 1)
    if background is None:
        return assign(overlap)[index]
    merged = merge(overlap, background)
    together = np.zeros((merged.max() + 1, classes), dtype=np.int64)
    np.add.at(together, merged, overlap)
    labels = assign(together)
    unmatched = together[np.arange(len(labels)), labels] == 0
    return np.where(unmatched, background, labels)[merged][index]


def assign(overlap: np.ndarray) -> np.ndarray:
    """A class for each segment, one-to-one with the largest sum of `overlap` [segments classes]; see `match` for a surplus."""
    labels = overlap.argmin(1)
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    labels[rows] = columns
    return labels


def merge(overlap: np.ndarray, background: int) -> np.ndarray:
    """New numbers of the segments: those matched to a class that is no background keep one each, all others share the last."""
    objects = np.delete(overlap, background, axis=1)
    rows, columns = linear_sum_assignment(objects, maximize=True)
    kept = rows[objects[rows, columns] > 0]
    numbers = np.full(len(overlap), len(kept))
    numbers[kept] = np.arange(len(kept))
    return numbers
