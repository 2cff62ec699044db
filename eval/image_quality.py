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

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState

from eval.common.files import writable, write_json
from eval.common.intervals import difference, resamples
from eval.common.processes import processes
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.common.provenance import command, commit, versions
from eval.generation.distances import FeatureSpace, Reference, read_reference
from eval.generation.metrics import METRICS, Number, tidy
from eval.generation.networks import INCEPTION_FILE, NETWORKS, PREPROCESSINGS
from eval.generation.run_folder import FinishedRun, base_of, read_run
from eval.generation.scales import by_scale


PACKAGES = ("torch", "torchmetrics", "torch-fidelity", "open-clip-torch", "pillow", "numpy", "goca-guidance")
FEW = (
    "there are fewer than ten images for each feature, so the Frechet distance is too large, the more the wider a run "
    "spreads: read the kernel distance beside it"
)
RANK = "there are no more images than features, so a covariance lacks its full rank"
UNKNOWN = "the reference's statistics do not say with which preprocessing they were made"
Numbers = dict[str, Number]  # by name


@dataclass(frozen=True)
class QualitySettings:
    """What the numbers depend on, beside the images.

    Args:
        metrics: names among `METRICS`.
        preprocessing: how an image comes to a network's size, a name among `PREPROCESSINGS`.
        inception: the file of its weights; None is the usual download.
        clip_model, clip_pretrained: a model of open_clip, and its weights, a tag or a file.
        batch: images in a forward.
    """

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
        self.metrics = {name: METRICS[name] for name in settings.metrics}
        self.spaces: dict[str, FeatureSpace] = {}
        asked = [name for name, metric in self.metrics.items() if metric.reference]
        if asked and reference is None:
            raise ValueError(f"Expected --reference for {', '.join(asked)}, but got none.")
        asked = [name for name in asked if self.metrics[name].reference == "images"]
        if asked and reference.statistics:
            names = ", ".join(asked)
            raise ValueError(f"Expected a folder of images as --reference for {names}, but got {reference.path}.")

    def space(self, network: str) -> FeatureSpace:
        """A network, and what the reference is to it."""
        if network not in self.spaces:
            backbone = NETWORKS[network](self.settings, self.state)
            self.spaces[network] = FeatureSpace(backbone, self.reference, self.state, self.settings.batch)
        return self.spaces[network]

    def collect(self, runs: Sequence[FinishedRun]) -> None:
        """All features to disk, the processes sharing the images."""
        for metric in self.metrics.values():
            real = [self.reference.items] if metric.reference and self.reference.items else []
            for items in [*(run.items for run in runs), *real]:
                self.space(metric.network).compute(items)

    def of(self, run: FinishedRun) -> tuple[Numbers, dict]:
        """The numbers of a run, and what else its row says."""
        weights, numbers, facts = resamples(len(run.items)), {}, {}
        for metric in self.metrics.values():
            space = self.space(metric.network)
            found, others = metric.of(space, run, space.features(run.items), weights)
            numbers |= zip(metric.numbers, found, strict=True)
            facts |= others
        return numbers, facts | {"warnings": self.warnings(facts)}

    def warnings(self, facts: dict) -> list[str]:
        """Why a row's numbers are not quite what their names say."""
        warnings = [space.backbone.warning for space in self.spaces.values() if space.backbone.warning]
        warnings += [RANK] if facts.get("covariance_rank_deficient") else []
        warnings += [FEW] if facts.get("images_per_feature", 10) < 10 else []
        known = self.reference.statistics if self.reference else None
        return warnings + ([UNKNOWN] if known and not known.made_with else [])


# ---- the result ------------------------------------------------------------------------------------------------------
def row_of(measurement: Measurement, run: FinishedRun, measured: tuple[Numbers, dict], base: Numbers | None) -> dict:
    """A run's row: numbers with intervals, and where there is a base their difference from it."""
    numbers, facts = measured
    spreads = {name: metric.spread for metric in measurement.metrics.values() for name in metric.numbers}
    counts = {"images": len(run.items), "failed": run.failed, "preprocessing": measurement.settings.preprocessing}
    row, noise = {"method": run.settings["method"], **run.group, **counts}, []
    for name, (value, draws) in numbers.items():
        row[name] = tidy(value)
        if spread := spreads[name]:
            row[f"{name}_interval"] = tidy(spread(value, draws))
        if spread and base is not None:
            found = difference(value, draws, *base[name], spread)
            noise.append(found["within_noise"])
            row |= {f"{name}_{key}": tidy(each) for key, each in found.items()}
    return row | facts | ({"within_noise": all(noise)} if noise else {})


def result_of(measurement: Measurement, runs: Sequence[FinishedRun]) -> dict:
    """The JSON of a measurement: how it was made, and a row for each run."""
    bases = [base_of(run, runs) for run in runs]
    found = {run.folder: measurement.of(run) for run in runs}
    chosen, real = measurement.settings, measurement.reference
    rows = [
        row_of(measurement, run, found[run.folder], found[base.folder][0] if base else None)
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
    """The networks with their weights, and what a metric says of its own."""
    facts = {"networks": [space.backbone.settings for space in measurement.spaces.values()]}
    for metric in measurement.metrics.values():
        facts |= metric.facts(measurement.space(metric.network).backbone)
    return facts


def write_statistics(measurement: Measurement, path: Path) -> None:
    """Statistics of the reference; ValueError unless metrics of one network were asked for."""
    networks = {metric.network for metric in measurement.metrics.values() if metric.reference}
    if len(networks) != 1:
        raise ValueError(
            f"Expected metrics of one network for --write-statistics, but got those of {sorted(networks)}."
        )
    measurement.space(*networks).statistics.write(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders of eval.coco30k")
    parser.add_argument("--reference", help='a folder of real images, an .npz file of statistics, or "scenes"')
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=QualitySettings.metrics)
    parser.add_argument("--preprocessing", choices=[*PREPROCESSINGS], default=QualitySettings.preprocessing)
    parser.add_argument("--inception", help=f"the file of its weights, {INCEPTION_FILE}")
    parser.add_argument("--clip-model", default=QualitySettings.clip_model, help="a model of open_clip")
    parser.add_argument(
        "--clip-pretrained", default=QualitySettings.clip_pretrained, help="its weights: a tag or a file"
    )
    parser.add_argument("--batch", type=at_least(1), default=QualitySettings.batch, help="images in a forward")
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
    for path in filter(None, (written, result)):
        writable(path)
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
    run_program(main)
