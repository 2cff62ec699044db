"""How good the images of run folders are: `python -m eval.image_quality RUN [RUN ...] --reference FOLDER`.

Over many processes: `accelerate launch --num_processes 8 -m eval.image_quality RUN [RUN ...] --reference FOLDER`.

A run is a folder of `eval.coco30k`. The reference is a folder of real images, an .npz file of their statistics (`mu`,
`sigma`: pytorch-fid, clean-fid, T2IBenchmark, or --write-statistics), or "scenes": the first 5,000 scenes of
the test split, drawn.

Metrics: fid, kid, precision_recall (Inception-v3); clip_score (100 x cosine by open_clip); frechet_efficientnet_lite0 and
mmd_efficientnet_lite0 (the same formulas on another network, whose weights a package holds: they are neither FID nor KID);
caption_accuracy (share of images that show every object of their caption, and objects_shown, the share of the named
objects; by the classifier of eval.generation.classifier, for captions of Scenes). Shares are from 0 to 1.

Each metric but precision and recall has a 95 % interval. A run with a cfg run of the same captions, model and guidance scale
beside it has the difference from that, with an interval of resamples of both's ids (`eval.common.intervals`), and
`within_noise`.

The features of each image are kept under runs/features/: a killed start goes on, any number of processes has the same result.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from accelerate import PartialState

from eval.common.files import write_json
from eval.common.intervals import difference, interval, jackknife, left_out, ratio_draws, resamples
from eval.common.processes import processes, slices
from eval.common.provenance import command, commit, versions
from eval.common.tables import by_scale
from eval.generation import networks
from eval.generation.distances import (
    BLOCK,
    Reference,
    Side,
    frechet,
    frechet_draws,
    precision_recall,
    read_reference,
    statistics,
)
from eval.generation.run_folder import FinishedRun, base_of, read_run
from eval.scenes.scene import OBJECTS, scene


DISTANCES = {  # the network, and what is made of its features
    "fid": ("inception", "frechet"),
    "kid": ("inception", "kernel"),
    "precision_recall": ("inception", "neighbours"),
    "frechet_efficientnet_lite0": ("efficientnet_lite0", "frechet"),
    "mmd_efficientnet_lite0": ("efficientnet_lite0", "kernel"),
}
METRICS = (*DISTANCES, "clip_score", "caption_accuracy")
PACKAGES = ("torch", "torchmetrics", "torch-fidelity", "open-clip-torch", "pillow", "numpy", "goca-guidance")
FEW = (
    "there are fewer than ten images for each feature, so the Frechet distance is too large, the more the wider a run "
    "spreads: read the kernel distance beside it"
)
RANK = "there are no more images than features, so a covariance lacks its full rank"
UNKNOWN = "the reference's statistics do not say with which preprocessing they were made"
Measured = dict[str, tuple[float, np.ndarray]]  # a metric's value, and its value of each resample


@dataclass(frozen=True)
class QualitySettings:
    """What the numbers depend on, beside the images. `inception`: the file of its weights, None is the usual download."""

    metrics: tuple[str, ...] = ("fid", "clip_score")
    preprocessing: str = "t2ibenchmark"
    inception: str | None = None
    clip_model: str = "ViT-B-32-quickgelu"
    clip_pretrained: str | None = "openai"
    batch: int = 32

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"Expected `batch` to be at least 1, but got {self.batch}.")


# ---- measuring -------------------------------------------------------------------------------------------------------
class Measurement:
    """Runs measured against a reference, by networks that are made when they are first needed."""

    def __init__(self, settings: QualitySettings, reference: Reference | None, state: PartialState):
        self.settings, self.reference, self.state = settings, reference, state
        self.sides: dict[str, Side] = {}
        asked = [name for name in settings.metrics if name in DISTANCES]
        if asked and reference is None:
            raise ValueError(f"Expected --reference for {', '.join(asked)}, but got none.")
        asked = [name for name in asked if DISTANCES[name][1] != "frechet"]
        if asked and reference.statistics:
            names = ", ".join(asked)
            raise ValueError(f"Expected a folder of images as --reference for {names}, but got {reference.path}.")

    @cached_property
    def classifier(self):
        return networks.scenes_classifier(self.state)

    def side(self, metric: str) -> Side:
        """The network of a metric."""
        network = DISTANCES[metric][0] if metric in DISTANCES else metric
        if network not in self.sides:
            self.sides[network] = Side(self.backbone(network), self.reference, self.state, self.settings.batch)
        return self.sides[network]

    def backbone(self, network: str) -> networks.Backbone:
        settings, device = self.settings, self.state.device
        if network == "inception":
            return networks.inception(settings.inception, settings.preprocessing, device)
        if network == "efficientnet_lite0":
            return networks.efficientnet_lite0(settings.preprocessing, device)
        if network == "clip_score":
            return networks.clip(settings.clip_model, settings.clip_pretrained, device)
        return networks.shown_objects(self.classifier[0])

    def collect(self, runs: Sequence[FinishedRun]) -> None:
        """All features to disk, the processes sharing the images."""
        for metric in self.settings.metrics:
            sets = [run.items for run in runs]
            if metric in DISTANCES and self.reference.items:
                sets.append(self.reference.items)
            for items in sets:
                self.side(metric).keep(items)

    def of(self, run: FinishedRun) -> tuple[Measured, dict]:
        """The metrics of a run, and what else its row says."""
        weights, values, facts = resamples(len(run.items)), {}, {}
        for metric in self.settings.metrics:
            found, told = self.measured(metric, run, weights)
            values, facts = values | found, facts | told
        warnings = [side.backbone.warning for side in self.sides.values() if side.backbone.warning]
        warnings += [RANK] if facts.get("covariance_rank_deficient") else []
        warnings += [FEW] if facts.get("images_per_feature", 10) < 10 else []
        known = self.reference.statistics if self.reference else None
        warnings += [UNKNOWN] if known and not known.made_with else []
        return values, facts | {"warnings": warnings}

    def measured(self, metric: str, run: FinishedRun, weights: np.ndarray) -> tuple[Measured, dict]:
        side = self.side(metric)
        rows = side.features(run.items)
        if metric == "clip_score":
            return clip_score(rows, weights)
        if metric == "caption_accuracy":
            return accuracy(rows > 0, named_objects(run), weights), {}
        kind = DISTANCES[metric][1]
        if kind == "neighbours":
            shares = precision_recall(side.real, rows, side.device)
            return {}, dict(zip(("precision", "recall"), map(tidy, shares), strict=True))
        if kind == "kernel":
            value, *draws = side.kernel(rows, np.vstack([np.ones(len(rows)), weights]))
            return {metric: (value, np.array(draws))}, {}
        own = statistics(slices(rows, BLOCK))
        draws = frechet_draws(side.statistics, rows, left_out(len(rows)), side.device)
        few = own.rank_deficient or side.statistics.rank_deficient
        facts = {"covariance_rank_deficient": few, "images_per_feature": tidy(len(rows) / rows.shape[1])}
        return {metric: (frechet(side.statistics, own), draws)}, facts


def clip_score(rows: np.ndarray, weights: np.ndarray) -> tuple[Measured, dict]:
    """Mean of 100 x cosine, and how many captions were truncated."""
    scores, truncated = rows.astype(float).T
    draws = ratio_draws(scores, np.ones(len(scores)), weights)
    return {"clip_score": (scores.mean(), draws)}, {"captions_truncated": int(truncated.sum())}


def accuracy(shown: np.ndarray, named: np.ndarray, weights: np.ndarray) -> Measured:
    """Share of images that show every object of their caption, and share of the named objects; both inputs [n 16] bool."""
    hits, asked = (shown & named).sum(1), named.sum(1)
    complete, one = (hits == asked).astype(float), np.ones(len(hits))
    return {
        "caption_accuracy": (complete.mean(), ratio_draws(complete, one, weights)),
        "objects_shown": (hits.sum() / asked.sum(), ratio_draws(hits, asked, weights)),
    }


def named_objects(run: FinishedRun) -> np.ndarray:
    """Which objects each caption of Scenes names, [n 16] bool; ValueError for other captions."""
    named = np.array([names_in(item.caption) for item in run.items])
    if run.settings["captions"] != "scenes" or not named.any(1).all():
        raise ValueError(f"Expected captions of Scenes for caption_accuracy, but {run.folder} has others.")
    return named


def names_in(caption: str) -> list[bool]:
    """Which objects of Scenes a caption names."""
    return [re.search(rf"\b{name}\b", caption) is not None for name in OBJECTS]


# ---- the result ------------------------------------------------------------------------------------------------------
def row_of(run: FinishedRun, preprocessing: str, measured: tuple[Measured, dict], base: Measured | None) -> dict:
    """A run's row: metrics with intervals, and where there is a base their difference from it."""
    values, facts = measured
    counts = {"images": len(run.items), "failed": run.failed, "preprocessing": preprocessing}
    row, noise = {"method": run.settings["method"], **run.group, **counts}, []
    for name, (value, draws) in values.items():
        spread = jackknife if DISTANCES.get(name, ("", ""))[1] == "frechet" else interval
        row |= {name: tidy(value), f"{name}_interval": tidy(spread(value, draws))}
        if base is not None:
            found = difference(value, draws, *base[name], spread)
            noise.append(found["within_noise"])
            row |= {f"{name}_{key}": tidy(each) for key, each in found.items()}
    return row | facts | ({"within_noise": all(noise)} if noise else {})


