"""What only a card can tell of guidance with fused kernels, and of the stock attention calls beside it.

Each question is a function of a device, and answers with rows: "case", and what was found.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from eval.cost.budget import a_step
from eval.cost.captured_step import full_size
from eval.cost.cases import CASES
from eval.cost.full_size import ARCHITECTURES, arguments, build
from eval.cost.kernel_facts import DTYPES, SHAPES, Shape, errors, host_time, milliseconds, switched, tiles
from eval.cost.operations import denoiser_inputs
from eval.cost.stepping import Case
from goca_guidance import GoCAConfig
from goca_guidance.denoisers.adapters import denoiser_of
from goca_guidance.method import kernels
from goca_guidance.method.aggregation import Aggregation
from goca_guidance.method.scfg import SpatialGuidanceScale


# ---- log-sum-exp of the stock call --------------------------------------------------------------------------------
BACKENDS = {  # torch's own operations, without and with statistics where that is a choice
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False),
    "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, False, 0.0, False, False
    ),
    "cudnn with statistics": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False
    ),
    "memory-efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False),
    "memory-efficient with statistics": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True
    ),
}


@torch.no_grad()
def statistics_of_stock(device: str, shapes: Sequence[Shape] = SHAPES) -> list[dict]:
    """Whether a backend's output has the bits of what torch chooses by itself, and its time with and without statistics."""
    rows = []
    for shape in shapes:
        record = shape.record(device)
        tensors = record.query, record.key[:, :, -(shape.side**2) :], record.key[:, :, -(shape.side**2) :]
        stock = F.scaled_dot_product_attention(*tensors)
        _, ms = milliseconds(lambda given=tensors: F.scaled_dot_product_attention(*given), device)
        rows.append({"case": f"{shape}, stock", "ms": ms})
        for name, call in BACKENDS.items():
            row = {"case": f"{shape}, {name}"}
            try:
                first, ms = milliseconds(lambda call=call, given=tensors: call(*given), device)
                output, lse = call(*tensors)[:2]
            except RuntimeError as error:  # no such kernel on this card
                rows.append(row | {"error": str(error).splitlines()[0][:120]})
                continue
            has = lse is not None and lse.numel() > 0
            rows.append(
                row | {"first_ms": first, "ms": ms, "stock_bits": torch.equal(output, stock), "statistics": has}
            )
    return rows


# ---- small maps ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def small_maps(device: str, family: str = "sd-1.5", dtype: str = "bfloat16") -> list[dict]:
    """All layers of one grid, one prediction, with kernels and without."""
    step, rows = full_size(family, ARCHITECTURES[family].size, device, DTYPES[dtype]), []
    (records,) = step.calls
    beside = dict(zip(step.preset.text, step.preset.self_attention, strict=True))
    for grid in sorted({record.grid for record in records}, key=math.prod):
        chosen = {record.name: record.branch(1) for record in records if record.grid == grid}
        text = tuple(name for name in beside if name in chosen)
        own = tuple(beside[name] for name in text)
        preset = replace(step.preset, text=text, self_attention=own, reference=own[0], refine=own)

        def run(chosen=chosen, preset=preset, grid=grid):
            aggregation = Aggregation(GoCAConfig(), preset, step.layout.columns, refining=True)
            for record in chosen.values():
                aggregation.keep(record)
            return aggregation.merged(grid)

        times = {}
        for name, on in (("pytorch_ms", False), ("kernels_ms", True)):
            with switched(on):
                _, times[name] = milliseconds(run, device)
        rows.append({"case": f"{family}, {' x '.join(map(str, grid))}, {len(text)} layers", **times})
    return rows


# ---- streams, offload, CUDA graphs --------------------------------------------------------------------------------
@torch.no_grad()
def surroundings(device: str, family: str = "sd-1.5", dtype: str = "bfloat16") -> list[dict]:
    """Whether guidance gives the same pictures elsewhere than on the default stream, and can be captured in a graph."""
    case = Case(family, ARCHITECTURES[family].size, 1, dtype)
    pipe = case.pipelines(device)["guided"]
    plain = case.call(pipe, True, 3).images

    def on_a_stream():
        with torch.cuda.stream(torch.cuda.Stream()):
            found = case.call(pipe, True, 3).images
        torch.cuda.synchronize()
        return torch.equal(found, plain)

    def with_offload():
        pipe.enable_model_cpu_offload()
        return torch.equal(case.call(pipe, True, 3).images.to(device), plain)

    questions = {"a stream of its own": on_a_stream, "model offload": with_offload}
    return [
        *(_tried(name, ask) for name, ask in questions.items()),
        _tried("a CUDA graph", lambda: _graph(case, device)),
    ]


def _tried(name: str, ask: Callable) -> dict:
    try:
        return {"case": name, "same": ask()}
    except Exception as error:
        return {"case": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}


def _graph(case: Case, device: str) -> bool:
    """Whether a guided step, captured after two, gives at its replay what it gave before."""
    pipe = build(case.family, device, DTYPES[case.dtype])
    given = denoiser_inputs(pipe, arguments(case.family, pipe, case.size, 1, 3))
    call, step = a_step(CASES[f"{case.family}, {case.size} px"], denoiser_of(pipe.components), [given], 1)
    with call.installed():
        for _ in range(2):
            before = step(SpatialGuidanceScale(5.0, call.rate))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(SpatialGuidanceScale(5.0, call.rate))
        graph.replay()
        torch.cuda.synchronize()
    return torch.equal(before, found)


QUESTIONS: dict[str, Callable[[str], list[dict]]] = {
    "errors": errors,
    "host time": host_time,
    "statistics": statistics_of_stock,
    "small maps": small_maps,
    "surroundings": surroundings,
    "tiles": tiles,
}
"""The most telling first. Memory is told by the rows of `eval.speed_gpu`, the card by all."""


def ask(question: str, device: str) -> list[dict]:
    """A question's answers, with kernels on; RuntimeError where this device has none."""
    reason = kernels.hindrance(torch.device(device))
    if reason is not None:
        raise RuntimeError(reason)
    with switched(True):
        return QUESTIONS[question](device)
