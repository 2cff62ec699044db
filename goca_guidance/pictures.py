"""What people look at: overlays with a legend, strips of regions over steps and frames, animated regions and guidance maps.

All of it shows itself in a notebook.
"""

import io
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from goca_guidance.files import inline, replacing
from goca_guidance.method.records import Regions
from goca_guidance.schema import FILLED, Count, between, checked


PANEL = 3.2  # inches of one panel
DPI = 110
LARGEST = 1000  # pixels on the longer side of a panel


class Drawing(Figure):
    """A figure that shows itself in a notebook, without pyplot."""

    def _repr_png_(self) -> bytes:
        drawn = io.BytesIO()
        self.savefig(drawn, format="png")
        return drawn.getvalue()


class Animation(list[Image.Image]):
    """Frames that play in a notebook."""

    def _repr_html_(self) -> str:
        return inline(_gif(self), "gif")


def colour(index: int) -> tuple[float, float, float]:
    """A colour for each class, distinct for the first twenty."""
    strong, pale = divmod(index % 20, 10)[::-1]
    return colormaps["tab20"](2 * strong + pale)[:3]


@checked
def overlay(
    image: Image.Image, labels: Sequence[Int[Tensor, "_ _"]], classes: Sequence[str], titles: Sequence[str] = ("",)
) -> Drawing:
    """The image, and beside it each label map painted over it, with a legend of the classes that occur.

    `labels`: H W index into `classes`, at any size; `titles`: one for each label map. A large image is drawn smaller.
    """
    image = fitted(image, LARGEST)
    panel = max(PANEL, max(image.size) / DPI) / max(image.size)
    figure, axes = _panels(1, 1 + len(labels), legend=True, panel=panel * image.width, height=panel * image.height)
    axes[0].imshow(np.asarray(image))
    axes[0].set_title("image", fontsize=9)
    for axis, label_map, title in zip(axes[1:], labels, titles, strict=True):
        axis.imshow(np.asarray(painted(image, label_map)))
        axis.set_title(title, fontsize=9)
    present = sorted({int(i) for label_map in labels for i in label_map.unique()})
    _legend(figure, [(classes[i], colour(i)) for i in present])
    return figure


@checked
def painted(
    image: Image.Image, label_map: Int[Tensor, "_ _"], strength: Annotated[float, between(0, 1)] = 0.6
) -> Image.Image:
    """The image under the colours of a label map of any size."""
    paint = index_image(label_map).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, paint.convert("RGB"), strength)


