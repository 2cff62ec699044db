"""Segmentation against generative power, from the result of `eval.proof`: tables, and a figure like the paper's first."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from eval.common.plots import write
from eval.common.tables import markdown


SHOWN = {"vanilla": "vanilla", "all": "GoCA"}  # of the methods, in the figure
POWER = "mmd_efficientnet_lite0"  # of the quality's numbers, in the figure: a loss depends on the autoencoder too


def by_level(rows: Sequence[dict], wanted: Sequence[str]) -> str:
    """A line for each level, a column for each method, of one model at the end of its training or after a share of it.

    A cell has mIoU, and its difference from vanilla with the 95 % interval. `wanted`: the model, the number ("miou", "objects"
    or "grounds"; mIoU by default), the share in percent.
    """
    model, number, share = (*wanted, *("miou", "100")[len(wanted) - 1 :])
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if (row["model"], str(row["checkpoint"])) == (model, share):
            lines.setdefault(row["level"], {"level": row["level"]})[row["method"]] = cell(row, number)
    return markdown([*lines.values()]) if lines else f"{model} was not measured."


def cell(row: dict, number: str) -> str:
    """A number of a row, as `by_level` shows it."""
    prefix = "" if number == "miou" else f"{number}_"
    if f"{prefix}difference" not in row:
        return f"{row[number]:.3f}"
    gap = "{:+.3f} ({:+.3f} to {:+.3f})".format(*(row[f"{prefix}{name}"] for name in ("difference", "low", "high")))
    return f"{row[number]:.3f}<br>{gap}"


def by_timestep(rows: Sequence[dict], wanted: Sequence[str] = ()) -> str:
    """A line for each model, a column for each timestep that was tried: mIoU of vanilla and GoCA on validation scenes."""
    lines = []
    for row in rows:
        tried = {
            f"t = {t}": "{vanilla:.3f} / {all:.3f}".format(**found) for t, found in row["tried"]["timestep"].items()
        }
        lines.append({"model": row["model"], **tried, "chosen": row["timestep"]})
    return markdown(lines)


def by_candidate(rows: Sequence[dict], wanted: Sequence[str] = ()) -> str:
    """A line for each candidate, a column for each model: how far it is from its base on validation scenes.

    Where it is ahead of it there: on test scenes below, with the 95 % interval. `wanted`: the level ("plain" by default).
    """
    level, lines = (*wanted, "plain")[0], {}
    for row in (row for row in rows if row["level"] == level):
        line = lines.setdefault(row["method"], {"candidate": row["method"], "base": row["base"]})
        if row["split"] == "validation":
            line[row["model"]] = f"{row['difference']:+.3f}"
        else:
            line[row["model"]] += "<br>{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**row)
    return markdown([*lines.values()])


def by_checkpoint(rows: Sequence[dict], quality: Sequence[dict], wanted: Sequence[str] = ()) -> str:
    """A line for each model and share of its training: mIoU of vanilla and GoCA, meaned over levels, and how well it draws."""
    frame = _means(rows, quality)
    return markdown(frame.round(4).to_dict("records")) if len(frame) else "Nothing was measured."


def _means(rows, quality) -> pd.DataFrame:
    """A row for each checkpoint: mIoU of the methods shown, meaned over the levels that all the model's checkpoints have."""
    place = ["model", "checkpoint"]
    frame = pd.DataFrame(rows).query("method in @SHOWN")
    counts = frame.groupby(["model", "level"], sort=False)["checkpoint"].transform("nunique")
    shares = frame.groupby("model", sort=False)["checkpoint"].transform("nunique")
    kept = frame[counts == shares]
    means = kept.pivot_table("miou", place, "method", sort=False)[[*SHOWN]].rename(columns=SHOWN)
    ranks = {model: rank for rank, model in enumerate(frame["model"].unique())}
    means = means.assign(lead=means["GoCA"] - means["vanilla"]).reset_index()
    means = means.sort_values(place, key=lambda values: values.map(ranks) if values.name == "model" else -values)
    if not quality:
        return means
    others = ["weights", "captions", "scale", "steps", "mmd_low", "mmd_high"]
    numbers = pd.DataFrame(quality).drop(columns=others, errors="ignore")
    return means.merge(numbers, "left", place)


def power(result: dict, path: Path) -> None:
    """mIoU, meaned over levels, against the kernel distance of a model's pictures from scenes, less of it to the right.

    A panel for each model of which several checkpoints were measured; where no quality was, against the share of the steps.
    """
    frame = _means(result["rows"], result.get("quality", []))
    frame = frame[frame.groupby("model")["checkpoint"].transform("nunique") > 1]
    models = frame["model"].unique()
    if not len(models):
        return
    figure = Figure(figsize=(4.2 * len(models), 3.8), layout="constrained")
    (row,) = figure.subplots(1, len(models), squeeze=False, sharey=True)
    for axes, model in zip(row, models, strict=True):
        panel(axes, frame[frame["model"] == model].sort_values("checkpoint"))
        axes.set_title(model)
    row[0].set_ylabel("mIoU, mean over levels")
    row[0].legend(frameon=False)
    write(figure, path)


def panel(axes: Axes, part: pd.DataFrame) -> None:
    """One model: a curve for each method, its points by the share of the training."""
    measured = POWER in part and part[POWER].notna().all()
    x = part[POWER] if measured else part["checkpoint"]
    for name, colour in zip(SHOWN.values(), ("C7", "C3"), strict=True):
        axes.plot(x, part[name], "o-", color=colour, label=name)
    for place, share, height in zip(x, part["checkpoint"], part["GoCA"], strict=True):
        axes.annotate(f"{share} %", (place, height), (0, 7), textcoords="offset points", fontsize=8, ha="center")
    axes.set_xlabel(
        "kernel distance of pictures from scenes" if measured else "steps, % of those of the shipped weights"
    )
    if measured:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.margins(0.12)
