"""What guidance changes, to look at: pictures of the same noise under several methods, and curves over the guidance scale."""

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from eval.common.plots import write
from eval.generation.drawing import METHODS, Drawing
from eval.generation.outcomes import Cell, Kept
from eval.generation.painting import paint_regions
from goca_guidance import Regions


SCALE = 3.0  # of the pairs
PAIRED = ("cfg", "s-cfg", "goca", "goca, conditional foreground", "goca, equal mean")  # methods side by side
LOOKED_AT = "goca"  # whose regions and guidance are shown
COUNT = 8  # captions
CURVES = {  # methods of the figure by colour; equal mean is dashed
    "cfg": "black", "s-cfg": "C1", "goca": "C0", "goca, conditional foreground": "C2",
}  # fmt: skip
EQUAL = ", equal mean"
PANELS = ("objects shown", "other objects", "ground texture", "distance")


def chosen(kept: Kept, count: int) -> list[int]:
    """Half of the captions spread evenly, half those where the objects shown by goca and by cfg differ most."""
    images = kept.settings["images"]
    spread = [int(i) for i in np.linspace(0, images - 1, -(-count // 2)).round()]
    shown = [kept.of(Cell("noise", method, SCALE).name)["shown"].astype(int) for method in ("cfg", LOOKED_AT)]
    farthest = np.argsort(-np.abs(shown[1] - shown[0]), kind="stable")
    return list(dict.fromkeys([*spread, *(int(i) for i in farthest if int(i) not in spread)]))[:count]


def draw_pairs(drawing: Drawing, kept: Kept, count: int = COUNT) -> None:
    """Draw some captions by every method of `PAIRED`, and keep the pictures with what guided them at the middle step."""
    places, pictures = chosen(kept, min(count, len(drawing.captions))), []
    for method in PAIRED:
        asked = {"output_regions": True} if method == LOOKED_AT else {}
        output, _ = drawing.draw(places, METHODS[method], SCALE, **asked)
        pictures.append((output.images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        if asked:
            middle = len(output.regions) // 2
            regions, guidance = output.regions[middle], output.guidance_maps[middle, :, 0]
    told = {"captions": [drawing.captions[i] for i in places], "labels": regions.labels}
    kept.add(
        "pairs",
        {
            "pictures": torch.stack(pictures, 1),
            "regions": regions.masks.to(torch.uint8).argmax(1),
            "foreground": regions.foreground[:, 0],
            "guidance": guidance,
            "told": json.dumps(told),
        },
    )


def sheet(kept: Kept, path: Path) -> None:
    """A row for each caption: its picture by every method, then regions and guidance of `LOOKED_AT` at the middle step."""
    found = kept.of("pairs")
    told, guidance = json.loads(str(found["told"])), found["guidance"]
    regions = _regions(found, told["labels"])
    columns = [*PAIRED, "regions, middle", "guidance, middle"]
    rows, norm = (
        len(guidance),
        TwoSlopeNorm(SCALE, min(guidance.min(), SCALE - 0.01), max(guidance.max(), SCALE + 0.01)),
    )
    figure = Figure(figsize=(1.5 * len(columns) + 2.2, 1.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, len(columns) + 1, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, name in zip(grid[0, 1:], columns, strict=True):
        axis.set_title(fill(name, 18), fontsize=9)
    for sample, (words, *axes) in enumerate(grid):
        words.text(0, 0.5, fill(told["captions"][sample], 20), va="center", fontsize=8)
        for axis, picture in zip(axes, found["pictures"][sample], strict=False):
            axis.imshow(picture)
        paint_regions(axes[-2], regions, sample)
        shown = axes[-1].imshow(guidance[sample], norm=norm, cmap="coolwarm")
    bar = figure.colorbar(shown, ax=grid[:, -1], shrink=0.4)
    bar.set_label(f"guidance scale times rate; white is {SCALE:g}, plain guidance", fontsize=8)
    write(figure, path)


def _regions(found, labels) -> Regions:
    masks = F.one_hot(torch.from_numpy(found["regions"])).permute(0, 3, 1, 2).bool()
    return Regions(masks, torch.from_numpy(found["foreground"])[:, None], tuple(map(tuple, labels)))


def curves(rows: Sequence[dict], path: Path) -> None:
    """Every level of `PANELS` over the scale times the mean rate, a line for each model: where curves lie on each other, a
    method does what a larger scale does. Bands are 95 % intervals of each number alone: paired differences are much surer."""
    rows = [row for row in rows if row["start"] == "noise"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.4 * len(PANELS), 3.6 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(PANELS), squeeze=False)
    for model, line in zip(models, grid, strict=True):
        for level, axis in zip(PANELS, line, strict=True):
            part = [row for row in rows if (row["model"], row["level"]) == (model, level)]
            for method, colour in CURVES.items():
                _curve(axis, part, method, colour)
                _curve(axis, part, method + EQUAL, colour)
            axis.set(title=f"{model}: {level}", xlabel="guidance scale times mean rate", xscale="log")
            axis.set_xticks([2, 3, 5, 10], ["2", "3", "5", "10"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    grid[0, 0].legend(frameon=False, fontsize=7)
    write(figure, path)


def _curve(axis, rows, method, colour) -> None:
    points = [row for row in rows if row["method"] == method]
    points = sorted((r["scale"] * r["mean_rate"], r["value"], r["value_low"], r["value_high"]) for r in points)
    if points:
        x, value, low, high = zip(*points, strict=True)
        line = "--" if method.endswith(EQUAL) else "-"
        axis.plot(x, value, line, color=colour, label=method, marker="o", markersize=3)
        if method == "cfg":
            axis.fill_between(x, low, high, color=colour, alpha=0.12)
