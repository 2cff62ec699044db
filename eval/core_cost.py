"""Time and peak memory of GoCA's core alone, ours and naive, on one full-size step: `python -m eval.core_cost`.

One step of a denoiser with random weights is captured: one image, two predictions. Then each form, in a process of its own,
reads the records in network order and makes regions of the latent's size: its time is the median after one warm-up, its
memory what the warm-up's peak adds to the captured step (resident on the CPU, allocated on an accelerator). The errors are
against the naive form in float64. The last columns are the shares of our time that the parts take.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from eval.common.files import writable, write_json
from eval.common.processes import now
from eval.common.programs import at_least, command_line
from eval.common.programs import run as run_program
from eval.common.provenance import command
from eval.common.tables import markdown
from eval.cost.captured_step import Step, full_size
from eval.cost.full_size import ARCHITECTURES
from eval.cost.measure import PeakMemory, add_device, alone, device_name
from eval.cost.operations import added_flops
from goca_guidance import GoCAConfig
from goca_guidance.method import aggregation, attention, segmentor


SHARPER = 16  # times louder queries: of evener attention the naive form keeps mostly rounding
FORMS = {"ours": Step.ours, "naive": Step.naive}
FAMILIES = ("sd-1.5", "sdxl", "pixart-sigma", "flux-short", "hunyuan", "sd3")
PARTS = {  # functions that aggregation and segmentor call; what none of them does is "rest"
    "head_weights": ((aggregation, "head_weights"),),
    "attention": ((attention, "probabilities"),),  # of words and pixels, which all other parts share
    "words": ((attention, "some_keys"), (aggregation, "some_keys")),
    "agreement": tuple((aggregation, name) for name in ("pseudo_attention", "pull_affinity", "agreement")),
    "refinement": ((segmentor, "refine"), (aggregation, "affinity_product")),
}


def capture_to(path: Path, family: str, size: int, device: str, dtype: str) -> None:
    """A step to a file."""
    torch.save(full_size(family, size, device, getattr(torch, dtype), SHARPER), path)


def regions(step: Step, form: str) -> tuple:
    """What is measured: a segmentor that reads everything, and its regions."""
    found = FORMS[form](step, GoCAConfig())
    return found, found.regions(step.latent)


def measure(path: Path, device: str, form: str, repeats: int) -> dict:
    """Time and memory of a form, and what it found; run it in a process of its own."""
    step, seconds = torch.load(path, map_location=device, weights_only=False), []
    before = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    with PeakMemory(device) as memory:
        found = regions(step, form)
    for _ in tqdm(range(repeats), desc=form):
        found = None  # what was stored is let go
        start = now(device)
        found = regions(step, form)
        seconds.append(now(device) - start)
    scores, masks = found[0].scores().cpu().numpy(), found[1].masks.cpu().numpy()
    milliseconds, megabytes = round(1000 * statistics.median(seconds), 1), (memory.peak - before) // 2**20
    return {"ms": milliseconds, "mb": megabytes, "scores": scores, "masks": masks}


def exact(path: Path, device: str) -> dict:
    """What the naive form finds in float64."""
    step = torch.load(path, map_location=device, weights_only=False)
    found = step.naive(GoCAConfig(), torch.float64)
    return {"scores": found.scores().cpu().numpy(), "masks": found.regions(step.latent).masks.cpu().numpy()}


def profile(path: Path, device: str, repeats: int) -> dict[str, float]:
    """Share of each part in the time of ours, while the functions that it calls carry timers."""
    step, seconds, total = torch.load(path, map_location=device, weights_only=False), dict.fromkeys(PARTS, 0.0), 0.0
    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for module, name in functions:
                clock = partial(_clock, seconds, part, device)
                stack.enter_context(patch.object(module, name, _timed(getattr(module, name), clock)))
        for repeat in tqdm(range(repeats + 1), desc="profile"):
            if repeat == 1:
                seconds.update(dict.fromkeys(PARTS, 0.0))  # so far the warm-up's
            start = now(device)
            regions(step, "ours")
            total += now(device) - start if repeat else 0.0
    shares = {part: round(spent / total, 3) for part, spent in seconds.items()}
    return {**shares, "rest": round(1 - sum(shares.values()), 3)}


@contextmanager
def _clock(seconds: dict[str, float], part: str, device: str):
    """Counts the block's time for a part, less the time of parts within it."""
    start, counted = now(device), sum(seconds.values())
    yield
    seconds[part] += now(device) - start - (sum(seconds.values()) - counted)


def _timed(function: Callable, clock: Callable) -> Callable:
    """The function under a clock, also while it yields."""

    def call(*args, **kwargs):
        with clock():
            result = function(*args, **kwargs)
        return each(result) if isinstance(result, Iterator) else result

    def each(items):
        while True:
            with clock():
                item = next(items, None)
            if item is None:
                return
            yield item

    return call


def compare(family: str, size: int, device: str, dtype: str, repeats: int) -> dict:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt"
        alone(capture_to, path, family, size, device, dtype)
        ours, naive = (alone(measure, path, device, form, repeats) for form in FORMS)
        truth = alone(exact, path, device)
        parts = alone(profile, path, device, repeats)
    return {
        "device": device_name(device),
        "family": family,
        "size": size,
        "dtype": dtype,
        **{f"{key}_{name}": found[key] for key in ("ms", "mb") for name, found in (("ours", ours), ("naive", naive))},
        "time_ratio": round(naive["ms"] / ours["ms"], 1),
        "memory_ratio": round(naive["mb"] / max(1, ours["mb"]), 1),
        **_difference(ours, truth),
        "naive": _difference(naive, truth),
        **parts,
        **speed(family, size, ours["ms"]),
    }


def speed(family: str, size: int, milliseconds: float) -> dict[str, float]:
    """The operations that the core must do at the least (`eval.least_cost`), and how many of them a second were done."""
    flops = added_flops(family, size)
    return {"added_gflop": round(flops / 1e9, 1), "gflop_per_second": round(flops / 1e6 / milliseconds, 1)}


def _difference(one: dict, other: dict) -> dict[str, float]:
    """Largest difference of scores, and share of pixels in the same region."""
    return {
        "score_error": float(f"{np.abs(one['scores'] - other['scores']).max():.1e}"),
        "mask_agreement": round(float((one["masks"] == other["masks"]).all(1).mean()), 5),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=list(ARCHITECTURES))
    parser.add_argument(
        "--size", type=at_least(8), default=512, help="at which the naive form of every family can be held"
    )
    add_device(parser)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--result", type=Path, help="results/core-DEVICE.json by default")
    args, rows = parser.parse_args(arguments), []
    result = writable(args.result or Path(f"results/core-{args.device}.json"))
    for family in args.families:
        rows.append(compare(family, args.size, args.device, args.dtype, args.repeats))
        write_json(result, {"command": command(), "torch": torch.__version__, "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    run_program(main)
