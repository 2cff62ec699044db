"""`python -m tests.fuzz --calls 20000`: random calls of everything public, and what became of them; see `tests.fuzz.cases`.

A finding is an error that is neither the house's nor stock's own (raw), something that a call left behind (leak), or an output
that is not what was asked for (difference): then the exit status is 1. The same seed draws the same cases.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory


os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import transformers
from tqdm import tqdm

from tests.fuzz import tally as t
from tests.fuzz.kills import PROGRAMS, kills
from tests.fuzz.pairs import NAMES, pair


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, help="how many; 2,000 by default, where there are no --minutes")
    parser.add_argument("--minutes", type=float, help="how long")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first batch of cases; the next one has the next seed"
    )
    parser.add_argument("--kills", type=int, default=6, help="of each long program")
    parser.add_argument("--lives", type=int, default=10, help="of a pipeline")
    parser.add_argument(
        "--smallest", type=int, default=20, help="of so many kinds of findings the smallest case is looked for"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(50)
        library.utils.logging.disable_progress_bar()
    wrong = [*lives(args.seed, args.lives), *killed(args.seed, args.kills)]
    found = calls(args.seed, args.calls or (None if args.minutes else 2000), args.minutes)
    print(found.table())
    for number, (kind, finding) in enumerate(sorted(found.findings.items(), key=lambda item: -item[1].count)):
        case = t.smallest(kind, finding.case) if number < args.smallest else finding.case
        wrong.append(
            f"{finding.count} x {finding.verdict}: {kind}\n  {finding.detail}\n  {case!r}\n"
            f"  again: make fuzz SEED={finding.seed} CALLS={t.BATCH}"
        )
    print(*wrong, sep="\n\n")
    return 1 if wrong else 0


def lives(seed: int, count: int) -> list[str]:
    """What goes wrong in a pipeline's life: hypothesis's smallest sequence of it."""
    try:
        t.lives(seed, count)
    except Exception as error:
        return ["\n".join(["a pipeline's life:", *traceback.format_exception_only(error)])]
    return []


def killed(seed: int, count: int) -> list[str]:
    """What is wrong after kills of the long programs."""
    found = []
    for name, program in PROGRAMS.items() if count else ():
        with TemporaryDirectory() as folder, tqdm(total=count, unit="kill", desc=name) as bar:
            for wrong in kills(program, Path(folder), count, seed):
                found += [f"{name} {wrong}"] * bool(wrong)
                bar.update()
    return found


def calls(seed: int, count: int | None, minutes: float | None) -> t.Tally:
    """Batches, until so many calls were tried or so many minutes are over."""
    found, end = t.Tally(), time.monotonic() + 60 * (minutes or float("inf"))
    for name in NAMES:
        pair(name)
    with tqdm(total=count, unit="call", desc="fuzz") as bar:

        def over() -> bool:
            bar.update(found.total() - bar.n)
            told = {"raw": "raw", "leaks": "leak", "differences": "difference"}
            bar.set_postfix({name: found.total(verdict) for name, verdict in told.items()}, refresh=False)
            return time.monotonic() > end

        while not over() and (count is None or found.total() < count):
            t.tally(seed, t.BATCH if count is None else min(t.BATCH, count - found.total()), found, over)
            seed += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
