"""Methods over guidance scales, from the rows of `eval.image_quality`: a table, and what guidance trades."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.common.plots import write
from eval.common.tables import markdown
from eval.generation.metrics import METRICS


def by_scale(rows: Sequence[dict], numbers: Sequence[str] = ()) -> str:
    """A table: a row for each number and method, a column for each guidance scale.

    A cell has the value with its 95 % interval; below, the paired difference from cfg, and whether it is within noise. All
    numbers of the rows, or some.
    """
    metrics = sorted(METRICS.values(), key=lambda metric: metric.spread is None)  # those without an interval last
    known = [name for metric in metrics for name in metric.numbers if any(name in row for row in rows)]
    others = [name for row in rows for name in row if f"{name}_interval" in row and not name.endswith("_difference")]
    known = list(dict.fromkeys([*known, *others]))  # of a metric that is registered no more
    places = ["metric", *(["model"] if len({row["model"] for row in rows}) > 1 else []), "method"]
    lines: dict[tuple, dict[str, str]] = {}
    for number in numbers or known:
        for row in rows:
            place = {name: {"metric": number, **row}[name] for name in places}
            line = lines.setdefault(tuple(place.values()), place)
            line[f"scale {row['guidance_scale']:g}"] = cell(row, number) if number in row else ""
    scales = [f"scale {scale:g}" for scale in sorted({row["guidance_scale"] for row in rows})]
    return markdown([*lines.values()], [*places, *scales])


def cell(row: dict, number: str) -> str:
    """A number of a row, as `by_scale` shows it."""
    parts = [f"{row[number]:.4g}"]
    if f"{number}_interval" in row:
        parts[0] += " ({:.4g} to {:.4g})".format(*row[f"{number}_interval"])
    if f"{number}_difference" in row:
        gap = "{:+.3g} ({:+.3g} to {:+.3g})".format(row[f"{number}_difference"], *row[f"{number}_difference_interval"])
        parts.append(gap + (", within noise" if row[f"{number}_within_noise"] else ""))
    return "<br>".join(parts)


def trade_off(rows: Sequence[dict], path: Path) -> None:
    """Distance from the reference against agreement with the caption, a curve over guidance scale for each method.

    A panel for each model, and each pair of metrics in the rows of which lower and higher is better: lower right is better.
    Bars are 95 % intervals of each number alone: paired differences are much surer.
    """
    frame = pd.DataFrame(rows).sort_values("guidance_scale")
    metrics = [metric for metric in METRICS.values() if metric.spread]
    panels = [
        (model, agreement, distance, part)
        for model, part in frame.groupby("model", sort=False)
        for agreement in (metric.numbers[0] for metric in metrics if metric.higher_is_better)
        for distance in (metric.numbers[0] for metric in metrics if not metric.higher_is_better)
        if {agreement, distance} <= set(part.dropna(axis=1, how="all").columns)
    ]
    if not panels:
        return
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    (row,) = figure.subplots(1, len(panels), squeeze=False)
    for axes, (model, agreement, distance, part) in zip(row, panels, strict=True):
        for index, (method, group) in enumerate(part.groupby("method", sort=False)):
            curve(axes, group, agreement, distance, method, f"C{index}")
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