@checked
def region_strip(regions: Annotated[Sequence[Regions], FILLED], sample: int = 0, columns: Count = 8) -> Drawing:
    """Regions of one image over its guided steps, evenly chosen; what is not foreground is pale.

    Of a video a film strip for each of these steps: frames, evenly chosen too, side by side.
    """
    drawn = [(f"step {step + 1}", painted_regions(regions[step], sample)) for step in _chosen(len(regions), columns)]
    rows, (*frames, height, width) = 1, regions[0].masks.shape[2:]
    if frames:
        rows, shown = len(drawn), _chosen(frames[0], columns)
        steps = [f"{step}, " if rows > 1 else "" for step, _ in drawn]
        drawn = [(f"{s}frame {n + 1}", video[n]) for s, (_, video) in zip(steps, drawn, strict=True) for n in shown]
    figure, axes = _panels(rows, len(drawn) // rows, legend=True, panel=1.5, height=1.5 * min(1, height / width))
    for axis, (title, picture) in zip(axes, drawn, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8)
    _legend(figure, [(name, colour(i)) for i, name in enumerate(regions[0].labels[sample])])
    return figure


def _chosen(count, most):
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


@checked
def painted_regions(regions: Regions, sample: int = 0) -> np.ndarray:
    """Regions of one image or video in colours, *S 3 in [0, 1]; what is not foreground is pale."""
    paint = np.array([colour(i) for i in range(len(regions.labels[sample]))])[as_labels(regions, sample).numpy()]
    shade = np.where(regions.foreground[sample, 0].numpy(), 1.0, 0.45)[..., None]
    return 1 - shade * (1 - paint)


@checked
def region_frames(regions: Regions, sample: int = 0) -> Animation:
    """A video's regions as an animation (`save` to a GIF), with a legend; what is not foreground is pale."""
    painted, names = painted_regions(regions, sample), regions.labels[sample]
    if painted.ndim != 4:
        raise ValueError(
            f"Expected regions of a video, but got masks of shape {tuple(regions.masks.shape)}: draw a strip."
        )
    frames = []
    for number, picture in enumerate(painted):
        width = 1.5 * PANEL
        figure, (axis,) = _panels(1, 1, legend=True, panel=width, height=width * picture.shape[0] / picture.shape[1])
        axis.imshow(picture)
        axis.set_title(f"regions, frame {number + 1} of {len(painted)}", fontsize=9)
        _legend(figure, [(name, colour(i)) for i, name in enumerate(names)], columns=4)
        frames.append(_drawn(figure))
    return Animation(frames)


@checked
def guidance_frames(maps: Float[Tensor, "steps H W"], along: str = "step") -> Animation:
    """One frame a guided step: guidance scale times rate, one colour scale for all steps.

    `along`: what the first axis is, where it is not steps: the frames of a video.
    """
    low, high, frames = maps.min().item(), maps.max().item(), []
    for number, values in enumerate(maps):
        figure, (axis,) = _panels(1, 1, panel=PANEL * 1.3, height=PANEL - 0.25)
        shown = axis.imshow(values, vmin=low, vmax=max(high, low + 1e-6), cmap="viridis")
        axis.set_title(f"guidance, {along} {number + 1} of {len(maps)}", fontsize=9)
        figure.colorbar(shown, ax=axis, shrink=0.85)
        frames.append(_drawn(figure))
    return Animation(frames)


def _drawn(figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


@checked
def comparison(images: Annotated[Sequence[Image.Image], FILLED], titles: Sequence[str]) -> Drawing:
    """Images side by side, each under its title."""
    figure, axes = _panels(1, len(images))
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(np.asarray(image), interpolation="bicubic")
        axis.set_title(title, fontsize=9)
    return figure


@checked
def map_grid(
    maps: Sequence[Float[Tensor, "k _ _"]],
    rows: Sequence[str],
    columns: Sequence[str],
    bounds: tuple[float, float] | None = None,
    most: Count = 8,
) -> Drawing:
    """Maps as a grid of pictures: a column for each of `maps`, evenly chosen if there are more than `most`, a row for each k.

    `bounds`: lowest and highest value of the colours; None takes each map's own.
    """
    shown = _chosen(len(maps), most)
    figure, axes = _panels(len(rows), len(shown), panel=PANEL / 2, height=PANEL / 2 - 0.22)
    low, high = bounds or (None, None)
    for axis, (row, column) in zip(axes, product(range(len(rows)), shown), strict=True):
        axis.imshow(maps[column][row].numpy(), vmin=low, vmax=high, cmap="viridis")
        axis.set_title(columns[column] if row == 0 else "", fontsize=7)
        if column == shown[0]:
            axis.text(
                -0.06, 0.5, rows[row], rotation=90, ha="right", va="center", transform=axis.transAxes, fontsize=8
            )
    return figure


@checked
def weights(heads: Float[Tensor, "l h"], layers: Float[Tensor, " l"], names: Sequence[str]) -> Drawing:
    """Weights of the heads of each layer as coloured numbers, and of the layers as bars."""
    height = 0.26 * len(names) + 0.8
    figure = Drawing(figsize=(2 * PANEL, height), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.imshow(heads.numpy(), cmap="viridis", aspect="auto")
    left.set_title("weight of each head in its layer", fontsize=8)
    left.set_yticks(range(len(names)), names, fontsize=6)
    left.set_xticks(range(heads.shape[1]), [str(n + 1) for n in range(heads.shape[1])], fontsize=6)
    middle = (heads.max() + heads.min()).item() / 2
    for (row, column), value in np.ndenumerate(heads.numpy()) if heads.shape[1] <= 12 else ():
        shade = "white" if value < middle else "black"
        left.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=shade)
    right.barh(range(len(names)), layers.numpy(), color=colour(0))
    right.set_title("weight of each layer", fontsize=8)
    right.tick_params(labelsize=6)
    return figure


def without_common_end(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts at their end that all of them have: "down_blocks.0.attn2" is "down_blocks.0"."""
    parts = [name.split(".")[::-1] for name in names]
    alike = [len(set(position)) == 1 for position in zip(*parts, strict=False)]
    common = [*alike, False].index(False) if len(parts) > 1 else 0
    return [".".join(each[common:][::-1]) for each in parts]


def _panels(rows, columns, legend=False, panel=PANEL, height=None):
    around = rows * 0.25 + (0.3 if legend else 0)
    size = columns * panel, rows * (height or panel) + around
    figure = Drawing(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _legend(figure, entries, columns=8):
    handles = [Patch(color=shade, label=name) for name, shade in entries]
    inches = 0.5 + 0.07 * max(len(name) for name, _ in entries)  # of one entry
    columns = max(1, min(columns, len(handles), int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


@checked
def save(picture: Figure | Image.Image | Annotated[list[Image.Image], FILLED], path: str | Path) -> Path:
    """Write a figure, an image or an animation to a temporary name, then rename: no half-written picture is left."""
    path = Path(path)
    with replacing(path) as part:
        if isinstance(picture, Figure):
            picture.savefig(part, format=path.suffix[1:])
        elif isinstance(picture, list):
            part.write_bytes(_gif(picture))
        else:
            picture.save(part, format=path.suffix[1:].upper())
    return path


def _gif(frames) -> bytes:
    last = [frames[-1]] * 4  # rest on the last step before the animation starts again
    drawn = io.BytesIO()
    frames[0].save(drawn, format="GIF", save_all=True, append_images=[*frames[1:], *last], duration=220, loop=0)
    return drawn.getvalue()


@checked
def index_image(label_map: Int[Tensor, "H W"]) -> Image.Image:
    """A label map as a palette picture: the pixel value is the index of the class, of 256 at most."""
    if (highest := int(label_map.max())) > 255:
        raise ValueError(f"Expected at most 256 classes in a palette picture, but got index {highest}: draw fewer.")
    picture = Image.fromarray(label_map.numpy().astype(np.uint8), mode="L").convert("P")
    picture.putpalette([round(255 * c) for i in range(256) for c in colour(i)])
    return picture


@checked
def fitted(image: Image.Image, most: Count) -> Image.Image:
    """A large picture at most so many pixels on its longer side, for looking at."""
    factor = most / max(image.size)
    return image if factor >= 1 else image.resize([max(1, round(factor * side)) for side in image.size])


@checked
def enlarged(image: Image.Image, least: Count = 256) -> Image.Image:
    """A small picture enlarged, for looking at."""
    factor = -(-least // min(image.size))
    return (
        image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) if factor > 1 else image
    )


@checked
def as_labels(regions: Regions, sample: int = 0) -> Int[Tensor, "*S"]:
    """The region index of each pixel."""
    return regions.masks[sample].to(torch.uint8).argmax(0)
