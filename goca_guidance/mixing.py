"""How the loop of a stock pipeline mixes its two predictions: by which argument, with which formula."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusers import DiffusionPipeline


Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Mixing:
    """How a loop mixes a conditional prediction c and an unconditional one u by a scale s.

    Args:
        scale: name of the argument that is s; None where a pipeline has none.
        excess: what the effective scale S, of u + S (c - u), has more than s: one, where the loop computes c + s (c - u).
        least: s above which it mixes at all.
        product: whether s (c - u) is computed as that product; else one prediction is replaced.
    """

    scale: str | None = "guidance_scale"
    excess: int = 0
    least: float = 1.0
    product: bool = True


SCALES = ("true_cfg_scale", "guidance_scale")  # arguments; true guidance (Flux) has precedence
FURTHER = ("guidance_scale_2",)  # of a second denoiser (Wan 2.2)
FORMULAS = {  # by how the pipeline's name begins, where it is not u + s (c - u), or another argument is the scale
    "ChromaInpaint": Mixing(),  # has a `true_cfg_scale` that it asks nowhere
    "ZImage": Mixing(excess=1, least=0),
    "Krea2": Mixing(excess=1, least=0),
    "Cosmos3": Mixing(),
    "Cosmos": Mixing(excess=1),
    "Kandinsky3": Mixing(excess=1, product=False),
    "StableCascade": Mixing(product=False),
    "LTX2": Mixing(product=False),
    "Ideogram4": Mixing(product=False),
}

UNSERVED = {  # by how the pipeline's name begins, why regions cannot guide it
    **dict.fromkeys(("AudioLDM", "StableAudio", "LongCatAudio", "MusicLDM"), "it makes sounds, which have no regions"),
    "ShapE": "it makes shapes in space, which have no regions",
    "KandinskyPrior": "it makes an embedding of a picture, which has no regions",
    "KandinskyV22": "its denoiser reads an embedding of a picture, not the words",
    **dict.fromkeys(
        ("KandinskyPipeline", "KandinskyImg2Img", "KandinskyInpaint"),
        "its denoiser reads an embedding of a picture beside the words, mixed with them",
    ),
    "Cosmos3": "it mixes pictures and sounds",
    "Kandinsky6": "it mixes pictures and sounds",
    "SanaWM": "nobody has looked where its text and its pixels stand",
    "AnyFlowFAR": "it makes a video chunk by chunk, and its attention, which is compiled, reads the past from a cache",
    "HeliosPyramid": "it makes a video at several sizes, one after another",
    "EasyAnimateControl": "its own call fails in diffusers 0.42: it asks `encode_prompt` for a text encoder by a number",
    **dict.fromkeys(("BlipDiffusionControlNet", "JoyImageEdit", "NucleusMoE"), "nobody has run it with regions yet"),
}


def unserved(pipeline: type[DiffusionPipeline]) -> str | None:
    """Why regions cannot guide a stock pipeline class at all, where that is known."""
    return _by_name(UNSERVED, pipeline)


def _by_name(table: Mapping[str, Entry], pipeline: type[DiffusionPipeline]) -> Entry | None:
    """The first entry with which the name of a class, or of one that it is made from, begins."""
    names = [base.__name__ for base in pipeline.__mro__]
    return next((entry for begin, entry in table.items() if any(name.startswith(begin) for name in names)), None)


def scales_of(mixing: Mixing, arguments: Mapping[str, Any]) -> list[float]:
    """The scale of a call, or that of each step, where it has a schedule of them instead (Ideogram 4)."""
    scale, schedule = arguments[mixing.scale or ""], arguments.get("guidance_schedule")
    return [float(each) for each in schedule] if scale is None and schedule is not None else [float(scale)]


def mixing_of(pipeline: type[DiffusionPipeline]) -> Mixing:
    """How the loop of a stock pipeline class mixes."""
    arguments = inspect.signature(pipeline.__call__).parameters
    return _by_name(FORMULAS, pipeline) or Mixing(next((name for name in SCALES if name in arguments), None))
