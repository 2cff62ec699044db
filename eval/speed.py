"""Time and peak memory of a GoCA-S-CFG step over the stock step, in one run: `python -m eval.speed`.

Stock and guided calls alternate, so that a machine whose speed drifts slows both, until `--seconds` are over or twenty pairs
were seen. A step's time is the mean over a call's steps but the first, and the median over calls; the ratio is the median over
pairs of neighbours. `once_ms` is what a guided call's first step takes beyond that (Gram matrices, constants), less what the
stock call's does. Memory is the peak of a call of one step: resident
memory of a process of its own on the CPU, allocated memory on an accelerator. Full-size denoisers have random weights, and
there are no text encoders (`eval.cost.full_size`).

Without `--families` the plan of the device is measured. Rows that the result file has from the same code are not measured
again, so that a killed run goes on where it stopped.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm.auto import tqdm

from eval.common.files import writable
from eval.common.processes import now
from eval.common.programs import at_least, command_line, positive
from eval.common.programs import run as run_program
from eval.common.provenance import command, fingerprint
from eval.common.rows import Rows
from eval.common.tables import markdown
from eval.cost.full_size import ARCHITECTURES, arguments, build, guided_arguments
from eval.cost.measure import PeakMemory, add_device, alone, device_name
from goca_guidance import GoCAConfig, GoCASCFGPipeline, SCFGConfig


MODULES = ("eval.speed", "eval.cost.full_size", "eval.cost.measure", "eval.common.processes", "goca_guidance")
"""What a row depends on."""

PAIRS = 20  # of calls, at the most
NATIVE = ("sd-1.5", "sdxl", "pixart-sigma", "flux", "hunyuan", "sd3")
PLANS = {  # family, size, batch; the most telling ones first
    "cpu": [
        ("tiny-sd", 64, 1), ("tiny-sd", 64, 8), ("sd-1.5", 512, 1), ("flux-short", 512, 1), ("pixart-sigma", 512, 1),
        ("sdxl", 512, 1), ("sd-1.5", 512, 4), ("sd-1.5", 768, 1), ("sdxl", 1024, 1), ("pixart-sigma", 1024, 1),
        ("sd3", 512, 1), ("hunyuan", 512, 1), ("sd-1.5", 1024, 1), ("flux-short", 1024, 1), ("sd-1.5", 512, 8),
    ],
    "cuda": [
        *((family, ARCHITECTURES[family].size, batch) for batch in (1, 8, 4) for family in NATIVE),
        *(("sd-1.5", size, 1) for size in (768, 1024)), *((family, 1536, 1) for family in NATIVE[1:4]),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Args:
        family: an architecture of `eval.cost.full_size`.
        size: side of the picture in pixels.
        batch: prompts in a call.
        dtype: of the models.
        options: of `GoCAConfig` and `SCFGConfig`, for example "every=2 agreement_rows=256".
    """

    family: str
    size: int
    batch: int
    dtype: str
    options: str = ""

    def pipelines(self, device: str) -> dict[str, GoCASCFGPipeline]:
        """Stock and guided, on the same modules."""
        stock = build(self.family, device, getattr(torch, self.dtype))
        guided = GoCASCFGPipeline.from_pipe(stock)
        guided.set_progress_bar_config(disable=True)
        return {"stock": stock, "guided": guided}

    def chosen(self) -> dict[str, int]:
        """The options, read; ValueError for others than whole numbers of the fields of the two configurations."""
        try:
            found = {key: int(value) for key, value in (pair.split("=") for pair in self.options.split())}
            self.configs(found)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'Expected options such as "every=2 agreement_rows=256", but got {self.options!r} ({error}).'
            ) from error
        return found

    @staticmethod
    def configs(options: dict[str, int]) -> dict:
        """The arguments of a guided call."""
        goca = {name: value for name, value in options.items() if name != "every"}
        return {"goca": GoCAConfig(**goca), "scfg": SCFGConfig(every=options.get("every", 1))}

    def call(self, pipe, name: str, steps: int):
        """Generate latents."""
        kwargs, given = arguments(self.family, pipe, self.size, self.batch, steps), self.chosen()
        if name == "guided":
            kwargs |= guided_arguments(self.family) | self.configs(given)
        return pipe(**kwargs)


# ---- time ------------------------------------------------------------------------------------------------------------
def step_seconds(case: Case, device: str, seconds: float) -> dict[str, float]:
    """Seconds of a stock and of a guided step, their "ratio", and what only the first guided one takes ("once")."""
    pipes, steps, firsts = case.pipelines(device), {"stock": [], "guided": []}, {"stock": [], "guided": []}
    length = 1 + max(2, case.chosen().get("every", 1))  # after the first, every kind of step as often as it occurs
    with tqdm(desc=f"{case.family} {case.size} px, batch {case.batch}", unit="step") as bar:
        begun = time.perf_counter()
        while not (pairs := len(steps["guided"])) or (pairs < PAIRS and time.perf_counter() - begun < seconds):
            for name, pipe in pipes.items():
                start = time.perf_counter()
                with _stamped(pipe.scheduler, device, bar) as stamps:
                    case.call(pipe, name, length)
                steps[name].append((stamps[length - 1] - stamps[0]) / (length - 1))
                firsts[name].append(stamps[0] - start - steps[name][-1])
    once = statistics.median(firsts["guided"]) - statistics.median(firsts["stock"])
    ratio = statistics.median(guided / stock for stock, guided in zip(*steps.values(), strict=True))
    return {**{name: statistics.median(found) for name, found in steps.items()}, "once": once, "ratio": ratio}


@contextmanager
def _stamped(scheduler, device: str, bar: tqdm) -> Iterator[list[float]]:
    """Times at which the scheduler ends its steps, which every pipeline does once a step."""
    stamps, step = [], scheduler.step

    def stamp(*args, **kwargs):
        result = step(*args, **kwargs)
        stamps.append(now(device))
        bar.update()
        return result

    with patch.object(scheduler, "step", stamp):
        yield stamps


# ---- memory ----------------------------------------------------------------------------------------------------------
def peak_bytes(case: Case, device: str, name: str) -> int:
    """Peak memory of one call of one step; run it in a process of its own."""
    pipe = case.pipelines(device)[name]
    with PeakMemory(device) as memory:
        case.call(pipe, name, 1)
    return memory.peak


# ---- rows ------------------------------------------------------------------------------------------------------------
def compare(case: Case, device: str, seconds: float) -> dict:
    """A row of the table; each measurement in a process of its own, which leaves no memory behind."""
    peaks = {name: alone(peak_bytes, case, device, name) for name in ("stock", "guided")}
    times = alone(step_seconds, case, device, seconds)
    return {
        "device": device_name(device),
        **asdict(case),
        "stock_ms": round(1000 * times["stock"], 1),
        "guided_ms": round(1000 * times["guided"], 1),
        "time_ratio": round(times["ratio"], 3),
        "once_ms": round(1000 * times["once"], 1),
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
    dtype, plan = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device], PLANS[args.device]
    if args.families:
        sizes = {family: args.sizes or [ARCHITECTURES[family].size] for family in args.families}
        plan = [(family, size, batch) for family in args.families for size in sizes[family] for batch in args.batch]
    cases = [Case(*place, dtype, args.options) for place in plan]
    _ = [case.chosen() for case in cases]
    result = writable(args.result or Path(f"results/speed-{args.device}.json"))
    print(markdown(measure(cases, args.device, args.seconds, result)))


if __name__ == "__main__":
    run_program(main)
