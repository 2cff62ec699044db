"""Runs that are a pair, and what a difference between them is worth: resamples of the ids that both share.

An id is drawn, or left out, for both runs at once, so what makes one caption easier than another falls out of the
difference. The reference is held fixed: an interval says how a number varies with the captions and their noise.

Means and kernel distances have a bootstrap. A Frechet distance has a jackknife that leaves out one group of ids at a time: a
bootstrap sample has 63 % of the different images only, and where there are few images for each feature its spread is up to
three times too wide. No interval mends the bias of a Frechet distance: fewer images make it larger, the more so the wider
they spread, so a part of a difference between two runs may be of their spread. The kernel distance has no such bias.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from eval.features import Item, visible
from eval.files import some
from eval.provenance import model_name


DRAWS = 1000
GROUPS = 40  # of ids that the jackknife leaves out
COCO30K = "MS-COCO_val2014_30k_captions"
Spread = Callable[[float, np.ndarray], tuple[float, float]]
UNPAIRED = {"method", "model", "captions", "batch"}  # a pair may differ in these; digests stand for the paths


# ---- resamples -------------------------------------------------------------------------------------------------------
def resamples(images: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each image is in each resample, [draws n]; the same for all runs of as many images."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), draws).astype(float)


def ratio_draws(above: np.ndarray, below: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum(above) / sum(below) over images, of each resample; a mean where `below` is one."""
    return (weights @ above) / (weights @ below)


def left_out(images: int, seed: int = 0) -> np.ndarray:
    """Which images count when a group is left out, [groups n] of 0 and 1; the same for all runs of as many images."""
    if images < 3:
        raise ValueError(f"Expected at least three images for an interval of a Frechet distance, but got {images}.")
    groups = np.random.default_rng(seed).permutation(images) % min(GROUPS, images)
    return (groups != np.arange(min(GROUPS, images))[:, None]).astype(float)


def jackknife(value: float, draws: np.ndarray) -> tuple[float, float]:
    """95 % interval from the values with a group left out (Efron, The Jackknife, 1982, section 2.2)."""
    error = ((len(draws) - 1) * draws.var()) ** 0.5
    return float(value - 1.96 * error), float(value + 1.96 * error)


def interval(value: float, draws: np.ndarray) -> tuple[float, float]:
    """95 % interval of a bootstrap: the percentiles of the draws about their mean, laid around the value."""
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])
    return float(value + low), float(value + high)


def difference(
    value: float, draws: np.ndarray, base: float, base_draws: np.ndarray, spread: Spread = interval
) -> dict:
    """A run's value beyond the base's with its 95 % interval, and whether zero lies in it; the draws are paired."""
    low, high = spread(value - base, draws - base_draws)
    return {"difference": value - base, "difference_interval": (low, high), "within_noise": bool(low <= 0 <= high)}


# ---- runs ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """A run folder of `eval.coco30k`: its settings, its images sorted by id, and how many failed."""

    folder: Path
    settings: dict
    items: tuple[Item, ...]
    failed: int

    @property
    def group(self) -> dict:
        """What a pair shares."""
        source = Path(self.settings["captions"]).stem
        return {
            "model": model_name(self.settings["model"]),
            "captions": "coco30k" if source == COCO30K else source,
            "guidance_scale": self.settings["guidance_scale"],
        }


def read_run(folder: Path) -> Run:
    """ValueError for a folder that is no run, or whose manifest and images do not agree."""
    if lacking := [name for name in ("settings.json", "manifest.csv") if not (folder / name).is_file()]:
        names = " and no ".join(lacking)
        raise ValueError(f"Expected a run folder of eval.coco30k, but {folder} has no {names}: finish its generation.")
    told = json.loads((folder / "settings.json").read_text())
    settings = told.get("settings", {}) | {"versions": told.get("versions")}
    refuse(
        folder, "settings of eval.coco30k; these lack", {"method", "model", "captions", "guidance_scale"} - {*settings}
    )
    table, failed = (read_table(folder / name) for name in ("manifest.csv", "failed.csv"))
    refuse(folder, "the columns of manifest.csv; these lack", {"id", "caption", "file", "sha256"} - {*table.columns})
    refuse(folder, "each id once in manifest.csv; these stand twice", {*table["id"][table["id"].duplicated()]})
    if table.empty:
        raise ValueError(
            f"Expected images in the run {folder}, but its manifest is empty: start its generation again."
        )
    items = [Item(row.id, folder / row.file, row.caption, row.sha256) for row in table.itertuples()]
    listed, found = {item.path for item in items}, {*visible(folder / "images")}
    names = {path.name for path in listed - found}
    refuse(folder, "every image of its manifest (start its generation again); these lack", names)
    names = {path.name for path in found - listed}
    refuse(folder, "only images of its manifest (move others away, or start its generation again); found", names)
    return Run(folder, settings, tuple(sorted(items, key=lambda item: item.id)), len(failed))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file of texts as they stand, or no rows where there is no file."""
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame()


def refuse(folder: Path, expected: str, mistakes: Collection[str]) -> None:
    """ValueError that names some of the mistakes, if there are any."""
    if mistakes:
        raise ValueError(f"Expected of {folder} {expected}: {some(sorted(mistakes))}.")


def base_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The cfg run of the same captions, model and scale, None for such a run itself; ValueError if they are no pair."""
    bases = [each for each in runs if each.settings["method"] == "cfg" and each.group == run.group]
    if len(bases) > 1:
        folders = ", ".join(str(each.folder) for each in bases)
        raise ValueError(f"Expected one cfg run of {run.group}, but got {len(bases)}: {folders}.")
    if not bases or bases[0] is run:
        return None
    check_pair(run, bases[0])
    return bases[0]


def check_pair(run: Run, base: Run) -> None:
    """ValueError unless both were made from the same captions and noise, with the same settings but for the method."""
    names = {*run.settings, *base.settings} - UNPAIRED
    differing = {name for name in names if run.settings.get(name) != base.settings.get(name)}
    refuse(run.folder, f"the settings of {base.folder}, its pair, but for the method; these differ", differing)
    ours, theirs = ({(item.id, item.caption) for item in each.items} for each in (run, base))
    refuse(
        run.folder,
        f"the ids and captions of {base.folder}, its pair; only in one",
        {name for name, _ in ours ^ theirs},
    )
