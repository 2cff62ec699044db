"""Peak memory of a block, a function in a process of its own, and the name of what was measured on."""

import argparse
import multiprocessing
import platform
import threading
import traceback
from multiprocessing.connection import Connection

import psutil
import torch


class PeakMemory:
    """Peak memory while the block runs."""

    def __init__(self, device: str):
        self.device, self.peak = device, 0

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        process, ended = psutil.Process(), False
        while not ended:
            ended = self._stop.wait(0.005)
            self.peak = max(self.peak, process.memory_info().rss)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()


def alone(function, *args, seconds: float | None = None):
    """What a function returns in a process of its own, which is ended after so many seconds.

    Raises:
        TimeoutError: it took longer.
        RuntimeError: the process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise TimeoutError(f"it took longer than {seconds:.0f} seconds")
        found, error = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process died, with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if error is not None:
        raise error
    return found


def _send(to: Connection, function, args) -> None:
    try:
        answer = function(*args), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        answer = None, error
    to.send(answer)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The argument --device: what there is of cuda and cpu, the first by default."""
    there = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=there, default=there[0])


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    return (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