def tidy(value):
    """Numbers of six digits."""
    if isinstance(value, tuple):
        return [tidy(each) for each in value]
    return value if isinstance(value, bool) else float(f"{value:.6g}")


def result_of(measurement: Measurement, runs: Sequence[FinishedRun]) -> dict:
    """The JSON of a measurement: how it was made, and a row for each run."""
    bases = [base_of(run, runs) for run in runs]
    found = {run.folder: measurement.of(run) for run in runs}
    chosen, real = measurement.settings, measurement.reference
    rows = [
        row_of(run, chosen.preprocessing, found[run.folder], found[base.folder][0] if base else None)
        for run, base in zip(runs, bases, strict=True)
    ]
    return {
        "command": command(),
        "reference": {"path": real.path, "images": real.images, "other_files": real.other_files} if real else None,
        "settings": {**asdict(chosen), **described(measurement)},
        "versions": versions(PACKAGES),
        "commit": commit(),
        "rows": rows,
    }


def table(rows: Sequence[dict]) -> str:
    """Metrics by method and guidance scale, and the warnings."""
    told = dict.fromkeys(f"Note: {warning}." for row in rows for warning in row["warnings"])
    return "\n".join([by_scale(rows), *told])


def described(measurement: Measurement) -> dict:
    """The networks with their weights, and what the classifier says of scenes themselves."""
    told = {"networks": [side.backbone.settings for side in measurement.sides.values()]}
    if "caption_accuracy" in measurement.settings.metrics:
        shown = measurement.classifier[1]
        named = np.array([names_in(scene("test", number).caption) for number in range(len(shown))])
        values = accuracy(shown, named, np.ones((1, len(shown))))
        told["of_scenes_themselves"] = {name: tidy(value) for name, (value, _) in values.items()}
    return told


