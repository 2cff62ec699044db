"""Time of a guided step of a compiled denoiser over the compiled stock step, in one process.

    python -m eval.compiled_cost

Inductor compiles the denoiser as a whole, once for stock and once for guided calls: minutes each, which count to `--seconds`.
Stock calls, guided ones, and guided ones that run eagerly alternate until the seconds are over or twenty rounds were seen; see
`eval.speed` for what a step's time is. Rows that the result file has from the same code are not measured again.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from eval.common.files import writable
from eval.common.programs import command_line, positive
from eval.common.programs import run as run_program
from eval.common.provenance import command, fingerprint
from eval.common.rows import Rows
from eval.common.tables import markdown
from eval.cost.full_size import ARCHITECTURES
from eval.cost.measure import alone, device_name
from eval.cost.stepping import Case, step_times


MODULES = ("eval.compiled_cost", "eval.cost.full_size", "eval.cost.stepping", "goca_guidance")
"""What a row depends on."""

MODELS = ("tiny-sd", "sd-1.5-quarter")
SETTINGS = {"guided": nullcontext, "eager": lambda: torch.compiler.set_stance("force_eager")}


def compare(model: str, seconds: float) -> dict:
    """A row of the table."""
    case = Case(model, ARCHITECTURES[model].size, 1, "float32")
    times = step_times(case, "cpu", seconds, SETTINGS, compiled=True)
    stock, guided, eager = times["stock"], times["guided"], times["eager"]
    return {
        "device": device_name("cpu"),
        "model": model,
        "size": case.size,
        "stock_ms": round(1000 * stock.step, 1),
        "guided_ms": round(1000 * guided.step, 1),
        "time_ratio": round(guided.over(stock), 3),
        "eager_ms": round(1000 * eager.step, 1),
        "eager_ratio": round(eager.over(stock), 3),
        "rounds": len(stock.steps),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seconds", type=positive, default=1800, help="to spend on a row, at the least for one round")
    parser.add_argument("--result", type=Path, default=Path("results/compiled.json"))
    args = parser.parse_args(arguments)
    run = {"code": fingerprint(*MODULES, seconds=args.seconds), "command": command(), "torch": torch.__version__}
    rows = Rows(writable(args.result), ("device", "model"), run)
    for model in args.models:
        if not rows.has(device=device_name("cpu"), model=model):
            rows.add(alone(compare, model, args.seconds))
    print(markdown(list(rows)))


if __name__ == "__main__":
    run_program(main)
