"""Both long programs killed (SIGKILL) and started again: between any two changes of a file, and at random moments.

Each run is a fork of this process with a loaded model, so that a kill costs a second.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eval import coco30k, segmentation
from eval.common.load import load_pipeline
from eval.generation import generator
from eval.segment import running
from eval.segment.confusion import Counts
from goca_guidance import TINY_SD
from tests.helpers.guided import guided
from tests.helpers.processes import SECONDS, settle


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
GENERATION = 'method = "goca"\ncount = 4\nsteps = 1\nbatch = 2\nsize = 32\n'
SEGMENTATION = "limit = 4\nbatch = 2\n[methods.vanilla]\n[methods.goca]\n"


@dataclass(frozen=True)
class Program:
    """A program, its TOML file and further arguments; `results` reads what must be equal from the folder it ran in."""

    main: Callable
    config: str
    arguments: tuple[str, ...]
    results: Callable[[Path], dict]


def _generated(folder: Path) -> dict:
    files = (path for path in (folder / "run").rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _segmented(folder: Path) -> dict:
    """The result, and all counts but for the seconds that they took."""
    found: dict = {"result.json": (folder / "result.json").read_bytes()}
    for path in (folder / "runs" / "segmentation").rglob("[0-9a-f]*.npz"):
        counts = Counts.load(path)
        found[path.name] = counts.images, counts.cells.tobytes(), counts.skipped
    return found


PROGRAMS = {
    "coco30k": Program(coco30k.main, GENERATION, ("--out", "run"), _generated),
    "segmentation": Program(segmentation.main, SEGMENTATION, ("--result", "result.json"), _segmented),
}


@cache
def _model():
    return load_pipeline(TINY_SD, device="cpu")


# ---- one run ---------------------------------------------------------------------------------------------------------
def started(program: Program, folder: Path, stop: int | None = None):
    """The program at work in a folder, in a process of its own, which dies before its `stop`-th change of a file."""
    _model()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(program.config)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(program, folder, stop))
    process.start()
    return process


def ended(process, seconds: float):
    """The process, which has so long, and is dead."""
    process.join(seconds)
    process.kill()
    process.join()
    return process


def finished(program: Program, folder: Path) -> dict:
    """The results of a run that nobody disturbs; RuntimeError where it fails."""
    process = ended(started(program, folder), SECONDS)
    if process.exitcode:
        raise RuntimeError(f"exit status {process.exitcode}: {(folder / 'told.txt').read_text()[-2000:]}")
    return program.results(folder)


def _run(program, folder, stop):
    settle()
    os.chdir(folder)
    told = os.open("told.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(told, 1)
    os.dup2(told, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    generator.load_pipeline = lambda *args: guided(_model())
    running.load_pipeline, running.CHUNK = (lambda *args: _model()), 2
    sys.argv = ["program", "config.toml", *program.arguments]
    counted = [0]
    sys.addaudithook(lambda event, args: _count(event, args, counted, stop))
    program.main(sys.argv[1:])
    (folder.parent / f"{folder.name}.changes").write_text(str(counted[0]))


def _count(event, args, counted, stop) -> None:
    """Count changes of files here, and die before the `stop`-th."""
    if (event in CHANGES or (event == "open" and _writes(*args))) and not str(args[0]).startswith(("/dev", "/proc")):
        counted[0] += 1
        if counted[0] == stop:
            os.kill(os.getpid(), signal.SIGKILL)


def _writes(path, mode, flags) -> bool:
    return isinstance(path, str) and bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


# ---- kills -----------------------------------------------------------------------------------------------------------
def changes(program: Program, folder: Path) -> tuple[dict, int, float]:
    """The results of an undisturbed run, how often it changed files, and the seconds it took."""
    start = time.monotonic()
    results = finished(program, folder)
    return results, int((folder.parent / f"{folder.name}.changes").read_text()), time.monotonic() - start


def kills(program: Program, root: Path, count: int, seed: int = 0) -> Iterator[str]:
    """So many runs, each killed once or twice and then finished; yields of each what was wrong, or an empty text."""
    draw = random.Random(seed)
    whole, last, seconds = changes(program, root / "whole")
    for number in range(count):
        folder, told = root / str(number), []
        for _ in range(draw.choice([1, 1, 2])):
            if draw.random() < 0.7:
                stop, moment = draw.randint(1, last), SECONDS
                told.append(f"before change {stop}")
            else:
                stop, moment = None, draw.uniform(0, seconds)
                told.append(f"after {moment:.2f} s")
            ended(started(program, folder, stop), moment)
        yield wrong(program, folder, whole, " and ".join(told))


def wrong(program: Program, folder: Path, whole: dict, told: str) -> str:
    """What differs when a killed run is finished; nothing: an empty text."""
    try:
        again = finished(program, folder)
    except RuntimeError as error:
        return f"killed {told}: {error}"
    differing = sorted(name for name in {*whole, *again} if whole.get(name) != again.get(name))
    return f"killed {told}: other {', '.join(differing)}" if differing else ""
