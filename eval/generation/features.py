"""Features: a row for each image by a network, computed once, kept under runs/features/, shared by the processes."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from eval.common.files import intact, replacing
from eval.common.processes import progress, share, slices
from eval.common.provenance import fingerprint, versions
from eval.generation.networks import Backbone
from eval.generation.run_folder import Item


RUNS = Path("runs/features")
MODULES = ("eval.generation.features", "eval.generation.networks", "eval.generation.classifier",
           "eval.generation.run_folder", "eval.scenes.scene", "eval.common.load")  # fmt: skip
PACKAGES = ("torch", "pillow", "open-clip-torch", "torch-fidelity", "torchmetrics")
CHUNK = 256  # images whose features are kept together until all are there
THREADS = 8


# ---- features --------------------------------------------------------------------------------------------------------
def features(items: Sequence[Item], backbone: Backbone, state: PartialState, batch: int = 32) -> np.ndarray:
    """A row for each image, [n d] float32, from disk as far as they were computed before; every process must ask for them."""
    return np.load(kept(items, backbone, state, batch))


def kept(items: Sequence[Item], backbone: Backbone, state: PartialState, batch: int) -> Path:
    """The file of the features, computed if it is not there; no edit but of the code that computes them matters."""
    inputs = {"backbone": backbone.settings, "batch": batch, "images": [item.identity() for item in items]}
    path = RUNS / f"{fingerprint(*MODULES, **inputs, versions=versions(PACKAGES))}.npy"
    if intact(path, partial(rows_of, len(items))) is None:
        compute(items, backbone, state, batch, path)
    return path


def compute(items: Sequence[Item], backbone: Backbone, state: PartialState, batch: int, path: Path) -> None:
    """Chunk by chunk into a folder beside `path`; when all are there, one process joins them."""
    chunks = slices(items, CHUNK)
    parts = [path.with_suffix("") / f"{number:06d}.npy" for number in range(len(chunks))]
    mine = share(list(zip(parts, chunks, strict=True)), state)
    with progress((chunk for _, chunk in mine), backbone.settings["network"], state, leave=False) as bar:
        for part, chunk in mine:
            if intact(part, partial(rows_of, len(chunk))) is None:
                save(part, encoded(chunk, backbone, state.device, batch))
            bar.update(len(chunk))
    state.wait_for_everyone()
    if state.is_main_process:
        save(path, np.concatenate([np.load(part) for part in parts]))
        shutil.rmtree(path.with_suffix(""))
    state.wait_for_everyone()


def rows_of(count: int, path: Path) -> np.ndarray:
    """Kept rows; ValueError unless there are `count`."""
    rows = np.load(path, mmap_mode="r")
    if rows.ndim != 2 or len(rows) != count:
        raise ValueError(f"an array of shape {rows.shape}, of {count} images")
    return rows


def encoded(items: Sequence[Item], backbone: Backbone, device: torch.device, batch: int) -> np.ndarray:
    """Rows of some images; threads read and resize them while the network is at work."""
    found = []
    with ThreadPoolExecutor(THREADS) as threads, torch.inference_mode():
        prepared = threads.map(lambda item: backbone.prepare(item.read()), items)
        for part in slices(items, batch):
            images = torch.stack(list(islice(prepared, len(part)))).to(device)
            found.append(backbone.encode(images, [item.caption for item in part]).float().cpu())
    rows = torch.cat(found).numpy()
    if not np.isfinite(rows).all():
        raise ValueError(f"Expected finite features of {backbone.settings['network']}, but got NaN or infinity.")
    return rows


def save(path: Path, rows: np.ndarray) -> None:
    """Whole or not at all."""
    with replacing(path) as part, part.open("wb") as file:
        np.save(file, rows)
