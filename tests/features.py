"""The table of features by families, docs/features.md: `python -m tests.features` tries everything and writes it."""

import os
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import diffusers
import torch
import transformers
from tqdm import tqdm

from tests import feature_guidance, feature_models, feature_prompts, feature_tasks
from tests.families import FAMILIES
from tests.feature_checks import ENTERED


ROOMS = [room.__name__ for room in (feature_tasks, feature_prompts, feature_guidance, feature_models)]
FEATURES = dict(
    sorted(ENTERED.items(), key=lambda item: ROOMS.index(item[1].__module__))
)  # rooms in order, rows as written
Cells = Mapping[tuple[str, str], str]  # by title and family

TABLE = Path(__file__).parents[1] / "docs" / "features.md"
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
accelerator where models are offloaded, and `tests/test_features.py` fails where this table says anything else. *works*: with
a rate of one the output is that of the stock pipeline under the same feature, bit for bit, and with regions it differs, every
step having seen real attention; *refused*: an error says so and names the way out; *not in diffusers*, *refused by
diffusers*: the stock pipeline has no such thing, or raises.

Made by `python -m tests.features` with diffusers {diffusers}, transformers {transformers} and torch {torch}.
"""


def fill() -> Cells:
    """Every feature tried with every family."""
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return {(title, name): FEATURES[title](name) for title, name in tqdm(list(product(FEATURES, FAMILIES)))}


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


def main() -> None:
    new = TABLE.with_suffix(".new")
    new.write_text(to_markdown(fill()))
    os.replace(new, TABLE)


if __name__ == "__main__":
    main()
