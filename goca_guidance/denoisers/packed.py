"""Transformers with joint attention whose latents are packed: rows of `joint.PackedFamily`, and what differs more."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from goca_guidance.denoisers.base import DenoiserCall, Family, row
from goca_guidance.denoisers.joint import PackedFamily
from goca_guidance.method.records import AttentionView


class QwenFamily(PackedFamily):
    """`QwenImageTransformer2DModel`: the pictures' grids are told (`img_shapes`), the image's own first.

    Qwen-Image-Layered denoises several images at once, frames of one latent; its last picture is the one it takes apart.
    """

    @property
    def layered(self) -> bool:
        return bool(self.denoiser.config.use_layer3d_rope)

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        if not self.layered:
            return super().size(given)
        frames, (_, rows, columns) = len(_shapes(given)) - 1, _shapes(given)[0]
        return frames, self.patch * rows, self.patch * columns

    def _read(self, given) -> tuple[int, int, int]:
        (_, rows, columns), *others = _shapes(given)
        return rows, columns, sum(map(math.prod, others[-1:] if self.layered else others))

    def pack(self, maps: Float[Tensor, "b c *S"]) -> Float[Tensor, "b n e"]:
        if maps.ndim == 4:
            return super().pack(maps)
        return torch.cat([super(QwenFamily, self).pack(layer) for layer in maps.unbind(2)], 1)

    def unpack(self, prediction: Float[Tensor, "b n e"], call: DenoiserCall) -> Float[Tensor, "b c *S"]:
        if len(call.latent) == 2:
            return super().unpack(prediction, call)
        one = DenoiserCall(call.batch, call.latent[1:], call.text)
        layers = prediction.chunk(call.latent[0], 1)
        return torch.stack([super(QwenFamily, self).unpack(layer, one) for layer in layers], 2)


def _shapes(given: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of each picture of the first image; a pipeline with one picture may leave out the list."""
    shapes = given["img_shapes"][0]
    return list(shapes) if isinstance(shapes[0], (tuple, list)) else [shapes]


class Qwen21Family(PackedFamily):
    """`QwenImage21Transformer2DModel`: other pictures stand among the text, where the text encoder saw them, the image last.

    A token is a latent pixel. The pixels alone ask: what stands before them is kept from the first step on.
    """

    pipeline = "QwenImage21Pipeline"
    encoders = (("text_encoder", "processor"),)
    patch = 1
    segmented = True

    def _read(self, given) -> tuple[int, int, int]:
        *others, (_, rows, columns) = _shapes(given)
        return rows, columns, sum(map(math.prod, others))

    def text(self, given: Mapping[str, Any]) -> list[Tensor]:
        """Without the places of pictures, which all images have in common."""
        text = given["encoder_hidden_states"]
        return [text if len(_shapes(given)) == 1 else text[:, ~given["img_mask"][0, : text.shape[1]]]]

    def sizes(self, given: Mapping[str, Any]) -> DenoiserCall:
        call = super().sizes(given)
        if not call.others:
            return call
        slots = given["img_mask"][0]
        pictures = slots.repeat_interleave(torch.where(slots, 4, 1))  # a place of the text encoder's is 2 x 2 tokens
        seen, text = pictures.nonzero()[:, 0], (~pictures).nonzero()[:, 0]
        order = torch.cat([text, seen[call.others :], seen[: call.others]])
        return replace(call, order=order.expand(call.batch, -1))

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        return super().view(call, name, queries, keys) if queries == math.prod(call.latent) else None


class FiboFamily(PackedFamily):
    """`BriaFiboTransformer2DModel`: FIBO and FIBO Edit, which mixes the tokens of the pictures too.

    Whether a token holds one latent pixel or 2 x 2 cannot be told: a token counts as one.
    """

    patch = 1

    def unpack(self, prediction: Float[Tensor, "b n e"], call: DenoiserCall) -> Float[Tensor, "b c H W"]:
        return super().unpack(prediction[:, : prediction.shape[1] - call.others], call)


# ---- rows ------------------------------------------------------------------------------------------------------------
PACKED: dict[str, type[Family]] = {
    "QwenImageTransformer2DModel": row(QwenFamily, pipeline="QwenImagePipeline"),
    "QwenImage21Transformer2DModel": Qwen21Family,
    "ChromaTransformer2DModel": row(PackedFamily, pipeline="ChromaPipeline"),
    # Its latent pixels are patches already.
    "Flux2Transformer2DModel": row(PackedFamily, pipeline="Flux2KleinPipeline", patch=1),
    "OvisImageTransformer2DModel": row(PackedFamily, pipeline="OvisImagePipeline"),
    "LongCatImageTransformer2DModel": row(PackedFamily, pipeline="LongCatImagePipeline"),
    "BriaTransformer2DModel": row(PackedFamily, pipeline="BriaPipeline"),
    "BriaFiboTransformer2DModel": row(FiboFamily, pipeline="BriaFiboPipeline"),
    "Krea2Transformer2DModel": row(PackedFamily, pipeline="Krea2Pipeline", positions="position_ids"),
}
