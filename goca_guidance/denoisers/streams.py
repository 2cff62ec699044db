"""Transformers with a single stream of pixels and text, latents b c H W."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import DenoiserCall, Family, all_layers, row
from goca_guidance.denoisers.joint import JointFamily
from goca_guidance.method.records import AttentionView


class ZImageFamily(JointFamily):
    """`ZImageTransformer2DModel`: a list of images c 1 H W, the conditional half first, each with a text of its own length.

    Pixels, then text, both padded to a multiple of 32 tokens. The loop mixes each image by itself. Omni puts the parts of the
    text first, then other pictures and the image, then what a vision encoder saw of them, each padded alike.
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
        return torch.stack([_own(pictures) for pictures in given["x"]])

    def as_given(self, sample: Float[Tensor, "b c 1 H W"]) -> list[Tensor]:
        return list(sample)

    def text(self, given: Mapping[str, Any]) -> list[Tensor]:
        texts = (torch.cat(parts) if isinstance(parts, list) else parts for parts in given["cap_feats"])
        return [pad_sequence(list(texts), batch_first=True)]

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(_own(given["x"][0]).shape[-2:])

    def sizes(self, given: Mapping[str, Any]) -> DenoiserCall:
        call = super().sizes(given)
        if not isinstance(given["x"][0], list):
            return call
        parts = [self._parts(given, image) for image in range(call.batch)]
        keys = max(sum(map(self._padded, [*texts, *pictures, *seen])) for texts, pictures, seen in parts)
        order = [self._order(texts, pictures, call.text, keys) for texts, pictures, _ in parts]
        return replace(call, order=torch.tensor(order, device=given["x"][0][-1].device))

    def _parts(self, given, image) -> tuple[list[int], list[int], list[int]]:
        """Tokens of each part of the text, of each picture, the image last, and of what was seen of each; 0 for none."""
        pictures = [math.prod(self.grid("", picture.shape[-2:])) for picture in given["x"][image]]
        seen = (given.get("siglip_feats") or {image: None})[image] or ()
        features = [self.multiple if picture is None else math.prod(picture.shape[:2]) for picture in seen]
        return [len(part) for part in given["cap_feats"][image]], pictures, features

    def _order(self, texts, pictures, longest, keys) -> list[int]:
        """Text, made as long as the longest of the batch, then the image, then all others."""
        starts = list(accumulate(map(self._padded, [*texts, *pictures]), initial=0))
        text = [start + i for start, length in zip(starts, texts, strict=False) for i in range(length)]
        own = range(starts[-2], starts[-2] + pictures[-1])
        others = sorted(set(range(keys)) - set(text) - set(own))
        short = longest - len(text)
        return [*text, *others[:short], *own, *others[short:]]

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        grid = self.grid(name, call.latent)
        if call.order is not None:
            own = slice(call.text, call.text + math.prod(grid))
            return AttentionView(grid, slice(0, call.text), own, call.order) if keys == call.order.shape[1] else None
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


def _own(pictures: Tensor | list[Tensor]) -> Tensor:
    """The picture that is denoised, of an image's: the last one."""
    return pictures[-1] if isinstance(pictures, list) else pictures


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
        beside = tuple(name.replace("cross_", "") for name in text)
        return all_layers(text, beside, heads="uniform", features="output")

    def read(self, layer: Tensor) -> Tensor:
        """Each token has a mean square of one."""
        states = layer.float()
        return (states * torch.rsqrt(states.pow(2).mean(dim=-1, keepdim=True) + 1e-6)).to(layer.dtype)

    def text(self, given: Mapping[str, Any]) -> list[Tensor]:
        """Of several layers of the text encoder those that the resampler reads."""
        return [given["encoder_hidden_states"][:, 0]]

    def others(self, given: Mapping[str, Any]) -> int:
        return sum(math.prod(self.grid("", picture.shape[-2:])) for picture in given.get("context_latents") or ())

    def sizes(self, given: Mapping[str, Any]) -> DenoiserCall:
        call = super().sizes(given)
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
