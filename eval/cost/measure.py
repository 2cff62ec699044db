"""Peak memory of a block, a function in a process of its own, and the name of what was measured on."""

import argparse
import multiprocessing
import platform
import threading
from concurrent.futures import ProcessPoolExecutor

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


def alone(function, *args):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


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
