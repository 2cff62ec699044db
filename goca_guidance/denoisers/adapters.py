"""Which adapter a denoiser has, and which denoisers and text encoders a pipeline has."""

from collections.abc import Mapping
from typing import Any

import torch

from goca_guidance.denoisers.base import Family
from goca_guidance.denoisers.cross_attention import CROSS_ATTENTION
from goca_guidance.denoisers.joint import JOINT
from goca_guidance.denoisers.joint_texts import JOINT_TEXTS
from goca_guidance.denoisers.packed import PACKED
from goca_guidance.denoisers.streams import STREAMS
from goca_guidance.denoisers.unets import UNETS, unet_family
from goca_guidance.denoisers.unknown import UnknownFamily
from goca_guidance.denoisers.videos import VIDEOS
from goca_guidance.denoisers.videos_by_frame import VIDEOS_BY_FRAME, motion_family
from goca_guidance.denoisers.words import bare


ADAPTERS: dict[str, type[Family]] = {
    **CROSS_ATTENTION,
    **JOINT,
    **PACKED,
    **STREAMS,
    **JOINT_TEXTS,
    **VIDEOS,
    **VIDEOS_BY_FRAME,
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
