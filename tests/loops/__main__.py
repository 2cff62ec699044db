"""`python -m tests.loops` runs every mixing loop of diffusers, and writes docs/families.md and results/pipelines.json."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tqdm import tqdm

from tests.helpers.places import ROOT
from tests.loops.census import count
from tests.loops.table import COLUMNS, TABLE, cell, families, quiet, to_markdown


COUNTED = ROOT / "results" / "pipelines.json"


def _write(path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def main() -> None:
    quiet()
    counted = count()
    _write(COUNTED, json.dumps(counted, indent=2) + "\n")
    every = [(title, kind, names[0]) for kind, names in families().items() for title in COLUMNS]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), quiet) as pool:
        cells = dict(tqdm(pool.map(cell, every), total=len(every)))
    _write(TABLE, to_markdown(cells, counted))


if __name__ == "__main__":
    main()
