"""`python -m tests.loops` runs every mixing loop of diffusers, and writes docs/families.md and results/pipelines.json."""

import json
import os
import warnings

import diffusers
import torch
import transformers
from tqdm import tqdm

from tests.helpers.places import ROOT
from tests.loops.census import count
from tests.loops.table import COLUMNS, TABLE, families, to_markdown


COUNTED = ROOT / "results" / "pipelines.json"


def _write(path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def main() -> None:
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    counted = count()
    _write(COUNTED, json.dumps(counted, indent=2) + "\n")
    every = [(title, kind, names[0]) for kind, names in families().items() for title in COLUMNS]
    cells = {(title, kind): COLUMNS[title](name) for title, kind, name in tqdm(every)}
    _write(TABLE, to_markdown(cells, counted))


if __name__ == "__main__":
    main()