def write_statistics(measurement: Measurement, path: Path) -> None:
    """Statistics of the reference; ValueError unless metrics of one network were asked for."""
    sides = {DISTANCES[name][0]: name for name in measurement.settings.metrics if name in DISTANCES}
    if len(sides) != 1:
        raise ValueError(f"Expected metrics of one network for --write-statistics, but got those of {sorted(sides)}.")
    measurement.side(*sides.values()).statistics.write(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders of eval.coco30k")
    parser.add_argument("--reference", help='a folder of real images, an .npz file of statistics, or "scenes"')
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=QualitySettings.metrics)
    parser.add_argument("--preprocessing", choices=[*networks.PREPROCESSINGS], default=QualitySettings.preprocessing)
    parser.add_argument("--inception", help=f"the file of its weights, {networks.INCEPTION_FILE}")
    parser.add_argument("--clip-model", default=QualitySettings.clip_model, help="a model of open_clip")
    parser.add_argument(
        "--clip-pretrained", default=QualitySettings.clip_pretrained, help="its weights: a tag or a file"
    )
    parser.add_argument("--batch", type=int, default=QualitySettings.batch, help="images in a forward")
    parser.add_argument("--write-statistics", type=Path, help="write the reference's statistics to this .npz file")
    parser.add_argument("--result", type=Path, help="results/quality-CAPTIONS.json by default")
    args = vars(parser.parse_args(arguments))
    others = [args.pop(name) for name in ("runs", "reference", "write_statistics", "result")]
    run(QualitySettings(**args | {"metrics": tuple(args["metrics"])}), *others)


def run(
    settings: QualitySettings,
    folders: Sequence[Path],
    reference: str | None = None,
    written: Path | None = None,
    result: Path | None = None,
) -> None:
    """Measure and write; every process computes features, one of them the rest."""
    if not folders and written is None:
        raise ValueError("Expected run folders, or --write-statistics, but got neither.")
    state, runs = processes(), [read_run(folder) for folder in folders]
    for each in runs:
        base_of(each, runs)
    measurement = Measurement(settings, read_reference(reference, state) if reference else None, state)
    measurement.collect(runs)
    if state.is_main_process and written:
        write_statistics(measurement, written)
    if state.is_main_process and runs:
        found = result_of(measurement, runs)
        write_json(result or Path(f"results/quality-{runs[0].group['captions']}.json"), found)
        print(table(found["rows"]))


if __name__ == "__main__":
    main()
