"""The models that were trained on scenes, and their checkpoints, as folders that `from_pretrained` loads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from eval.common.files import file_digest
from eval.common.provenance import digest_of
from goca_guidance import TINY_SD


FOLDER = Path(__file__).parent / "models"
CHECKPOINTS = Path("runs/checkpoints")
SHIPPED = 100  # percent of the optimiser steps of the shipped weights' training; others' are counted in these too


@dataclass(frozen=True)
class TrainedModel:
    """A shipped model.

    Args:
        folder: of its weights at the end of the training.
        home: side in pixels of the pictures that it knows best.
        sides: of all that it was trained on.
        arguments: of every call.
    """

    folder: Path
    home: int
    sides: tuple[int, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)


T5 = {"max_sequence_length": 64}
MODELS = {
    "tiny-sd": TrainedModel(Path(TINY_SD), 64, (64,)),
    "tiny-unet": TrainedModel(FOLDER / "tiny-unet", 64, (64, 128)),
    "tiny-pixart": TrainedModel(FOLDER / "tiny-pixart", 64, (64, 128), T5),
    "tiny-flux": TrainedModel(FOLDER / "tiny-flux", 128, (128,), T5),
}


def shares(name: str) -> list[int]:
    """The steps that checkpoints of a model took, in percent of those of the shipped weights, the most first."""
    there = [int(folder.name) for folder in (CHECKPOINTS / name).glob("*") if folder.name.isdecimal()]
    return sorted({*there, SHIPPED}, reverse=True)


def checkpoint(name: str, share: int = SHIPPED) -> Path | None:
    """The folder of a model after a share of its steps, in percent; None where it is not there.

    ValueError for an unknown model, and for a folder that is not whole.
    """
    if name not in MODELS:
        raise ValueError(f"Expected models among {', '.join(MODELS)}, but got {name!r}.")
    folder = MODELS[name].folder if share == SHIPPED else CHECKPOINTS / name / str(share)
    if not folder.is_dir():
        return None
    if missing := _missing(folder):
        raise ValueError(
            f"Expected a whole checkpoint in {folder}, but got one without {missing}: let its training write it again, or "
            "remove the folder."
        )
    return folder


@cache
def weights_of(folder: Path) -> str:
    """Digest of a pipeline's parts, whatever lies beside them."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    return digest_of(parts={str(path.relative_to(folder)): file_digest(path) for path in files})


def _missing(folder: Path) -> str:
    """The first part that a pipeline's folder lacks."""
    try:
        parts = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return "model_index.json"
    loaded = [name for name, value in parts.items() if isinstance(value, list) and value[0] is not None]
    for name in loaded:
        files = [path.name for path in (folder / name).glob("*")]
        if not files or ("config.json" in files and not any(file.endswith(".safetensors") for file in files)):
            return f"the files of its {name}"
    return ""


def longest_text(folder: Path) -> int:
    """So many tokens a model reads at the most, by the longest of its text encoders."""
    files = folder.glob("tokenizer*/tokenizer_config.json")
    return max(json.loads(file.read_text())["model_max_length"] for file in files)
