"""The table of features by families, docs/features.md: what it says, as cells and as a document."""

import re
from collections.abc import Mapping

import diffusers
import torch
import transformers

from tests.features import guidance, models, prompts, tasks
from tests.features.checks import ENTERED
from tests.helpers.families import FAMILIES
from tests.helpers.places import ROOT


ROOMS = [room.__name__ for room in (tasks, prompts, guidance, models)]
FEATURES = dict(
    sorted(ENTERED.items(), key=lambda item: ROOMS.index(item[1].__module__))
)  # rooms in order, rows as written
Cells = Mapping[tuple[str, str], str]  # by title and family

TABLE = ROOT / "docs" / "features.md"
HEADS = {
    "sd": "Stable Diffusion 1, 2",
    "sdxl": "Stable Diffusion XL",
    "pixart-alpha": "PixArt-alpha",
    "pixart-sigma": "PixArt-Sigma",
    "flux": "Flux.1",
    "sd3": "Stable Diffusion 3",
    "hunyuan": "HunyuanDiT",
}
TEXT = """# What works with what

Each cell was filled by a test that ran the feature with a tiny pipeline of that family on a CPU, which stands in for the
accelerator where models are offloaded, and `tests/features/test_features.py` fails where this table says anything else.
*works*: with a rate of one the output is that of the stock pipeline under the same feature, bit for bit, and with regions it
differs, every step having seen real attention; *refused*: an error says so and names the way out; *not in diffusers*,
*refused by diffusers*: the stock pipeline has no such thing, or raises.

Made by `python -m tests.features` with diffusers {diffusers}, transformers {transformers} and torch {torch}.
"""


def to_markdown(cells: Cells) -> str:
    """The document; a cell's reason goes to a footnote."""
    notes: dict[str, int] = {}
    rows = [["", *(HEADS[name] for name in FAMILIES)], ["---"] * (len(FAMILIES) + 1)]
    for title in FEATURES:
        row = [title]
        for name in FAMILIES:
            verdict, _, reason = cells[title, name].partition(": ")
            row.append(f"{verdict}[^{notes.setdefault(reason, len(notes) + 1)}]" if reason else verdict)
        rows.append(row)
    versions = {package.__name__: package.__version__ for package in (diffusers, transformers, torch)}
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return TEXT.format(**versions) + f"\n{table}\n\n" + "".join(f"[^{n}]: {reason}\n" for reason, n in notes.items())


def from_markdown(text: str) -> Cells:
    """What a document says, reasons in their places."""
    notes = dict(re.findall(r"^(\[\^\d+\]): (.+)$", text, re.MULTILINE))
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    names = {title: name for name, title in HEADS.items()}
    return {
        (row[0], names[title]): re.sub(r"\[\^\d+\]", lambda mark: f": {notes[mark[0]]}", cell)
        for row in rows
        for title, cell in zip(head[1:], row[1:], strict=True)
    }
