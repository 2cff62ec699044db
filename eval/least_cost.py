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


# ---- the table -------------------------------------------------------------------------------------------------------
def row(name: str) -> dict:
    """A row of the table."""
    step = stock_step(name)
    parts = added(step)
    alternative = parts.pop("recomputed")
    cost = total(parts.values())
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
    write_json(result, {"command": command(), "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    run_program(main)
