"""Pairs of images with what guided them: `python -m eval.contact_sheet RUN RUN [RUN ...]`.

The runs (folders of `eval.coco30k`) share captions, model and guidance scale; one is of method goca. The upper half of the
sheet is spread evenly over the ids, so nobody chose it; the lower half is where goca differs most from the first run. The
batches of goca with these images are made again, to see their regions and guidance maps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from eval.common.configs import from_mapping, inside
from eval.common.files import writable
from eval.common.plots import write
from eval.common.processes import processes
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.generation.generator import GenerationSettings, Generator, batches
from eval.generation.painting import paint_regions
from eval.generation.run_folder import FinishedRun, Item, check_pair, read_run
from goca_guidance import Regions


MOMENTS = {"first": 0.0, "middle": 0.5, "last": 1.0}  # of the guided steps, whose maps are shown
COMPARED = 2000  # pairs, evenly spread, among which the farthest are found


@dataclass(frozen=True)
class Look:
    """An image that was made again, to see what guided it.

    Args:
        sample: its place in the batch.
        regions: the last step's, of the batch.
        maps: guidance maps of `MOMENTS`.
        equal: whether the image came out as it was.
    """

    sample: int
    regions: Regions
    maps: Float[Tensor, "moments H W"]
    equal: bool


def chosen(base: FinishedRun, goca: FinishedRun, count: int) -> list[Item]:
    """`count` images of goca: half spread evenly over the ids, half those whose pixels are farthest from the base's."""
    spread = [goca.items[i] for i in np.linspace(0, len(goca.items) - 1, -(-count // 2)).round().astype(int)]
    pairs = zip(goca.items, base.items, strict=True)
    rest = [(one, other) for one, other in pairs if one not in spread]
    rest = rest[:: max(1, math.ceil(len(rest) / COMPARED))]
    shift = [np.abs(pixels(one) - pixels(other)).mean() for one, other in tqdm(rest, desc="compare", leave=False)]
    farthest = np.argsort(shift, kind="stable")[::-1][: count - len(spread)]
    return list(dict.fromkeys([*spread, *(rest[i][0] for i in farthest)]))


def pixels(item: Item) -> np.ndarray:
    return np.asarray(item.read(), np.float32)


def looks(run: FinishedRun, items: Sequence[Item]) -> dict[str, Look]:
    """What guided the images, by id; ValueError if the captions are no longer those of the run."""
    known = {k: v for k, v in run.settings.items() if k in GenerationSettings.__dataclass_fields__}
    with inside(run.folder / "settings.json"):
        settings = from_mapping(GenerationSettings, known)
    wanted, found = {item.id: item for item in items}, {}
    texts = settings.texts()
    if any(run.settings.get(name) != value for name, value in settings.described(texts).items()):
        raise ValueError(
            f"Expected the model and the captions that {run.folder} was made with, but they have changed."
        )
    generator = Generator(settings, processes().device)
    asked = [batch for batch in batches(texts, settings.batch) if wanted.keys() & {*batch}]
    for batch in tqdm(asked, desc="goca again", unit="batch"):
        output = generator.call({name: texts[name] for name in batch}, output_regions=True)
        steps = [round(moment * (len(output.regions) - 1)) for moment in MOMENTS.values()]
        for sample, name in enumerate(batch):
            if name in wanted:
                (image,) = generator.pipe.image_processor.numpy_to_pil(output.images[sample : sample + 1])
                same = np.array_equal(np.asarray(image, np.float32), pixels(wanted[name]))
                found[name] = Look(sample, output.regions[-1], output.guidance_maps[steps, sample, 0], same)
    return found


# ---- the sheet -------------------------------------------------------------------------------------------------------
def sheet(runs: Sequence[FinishedRun], goca: FinishedRun, items: Sequence[Item], found: dict[str, Look]) -> Figure:
    """A row for each image: its caption, every run's image, the regions of the last step, the guidance maps."""
    scale, all_maps = goca.settings["guidance_scale"], torch.stack([found[item.id].maps for item in items])
    low, high = all_maps.min().item(), all_maps.max().item()
    norm = TwoSlopeNorm(scale, min(low, scale - 0.01), max(high, scale + 0.01))
    columns = [run.settings["method"] for run in runs] + [
        "regions, last",
        *(f"guidance, {moment}" for moment in MOMENTS),
    ]
    figure = Figure(figsize=(1.5 * len(columns) + 2.5, 1.5 * len(items) + 0.3), layout="constrained")
    grid = figure.subplots(len(items), len(columns) + 1, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, name in zip(grid[0, 1:], columns, strict=True):
        axis.set_title(name, fontsize=9)
    by_id = [{item.id: item for item in run.items} for run in runs]
    for (words, *axes), item in zip(grid, items, strict=True):
        look = found[item.id]
        words.text(0, 0.5, fill(f"{item.caption} ({item.id})", 20), va="center", fontsize=8)
        for axis, images in zip(axes, by_id, strict=False):
            axis.imshow(images[item.id].read())
        paint_regions(axes[len(runs)], look.regions, look.sample)
        for axis, values in zip(axes[len(runs) + 1 :], look.maps, strict=True):
            shown = axis.imshow(values, norm=norm, cmap="coolwarm")
    bar = figure.colorbar(shown, ax=grid[:, -1], shrink=0.5)
    bar.set_label(f"guidance scale times rate; white is {scale:g}, plain guidance", fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one of them of method goca")
    parser.add_argument("--count", type=at_least(2), default=8, help="images")
    parser.add_argument("--out", type=Path, default=Path("docs/pairs.png"))
    args = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in args.runs]
    gocas = [run for run in runs if run.settings["method"] == "goca"]
    if len(gocas) != 1 or len(runs) < 2:
        made = [run.settings["method"] for run in runs]
        raise ValueError(f"Expected two runs or more, one of them of method goca, but got runs of {made}.")
    writable(args.out)
    for run in runs[1:]:
        check_pair(run, runs[0])
    items = chosen(next(run for run in runs if run is not gocas[0]), gocas[0], args.count)
    found = looks(gocas[0], items)
    write(sheet(runs, gocas[0], items, found), args.out)
    changed = [name for name, look in found.items() if not look.equal]
    note = f"; made again, {', '.join(changed)} came out different: another device or version?" if changed else ""
    print(f"wrote {args.out}{note}")


if __name__ == "__main__":
    run_program(main)
