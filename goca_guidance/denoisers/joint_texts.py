"""Transformers with joint attention, latents b c H W, whose text is laid out in a way of its own."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from goca_guidance.denoisers.base import DenoiserCall, Family, row
from goca_guidance.denoisers.joint import JointFamily, PackedFamily, valid_first
from goca_guidance.method.records import AttentionView


class Lumina2Family(JointFamily):
    """`Lumina2Transformer2DModel`: of each image the valid text, its pixels right behind it, and padding last.

    A refiner has mixed the tokens of the text before the first layer that is read.
    """

    pipeline = "Lumina2Pipeline"
    sink = "start"
    modules = r"layers\.\d+\.attn"

    def sizes(self, given: Mapping[str, Any]) -> DenoiserCall:
        call = super().sizes(given)
        lengths = given["encoder_attention_mask"].sum(1)  # the denoiser itself waits for them
        call = replace(call, text=int(lengths.max()))
        if bool((lengths == call.text).all()):
            return call
        return replace(call, order=_behind_texts(lengths, call.text, math.prod(self.grid("", call.latent))))


def _behind_texts(lengths: Int[Tensor, " b"], longest: int, pixels: int) -> Int[Tensor, "b n"]:
    """Where the text, padded to the longest, and then the pixels stand in sequences of text, pixels and padding."""
    text = torch.arange(longest, device=lengths.device).expand(len(lengths), -1)
    padding = text >= lengths[:, None]
    behind = lengths[:, None] + torch.arange(pixels, device=lengths.device)
    return torch.cat([text + pixels * padding, behind], 1)


class PRXFamily(JointFamily):
    """`PRXTransformer2DModel`: the pixels alone ask, the text is keys; in a latent space, or in pixels."""

    pipeline = "PRXPipeline"
    sink = "start"
    modules = r"blocks\.\d+\.attention"

    def view(self, call: DenoiserCall, name: str, queries: int, keys: int) -> AttentionView | None:
        return super().view(call, name, queries, keys) if queries == math.prod(self.grid(name, call.latent)) else None


class HiDreamFamily(JointFamily):
    """`HiDreamImageTransformer2DModel`: pixels, padded where the image is no square; the texts of T5, of Llama's last layer,
    and of the Llama layer that is the block's own.
    """

    pipeline = "HiDreamImagePipeline"
    encoders = (("text_encoder_3", "tokenizer_3"), ("text_encoder_4", "tokenizer_4"))
    modules = r"(double|single)_stream_blocks\.\d+\.block\.attn1"
    text_first = False

    def text(self, given: Mapping[str, Any]) -> list[Float[Tensor, "b n c"]]:
        layers, llama = self.denoiser.config.llama_layers, given["encoder_hidden_states_llama3"]
        return [given["encoder_hidden_states_t5"], llama[layers[-1]], llama[layers[0]]]

    def others(self, given: Mapping[str, Any]) -> int:
        """Padding."""
        latent = self.size(given)
        return 0 if latent[0] == latent[1] else self.denoiser.max_seq - math.prod(self.grid("", latent))


class HunyuanImageFamily(JointFamily):
    """`HunyuanImageTransformer2DModel`: pixels, and then of each image the valid tokens of ByT5's text, which is what a prompt
    has in quotes, the valid ones of Qwen's text, and the rest of both. The refiner has no ByT5, and latents b c 1 H W.

    A refiner has mixed the tokens of Qwen's text before the first layer that is read.
    """

    pipeline = "HunyuanImagePipeline"
    text_first = False

    def text(self, given: Mapping[str, Any]) -> list[Float[Tensor, "b n c"]]:
        """In the order of the tokens; only so many channels as both texts have."""
        qwen, glyphs = given["encoder_hidden_states"], given.get("encoder_hidden_states_2")
        if glyphs is None:
            return [qwen]
        channels = min(qwen.shape[-1], glyphs.shape[-1])
        both = torch.cat([glyphs[..., :channels], qwen[..., :channels]], 1)
        valid = torch.cat([given["encoder_attention_mask_2"], given["encoder_attention_mask"]], 1).bool()
        return [valid_first(both, valid)]

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(self.sample(given).shape[2:])


class Ideogram4Family(PackedFamily):
    """`Ideogram4Transformer2DModel`: a stream of padding, text and pixels, each a patch of latent pixels already.

    Without words another model of the kind predicts, which sees the pixels alone. The text encoder's layers are called one by
    one: what it reads is seen where it looks up ids.
    """

    pipeline = "Ideogram4Pipeline"
    encoders = (("text_encoder.language_model.embed_tokens", "tokenizer"),)
    modules = r"layers\.\d+\.attention"
    patch = 1
    positions = "position_ids"

    def size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        return self._read(given)[:2]

    def others(self, given: Mapping[str, Any]) -> int:
        return 0

    def text(self, given: Mapping[str, Any]) -> list[Float[Tensor, "b n c"]]:
        text = given["encoder_hidden_states"]
        return [text[:, : text.shape[1] - math.prod(self.size(given))]]

    def of_pictures(self, positions: Num[Tensor, "n axes"]) -> Num[Tensor, "m axes"]:
        """They stand last, at one place of the first axis."""
        return positions[positions[:, 0] == positions[-1, 0]]


class GlmImageFamily(JointFamily):
    """`GlmImageTransformer2DModel`, which never sees the words of a prompt."""

    @property
    def preset(self):
        raise ValueError(
            "Expected a denoiser that reads the words of the prompt, but GLM-Image's gets tokens of a picture that a language "
            "model has made of them, and no region can be found by them: use the stock pipeline."
        )


# ---- rows ------------------------------------------------------------------------------------------------------------
JOINT_TEXTS: dict[str, type[Family]] = {
    "CogView3PlusTransformer2DModel": row(
        JointFamily, pipeline="CogView3PlusPipeline", modules=r"transformer_blocks\.\d+\.attn1"
    ),
    "CogView4Transformer2DModel": row(
        JointFamily, pipeline="CogView4Pipeline", modules=r"transformer_blocks\.\d+\.attn1", sink="start"
    ),
    "GlmImageTransformer2DModel": GlmImageFamily,
    "HiDreamImageTransformer2DModel": HiDreamFamily,
    "HunyuanImageTransformer2DModel": HunyuanImageFamily,
    "Ideogram4Transformer2DModel": Ideogram4Family,
    "Lumina2Transformer2DModel": Lumina2Family,
    "PRXTransformer2DModel": PRXFamily,
}
