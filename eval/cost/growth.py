"""How a step's cost grows, from the rows of `eval.speed`."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from eval.common.plots import write


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
