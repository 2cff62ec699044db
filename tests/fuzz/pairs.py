"""Stock pipelines and ours on the same modules, each built once: what all cases run on."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers
import torch

from goca_guidance import TINY_SD
from tests.helpers.families import FAMILIES, stock_pipeline
from tests.helpers.guided import guided


SIZES = {"hunyuan": (32, 32), "tiny-sd": (32, 32)}  # height and width in pixels, if not 16 x 16
LATENTS = {"tiny-sd": (1, 4, 8, 8), "sd3": (1, 16, 8, 8), "flux": (1, 16, 16), "hunyuan": (1, 4, 4, 4)}
NAMES = [*FAMILIES, "tiny-sd"]


@dataclass(frozen=True)
class Pair:
    """A family's stock pipeline, and ours on its modules; `call` are arguments of a small one with two predictions."""

    name: str
    stock: Any
    ours: Any
    call: dict

    @property
    def latent(self) -> tuple[int, ...]:
        """Shape of the latents of the small call."""
        return LATENTS.get(self.name, (1, 4, 8, 8))

    @cached_property
    def expected(self) -> torch.Tensor:
        """The stock output before anything happened."""
        return self.plain()

    @cached_property
    def modules(self) -> list[tuple[str, torch.nn.Module]]:
        """Every module of all components, by name."""
        parts = [(name, part) for name, part in self.ours.components.items() if isinstance(part, torch.nn.Module)]
        return [(f"{part}.{name}", module) for part, component in parts for name, module in component.named_modules()]

    @property
    def scale(self) -> str:
        """The argument that is the guidance scale."""
        return "true_cfg_scale" if self.name == "flux" else "guidance_scale"

    def plain(self) -> torch.Tensor:
        """Latents of a small stock call: what must be the same before and after anything."""
        with torch.no_grad():
            return self.stock("a cat", **self.call, generator=seed(0)).images


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def pair_of(name: str, stock: Any) -> Pair:
    """Ours beside a stock pipeline."""
    height, width = SIZES.get(name, (16, 16))
    call = FAMILIES["sd" if name == "tiny-sd" else name].call
    steps = 2 if name.startswith("pixart") else 1  # whose loop takes a single step for a consistency model's
    call = {**call, "height": height, "width": width, "num_inference_steps": steps, "output_type": "latent"}
    stock.set_progress_bar_config(disable=True)
    found = Pair(name, stock, guided(stock), call)
    with torch.no_grad():
        for part, encoder in stock.components.items():
            if part.startswith("text_encoder"):
                encoder(torch.tensor([[1, 2]]), output_hidden_states=True)  # which transformers hooks for good
    _ = found.expected
    return found


def pair(name: str) -> Pair:
    """The one pair of a family, or of the embedded model."""
    if name not in _PAIRS:
        tiny = name == "tiny-sd"
        stock = (
            diffusers.StableDiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None)
            if tiny
            else stock_pipeline(name)
        )
        _PAIRS[name] = pair_of(name, stock)
    return _PAIRS[name]


def renew(name: str) -> None:
    """Another pair from now on: something was left in this one."""
    _PAIRS.pop(name, None)


_PAIRS: dict[str, Pair] = {}


@contextmanager
def surroundings(kind: str):
    """What a caller may have switched on around a call."""
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    elif kind == "inference mode":
        with torch.inference_mode():
            yield
    elif kind == "default dtype":
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
    else:
        yield


SURROUNDINGS = ["autocast", "inference mode", "default dtype"]
