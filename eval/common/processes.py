"""How programs share and time their work: processes, batches, the seeds that depend on neither, a clock."""

import time
import zlib
from collections.abc import Collection, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm


def processes() -> PartialState:
    """This process among all that `accelerate launch` or `torchrun` started; one that is done waits for days.

    On CPUs launch with `torchrun --nproc-per-node 2 -m PROGRAM ...`: `accelerate launch --cpu` starts a single process.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


def share(work: Sequence[Any], state: PartialState) -> Sequence[Any]:
    """What of the work is this process's."""
    return work[state.process_index :: state.num_processes]


def progress(parts: Iterable[Collection], name: str, state: PartialState, leave: bool = True) -> tqdm:
    """A bar of the images in this process's parts, below those of the machine's other processes."""
    total = sum(len(part) for part in parts)
    return tqdm(total=total, desc=name, unit="image", position=state.local_process_index, leave=leave)


def slices(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Up to `size` items at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def seed_of(seed: int, name: str) -> int:
    """Seed of the noise of one image: of the program's seed and the image's id, whatever the batch and the process."""
    return zlib.crc32(f"{seed} {name}".encode())


def now(device: str) -> float:
    """Seconds on a clock, when all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
