"""`python -m tests.features` tries every feature with every family, and writes docs/features.md."""

import os
from itertools import product

import diffusers
import torch
import transformers
from tqdm import tqdm

from tests.features.table import FEATURES, TABLE, Cells, to_markdown
from tests.helpers.families import FAMILIES


def fill() -> Cells:
    """Every feature tried with every family."""
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return {(title, name): FEATURES[title](name) for title, name in tqdm(list(product(FEATURES, FAMILIES)))}


def main() -> None:
    new = TABLE.with_suffix(".new")
    new.write_text(to_markdown(fill()))
    os.replace(new, TABLE)


if __name__ == "__main__":
    main()
