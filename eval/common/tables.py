"""Tables of results in Markdown."""

from collections.abc import Sequence

import pandas as pd


def markdown(rows: Sequence[dict], columns: Sequence[str] | None = None) -> str:
    """A GitHub table of the rows' plain values, of all columns or some; dictionaries are left to the JSON file."""
    frame = pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows])
    frame = frame[list(columns)] if columns else frame
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(object).fillna("").to_numpy()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def by_scale(rows: Sequence[dict], metrics: Sequence[str] = ()) -> str:
    """A table of `eval.image_quality`: a row for each metric and method, a column for each guidance scale.

    A cell has the value with its 95 % interval; below, the paired difference from cfg, and whether it is within noise. All
    metrics of the rows, or some.
    """
    own = [name for row in rows for name in row if f"{name}_interval" in row and not name.endswith("_difference")]
    places = ["metric", *(["model"] if len({row["model"] for row in rows}) > 1 else []), "method"]
    lines: dict[tuple, dict[str, str]] = {}
    for metric in metrics or dict.fromkeys([*own, *(name for name in ("precision", "recall") if name in rows[0])]):
        for row in rows:
            place = {name: {"metric": metric, **row}[name] for name in places}
            line = lines.setdefault(tuple(place.values()), place)
            line[f"scale {row['guidance_scale']:g}"] = cell(row, metric) if metric in row else ""
    scales = [f"scale {scale:g}" for scale in sorted({row["guidance_scale"] for row in rows})]
    return markdown([*lines.values()], [*places, *scales])


def cell(row: dict, metric: str) -> str:
    """A metric of a row, as `by_scale` shows it."""
    parts = [f"{row[metric]:.4g}"]
    if f"{metric}_interval" in row:
        parts[0] += " ({:.4g} to {:.4g})".format(*row[f"{metric}_interval"])
    if f"{metric}_difference" in row:
        gap = "{:+.3g} ({:+.3g} to {:+.3g})".format(row[f"{metric}_difference"], *row[f"{metric}_difference_interval"])
        parts.append(gap + (", within noise" if row[f"{metric}_within_noise"] else ""))
    return "<br>".join(parts)
