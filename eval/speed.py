"""Time and peak memory of a GoCA-S-CFG step over the stock step, in one run: `python -m eval.speed`.

Stock and guided calls alternate, so that a machine whose speed drifts slows both, until `--seconds` are over or twenty pairs
were seen. A step's time is the mean over a call's steps but the first, and the median over calls; the ratio is the median over
pairs of neighbours. `once_ms` is what a guided call's first step takes beyond that (Gram matrices, constants), less what the
stock call's does. Memory is the peak of a call of one step: resident
memory of a process of its own on the CPU, allocated memory on an accelerator. Full-size denoisers have random weights, and
there are no text encoders (`eval.cost.full_size`).

Without `--families` the program's plan is measured, for a CPU (`eval.speed_gpu` is for a GPU). Rows that the result file has
from the same code are not measured again, so that a killed run goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from eval.common.files import writable
from eval.common.programs import at_least, command_line, positive
from eval.common.programs import run as run_program
from eval.common.provenance import command, fingerprint
from eval.common.rows import Rows
from eval.common.tables import markdown
from eval.cost.full_size import ARCHITECTURES
from eval.cost.measure import add_device, alone, device_name
from eval.cost.stepping import Case, peak_bytes, step_times


MODULES = ("eval.speed", "eval.cost", "eval.common.processes", "goca_guidance")
"""What a row depends on."""

PLAN = [  # family, size, batch; the most telling ones first
    ("tiny-sd", 64, 1), ("tiny-sd", 64, 8), ("sd-1.5", 512, 1), ("flux-short", 512, 1), ("pixart-sigma", 512, 1),
    ("sdxl", 512, 1), ("sd-1.5", 512, 4), ("sd-1.5", 768, 1), ("sdxl", 1024, 1), ("pixart-sigma", 1024, 1),
    ("sd3", 512, 1), ("hunyuan", 512, 1), ("sd-1.5", 1024, 1), ("flux-short", 1024, 1), ("sd-1.5", 512, 8),
]  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------
def compare(case: Case, device: str, seconds: float) -> dict:
    """A row of the table; each measurement in a process of its own, which leaves no memory behind."""
    peaks = {name: alone(peak_bytes, case, device, name) for name in ("stock", "guided")}
    times = alone(step_times, case, device, seconds)
    stock, guided = times["stock"], times["guided"]
    return {
        "device": device_name(device),
        **asdict(case),
        "stock_ms": round(1000 * stock.step, 1),
        "guided_ms": round(1000 * guided.step, 1),
        "time_ratio": round(guided.over(stock), 3),
        "once_ms": round(1000 * guided.once(stock), 1),
        "stock_mb": peaks["stock"] // 2**20,
        "memory_ratio": round(peaks["guided"] / peaks["stock"], 3),
    }


def measure(cases: list[Case], device: str, seconds: float, result: Path) -> list[dict]:
    """Rows of all cases, written after each one: old ones of other code or settings are replaced, others kept."""
    run = {"code": fingerprint(*MODULES, seconds=seconds), "command": command(), "torch": torch.__version__}
    rows = Rows(result, ("device", *Case.__dataclass_fields__), run)
    for case in cases:
        if not rows.has(device=device_name(device), **asdict(case)):
            rows.add(compare(case, device, seconds))
    return list(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", choices=list(ARCHITECTURES))
    parser.add_argument("--sizes", type=at_least(8), nargs="+", help="the native one by default")
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[1])
    parser.add_argument("--options", default="", help='for example "every=2 agreement_rows=256 working_size=32"')
    parser.add_argument("--seconds", type=positive, default=150, help="to spend on the steps of a row, at the least")
    add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on cuda by default")
    parser.add_argument("--result", type=Path, help="results/speed-DEVICE.json by default")
    args = parser.parse_args(arguments)
    dtype, plan = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device], PLAN
    if args.families:
        sizes = {family: args.sizes or [ARCHITECTURES[family].size] for family in args.families}
        plan = [(family, size, batch) for family in args.families for size in sizes[family] for batch in args.batch]
    cases = [Case(*place, dtype, args.options) for place in plan]
    _ = [case.chosen() for case in cases]
    result = writable(args.result or Path(f"results/speed-{args.device}.json"))
    print(markdown(measure(cases, args.device, args.seconds, result)))


if __name__ == "__main__":
    run_program(main)
