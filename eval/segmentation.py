"""mIoU of segmentation methods on a benchmark: `python -m eval.segmentation configs/segment/voc_sd15.toml`.

Over many processes: `accelerate launch --num_processes 8 -m eval.segmentation configs/segment/voc_sd15.toml`.

Images are counted in chunks, each kept under runs/ as soon as it is done: a killed run goes on with those that are missing,
and any number of processes has the same result. What was measured by the same code on the same weights and settings is
read.

The result is one JSON file: a row for each method, with the settings, the versions and the commit that it was measured with.
Intersections and unions are summed over the whole set. The difference from the first method comes with a 95 % interval of a
paired bootstrap over images. Images of the best and the worst cases are drawn under runs/pictures/.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from eval.benchmarks import present
from eval.cases import draw
from eval.counting import mean_iou, total
from eval.experiment import Experiment, images_of, method_of, rule_of
from eval.prompts import write_prompts
from eval.report import markdown, write_json
from eval.rows import Measured, result_of
from eval.running import Run


def measured(experiment: Experiment) -> dict[str, Measured]:
    """What each row measured."""
    run, found = Run(experiment), {}
    judge = run.on_training_images() if experiment.tune and not experiment.counted.best_value else run
    for name, settings in experiment.rows.items():
        rule = rule_of(experiment, method_of(name, settings), run.images)
        values = rule.values if rule else (None,)
        counts = run.counts(name)
        if not counts.images:
            raise ValueError(
                f"Expected images that {name} can be measured on, but all were skipped: {counts.skipped}."
            )
        judged = counts if judge is run or len(values) == 1 else judge.counts(name)
        matrices = total(judged, len(values), len(run.images.classes))
        best = int(np.argmax(mean_iou(matrices, experiment.counted.absent_counts)))
        found[name] = Measured(counts, best, values)
    return found


def run(experiment: Experiment) -> dict:
    """The result of an experiment, as its JSON file holds it."""
    return result_of(experiment, images_of(experiment), measured(experiment))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a TOML file with the fields of eval.experiment.Experiment")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--root", help="the dataset's folder, instead of the file's")
    parser.add_argument("--model", help="the model's folder or repository, instead of the file's")
    parser.add_argument("--methods", nargs="+", help="only these rows of the file")
    parser.add_argument("--pictures", type=int, default=0, help="draw so many of the best and of the worst cases")
    parser.add_argument(
        "--write-prompts", type=Path, help="write every image's prompts to this file, and measure nothing"
    )
    parser.add_argument("--result", type=Path, help="results/segment-CONFIG.json by default")
    args = parser.parse_args(arguments)
    changes = {name: value for name in ("limit", "root", "model") if (value := getattr(args, name)) is not None}
    experiment = Experiment.read(args.config, **changes)
    experiment = experiment.only(args.methods) if args.methods else experiment
    if args.write_prompts:
        write_prompts(args.write_prompts, prompts_of(Run(experiment)))
        return
    found, own = measured(experiment), Run(experiment)
    if own.state.is_main_process:
        result = result_of(experiment, own.images, found)
        write_json(args.result or Path(f"results/segment-{args.config.stem}.json"), result)
        print(markdown(result["rows"]))
        _print_speed(found)
        if args.pictures:
            draw(own, found, args.pictures, Path("runs/pictures"))


def prompts_of(run: Run) -> dict:
    """The prompts of every image that can be read."""
    found = {}
    for name in tqdm(run.images.ids, desc="prompts", unit="image"):
        image, mask = run.images.read(name)
        found[name] = run.prompts(name, image, tuple(c for c in present(mask) if c != run.background))
    return found


def _print_speed(found) -> None:
    """Images a second of one process, and where the time goes; measured when the counts were, by whatever machine did."""
    for name, counts in ((name, one.counts) for name, one in found.items()):
        spent = sum(counts.seconds.values())
        shares = ", ".join(f"{stage} {seconds / spent:.0%}" for stage, seconds in counts.seconds.items())
        print(f"{name}: {len(counts.images) / spent:.2f} images/s ({shares})" if spent else name)


if __name__ == "__main__":
    main()
