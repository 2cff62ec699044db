"""mIoU of segmentation methods on held-out scenes: `python -m eval.segmentation configs/scenes.toml`.

Protocol: the names of a scene's own classes are given (image tags), every pixel counts, there is no void and no
threshold to choose. Intersections and unions are summed over the whole set, then IoU is averaged over classes. The
difference from the first method comes with a 95 % interval of a paired bootstrap over scenes.

A method that was measured before by the same code on the same weights, scenes and settings is read from runs/.
"""

import argparse
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix
from tqdm.auto import tqdm

from eval.report import command, fingerprint, markdown, replacing, weights_digest, write_json
from eval.scenes import CLASSES, OBJECTS, scene
from goca_guidance import TINY_SD, GoCAConfig, GoCASCFGPipeline


@dataclass(frozen=True)
class Experiment:
    """One TOML file: which scenes, which model, which methods (a `GoCAConfig` each, plus `timestep`)."""

    methods: dict[str, dict]
    split: str = "test"
    scenes: int = 200
    model: str = TINY_SD
    timestep: int | None = None
    num_noises: int = 1
    result: str = "results/segmentation-scenes.json"
    seed: int = 0

    def conditions(self) -> dict:
        """What every method of the experiment shares, the weights by their digest."""
        shared = {k: v for k, v in asdict(self).items() if k not in ("methods", "result", "model")}
        return {**shared, "weights": weights_digest(self.model)}


def confusions(pipe, experiment: Experiment, name: str, settings: dict) -> np.ndarray:
    """Confusion matrix of each scene, [scenes classes classes], rows are the truth."""
    settings = dict(settings)
    timestep = settings.pop("timestep", experiment.timestep)
    config, found = from_mapping(GoCAConfig, settings), []
    for index in tqdm(range(experiment.scenes), desc=name):
        drawn = scene(experiment.split, index)
        segmentation = pipe.segment(
            drawn.image,
            drawn.names,
            timestep=timestep,
            num_noises=experiment.num_noises,
            generator=torch.Generator().manual_seed(experiment.seed + index),
            goca=config,
        )
        classes = torch.tensor([CLASSES.index(n) for n in segmentation.classes])
        prediction, truth = classes[segmentation.label_maps[0]], torch.from_numpy(drawn.mask).long()
        found.append(multiclass_confusion_matrix(prediction, truth, num_classes=len(CLASSES)).numpy())
    return np.stack(found)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, in percent; NaN for a class that neither truth nor prediction has."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    union = confusion.sum(-1) + confusion.sum(-2) - hit
    return np.divide(100 * hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def interval(ours: np.ndarray, base: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of mIoU(ours) - mIoU(base), resampling scenes in pairs."""
    rng, differences = np.random.default_rng(seed), []
    for _ in range(draws):
        times = np.bincount(rng.integers(len(ours), size=len(ours)), minlength=len(ours))
        sums = [np.tensordot(times, c, axes=1) for c in (ours, base)]
        differences.append(np.nanmean(iou(sums[0])) - np.nanmean(iou(sums[1])))
    return tuple(np.percentile(differences, [2.5, 97.5]).round(2).tolist())


def run(experiment: Experiment, cache: Path = Path("runs/segmentation")) -> list[dict]:
    """A table row for each method, the first one being the base of the differences."""
    pipe, rows, base = load(experiment.model), [], None
    for name, settings in experiment.methods.items():
        matrices = cached(cache, experiment, settings, partial(confusions, pipe, experiment, name, settings))
        base = matrices if base is None else base
        each = iou(matrices.sum(0))
        difference = np.nanmean(each) - np.nanmean(iou(base.sum(0)))
        low, high = interval(matrices, base)
        rows.append(
            {
                "method": name,
                "mIoU": round(float(np.nanmean(each)), 2),
                "mIoU objects": round(float(np.nanmean(each[: len(OBJECTS)])), 2),
                "difference": round(float(difference), 2),
                "95 % interval": f"{low:+.2f} to {high:+.2f}",
                "settings": settings,
            }
        )
    return rows


def cached(folder: Path, experiment: Experiment, settings: dict, compute) -> np.ndarray:
    """Confusions of one method, from disk where the same thing was measured before by the same code."""
    path = folder / f"{fingerprint(**experiment.conditions(), settings=settings)}.npy"
    if not path.exists():
        matrices = compute()
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, matrices)
    return np.load(path)


def load(model: str) -> GoCASCFGPipeline:
    """The pipeline on the accelerator, if there is one, and silent."""
    pipe = GoCASCFGPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def from_mapping(cls, values: dict):
    """A dataclass from a table of a TOML file; an unknown key is an error that lists the known ones."""
    known = {field.name for field in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"Expected keys of {cls.__name__} among {sorted(known)}, but got {unknown}.")
    return cls(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a TOML file with the fields of Experiment")
    parser.add_argument("--scenes", type=int, help="how many scenes, instead of the file's number")
    parser.add_argument("--methods", nargs="+", help="only these methods of the file")
    parser.add_argument("--result", help="where the JSON goes, instead of the file's place")
    args = parser.parse_args()
    experiment = from_mapping(Experiment, tomllib.loads(args.config.read_text()))
    changes = {name: value for name in ("scenes", "result") if (value := getattr(args, name)) is not None}
    if args.methods:
        changes["methods"] = {name: experiment.methods[name] for name in args.methods}
    experiment = replace(experiment, **changes)
    rows = run(experiment)
    result = {"command": command(), "experiment": experiment.conditions(), "rows": rows}
    write_json(Path(experiment.result), result)
    print(markdown(rows))


if __name__ == "__main__":
    main()
