"""The fused kernels on what is at hand: errors against float64, tiles, and what a call costs the host.

Each question is a function of a device, and answers with rows: "case", and what was found.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from eval.common.processes import now
from goca_guidance.method import kernels
from goca_guidance.method.records import AttentionRecord, AttentionView


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """One layer's attention of one image: heads and their width, side of its square map, and text tokens among the keys.

    `joint`: text stands beside the pixels; else it is all that is asked, if there is any, and nothing here is measured of it.
    """

    family: str
    heads: int
    width: int
    side: int
    text: int = 0
    joint: bool = True

    def record(self, device: str, dtype: torch.dtype = torch.bfloat16) -> AttentionRecord:
        """As attention comes, a token's heads side by side: random queries, loud enough that their attention is not even."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
        pixels, grid = self.side**2, (self.side, self.side)
        keys = self.text + (pixels if self.joint or not self.text else 0)

        def draw(tokens):
            drawn = torch.randn(1, tokens, self.heads, self.width, generator=generator, device=device)
            return drawn.to(dtype).transpose(1, 2)

        view = AttentionView(grid, slice(0, self.text), slice(self.text, keys) if keys > self.text else slice(0, 0))
        query, key, output = draw(pixels) * 2, draw(keys), draw(pixels)
        return AttentionRecord("layer", query, key, None, output, self.width**-0.5, view)

    def __str__(self):
        return f"{self.family}, {self.side} x {self.side}, {self.heads} heads of {self.width}"


SHAPES = (
    Shape("sd-1.5", 8, 40, 64), Shape("sd-1.5", 8, 80, 32), Shape("sd-1.5", 8, 160, 16), Shape("sdxl", 10, 64, 64),
    Shape("sdxl", 20, 64, 32), Shape("pixart-sigma", 16, 72, 64), Shape("hunyuan", 16, 88, 64),
    Shape("sd3", 24, 64, 64, 333), Shape("flux", 24, 128, 64, 512),
)  # fmt: skip
SMALL = Shape("sd-1.5", 8, 40, 8, text=77)
TILES = [  # rows, keys, warps, stages
    (rows, keys, warps, stages)
    for rows, keys, warps in ((128, 128, 8), (64, 128, 4), (256, 64, 8), (128, 64, 4), (64, 64, 4))
    for stages in (2, 3, 4)
]


@contextmanager
def switched(with_kernels: bool, lse: bool = False) -> Iterator[None]:
    """The environment's switches as wanted, and what was read of them before forgotten."""
    wanted = {"GOCA_TRITON": str(int(with_kernels)), "GOCA_LSE": str(int(lse))}
    with patch.dict(os.environ, wanted):
        kernels.enabled.cache_clear()
        try:
            yield
        finally:
            kernels.enabled.cache_clear()


def milliseconds(function: Callable, device: str, repeats: int = 10) -> tuple[float, float]:
    """Of the first call, and of one of the later ones."""
    start = now(device)
    function()
    first, start = now(device) - start, now(device)
    for _ in range(repeats):
        function()
    return round(1000 * first, 3), round(1000 * (now(device) - start) / repeats, 4)


# ---- do they run, and are they right? -----------------------------------------------------------------------------
def errors(device: str, shapes: Sequence[Shape] = SHAPES, dtypes: Sequence[str] = tuple(DTYPES)) -> list[dict]:
    """Each kernel against float64, the largest error over the largest value."""
    return [_errors(shape, device, dtype) for shape in shapes for dtype in dtypes]


def _errors(shape: Shape, device: str, dtype: str) -> dict:
    record = shape.record(device, DTYPES[dtype])
    exact_lse, exact = _exact(record)
    pixels = exact[..., record.view.image]
    reference = torch.rand_like(pixels, dtype=torch.float32).contiguous()
    total = torch.zeros_like(reference)
    lse = kernels.log_sum_exp(record)
    found = kernels.pixels(record, lse, reference=reference, total=total)
    found_errors = {
        "log_sum_exp": _error(lse, exact_lse),
        "agreement": _error(found, (pixels * reference).sum((1, 2))),
        "sum": _error(total, pixels),
    }
    if shape.text:
        columns = torch.arange(2, 15, 3, device=device)[None]
        words = kernels.words(record, columns, lse=lse)
        found_errors["words"] = _error(words, exact[..., record.view.text][..., columns[0]])
    return {"case": f"{shape}, {dtype}", **found_errors}


