"""Transformers with text cross-attention that differ from `base.Family`: rows of it, and what differs more."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import Family, self_attention_beside, words_alone


class PixArtFamily(Family):
    """`PixArtTransformer2DModel`: PixArt-alpha and PixArt-Sigma."""

    pipeline = "PixArtSigmaPipeline"
    sink = "end"
    unconditional_sink = False

    @cached_property
    def preset(self) -> LayerPreset:
        """The papers' for 28 layers, else the generic one."""
        text = self._text_layers()
        if len(text) != 28:
            return self._generic_preset()
        beside = self_attention_beside(text)
        return LayerPreset(text, beside, text[13], beside[10:18], order=5)


class HunyuanFamily(Family):
    """`HunyuanDiT2DModel`: the text is BERT's tokens, then T5's."""

    pipeline = "HunyuanDiTPipeline"
    encoders = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    texts = ("encoder_hidden_states", "encoder_hidden_states_t5")

    @cached_property
    def preset(self) -> LayerPreset:
        """The released configuration for 40 layers, else the generic one."""
        text = self._text_layers()
        if len(text) != 40:
            return self._generic_preset()
        beside = self_attention_beside(text[20:30])
        return LayerPreset(text[20:30], beside, text[25], beside, order=4, heads="uniform")


class SanaFamily(Family):
    """`SanaTransformer2DModel`: self-attention is linear and has no map. Words are read, but no layer can be compared with the
    dense features of another, and nothing refines.
    """

    pipeline = "SanaPipeline"
    sink_measured = False
    unconditional_sink = False

    @cached_property
    def preset(self) -> LayerPreset:
        return words_alone(tuple(name for name in self.attention_modules if name.endswith(".attn2")))


class LuminaFamily(Family):
    """`LuminaNextDiT2DModel`: what a layer reads of the text goes through a gate for each head before it is projected."""

    pipeline = "LuminaPipeline"
    sink_measured = False
    unconditional_sink = False
    modules = r"layers\.\d+\.attn[12]"
    branches = (1, 0)

    @cached_property
    def preset(self) -> LayerPreset:
        return replace(self._generic_preset(), features="output")

    def project(self, name: str) -> Callable[[Tensor], Tensor]:
        block = self.denoiser.get_submodule(name.rpartition(".")[0])
        to_out, gate = block.attn2.to_out[0], block.gate.tanh()[:, None]
        return lambda x: to_out((x.unflatten(-1, (len(gate), -1)) * gate).flatten(-2))


# ---- rows ------------------------------------------------------------------------------------------------------------
CROSS_ATTENTION: dict[str, type[Family]] = {
    "HunyuanDiT2DModel": HunyuanFamily,
    "LuminaNextDiT2DModel": LuminaFamily,
    "PixArtTransformer2DModel": PixArtFamily,
    "SanaTransformer2DModel": SanaFamily,
}
