"""Tables of results in Markdown."""

from collections.abc import Sequence

import pandas as pd


def markdown(rows: Sequence[dict], columns: Sequence[str] | None = None) -> str:
    """A GitHub table of the rows' plain values, of all columns or some; dictionaries are left to the JSON file."""
    frame = pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows])
    frame = frame[list(columns)] if columns else frame
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(object).fillna("").to_numpy()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