def _exact(record: AttentionRecord) -> tuple[Tensor, Tensor]:
    """Log-sum-exp b h p, and the mean over heads b p n, in float64, a head at a time."""
    lse, mean = [], 0.0
    for query, key in zip(record.query.unbind(1), record.key.unbind(1), strict=True):
        logits = query.double() @ key.double().mT * record.scale
        lse.append(logits.logsumexp(-1))
        mean = mean + logits.softmax(-1) / record.query.shape[1]
    return torch.stack(lse, 1), mean


def _error(found: Tensor, exact: Tensor) -> float:
    return float(f"{((found - exact).abs().max() / exact.abs().max()).item():.1e}")


# ---- which tiles are fast? ----------------------------------------------------------------------------------------
def tiles(
    device: str, shapes: Sequence[Shape] = SHAPES, variants: Sequence[tuple] = TILES, repeats: int = 10
) -> list[dict]:
    """The kernel of pixels with other tiles than its own ("as it is")."""
    rows = []
    for shape in shapes:
        record = shape.record(device)
        lse = kernels.log_sum_exp(record)
        reference = torch.rand(1, shape.side**2, shape.side**2, device=device)
        total = torch.zeros_like(reference)

        def run(record=record, lse=lse, reference=reference, total=total):
            kernels.pixels(record, lse, reference=reference, total=total)

        flops = 2 * shape.heads * shape.width * shape.side**4
        for variant in (None, *variants):
            row = {"case": f"{shape}, {'as it is' if variant is None else ' x '.join(map(str, variant[:2]))}"}
            row |= {} if variant is None else {"warps": variant[2], "stages": variant[3]}
            with _tile(variant):
                try:
                    first, each = milliseconds(run, device, repeats)
                    rows.append(row | {"first_ms": first, "ms": each, "tflops": round(flops / each / 1e9, 1)})
                except kernels.NotLaunchedError as error:  # for example too much shared memory
                    rows.append(row | {"error": str(error)[:120]})
                    kernels._failed.clear()
    return rows


@contextmanager
def _tile(variant: tuple | None) -> Iterator[None]:
    if variant is None:
        yield
        return
    rows, keys, warps, stages = variant
    kernels._plan_pixels.cache_clear()
    try:
        with patch.object(
            kernels, "_tile_of_pixels", lambda *_: (rows, keys, {"num_warps": warps, "num_stages": stages})
        ):
            yield
    finally:
        kernels._plan_pixels.cache_clear()


# ---- what does a call cost the host? ------------------------------------------------------------------------------
def host_time(device: str, shape: Shape = SMALL, repeats: int = 200) -> list[dict]:
    """Microseconds of Python and of launching, of a layer so small that the device never keeps the host waiting."""
    record, pixels = shape.record(device), shape.side**2
    columns, total = torch.arange(5, device=device)[None], torch.zeros(1, pixels, pixels, device=device)
    lse = kernels.log_sum_exp(record)
    calls = {
        "log_sum_exp": lambda: kernels.log_sum_exp(record),
        "pixels": lambda: kernels.pixels(record, lse, total=total),
        "words": lambda: kernels.words(record, columns, lse=lse),
        "a sum of PyTorch's": lambda: total + total,
    }
    rows = []
    for name, call in calls.items():
        call()
        spent = []
        for _ in range(5):
            now(device)
            start = time.perf_counter()
            for _ in range(repeats // 5):
                call()
            spent.append((time.perf_counter() - start) / (repeats // 5))
        rows.append({"case": name, "microseconds": round(1e6 * statistics.median(spent), 1)})
    return rows
