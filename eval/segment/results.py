"""Counts to the rows of a result, and what a result says of how it was made."""

import json
from dataclasses import asdict, dataclass

from eval.common.provenance import PACKAGES, command, commit, model_name, versions
from eval.datasets.benchmarks import Benchmark
from eval.segment.confusion import Counts, by_image, interval, iou, mean_iou, pixel_accuracy, total
from eval.segment.experiment import Experiment, method_of, rule_of


@dataclass(frozen=True)
class Measured:
    """Counts of a method, all values of the background's rule (None for no rule), and the index of the reported one."""

    counts: Counts
    best: int
    values: tuple[float | None, ...]


def result_of(experiment: Experiment, images: Benchmark, found: dict[str, Measured]) -> dict:
    """The JSON of an experiment: how it was made, and a row for each method."""
    base, rows = next(iter(found.values())), []
    for name, measured in found.items():
        rows.append(row_of(experiment, images, name, measured) | difference(experiment, images, measured, base))
    return {
        "command": command(),
        "experiment": experiment.conditions() | {key: getattr(experiment, key) for key in ("limit", "tune", "batch")},
        "versions": versions(PACKAGES),
        "commit": commit(),
        "rows": rows,
    }


def row_of(experiment: Experiment, images: Benchmark, name: str, measured: Measured) -> dict:
    """One method: `miou`, `pixel_accuracy` and the classes' `iou` are shares from 0 to 1."""
    counts, best, values = measured.counts, measured.best, measured.values
    matrices = total(counts, len(values), len(images.classes))
    means = mean_iou(matrices, experiment.chosen_protocol.absent_counts).round(4).tolist()
    each = dict(zip(images.classes, iou(matrices[best]).round(4).tolist(), strict=True))
    tried = dict(zip(map(str, values), means, strict=True))
    rule = {} if values == (None,) else {"value": values[best], "values": tried}
    return {
        "method": name,
        "model": model_name(experiment.model),
        "benchmark": images.name,
        "split": experiment.evaluated_split,
        "protocol": experiment.protocol,
        "prompts": experiment.prompts.get("source", "tags"),
        "images": len(counts.images),
        "miou": means[best],
        "pixel_accuracy": round(pixel_accuracy(matrices[best]), 4),
        **rule,
        "skipped": len(counts.skipped),
        "config": experiment.rows[name],
        "seed": experiment.seed,
        "effective": effective(experiment, name, images),
        "iou": {name: None if share != share else share for name, share in each.items()},
        "reasons": dict(sorted(counts.skipped.items())[:20]),
    }


def effective(experiment: Experiment, name: str, images: Benchmark) -> dict:
    """The settings that a row was measured with, its own and what it took over."""
    method = method_of(name, experiment.rows[name])
    rule = rule_of(experiment, method, images)
    settings = {
        "timestep": experiment.timestep,
        "num_noises": experiment.num_noises,
        "crf": method.crf and asdict(method.crf),
        **method.extra,
    }
    settings |= {key: value for key in ("timestep", "num_noises") if (value := getattr(method, key)) is not None}
    background = None if rule is None else {"kind": rule.kind, "merged": rule.merged}
    settings |= {"background": background, "goca": asdict(method.config)}
    return json.loads(json.dumps(settings))  # tuples are lists in the file


def difference(experiment: Experiment, images: Benchmark, measured: Measured, base: Measured) -> dict:
    """mIoU beyond the first method's, on the images that both counted, with its 95 % interval."""
    if measured is base:
        return {}
    common, count = sorted({*measured.counts.images} & {*base.counts.images}), len(images.classes)
    ours, theirs = (by_image(one.counts, one.best, count, common) for one in (measured, base))
    absent = experiment.chosen_protocol.absent_counts
    sums = [mean_iou(one.sum(0).reshape(count, count), absent) for one in (ours, theirs)]
    low, high = interval(ours, theirs, absent)
    return {"difference": round(float(sums[0] - sums[1]), 4), "interval": f"{low:+.4f} to {high:+.4f}"}
