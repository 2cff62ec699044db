"""Transformers with text cross-attention that differ from `base.Family`: rows of it, and what differs more."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import Family


class SanaFamily(Family):
    """`SanaTransformer2DModel`: self-attention is linear and has no map. Words are read, but no layer can be compared with the
    dense features of another, and nothing refines.
    """

    pipeline = "SanaPipeline"
    sink_measured = False
    unconditional_sink = False

    @cached_property
    def preset(self) -> LayerPreset:
        text = tuple(name for name in self.attention_modules if name.endswith(".attn2"))
        return LayerPreset(text, (), text[len(text) // 2], (), order=0)


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
CROSS: dict[str, type[Family]] = {
    "LuminaNextDiT2DModel": LuminaFamily,
    "SanaTransformer2DModel": SanaFamily,
}
