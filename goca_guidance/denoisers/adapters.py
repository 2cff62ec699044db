"""The adapter of a denoiser: those of the first transformers with cross-attention, and which one a denoiser has."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from goca_guidance.config import LayerPreset
from goca_guidance.denoisers.base import Family, self_attention_beside
from goca_guidance.denoisers.by_frame import BY_FRAME, motion_family
from goca_guidance.denoisers.cross import CROSS
from goca_guidance.denoisers.frames import FRAMES
from goca_guidance.denoisers.joint import JOINT
from goca_guidance.denoisers.joint_texts import JOINT_TEXTS
from goca_guidance.denoisers.packed import PACKED
from goca_guidance.denoisers.streams import STREAMS
from goca_guidance.denoisers.unets import UNETS, unet_family
from goca_guidance.denoisers.unknown import UnknownFamily
from goca_guidance.denoisers.words import bare


# ---- transformers with cross-attention -------------------------------------------------------------------------------
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


# ---- choice ----------------------------------------------------------------------------------------------------------
ADAPTERS: dict[str, type[Family]] = {
    "PixArtTransformer2DModel": PixArtFamily,
    "HunyuanDiT2DModel": HunyuanFamily,
    **CROSS,
    **JOINT,
    **PACKED,
    **STREAMS,
    **JOINT_TEXTS,
    **FRAMES,
    **BY_FRAME,
    **UNETS,
}


def family_of(denoiser: Any) -> Family:
    """The adapter of a denoiser, a compiled one looked through."""
    compiled = denoiser if hasattr(denoiser, "_orig_mod") else None
    denoiser = denoiser if compiled is None else compiled._orig_mod
    names = [cls.__name__ for cls in type(denoiser).__mro__]
    if "ModelMixin" not in names:
        raise ValueError(
            f"Expected a denoiser of diffusers, but got {names[0]}: pass the model itself, not a wrapper."
        )
    if "UNet2DConditionModel" in names:
        return unet_family(denoiser)(denoiser, compiled)
    if "UNetMotionModel" in names:
        return motion_family(denoiser)(denoiser, compiled)
    if row := next((ADAPTERS[name] for name in names if name in ADAPTERS), None):
        return row(denoiser, compiled)
    generic = Family(denoiser, compiled)
    layers = generic.attention_modules.items()
    across = any(name.endswith("attn2") and getattr(layer, "is_cross_attention", True) for name, layer in layers)
    return generic if across else UnknownFamily(denoiser, compiled)


DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer")  # names of components
PRIORS = ("prior", "decoder")  # where a pipeline has none of these (Stable Cascade)


def denoisers_of(components: Mapping) -> list[torch.nn.Module]:
    """The denoisers among a pipeline's components, `unet` or `transformer` first."""
    found = _named(components, DENOISERS) or _named(components, PRIORS)
    if not found:
        raise ValueError(
            f"Expected a `unet` or a `transformer` among the components, but got {', '.join(sorted(components))}."
        )
    return found


def _named(components: Mapping, names: tuple[str, ...]) -> list[torch.nn.Module]:
    return [components[name] for name in names if components.get(name) is not None]  # a compiled module has no truth


def denoiser_of(components: Mapping) -> torch.nn.Module:
    """The first denoiser among a pipeline's components."""
    return denoisers_of(components)[0]


def text_encoders_of(pipe, family: Family) -> list[tuple[Any, Any]]:
    """The text encoders whose tokens the denoiser sees, with their tokenizers; None for an encoder that is not loaded."""
    found = [(_part(pipe, model), getattr(pipe, tokenizer, None)) for model, tokenizer in family.encoders]
    found = [(model, bare(tokenizer)) for model, tokenizer in found if tokenizer is not None]
    return found[:1] if family.side_by_side else found


def _part(pipe, name: str) -> Any:
    """A component, or a module in it."""
    for step in name.split("."):
        pipe = getattr(pipe, step, None)
    return pipe
