"""Counts of the levels to rows: mIoU of all classes, of objects, of grounds, and how far each is from vanilla's."""

import numpy as np
from scipy.sparse import csr_array

from eval.common.intervals import resamples
from eval.common.processes import slices
from eval.scenes.levels import LEVELS
from eval.scenes.models import weights_of
from eval.scenes.scene import OBJECTS
from eval.segment.confusion import by_image, iou
from eval.segment.level_counts import LevelRun


BASE = "vanilla"  # the row from which all differ
PARTS = ("miou", "objects", "grounds")


def means(confusion: np.ndarray) -> np.ndarray:
    """mIoU of all classes, of the objects, of the grounds (or of the background), [... 3], from [... classes classes].

    A class that neither truth nor prediction has is left out.
    """
    each = iou(confusion)
    parts = each, each[..., : len(OBJECTS)], each[..., len(OBJECTS) :]
    return np.stack([np.nanmean(part, -1) for part in parts], -1)


def bootstrap(ours: csr_array, base: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of means(ours) - means(base): a paired bootstrap over images, the rows of both."""
    classes, drawn = round(ours.shape[1] ** 0.5), []
    for times in slices(resamples(ours.shape[0]), 100):
        sums = [means(np.asarray(times @ one).reshape(-1, classes, classes)) for one in (ours, base)]
        drawn.append(sums[0] - sums[1])
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
    return low, high


def rows_of(run: LevelRun, share: int) -> list[dict]:
    """A row for each method of a measured run, by a model after `share` percent of its training."""
    names, classes = [str(index) for index in range(run.images)], len(LEVELS[run.level].classes)
    counted = {method: by_image(run.counts(method), run.value, classes, names) for method in run.methods}
    found = {method: means(rows.sum(0).reshape(classes, classes)) for method, rows in counted.items()}
    place = {"model": run.model, "checkpoint": share, "level": run.level}
    facts = {"images": run.images, "weights": weights_of(run.folder)}
    rows = []
    for method, values in found.items():
        row = {**place, "method": method, **facts, **dict(zip(PARTS, values.round(4).tolist(), strict=True))}
        if method != BASE:
            low, high = bootstrap(counted[method], counted[BASE])
            for part, *numbers in zip(PARTS, values - found[BASE], low, high, strict=True):
                prefix = "" if part == "miou" else f"{part}_"
                for name, number in zip(("difference", "low", "high"), numbers, strict=True):
                    row[f"{prefix}{name}"] = round(float(number), 4)
        rows.append(row)
    return rows


def compared(run: LevelRun, method: str, base: str) -> dict:
    """mIoU of all classes of one method of a measured run, and how far it is from another's."""
    names, classes = [str(index) for index in range(run.images)], len(LEVELS[run.level].classes)
    ours, theirs = (by_image(run.counts(name), run.value, classes, names) for name in (method, base))
    (found, *_), (known, *_) = (means(rows.sum(0).reshape(classes, classes)) for rows in (ours, theirs))
    (low, *_), (high, *_) = bootstrap(ours, theirs)
    numbers = {"miou": found, "difference": found - known, "low": low, "high": high}
    return {name: round(float(number), 4) for name, number in numbers.items()}


def miou(run: LevelRun, method: str) -> float:
    """mIoU of all classes of a measured run."""
    classes = len(LEVELS[run.level].classes)
    rows = by_image(run.counts(method), run.value, classes, [str(index) for index in range(run.images)])
    return round(float(means(rows.sum(0).reshape(classes, classes))[0]), 4)
