"""Pixels counted by true and predicted class, image by image, and what follows from them: IoU, mIoU, paired intervals.

Counts are sparse, because an image shows few of the classes: rows of (image, value, truth, prediction, pixels), where
`value` numbers the values of the background rule that share a forward. They are integers: any split over processes, and any
order, has the same sums.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import csr_array
from torch import Tensor

from eval.common.files import replacing
from eval.common.intervals import resamples
from eval.common.processes import slices


@dataclass(frozen=True)
class Counts:
    """`cells` [n 5]: image (index into `images`), value, truth, prediction, pixels. `skipped`: ids with the reason.

    `seconds`: where the time went, by stage; it is no part of a result.
    """

    images: tuple[str, ...]
    cells: np.ndarray
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        facts = json.dumps({"images": self.images, "skipped": self.skipped, "seconds": self.seconds})
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(file, cells=self.cells, facts=np.array(facts))

    @classmethod
    def load(cls, path: Path) -> "Counts":
        with np.load(path) as file:
            facts = json.loads(str(file["facts"]))
            return cls(tuple(facts["images"]), file["cells"], facts["skipped"], facts["seconds"])

    @classmethod
    def of(cls, ids: Sequence[str], path: Path) -> "Counts":
        """Those of some images; ValueError if the file holds others."""
        found = cls.load(path)
        if {*found.images, *found.skipped} != set(ids) or found.cells.shape[1:] != (5,):
            raise ValueError("it holds the counts of other images")
        return found


def cells_of(
    image: int, predictions: Int[Tensor, "v H W"], truth: Int[Tensor, "H W"], classes: int, void: int
) -> np.ndarray:
    """Rows of one image with a prediction for each value; pixels whose truth is `void` do not count."""
    known, values = truth != void, len(predictions)
    place = torch.arange(values)[:, None] * classes**2 + truth[known] * classes + predictions[:, known]
    return _rows(image, place.flatten().bincount(minlength=values * classes**2).view(values, classes, classes).numpy())


def cells_of_values(
    image: int,
    labels: Int[Tensor, "H W"],
    kept: Int[Tensor, "H W"],
    values: int,
    truth: Int[Tensor, "H W"],
    classes: int,
    void: int,
    background: int = 0,
) -> np.ndarray:
    """The same for `values` predictions in one go: the one of value v has `labels` at the pixels with `kept` > v, and
    `background` elsewhere.

    Pixels are counted by truth, label and `kept`; the sum of the counts from v + 1 on, taken from the end, is what value v
    keeps, and the rest of each row goes to the background.
    """
    known, bins = truth != void, values + 1
    place = (truth[known] * classes + labels[known]) * bins + kept[known]
    counts = place.bincount(minlength=classes**2 * bins).view(classes, classes, bins)
    stays = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    matrices = stays.clone()
    matrices[:, background] += (counts.sum(-1, keepdim=True) - stays).sum(1)
    return _rows(image, matrices.permute(2, 0, 1).numpy())


def _rows(image, matrices):
    found = np.argwhere(matrices)
    return np.column_stack([np.full(len(found), image), found, matrices[tuple(found.T)]]).astype(np.int64)


def joined(parts: Sequence[Counts]) -> Counts:
    """Counts of several sets of images as one."""
    starts = np.cumsum([0, *(len(part.images) for part in parts)])
    cells = [part.cells + np.array([start, 0, 0, 0, 0]) for part, start in zip(parts, starts, strict=False)]
    seconds = {stage: sum(p.seconds.get(stage, 0) for p in parts) for part in parts for stage in part.seconds}
    return Counts(
        tuple(image for part in parts for image in part.images),
        np.concatenate([np.zeros((0, 5), np.int64), *cells]),
        {image: why for part in parts for image, why in part.skipped.items()},
        seconds,
    )


def by_image(counts: Counts, value: int, classes: int, images: Sequence[str]) -> csr_array:
    """One row for each of the `images`: its confusion matrix, [classes x classes] in row-major order, truth first."""
    row = {image: number for number, image in enumerate(images)}
    where = np.array([row.get(image, -1) for image in counts.images], dtype=np.int64)
    image, number, truth, prediction, pixels = counts.cells.T
    kept = (number == value) & (where[image] >= 0)
    place = where[image[kept]], truth[kept] * classes + prediction[kept]
    return csr_array((pixels[kept], place), shape=(len(images), classes**2), dtype=np.int64)


def total(counts: Counts, values: int, classes: int) -> np.ndarray:
    """Confusion matrices of the whole set, [values classes classes]; rows are the truth."""
    sums = [by_image(counts, value, classes, counts.images).sum(0) for value in range(values)]
    return np.stack(sums).reshape(values, classes, classes)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, 0 to 1; NaN for a class that neither truth nor prediction has."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    union = confusion.sum(-1) + confusion.sum(-2) - hit
    return np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray, absent_counts: bool = False) -> np.ndarray:
    """Mean over classes; one that never occurs is left out, or counts as zero as in the released code of GoCA."""
    each = iou(confusion)
    return np.nan_to_num(each).mean(-1) if absent_counts else np.nanmean(each, -1)


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Share of the counted pixels whose class is right."""
    return float(np.trace(confusion) / confusion.sum())


def interval(ours: csr_array, base: csr_array, absent_counts: bool = False, draws: int = 1000, seed: int = 0):
    """95 % interval of mIoU(ours) - mIoU(base): a paired bootstrap over images (the rows of both)."""
    differences, classes = [], round(ours.shape[1] ** 0.5)
    for times in slices(resamples(ours.shape[0], draws, seed), 100):
        sums = [np.asarray(times @ one).reshape(-1, classes, classes) for one in (ours, base)]
        differences.append(mean_iou(sums[0], absent_counts) - mean_iou(sums[1], absent_counts))
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    return float(low), float(high)


def image_scores(counts: Counts, value: int, classes: int) -> dict[str, float]:
    """mIoU of each image by itself, over the classes that it shows or is said to show."""
    rows = by_image(counts, value, classes, counts.images)
    return {
        image: float(np.nanmean(iou(rows[[i]].toarray().reshape(classes, classes))))
        for i, image in enumerate(counts.images)
    }


def as_tensor(mask: np.ndarray) -> Int[Tensor, "H W"]:
    """A mask of label indices as int64, in which they can be counted."""
    return torch.from_numpy(mask.astype(np.int64))
