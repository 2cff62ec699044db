"""Denoisers of their published sizes and the arguments of one call, on "meta": what a step costs is counted on these.

Those of `eval.cost.full_size` get what their stock pipeline gives them; the others, whose pipelines are not built there, the
arguments written here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from eval.cost.full_size import ARCHITECTURES, T5_WORDS, arguments, build, guided_arguments
from eval.cost.operations import denoiser_inputs
from goca_guidance.denoisers.adapters import denoiser_of


DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A denoiser, and how it is called in a step.

    Args:
        create: the denoiser on "meta", and positional and keyword arguments of its call for so many images or videos.
        tokens: of pixels along each axis, at the finest layer.
        batched: both predictions are one batch; else each is a call.
        words: regions by token positions.
        segmentor: of `SCFGConfig`.
    """

    create: Callable[[int], tuple[torch.nn.Module, tuple, dict[str, Any]]]
    tokens: tuple[int, ...]
    batched: bool = True
    words: dict[str, list[int]] | None = None
    segmentor: Literal["goca", "s-cfg"] = "goca"


def _from_pipeline(name: str, images: int):
    pipe = build(name, "meta", DTYPE)
    call = arguments(name, pipe, ARCHITECTURES[name].size, images, steps=2)
    return denoiser_of(pipe.components), *denoiser_inputs(pipe, call)


def _stock(name: str, side: int, **facts) -> Case:
    """Of `full_size`, its pixel tokens `side` x `side`."""
    words = guided_arguments(name).get("region_tokens", {"cat": [5], "grass": [14]})
    return Case(partial(_from_pipeline, name), (side, side), words=words, **facts)


def _written(denoiser, inputs: Callable[[int], dict[str, Any]], tokens: tuple[int, ...], batched: bool) -> Case:
    """By the arguments of a denoiser's call for a batch."""

    def create(images: int):
        with torch.device("meta"):
            model = torch.nn.Module.to(denoiser().eval(), DTYPE)
            return model, (), inputs(2 * images if batched else images)

    return Case(create, tokens, batched, T5_WORDS)


def _of(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=DTYPE, device="meta")


def _qwen(b: int) -> dict[str, Any]:
    shapes = [[(1, 64, 64)]] * b
    return {"hidden_states": _of(b, 4096, 64), "encoder_hidden_states": _of(b, 64, 3584), "timestep": _of(b),
            "img_shapes": shapes}  # fmt: skip


def _flux2(b: int) -> dict[str, Any]:
    return {"hidden_states": _of(b, 4096, 128), "encoder_hidden_states": _of(b, 512, 15360), "timestep": _of(b),
            "img_ids": _of(b, 4096, 4), "txt_ids": _of(b, 512, 4)}  # fmt: skip


def _auraflow(b: int) -> dict[str, Any]:
    return {"hidden_states": _of(b, 4, 128, 128), "encoder_hidden_states": _of(b, 256, 2048), "timestep": _of(b)}


def _wan(b: int) -> dict[str, Any]:
    return {"hidden_states": _of(b, 16, 21, 60, 104), "timestep": _of(b), "encoder_hidden_states": _of(b, 512, 4096)}


def _ltx(b: int) -> dict[str, Any]:
    return {"hidden_states": _of(b, 21 * 16 * 22, 128), "encoder_hidden_states": _of(b, 128, 4096), "timestep": _of(b),
            "encoder_attention_mask": _of(b, 128), "num_frames": 21, "height": 16, "width": 22}  # fmt: skip


def _cogvideox(b: int) -> dict[str, Any]:
    return {"hidden_states": _of(b, 13, 16, 60, 90), "encoder_hidden_states": _of(b, 226, 4096), "timestep": _of(b)}


CASES = {
    "tiny-sd, 64 px": _stock("tiny-sd", 16),
    "sd-1.5, 512 px": _stock("sd-1.5", 64),
    "sd-1.5, 512 px, S-CFG's segmentor": _stock("sd-1.5", 64, segmentor="s-cfg"),
    "sdxl, 1024 px": _stock("sdxl", 64),
    "pixart-sigma, 1024 px": _stock("pixart-sigma", 64),
    "hunyuan, 1024 px": _stock("hunyuan", 64),
    "sd3, 1024 px": _stock("sd3", 64),
    "flux.1, 1024 px": _stock("flux", 64, batched=False),
    "flux.1 with 2 + 4 blocks, 1024 px": _stock("flux-short", 64, batched=False),
    "qwen-image, 1024 px": _written(
        partial(diffusers.QwenImageTransformer2DModel, guidance_embeds=False), _qwen, (64, 64), batched=False
    ),
    "flux.2 dev, 1024 px": _written(
        partial(diffusers.Flux2Transformer2DModel, guidance_embeds=False), _flux2, (64, 64), batched=False
    ),
    "auraflow, 1024 px": _written(
        partial(diffusers.AuraFlowTransformer2DModel, sample_size=128, pos_embed_max_size=9216),
        _auraflow, (64, 64), batched=True,
    ),
    "wan 2.1 1.3B, 480 x 832 px, 81 frames": _written(
        partial(diffusers.WanTransformer3DModel, num_attention_heads=12, ffn_dim=8960, num_layers=30),
        _wan, (21, 30, 52), batched=False,
    ),
    "ltx-video, 512 x 704 px, 161 frames": _written(
        diffusers.LTXVideoTransformer3DModel, _ltx, (21, 16, 22), batched=True
    ),
    "cogvideox 2B, 480 x 720 px, 49 frames": _written(
        partial(diffusers.CogVideoXTransformer3DModel, num_attention_heads=48, num_layers=42,
                use_rotary_positional_embeddings=True),
        _cogvideox, (13, 30, 45), batched=True,
    ),
}  # fmt: skip
"""By name, which tells the size of the picture or video."""
