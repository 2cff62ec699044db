"""The rows of `eval.guidance` as tables: a method in a line, a guidance scale in a column."""

from collections.abc import Sequence

from eval.common.tables import markdown


AGAINST = {"same_scale": "", "equal_mean": "_equal_mean"}  # which scale of cfg a cell is compared with


def guidance_table(rows: Sequence[dict], wanted: Sequence[str]) -> str:
    """Of one level: each value, and its difference from cfg, with a star where its 95 % interval is without zero.

    `wanted`: "noise" or "scene"; the level, with "_" for spaces; a name of `AGAINST`; models, all if there are none.
    """
    start, level, against, *models = wanted
    level, suffix, lines = level.replace("_", " "), AGAINST[against], {}
    found = [row for row in rows if row["level"] == level and row["model"] in (models or {row["model"]})]
    scales = sorted({row["scale"] for row in found if row["start"] == start and row["method"] != "cfg"})
    for row in found:
        line = lines.setdefault((row["model"], row["method"]), {"model": row["model"], "method": row["method"]})
        if row["method"] == "scenes":
            line |= dict.fromkeys([f"scale {scale:g}" for scale in scales], f"{row['value']:.3g}")
        elif row["start"] == start and row["scale"] in scales:
            line[f"scale {row['scale']:g}"] = _cell(row, suffix)
    return markdown(
        [line for line in lines.values() if len(line) > 2], ["model", "method", *[f"scale {s:g}" for s in scales]]
    )


def _cell(row: dict, suffix: str) -> str:
    if f"difference{suffix}" not in row:
        return f"{row['value']:.3g}"
    low, high = row[f"low{suffix}"], row[f"high{suffix}"]
    return f"{row['value']:.3g} ({row[f'difference{suffix}']:+.2g}{'' if low <= 0 <= high else '*'})"
