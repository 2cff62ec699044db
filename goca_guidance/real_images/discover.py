"""Segments of real images without any names: DiffCut (arXiv 2406.02842) on the features of a U-Net's encoder."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from goca_guidance.config import layers_named
from goca_guidance.denoisers.base import Family
from goca_guidance.hooks.observer import check_seen
from goca_guidance.hooks.shared import hook_here
from goca_guidance.method.diffcut import cut
from goca_guidance.method.maps import nearest_index
from goca_guidance.method.records import AttentionRecord
from goca_guidance.real_images.forwards import Forwards, noised
from goca_guidance.schema import Count, Positive, checked


@torch.no_grad()
@checked
def discover(
    pipe: DiffusionPipeline,
    stock: type[DiffusionPipeline],
    images,
    *,
    threshold: float = 0.5,
    alpha: Positive = 10.0,
    timestep: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    height: Count | None = None,
    width: Count | None = None,
    size: Count = 128,
    layer: str | None = None,
) -> list[Int[Tensor, "_ _"]]:
    """Segment real images without names (DiffCut, arXiv 2406.02842): recursive normalised cut of dense features.

    `pipe` and `stock` as in [`goca_guidance.real_images.segment.segment`]; the other arguments are those of
    [`goca_guidance.GoCASCFGPipeline.discover`].
    """
    noisy = noised(pipe, images, 50 if timestep is None else timestep, 1, generator, height, width)
    forwards = Features(pipe, noisy.family, layer)
    features = forwards.run(stock, [""] * len(noisy.pictures), noisy.samples, noisy.size)
    labels = cut(features, (size, size), threshold, alpha).cpu()
    sizes = [picture.size[::-1] for picture in noisy.pictures]
    return [
        label_map.flatten()[nearest_index((size, size), to, label_map.device)].unflatten(0, to)
        for label_map, to in zip(labels, sizes, strict=True)
    ]


class Features(Forwards):
    """Output of one self-attention layer, [b c H W]: the one of this name, or the last one of a U-Net's encoder."""

    def __init__(self, pipe: DiffusionPipeline, family: Family, layer: str | None = None):
        super().__init__(pipe, family)
        known = family.preset.self_attention
        encoder = [name for name in known if name.startswith("down_blocks.")]
        if not encoder:
            raise ValueError(
                "Expected a U-Net, whose encoder has attention layers, but got "
                f"{type(family.denoiser).__name__}: DiffCut is defined for U-Nets."
            )
        self.layer = (encoder if layer is None else layers_named([layer], known))[-1]
        self._features: Any = None  # of the forward in progress

    def run(self, stock, prompts: Sequence[str], samples, size=None, arguments=None) -> Float[Tensor, "b c H W"]:
        layer = self.family.attention_modules[self.layer]
        with ExitStack() as stack:
            stack.callback(hook_here(layer.register_forward_hook, self._see).remove)
            return super().run(stock, prompts, samples, size, arguments)

    def on_attention(self, record: AttentionRecord) -> None:
        """The layer's output is what is wanted, not its attention."""

    def result(self) -> Float[Tensor, "b c H W"]:
        grid = self.family.grid(self.layer, self.call.latent)
        check_seen([self.layer], {self.layer} if self._features.shape[1] == math.prod(grid) else set())
        features, self._features = self._features.mT.unflatten(-1, grid).float(), None
        return features

    def _see(self, module, args, output):
        self._features = output
