"""Pictures of results: how a step's cost grows, what guidance trades over its scale; pictures stacked."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from eval.common.files import replacing


DISTANCES = ("fid", "kid", "frechet_efficientnet_lite0", "mmd_efficientnet_lite0")


AGREEMENTS = ("clip_score", "caption_accuracy")


def growth(rows: Sequence[dict], path: Path) -> None:
    """How a step's time grows with the picture and with the batch: stock and guided, and their ratio."""
    frame = pd.DataFrame(rows).query("options == '' and family != 'tiny-sd'")
    figure = Figure(figsize=(10, 4), layout="constrained")
    time, ratio = figure.subplots(1, 2)
    for number, (family, group) in enumerate(frame.groupby("family", sort=False)):
        group = group.assign(pixels=group["size"] ** 2 * group["batch"] / 1e6).sort_values("pixels")
        time.plot(group["pixels"], group["stock_ms"] / 1000, "o--", color=f"C{number}", mfc="white")
        time.plot(group["pixels"], group["guided_ms"] / 1000, "o-", color=f"C{number}", label=family)
        ratio.plot(group["pixels"], group["time_ratio"], "o-", color=f"C{number}")
        ratio.plot(group["pixels"], group["memory_ratio"], "s:", color=f"C{number}", mfc="white")
    time.set(xscale="log", yscale="log", ylabel="seconds a step (dashed: stock)")
    ratio.set(xscale="log", ylabel="guided / stock (dotted: peak memory)")
    for axes in (time, ratio):
        axes.set_xlabel("megapixels in a batch")
        axes.grid(alpha=0.3)
    time.legend(frameon=False)
    figure.suptitle(rows[0]["device"])
    write(figure, path)


def trade_off(rows: Sequence[dict], path: Path) -> None:
    """Distance from the reference against agreement with the caption, a curve over guidance scale for each method.

    A panel for each model, distance and agreement in the rows of `eval.image_quality`; lower right is better. Bars are 95 %
    intervals of each number alone: paired differences are much surer.
    """
    frame = pd.DataFrame(rows).sort_values("guidance_scale")
    panels = [
        (model, agreement, distance, part)
        for model, part in frame.groupby("model", sort=False)
        for agreement in AGREEMENTS
        for distance in DISTANCES
        if {agreement, distance} <= set(part.dropna(axis=1, how="all").columns)
    ]
    if not panels:
        return
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    (row,) = figure.subplots(1, len(panels), squeeze=False)
    for axes, (model, agreement, distance, part) in zip(row, panels, strict=True):
        for number, (method, group) in enumerate(part.groupby("method", sort=False)):
            curve(axes, group, agreement, distance, method, f"C{number}")
        axes.set(xlabel=f"{agreement} (higher is better)", ylabel=f"{distance} (lower is better)", title=model)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    write(figure, path)


def curve(axes: Axes, group: pd.DataFrame, x: str, y: str, method: str, colour: str) -> None:
    """One method: its points by guidance scale, with the interval of each number."""
    group = group.dropna(subset=[x, y])
    for name, other, draw in ((x, y, axes.hlines), (y, x, axes.vlines)):
        ends = zip(*group[f"{name}_interval"], strict=True)
        draw(group[other], *ends, color=colour, alpha=0.3)
    axes.plot(group[x], group[y], "o-", color=colour, label=method)
    for point in group.to_dict("records"):
        axes.annotate(
            f"{point['guidance_scale']:g}", (point[x], point[y]), (5, 4), textcoords="offset points", fontsize=8
        )


def write(figure: Figure, path: Path) -> None:
    """As a PNG file, whole or not at all."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def stack(pictures: Sequence[Image.Image], width: int = 1000) -> Image.Image:
    """Pictures one above the other on white, each as wide as the page."""
    scaled = [p.convert("RGB").resize((width, round(p.height * width / p.width)), Image.LANCZOS) for p in pictures]
    page, top = Image.new("RGB", (width, sum(p.height for p in scaled)), "white"), 0
    for picture in scaled:
        page.paste(picture, (0, top))
        top += picture.height
    return page
