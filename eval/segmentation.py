"""mIoU of segmentation methods on a benchmark: `python -m eval.segmentation configs/segment/voc_sd15.toml`.

Over many processes: `accelerate launch --num_processes 8 -m eval.segmentation configs/segment/voc_sd15.toml`; on CPUs, where
accelerate starts a single one: `torchrun --nproc-per-node 2 -m eval.segmentation ...`.

Images are counted in chunks, each kept under runs/ as soon as it is done: a killed run goes on with those that are missing,
and any number of processes has the same result. What was measured by the same code on the same weights and settings is
read.

The result is one JSON file: a row for each method, with the settings, the versions and the commit that it was measured with.
Intersections and unions are summed over the whole set. The difference from the first method comes with a 95 % interval of a
paired bootstrap over images. Images of the best and the worst cases are drawn under runs/pictures/.
"""

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from eval.common.files import writable, write_json
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.common.tables import markdown
from eval.datasets.benchmarks import BadSample
from eval.prompts.prompt_file import write_prompts
from eval.segment.best_and_worst import draw
from eval.segment.confusion import Counts
from eval.segment.experiment import Experiment
from eval.segment.results import result_of
from eval.segment.running import SegmentationRun, measured


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("config", type=Path, help="a TOML file with the fields of eval.segment.experiment.Experiment")
    parser.add_argument("--limit", type=at_least(1), help="only the first so many images")
    parser.add_argument("--root", help="the dataset's folder, instead of the file's")
    parser.add_argument("--model", help="the model's folder or repository, instead of the file's")
    parser.add_argument("--methods", nargs="+", help="only these rows of the file")
    parser.add_argument(
        "--pictures", type=at_least(0), default=0, help="draw so many of the best and of the worst cases"
    )
    parser.add_argument(
        "--write-prompts", type=Path, help="write every image's prompts to this file, and measure nothing"
    )
    parser.add_argument("--result", type=Path, help="results/segment-CONFIG.json by default")
    args = parser.parse_args(arguments)
    changes = {name: value for name in ("limit", "root", "model") if (value := getattr(args, name)) is not None}
    result = writable(args.write_prompts or args.result or Path(f"results/segment-{args.config.stem}.json"))
    experiment = Experiment.read(args.config, **changes)
    experiment = experiment.only(args.methods) if args.methods else experiment
    run = SegmentationRun(experiment)
    if args.write_prompts:
        if run.state.is_main_process:
            write_prompts(result, prompts_of(run), run.images.classes)
        return
    found = measured(run)
    if run.state.is_main_process:
        content = result_of(experiment, run.images, found)
        write_json(result, content)
        times = [speed(row, measured_row.counts) for row, measured_row in found.items()]
        write_json(Path(f"runs/speed/{args.config.stem}.json"), {"command": content["command"], "rows": times})
        print(markdown(content["rows"]), markdown(times), sep="\n\n")
        if args.pictures:
            draw(run, found, args.pictures, Path("runs/pictures"))


def prompts_of(run: SegmentationRun) -> dict:
    """The prompts of every image that can be read."""
    found = {}
    for image_id in tqdm(run.images.ids, desc="prompts", unit="image"):
        try:
            found[image_id] = run.prompts_of(image_id, *run.images.read(image_id))
        except BadSample as error:
            tqdm.write(f"{image_id}: {error}")
    return found


def speed(name: str, counts: Counts) -> dict:
    """Images a second of one process, and where the time went; measured when the counts were, by whatever machine did."""
    spent = sum(counts.seconds.values())
    shares = {stage: f"{seconds / spent:.0%}" for stage, seconds in counts.seconds.items()}
    return {
        "method": name,
        "images": len(counts.images),
        "images_per_second": round(len(counts.images) / spent, 2),
        **shares,
    }


if __name__ == "__main__":
    run_program(main)
