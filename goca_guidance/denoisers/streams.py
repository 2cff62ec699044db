"""Transformers with a single stream of pixels and text, latents b c H W."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import DenoiserCall, Family, row
from goca_guidance.denoisers.joint import JointFamily
from goca_guidance.method.records import AttentionView


class ZImageFamily(JointFamily):
    """`ZImageTransformer2DModel`: a list of images c 1 H W, the conditional half first, each with a text of its own length.

    Pixels, then text, both padded to a multiple of 32 tokens. The loop mixes each image by itself.
    """

    samples = ("x",)
    texts = ("cap_feats",)
    modules = r"layers\.\d+\.attention"
    text_first = False
    branches = (1, 0)
    by_image = True
    multiple = 32

    @property
    def patch(self) -> int:
        return self.denoiser.config.all_patch_size[0]

    def sample(self, given: Mapping[str, Any]) -> Float[Tensor, "b c 1 H W"]:
        if isinstance(given["x"][0], list):
            raise ValueError(
                "Expected one picture for each prompt, but Z-Image Omni got others to look at, in the same sequence: leave "
                "out `image`, or pass use_scfg=False."
            )
        return torch.stack(list(given["x"]))

    def as_given(self, sample: Float[Tensor, "b c 1 H W"]) -> list[Tensor]:
        return list(sample)

    def text(self, given: Mapping[str, Any]) -> list[Tensor]:
        return [pad_sequence(list(given["cap_feats"]), batch_first=True)]

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(given["x"][0].shape[-2:])

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        grid = self.grid(name, call.latent)
        start = self._padded(math.prod(grid))
        if keys != start + self._padded(call.text):
            return None
        return AttentionView(grid, slice(start, start + call.text), slice(0, math.prod(grid)))

    def _padded(self, tokens: int) -> int:
        return -(-tokens // self.multiple) * self.multiple

    def pack(self, maps: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c 1 H W"]:
        return maps[:, :, None]

    def unpack(self, prediction: Float[Tensor, "b c 1 H W"], call: DenoiserCall) -> Float[Tensor, "b c H W"]:
        return prediction[:, :, 0]


@dataclass(frozen=True)
class GistCall(DenoiserCall):
    """`start`: of the image's own tokens in the stream."""

    start: int = 0


class Fibo2Family(Family):
    """`BriaFibo2Transformer2DModel`: a stream of gist tokens, which a resampler made of the text, pixels, and other pictures.

    Words are keys in the cross-attention of a few blocks alone. Where a batch has gist tokens that are padding, they stand
    behind all others. Its self-attention is compared and refines as elsewhere.
    """

    pipeline = "BriaFibo2Pipeline"
    encoders = (("text_encoder", "processor"),)
    sink = "end"
    sink_measured = False
    unconditional_sink = False
    modules = r"layers\.\d+\.(cross_)?attention"

    @cached_property
    def preset(self) -> LayerPreset:
        text = tuple(name for name in self.attention_modules if name.endswith("cross_attention"))
        beside, count = tuple(name.replace("cross_", "") for name in text), len(text)
        refine = beside[count // 3 : max(count // 3 + 1, 2 * count // 3)]
        return LayerPreset(text, beside, text[count // 2], refine, heads="uniform", features="output")

    def text(self, given: Mapping[str, Any]) -> list[Tensor]:
        """Of several layers of the text encoder those that the resampler reads."""
        return [given["encoder_hidden_states"][:, 0]]

    def others(self, given: Mapping[str, Any]) -> int:
        return sum(math.prod(self.grid("", picture.shape[-2:])) for picture in given.get("context_latents") or ())

    def call(self, args: tuple, kwargs: Mapping) -> DenoiserCall:
        call, given = super().call(args, kwargs), self.bound(args, kwargs)
        counts = self._gist_counts(given, call)
        start = max(counts) if len(set(counts)) == 1 else 0
        return GistCall(call.batch, call.latent, call.text, call.others, start=start)

    def _gist_counts(self, given, call) -> list[int]:
        """Of each image, as the denoiser itself counts them."""
        from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

        mask, config = given.get("encoder_attention_mask"), self.denoiser.config
        lengths = [call.text] * call.batch if mask is None else mask.sum(1).tolist()
        limits = (config.min_num_gist_tokens, config.max_num_gist_tokens, config.gist_step)
        return compute_gist_count(lengths, *limits, config.gist_min_text_len, config.gist_max_text_len)

    def view(self, call: Any, name: str, queries: int, keys: int) -> AttentionView | None:
        grid = self.grid(name, call.latent)
        own = slice(call.start, call.start + math.prod(grid))
        text = name.endswith("cross_attention")
        if queries < own.stop + call.others or keys != (call.text if text else queries):
            return None
        return AttentionView(grid, **{"text": slice(0, keys)} if text else {"image": own}, queries=own)


# ---- rows ------------------------------------------------------------------------------------------------------------
STREAMS: dict[str, type[Family]] = {
    "ZImageTransformer2DModel": row(ZImageFamily, pipeline="ZImagePipeline"),
    "BriaFibo2Transformer2DModel": Fibo2Family,
    "ErnieImageTransformer2DModel": row(
        JointFamily,
        pipeline="ErnieImagePipeline",
        modules=r"layers\.\d+\.self_attention",
        texts=("text_bth",),
        text_first=False,
    ),
}
