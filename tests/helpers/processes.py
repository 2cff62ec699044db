"""Several processes at one work, as `torchrun` starts them, but forked: libraries and models are loaded once."""

import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tqdm.auto
import tqdm.std
from accelerate import PartialState


SECONDS = 300  # that a fork may take


def forked(count: int, work: Callable[[], Any], folder: Path) -> list[str]:
    """Run `work` in so many processes, in a folder; returns what each wrote to stderr. AssertionError where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = multiprocessing.get_context("fork").Process
    started = [start(target=_work, args=(work, folder, rank, count, port)) for rank in range(count)]
    for process in started:
        process.start()
    end = time.monotonic() + SECONDS
    while any(p.is_alive() for p in started) and not any(p.exitcode for p in started) and time.monotonic() < end:
        time.sleep(0.02)
    for process in started:
        process.kill()  # what waits for one that failed
        process.join()
    told = [(folder / f"stderr-{rank}.txt").read_text() for rank in range(count)]
    assert [process.exitcode for process in started] == [0] * count, "\n".join(told)
    return told


def settle() -> None:
    """First of all in a fork: what it must not share with the others, or cannot have from before."""
    for kind in (tqdm.std.tqdm, tqdm.auto.tqdm):
        kind.set_lock(threading.RLock())  # it was one of all forks: killed with it, one would stop them all
    torch.set_num_threads(1)  # OpenMP's threads are not forked along: work given to them would never end


def _work(work: Callable[[], Any], folder: Path, rank: int, count: int, port: int) -> None:
    os.chdir(folder)
    sys.stderr = sys.stdout = Path(f"stderr-{rank}.txt").open("w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
    settle()
    PartialState._reset_state()
    work()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
