"""Transformers whose text and pixels attend to each other in one call: a row of facts each, code where facts do not do."""

import math
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import DenoiserCall, Family, all_layers, row
from goca_guidance.method.records import AttentionView


class JointFamily(Family):
    """A transformer with joint attention, its latents b c H W; nobody has picked layers for it, or looked for its sink.

    All its layers are read; the middle one is the reference, and the middle third refines. Heads are uniform, as for Flux, and
    the sink is read in the conditional prediction: the unconditional one would cost all its joint attention again.
    """

    sink = "end"
    sink_measured = False
    unconditional_sink = False
    modules = r"(single_)?transformer_blocks\.\d+\.attn"
    text_first: ClassVar[bool] = True  # in the sequence
    registers: ClassVar[int] = 0  # tokens before all others that are neither text nor pixels
    features: ClassVar[Literal["query", "output"]] = "output"  # dense features of the reference layer

    @cached_property
    def preset(self) -> LayerPreset:
        names = tuple(self.attention_modules)
        if not names:
            raise ValueError(f"Expected joint attention layers in {type(self.denoiser).__name__}, but found none.")
        return all_layers(names, names, heads="uniform", features=self.features)

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        grid = self.grid(name, call.latent)
        pixels, start = math.prod(grid), self.registers
        if keys != start + call.text + pixels + call.others:
            return None
        if self.text_first:
            text = slice(start, start + call.text)
            return AttentionView(grid, text, slice(text.stop, text.stop + pixels), call.order)
        return AttentionView(grid, slice(start + pixels + call.others, keys), slice(start, start + pixels), call.order)

    def latents(self, channels: int) -> tuple[int | None, ...] | None:
        return None


class PackedFamily(JointFamily):
    """Latents are packed into tokens b n e of 2 x 2 latent pixels, b c (h 2) (w 2) to b (h w) (c 2 2).

    Where they stand is read off their positions, `img_ids` n 3, whose first column tells pictures apart: the image's own
    tokens come first.
    """

    patch = 2
    packed = True
    positions: ClassVar[str] = "img_ids"

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        tokens = self.sample(given).shape[1]
        if tokens == 0:
            raise ValueError(
                "Expected an image of at least one pixel token, but the denoiser got none: use a larger height and width."
            )
        rows, columns, others = self._read(given)
        if rows * columns + others != tokens:
            raise ValueError(
                f"Expected the {rows} x {columns} tokens of one image, but the denoiser got {tokens}: this pipeline puts "
                "other pictures into the sequence that cannot be told apart. Pass use_scfg=False."
            )
        return self.patch * rows, self.patch * columns

    def others(self, given: Mapping[str, Any]) -> int:
        return self._read(given)[2]

    def _read(self, given) -> tuple[int, int, int]:
        """Rows and columns of the image's own tokens, and how many others there are."""
        tokens = self.sample(given).shape[1]
        rows, columns, others = self.once(given[self.positions], partial(self._grid, tokens))
        return rows, columns, others

    def _grid(self, tokens: int, positions: Num[Tensor, "... axes"]) -> tuple[int, int, int]:
        return _grid(self.of_pictures(positions.reshape(-1, positions.shape[-1])[-tokens:]))

    def of_pictures(self, positions: Num[Tensor, "n axes"]) -> Num[Tensor, "m axes"]:
        """The positions of pixels; those of the text, which may stand before, are left out."""
        return positions

    def pack(self, maps: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n e"]:
        return F.pixel_unshuffle(maps, self.patch).flatten(2).mT

    def unpack(self, prediction: Float[Tensor, "b n e"], call: DenoiserCall) -> Float[Tensor, "b c H W"]:
        return F.pixel_shuffle(prediction.mT.unflatten(2, (call.latent[0] // self.patch, -1)), self.patch)


def _grid(positions: Num[Tensor, "n axes"]) -> tuple[int, int, int]:
    """Rows and columns of the first picture, by columns 1 and 2 of the positions; how many tokens are of others."""
    own = positions[:, 0] == positions[0, 0]
    first, last = positions[own][:, 1:3].aminmax(dim=0)
    rows, columns = (int(n) + 1 for n in last - first)
    return rows, columns, len(own) - int(own.sum())


class FluxFamily(PackedFamily):
    """`FluxTransformer2DModel`: Flux.1."""

    pipeline = "FluxPipeline"
    encoders = (("text_encoder_2", "tokenizer_2"),)  # the other one makes no tokens
    sink_measured = True

    @cached_property
    def preset(self) -> LayerPreset:
        """The released configuration for Flux.1's 19 + 38 blocks, else a generic one."""
        names = tuple(self.attention_modules)
        double = sum(name.startswith("transformer_blocks") for name in names)
        refine: tuple[str, ...]
        if (double, len(names)) == (19, 57):
            reference, refine = names[19 + 8], (names[12], names[18])
        else:
            reference, refine = names[len(names) // 2], names[len(names) // 3 : 2 * len(names) // 3]
        return LayerPreset(names, names, reference, refine, timestep=150, heads="uniform", features="output")

    def latents(self, channels: int) -> tuple[int | None, ...] | None:
        return None, channels * self.patch**2


class SD3Family(JointFamily):
    """`SD3Transformer2DModel`: the text is CLIP's tokens, then T5's.

    Its dense features are the queries, and its sink the start token, as for Stable Diffusion 1. The second attention of dual
    blocks sees no text and is not read.
    """

    pipeline = "StableDiffusion3Pipeline"
    encoders = (("text_encoder", "tokenizer"), ("text_encoder_3", "tokenizer_3"))
    sink = "start"
    text_first = False
    features = "query"

    def latents(self, channels: int) -> tuple[int | None, ...] | None:
        return channels, None, None


def valid_first(text: Float[Tensor, "b n c"], valid: Bool[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    """Tokens of each image, those that are no padding before the others, else in their order."""
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    return text.take_along_dim(order[..., None], 1)


# ---- rows ------------------------------------------------------------------------------------------------------------
JOINT: dict[str, type[Family]] = {
    "FluxTransformer2DModel": FluxFamily,
    "SD3Transformer2DModel": SD3Family,
    "AuraFlowTransformer2DModel": row(
        JointFamily,
        pipeline="AuraFlowPipeline",
        modules=r"(joint|single)_transformer_blocks\.\d+\.attn",
        registers=8,
    ),
}
