"""Transformers with a single stream of pixels and text, latents b c H W."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


# ---- rows ------------------------------------------------------------------------------------------------------------
STREAMS: dict[str, type[Family]] = {
    "ZImageTransformer2DModel": row(ZImageFamily, pipeline="ZImagePipeline"),
    "ErnieImageTransformer2DModel": row(
        JointFamily,
        pipeline="ErnieImagePipeline",
        modules=r"layers\.\d+\.self_attention",
        texts=("text_bth",),
        text_first=False,
    ),
}
