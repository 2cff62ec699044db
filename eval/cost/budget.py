"""What regions add to one step, counted on a fake GPU (`eval.cost.fake_step`)."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

from torch import Tensor

from eval.cost.cases import Case
from eval.cost.fake_step import Step, Trace, fake_cuda, fake_like, to_cuda
from goca_guidance import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.base import Family
from goca_guidance.hooks.guided import GuidedCall
from goca_guidance.method import kernels
from goca_guidance.method.records import TokenLayout
from goca_guidance.method.scfg import SpatialGuidanceScale


MODULES = ("eval.cost", "goca_guidance")
"""What a cost depends on."""


@dataclass(frozen=True)
class Cost:
    """A stock step, and the first and second guided one."""

    stock: Step
    first: Step
    second: Step

    @property
    def added_peak(self) -> int:
        """Bytes beyond the stock step's, what stays between steps included."""
        return self.second.peak - self.stock.peak

    def row(self) -> dict[str, Any]:
        """In units for people."""
        ours = self.second.ours
        return {
            "stock_launches": self.stock.model.launches,
            "added_launches": ours.launches,
            "stock_gb": round(self.stock.model.bytes / 1e9, 2),
            "added_gb": round(ours.bytes / 1e9, 2),
            "stock_peak_mb": round(self.stock.peak / 2**20),
            "added_peak_mb": round(self.added_peak / 2**20),
            "largest_tensor_mb": round(ours.largest / 2**20),
        }


def cost(case: Case, batch: int = 1, with_kernels: bool = False) -> Cost:
    """Three steps of a case. What mixes devices, or makes the host wait for the device, raises."""
    denoiser, *inputs = case.create(batch)
    with fake_cuda():
        to_cuda(denoiser)
        halves = [fake_like(inputs) for _ in range(1 if case.batched else 2)]
        call, step = a_step(case, denoiser, halves, batch)
        with Trace() as trace, _host_reads(trace, case), _switched(with_kernels, trace):
            stock = trace.begin()
            step(5.0)
            with call.installed():
                first = trace.begin()
                step(SpatialGuidanceScale(5.0, call.rate))
                second = trace.begin()
                step(SpatialGuidanceScale(5.0, call.rate))
    return Cost(stock, first, second)


def a_step(
    case: Case,
    denoiser,
    inputs: Sequence[tuple[tuple, dict]],
    batch: int,
) -> tuple[GuidedCall, Callable[[Any], Tensor]]:
    """A guided call, and what a stock loop does, by a guidance scale, between two steps of its scheduler.

    `inputs`: arguments of the denoiser's calls in a step: one, or the conditional and then the unconditional prediction.
    """
    call = GuidedCall(
        denoiser, [], GoCAConfig(), SCFGConfig(segmentor=case.segmentor), images=batch, prompts=batch,
        separate=None, region_tokens=case.words,
    )  # fmt: skip

    def step(scale):
        made = [denoiser(*args, **{**kwargs, "return_dict": False})[0] for args, kwargs in inputs]
        u, c = made[0].chunk(2) if case.batched else reversed(made)
        return u + scale * (c - u)

    return call, step


@contextmanager
def _host_reads(trace: Trace, case: Case) -> Iterator[None]:
    """Answers what the host reads off the device once a call, and notes it: where pixels stand, whether a region is alone."""

    def noted(answer):
        trace.step.copies.append("a number that the host reads")
        return answer

    def once(family, positions, read):
        return kept(family, positions, lambda _: noted((*case.tokens[-2:], 0)))

    kept, alone = Family.once, cached_property(lambda layout: noted(False))
    alone.__set_name__(TokenLayout, "alone")
    with patch.object(Family, "once", once), patch.object(TokenLayout, "alone", alone):
        yield


@contextmanager
def _switched(on: bool, trace: Trace) -> Iterator[None]:
    """Kernels are on or off, whatever this machine has; those that would be launched are counted."""
    with (
        patch.dict(os.environ, {"GOCA_LSE": "0"}),
        patch.object(kernels, "enabled", lambda: on),
        patch.object(kernels, "hindrance", lambda device: None),
        patch.object(kernels, "launch", trace.launch),
    ):
        yield
