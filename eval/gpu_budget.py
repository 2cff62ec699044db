"""What regions add to a step of full-size denoisers on a GPU, counted on a fake one: launches, bytes, peak memory.

    python -m eval.gpu_budget [NAME ...]

No GPU is needed and nothing is run: shapes alone are followed, in bfloat16, two predictions a step. The second guided step is
counted, as the first one makes constants. What a launch reads and writes is its tensors, each once: neither what a cache
serves again is counted, nor that a large operation may take more than one launch. `added_peak_mb` is memory beyond the stock
step's, with what stays between steps.

Writes results/gpu-budget.json after each row; those of the same code are not counted again, so that a killed run goes on.
`--lines 20` prints where in goca_guidance the most is launched, moved and, at the peak, held; "" is the model's own.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import diffusers
import torch
from tqdm.auto import tqdm

from eval.common.files import writable
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.common.provenance import fingerprint
from eval.common.rows import Rows
from eval.common.tables import markdown
from eval.cost.budget import MODULES, Cost, cost
from eval.cost.cases import CASES


def lines(found: Cost, count: int) -> str:
    """A table of the lines that move the most bytes, and of those that hold the most at the peak."""
    step = found.second
    busiest = sorted(step.lines.items(), key=lambda item: -item[1].bytes)
    moved = [{"line": line, "launches": n.launches, "gb": round(n.bytes / 1e9, 3)} for line, n in busiest[:count]]
    held = [{"line": line, "held_mb": round(size / 2**20, 1)} for line, size in step.held.most_common(count)]
    return f"{markdown(moved)}\n\n{markdown(held)}"


def measure(
    names: Sequence[str], batches: Sequence[int], switch: Sequence[str], result: Path, shown: int = 0
) -> list[dict]:
    """Rows of the table, written after each one."""
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    run = {"code": fingerprint(*MODULES), "command": "make gpu-budget"}
    rows = Rows(result, ("family", "batch", "kernels"), run, _place)
    for name, batch, kernels in tqdm(list(product(names, batches, switch))):
        key = {"family": name, "batch": batch, "kernels": kernels}
        if shown or not rows.has(**key):
            found = cost(CASES[name], batch, with_kernels=kernels == "on")
            rows.add(key | found.row(), **versions)
            if shown:
                tqdm.write(f"\n{name}, batch {batch}, kernels {kernels}\n{lines(found, shown)}")
    return list(rows)


def _place(row: dict) -> tuple:
    """The order of rows: that of the cases."""
    return list(CASES).index(row["family"]), row["batch"], row["kernels"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {'; '.join(CASES)}")
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[1, 4])
    parser.add_argument(
        "--kernels", nargs="+", default=["off", "on"], choices=("off", "on"), help="the Triton kernels"
    )
    parser.add_argument("--lines", type=at_least(1), default=0, help="how many lines of code to show")
    parser.add_argument("--result", type=Path, default=Path("results/gpu-budget.json"))
    args = parser.parse_args(arguments)
    names = args.names or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"expected names among {'; '.join(CASES)}, but got {', '.join(unknown)}")
    print(markdown(measure(names, args.batch, args.kernels, writable(args.result), args.lines)))


if __name__ == "__main__":
    run_program(main)
