"""The metrics of generated images, one object each: what `eval.image_quality` measures, and tables and plots show.

What computes is imported when it does: tables and plots need the objects alone, and start at once.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eval.common.intervals import Spread, interval, jackknife, left_out, ratio_draws
from eval.generation.run_folder import FinishedRun
from eval.scenes.scene import OBJECTS, scene


if TYPE_CHECKING:
    from eval.generation.distances import FeatureSpace
    from eval.generation.networks import Backbone


Number = tuple[float, np.ndarray | None]  # a value, and its value of each resample


@dataclass(frozen=True)
class Metric:
    """A number of a run's images, or several that are computed together.

    Args:
        numbers: their names in a result's row.
        network: of `eval.generation.networks.NETWORKS`, whose features the numbers are made of.
        of: (network and reference, run, its features [n d], weights [resamples n]) to the numbers, and what else the row says.
        spread: the numbers' values of each resample to a 95 % interval; None where there is none.
        higher_is_better: which way is up.
        reference: what it needs of the real images: "" for nothing, "statistics", or the "images" themselves.
        facts: what a result says of the network once, beside its settings.
    """

    numbers: tuple[str, ...]
    network: str
    of: Callable[["FeatureSpace", FinishedRun, np.ndarray, np.ndarray], tuple[Sequence[Number], dict]]
    spread: Spread | None
    higher_is_better: bool
    reference: str = ""
    facts: Callable[["Backbone"], dict] = lambda backbone: {}


def tidy(value):
    """Numbers of six digits."""
    if isinstance(value, tuple):
        return [tidy(each) for each in value]
    return value if isinstance(value, bool) else float(f"{value:.6g}")


def frechet_distance(space: "FeatureSpace", run: FinishedRun, rows: np.ndarray, weights: np.ndarray):
    """Squared Frechet distance from the reference, and whether images are few for it."""
    from eval.common.processes import slices
    from eval.generation.distances import BLOCK, frechet, frechet_draws, statistics

    found = statistics(slices(rows, BLOCK))
    draws = frechet_draws(space.statistics, rows, left_out(len(rows)), space.device)
    few = found.rank_deficient or space.statistics.rank_deficient
    facts = {"covariance_rank_deficient": few, "images_per_feature": tidy(len(rows) / rows.shape[1])}
    return [(frechet(space.statistics, found), draws)], facts


def kernel_distance(space: "FeatureSpace", run: FinishedRun, rows: np.ndarray, weights: np.ndarray):
    """Squared MMD from the reference."""
    value, *draws = space.kernel(rows, np.vstack([np.ones(len(rows)), weights]))
    return [(value, np.array(draws))], {}


def precision_and_recall(space: "FeatureSpace", run: FinishedRun, rows: np.ndarray, weights: np.ndarray):
    """Improved precision and recall, shares from 0 to 1."""
    from eval.generation.distances import precision_recall

    return [(share, None) for share in precision_recall(space.real, rows, space.device)], {}


def clip_score(space: "FeatureSpace", run: FinishedRun, rows: np.ndarray, weights: np.ndarray):
    """Mean of 100 x cosine, and how many captions were truncated."""
    scores, truncated = rows.astype(float).T
    draws = ratio_draws(scores, np.ones(len(scores)), weights)
    return [(scores.mean(), draws)], {"captions_truncated": int(truncated.sum())}


def caption_accuracy(space: "FeatureSpace", run: FinishedRun, rows: np.ndarray, weights: np.ndarray):
    """Share of images that show every object of their caption, and share of the named objects."""
    return accuracy(rows > 0, objects_of_captions(run), weights), {}


def accuracy(shown: np.ndarray, named: np.ndarray, weights: np.ndarray) -> list[Number]:
    """Share of images that show every named object, and share of the named objects; both inputs [n 16] bool."""
    hits, asked = (shown & named).sum(1), named.sum(1)
    complete, one = (hits == asked).astype(float), np.ones(len(hits))
    return [
        (complete.mean(), ratio_draws(complete, one, weights)),
        (hits.sum() / asked.sum(), ratio_draws(hits, asked, weights)),
    ]


def of_scenes_themselves(backbone: "Backbone") -> dict:
    """What the classifier says of held-out scenes, the pictures that the captions were written for."""
    shown = backbone.shown_in_scenes
    named = np.array([objects_named(scene("test", number).caption) for number in range(len(shown))])
    values = accuracy(shown, named, np.ones((1, len(shown))))
    names = METRICS["caption_accuracy"].numbers
    return {"of_scenes_themselves": {name: tidy(value) for name, (value, _) in zip(names, values, strict=True)}}


def objects_of_captions(run: FinishedRun) -> np.ndarray:
    """Which objects each caption of Scenes names, [n 16] bool; ValueError for other captions."""
    named = np.array([objects_named(item.caption) for item in run.items])
    if run.settings["captions"] != "scenes" or not named.any(1).all():
        raise ValueError(f"Expected captions of Scenes for caption_accuracy, but {run.folder} has others.")
    return named


def objects_named(caption: str) -> list[bool]:
    """Which objects of Scenes a caption names."""
    return [re.search(rf"\b{name}\b", caption) is not None for name in OBJECTS]


METRICS: dict[str, Metric] = {
    "fid": Metric(("fid",), "inception", frechet_distance, jackknife, False, "statistics"),
    "kid": Metric(("kid",), "inception", kernel_distance, interval, False, "images"),
    "precision_recall": Metric(("precision", "recall"), "inception", precision_and_recall, None, True, "images"),
    "frechet_efficientnet_lite0": Metric(
        ("frechet_efficientnet_lite0",), "efficientnet_lite0", frechet_distance, jackknife, False, "statistics"
    ),
    "mmd_efficientnet_lite0": Metric(
        ("mmd_efficientnet_lite0",), "efficientnet_lite0", kernel_distance, interval, False, "images"
    ),
    "clip_score": Metric(("clip_score",), "clip", clip_score, interval, True),
    "caption_accuracy": Metric(
        ("caption_accuracy", "objects_shown"), "scenes_classifier", caption_accuracy, interval, True,
        facts=of_scenes_themselves,
    ),
}  # fmt: skip
