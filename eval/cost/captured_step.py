"""Attention of one step of a stock pipeline, copied so that segmentors can read it again and again."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from eval.cost.full_size import arguments, build, guided_arguments
from eval.cost.naive import NaiveSegmentor
from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.denoisers.adapters import denoiser_of, family_of, text_encoders_of
from goca_guidance.denoisers.layouts import named_layout, prompt_layout
from goca_guidance.hooks.observer import output_projection
from goca_guidance.hooks.watch import Watch
from goca_guidance.method.records import AttentionRecord, TokenLayout
from goca_guidance.method.segmentor import GoCASegmentor


@dataclass(frozen=True)
class Step:
    """Attention of one step, whose latents are of size `latent`.

    `calls`: the records of each denoiser call, in network order. A single call holds both predictions as the halves of a
    batch, the unconditional one first; of two calls the first one is the conditional prediction. `projections`: output
    projections [h*d c] of the text layers, without bias.
    """

    latent: tuple[int, ...]
    preset: LayerPreset
    layout: TokenLayout
    unconditional_sink: bool
    projections: dict[str, Float[Tensor, "hd c"]]
    calls: list[list[AttentionRecord]]

    def ours(self, config: GoCAConfig) -> GoCASegmentor:
        """The library's segmentor, which has read both predictions."""
        return self._fed(GoCASegmentor(config, self.preset, self.layout, self.unconditional_sink))

    def naive(self, config: GoCAConfig, dtype: torch.dtype = torch.float32) -> NaiveSegmentor:
        """The naive segmentor, which has read both predictions."""
        sink = self.unconditional_sink
        return self._fed(NaiveSegmentor(config, self.preset, self.layout, sink, self.projections, dtype))

    def _fed(self, segmentor):
        """The one place that knows how a segmentor is given records."""
        predictions = ((0, 1),) if len(self.calls) == 1 else ((1,), (0,))
        for branches, records in zip(predictions, self.calls, strict=True):
            for record in records:
                segmentor.keep(record, branches)
        return segmentor


class _Captured(Exception):  # noqa: N818
    """Both predictions were seen: nothing more is to run."""


class _Capture(Watch):
    """Copies what a segmentor may read of two predictions of so many images."""

    def __init__(self, family, text_encoders, images: int):
        super().__init__([family], text_encoders)
        self.awaited, self.calls = 2 * images, []

    def on_forward(self, call, device) -> None:
        if not self.awaited:
            raise _Captured
        self.observer.projected = frozenset(self.family.preset.text)
        self.awaited -= call.batch
        self.calls.append([])

    def on_attention(self, record) -> None:
        tensors = {name: getattr(record, name) for name in ("query", "key", "output", "features")}
        copies = {name: None if x is None else x.clone() for name, x in tensors.items()}
        self.calls[-1].append(replace(record, value=None, **copies))


@torch.no_grad()
def capture(pipe: DiffusionPipeline, images: int, words: Mapping[str, Sequence[int]] | None = None, **call) -> Step:
    """The first step of a stock pipeline's call of at least two steps; the second one is not run.

    `words`: positions of the regions' words, or none where the pipeline reads them in a prompt.
    """
    family = family_of(denoiser_of(pipe.components))
    watch = _Capture(family, text_encoders_of(pipe, family), images)
    with watch.installed(), suppress(_Captured):
        pipe(**call)
    if words is None:
        layout = prompt_layout(watch.encoded(), family.sink, drop_stop_words=True)
    else:
        layout = named_layout(words, images, watch.call.text, family.sink, watch.encoded())
    layout, records = layout.to(watch.calls[0][0].query.device), {record.name: record for record in watch.calls[0]}
    projections = {name: output_projection(family.project(name), records[name].query) for name in family.preset.text}
    return Step(watch.call.latent, family.preset, layout, family.unconditional_sink, projections, watch.calls)


def full_size(
    family: str, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32, sharper: float = 1
) -> Step:
    """One image's step of an architecture with random weights, whose queries are made louder by a factor."""
    pipe = build(family, device, dtype)
    sharpen(denoiser_of(pipe.components), sharper)
    call = arguments(family, pipe, size, batch=1, steps=2)
    return capture(pipe, 1, guided_arguments(family).get("region_tokens"), **call)


def sharpen(denoiser: torch.nn.Module, factor: float) -> None:
    """Louder queries, for random weights: their attention is nearly even, and min-max of it mostly float32's rounding."""
    for name, module in denoiser.named_modules():
        if name.endswith(("to_q", "norm_q")):
            module.weight.data *= factor
