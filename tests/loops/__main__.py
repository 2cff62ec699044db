"""`python -m tests.loops` runs every mixing loop of diffusers, and writes docs/families.md and results/pipelines.json."""

import json
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

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


def _quiet() -> None:
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _cell(place: tuple[str, str, str]) -> tuple[tuple[str, str], str]:
    title, kind, name = place
    return (title, kind), COLUMNS[title](name)


def main() -> None:
    _quiet()
    counted = count()
    _write(COUNTED, json.dumps(counted, indent=2) + "\n")
    every = [(title, kind, names[0]) for kind, names in families().items() for title in COLUMNS]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _quiet) as pool:
        cells = dict(tqdm(pool.map(_cell, every), total=len(every)))
    _write(TABLE, to_markdown(cells, counted))


if __name__ == "__main__":
    main()
