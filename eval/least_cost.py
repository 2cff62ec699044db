"""What GoCA-S-CFG must add to a step at the least, counted from shapes: `python -m eval.least_cost`. Nothing real is run.

One step is both predictions of one image at the family's native size; what is counted, and how, says
`eval.cost.operations`.
"""

from collections.abc import Sequence
from pathlib import Path

from eval.common.files import writable, write_json
from eval.common.programs import command_line
from eval.common.programs import run as run_program
from eval.common.provenance import command
from eval.common.tables import markdown
from eval.cost.full_size import ARCHITECTURES
from eval.cost.operations import added, stock_step, total


# An H100, assumed and not measured: dense half-precision products as reached in practice, memory, and exponentials (132
# multiprocessors, 16 a clock, 1.755 GHz).
FLOP_PER_SECOND, BYTES_PER_SECOND, EXPONENTIALS_PER_SECOND = 800e12, 3.35e12, 132 * 16 * 1.755e9


# ---- the table -------------------------------------------------------------------------------------------------------
def row(name: str) -> dict:
    """A row of the table. Milliseconds are what the assumed H100 needs at the least: the step for the longer of products and
    weights, what is added for products and exponentials one after the other (or for its bytes, where that is longer)."""
    step = stock_step(name)
    parts = added(step)
    alternative = parts.pop("recomputed")
    cost = total(parts.values())
    step_ms = 1e3 * max(step.flops / FLOP_PER_SECOND, step.weights / BYTES_PER_SECOND)
    compute = cost.flops / FLOP_PER_SECOND + cost.exponentials / EXPONENTIALS_PER_SECOND
    added_ms = 1e3 * max(compute, cost.bytes / BYTES_PER_SECOND)
    return {
        "family": name,
        "size": ARCHITECTURES[name].size,
        "step_tflop": _round(step.flops / 1e12),
        "weights_gb": _round(step.weights / 1e9),
        "added_tflop": _round(cost.flops / 1e12),
        "added_percent": _round(100 * cost.flops / step.flops),
        **{f"{part}_gflop": _round(value.flops / 1e9) for part, value in parts.items()},
        "recomputed_refinement_gflop": _round(alternative.flops / 1e9),
        "gexp": _round(cost.exponentials / 1e9),
        "recomputed_gexp": _round(alternative.exponentials / 1e9),
        "added_gb": _round(cost.bytes / 1e9),
        "h100_step_ms": _round(step_ms),
        "h100_added_ms": _round(added_ms),
        "h100_percent": _round(100 * added_ms / step_ms),
    }


def _round(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--result", type=Path, default=Path("results/least_cost.json"))
    args = parser.parse_args(arguments)
    result = writable(args.result)
    rows = [row(name) for name in args.families]
    h100 = {"flop": FLOP_PER_SECOND, "bytes": BYTES_PER_SECOND, "exponentials": EXPONENTIALS_PER_SECOND}
    write_json(result, {"command": command(), "assumed_h100_per_second": h100, "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    run_program(main)
