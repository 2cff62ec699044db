"""Time and peak memory of stock and guided steps of whole pipelines, on what is at hand."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from tqdm.auto import tqdm

from eval.common.processes import now
from eval.cost.full_size import arguments, build, guided_arguments
from eval.cost.measure import PeakMemory
from goca_guidance import GoCAConfig, GoCASCFGPipeline, SCFGConfig
from goca_guidance.denoisers.adapters import denoiser_of


PAIRS = 20  # of calls, at the most
Settings = Mapping[str, Callable[[], AbstractContextManager]]
PLAIN: Settings = {"guided": nullcontext}


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

    def pipelines(self, device: str, compiled: bool = False) -> dict[str, GoCASCFGPipeline]:
        """Stock and guided, on the same modules."""
        stock = build(self.family, device, getattr(torch, self.dtype))
        if compiled:
            denoiser_of(stock.components).compile()
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

    def call(self, pipe, guided: bool, steps: int):
        """Generate latents."""
        kwargs, given = arguments(self.family, pipe, self.size, self.batch, steps), self.chosen()
        if guided:
            kwargs |= guided_arguments(self.family) | self.configs(given)
        return pipe(**kwargs)


# ---- time ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Times:
    """Of some calls of one kind: seconds of a step, what the first one takes beyond them, and allocated bytes at the peak
    (on an accelerator)."""

    steps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    def over(self, stock: "Times") -> float:
        """The ratio, over pairs of neighbouring calls."""
        return statistics.median(ours / theirs for theirs, ours in zip(stock.steps, self.steps, strict=True))

    def once(self, stock: "Times") -> float:
        """What a call's first step takes beyond its others, less what the stock call's does."""
        return statistics.median(self.firsts) - statistics.median(stock.firsts)


def step_times(
    case: Case, device: str, seconds: float, settings: Settings = PLAIN, compiled: bool = False
) -> dict[str, Times]:
    """Stock calls ("stock") and, under each of the settings, guided ones alternate until the seconds are over."""
    pipes, found = case.pipelines(device, compiled), {name: Times() for name in ("stock", *settings)}
    length = 1 + max(2, case.chosen().get("every", 1))  # after the first, every kind of step as often as it occurs
    with tqdm(desc=f"{case.family} {case.size} px, batch {case.batch}", unit="step") as bar:
        begun = time.perf_counter()
        while not (pairs := len(found["stock"].steps)) or (pairs < PAIRS and time.perf_counter() - begun < seconds):
            for name, times in found.items():
                pipe = pipes["stock" if name == "stock" else "guided"]
                start = time.perf_counter()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with settings.get(name, nullcontext)(), _stamped(pipe.scheduler, device, bar) as stamps:
                    case.call(pipe, name != "stock", length)
                times.peaks.append(torch.cuda.max_memory_allocated() if device == "cuda" else 0)
                times.steps.append((stamps[length - 1] - stamps[0]) / (length - 1))
                times.firsts.append(stamps[0] - start - times.steps[-1])
    return found


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
    """Peak memory of one "stock" or "guided" call of one step; on the CPU, run it in a process of its own."""
    pipe = case.pipelines(device)[name]
    with PeakMemory(device) as memory:
        case.call(pipe, name == "guided", 1)
    return memory.peak
