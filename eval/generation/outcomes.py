"""What each picture of a cell is worth, kept in one file a model: methods by guidance scales, and where pictures start."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.common.files import expecting, replacing
from eval.common.intervals import difference, interval, ratio_draws, resamples
from eval.generation.drawing import METHODS, Start
from eval.generation.metrics import Number, tidy


Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Cell:
    """A method at a guidance scale, its pictures begun from noise or from noised scenes."""

    start: Start
    method: str
    scale: float

    @property
    def name(self) -> str:
        return f"{self.start}/{self.method}/{self.scale:g}"


class Kept:
    """Arrays by name in one .npz file, which is written whole after each addition; ValueError for one of other settings."""

    def __init__(self, path: Path, settings: Mapping[str, Any] | None = None):
        self.path, self.arrays = path, {}
        if path.exists():
            with expecting("measurements", path, "remove it, and they are made again"), np.load(path) as file:
                self.arrays = {name: file[name] for name in file.files}
        if settings is None:
            return
        if self.arrays and _compared(self.settings) != _compared(settings):
            raise ValueError(
                f"Expected measurements of {_compared(settings)} in {path}, but got those of {_compared(self.settings)}: move "
                "the file away."
            )
        self.arrays["settings"] = np.array(json.dumps(settings))

    @property
    def settings(self) -> dict[str, Any]:
        """What everything in it was measured with."""
        return json.loads(str(self.arrays["settings"]))

    def add(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Keep arrays under a name, and write the file."""
        self.arrays |= {f"{name}/{key}": np.asarray(value) for key, value in arrays.items()}
        with replacing(self.path) as part, part.open("wb") as file:
            np.savez(file, **self.arrays)

    def of(self, name: str) -> dict[str, np.ndarray]:
        """The arrays under a name; none where it is not there."""
        start = f"{name}/"
        return {key.removeprefix(start): value for key, value in self.arrays.items() if key.startswith(start)}

    def cells(self) -> list[Cell]:
        """Those that were measured, in the order of the methods and scales."""
        names = {tuple(name.split("/")[:3]) for name in self.arrays if name.startswith(("noise/", "scene/"))}
        found = [Cell(start, method, float(scale)) for start, method, scale in names if method in METHODS]
        return sorted(found, key=lambda cell: (cell.start, [*METHODS].index(cell.method), cell.scale))


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "command"}


# ---- levels ----------------------------------------------------------------------------------------------------------
def _share(above: str, below: str | None = None) -> Callable[[Arrays, np.ndarray], Number]:
    def number(arrays, weights):
        value = arrays[above].astype(float)
        of = np.ones(len(value)) if below is None else arrays[below].astype(float)
        return float(value.sum() / of.sum()), ratio_draws(value, of, weights)

    return number


def _texture(arrays: Arrays, weights: np.ndarray) -> Number:
    """The geometric mean of the pictures that show enough ground: a wrong ground is very far."""
    known = ~np.isnan(arrays["texture"])
    logs = np.log(np.where(known, arrays["texture"], 1))
    with np.errstate(invalid="ignore"):  # few pictures: a resample may have none that shows ground
        return float(np.exp(logs.sum() / known.sum())), np.exp(ratio_draws(logs, known.astype(float), weights))


def _distance(arrays: Arrays, weights: np.ndarray) -> Number:
    return float(arrays["distance"][0]), arrays["distance"][1:]


LEVELS: dict[str, Callable[[Arrays, np.ndarray], Number]] = {
    "objects shown": _share("shown", "named"),
    "other objects": _share("others"),
    "ground shown": _share("ground"),
    "ground texture": _texture,
    "distance": _distance,
    "layout": _share("layout"),  # of pictures that start from a noised scene
}


# ---- rows ------------------------------------------------------------------------------------------------------------
def rows_of(kept: Kept) -> list[dict]:
    """A row for each cell and level: its value, and its difference from plain guidance.

    `difference`, `low`, `high`: from cfg at the same scale, with a 95 % interval of resamples of the captions that both share;
    the same with `_equal_mean`: from cfg at the scale that is the cell's own times its mean rate, between two measured ones.
    """
    settings, rows = kept.settings, []
    weights = resamples(settings["images"])
    numbers = {cell: {level: of(kept.of(cell.name), weights) for level, of in LEVELS.items()} for cell in kept.cells()}
    for cell, found in numbers.items():
        rate = float(kept.of(cell.name).get("mean_rate", np.ones(1)).mean())
        place = {"model": settings["model"], "checkpoint": settings["checkpoint"], "start": cell.start}
        for level, number in found.items():
            if level == "layout" and cell.start == "noise":
                continue
            low, high = interval(*number)
            row = place | {"level": level, "method": cell.method, "scale": cell.scale, "images": settings["images"]}
            row |= {"mean_rate": rate, "value": number[0], "value_low": low, "value_high": high}
            if cell.method != "cfg":
                curve = {c.scale: n[level] for c, n in numbers.items() if (c.start, c.method) == (cell.start, "cfg")}
                row |= _beside(number, at(curve, cell.scale), "")
                row |= _beside(number, at(curve, round(cell.scale * rate, 3)), "_equal_mean")
            rows.append({key: tidy(value) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def scenes_rows(kept: Kept) -> list[dict]:
    """What the judge says of the scenes themselves, as the autoencoder shows them: the best that can be had."""
    settings, arrays = kept.settings, kept.of("scenes")
    place = {"model": settings["model"], "checkpoint": settings["checkpoint"], "start": "", "method": "scenes"}
    numbers = {level: of(arrays, resamples(settings["images"])) for level, of in LEVELS.items()} if arrays else {}
    return [
        place | {"level": level, "images": settings["images"], "value": tidy(value), **_ends(value, draws)}
        for level, (value, draws) in numbers.items()
    ]


def _ends(value, draws) -> dict:
    low, high = interval(value, draws)
    return {"value_low": tidy(low), "value_high": tidy(high)}


def _beside(number: Number, base: Number | None, suffix: str) -> dict:
    if base is None:
        return {}
    found = difference(*number, *base)
    low, high = found["difference_interval"]
    return {f"difference{suffix}": found["difference"], f"low{suffix}": low, f"high{suffix}": high}


def at(curve: Mapping[float, Number], scale: float) -> Number | None:
    """A curve's number at a scale, on the straight line between its neighbours; None beyond its ends."""
    below, above = (
        max((s for s in curve if s <= scale), default=None),
        min((s for s in curve if s >= scale), default=None),
    )
    if below is None or above is None:
        return None
    share = 0.0 if above == below else (scale - below) / (above - below)
    (low, low_draws), (high, high_draws) = curve[below], curve[above]
    return (1 - share) * low + share * high, (1 - share) * low_draws + share * high_draws
