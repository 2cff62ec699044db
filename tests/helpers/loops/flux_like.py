"""Flux.2, Chroma, Flux.1 Kontext, Ovis-Image and LongCat-Image, tiny.

All mix as `u + s (c - u)` with two calls a step, the conditional one first, but for Chroma and Flux.2 dev (one prediction).
Keys are text, then pixels, then the pictures that are edited. Latents are packed: a token of Flux.2 is a pixel of its
latent, whose channels are patches of 2 x 2 already; the others' tokens hold 2 x 2 latent pixels. `img_ids` tell the pictures
apart: the first column is 0 for the target, 10, 20, ... (Flux.2), 1 (Kontext) or 2 against 1 (LongCat) for pictures.
LongCat renorms the mixture (`enable_cfg_renorm`).
"""

from functools import partial
from typing import Any

import diffusers
import torch.nn.functional as F

from tests.helpers.families import FAMILIES
from tests.helpers.loops.qwen import half_mask, picture
from tests.helpers.loops.texts_qwen import (
    WIDTH,
    mistral3,
    mistral3_processor,
    qwen2_5_vl,
    qwen2_5_vl_processor,
    qwen3,
    qwen_tokenizer,
)
from tests.helpers.loops.tiny_loop import TinyLoop, in_patches, in_tokens, plain, seeded
from tests.helpers.loops.zimage import flow_vae


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_LAYERS = {"num_layers": 1, "num_single_layers": 1}
SIZE = {"height": 16, "width": 24}  # 4 x 6 tokens
_PICTURE, _MASK = picture(), half_mask()


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    """Shrinks pixels by 2; a latent pixel's channels are those of 2 x 2."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


class PoolingVae(diffusers.AutoencoderKL):
    """Shrinks pixels by 128: pools them first, for the edit pipeline makes a megapixel of every picture."""

    def __init__(self, **config):
        super().__init__(**config)
        self.register_to_config(block_out_channels=(8,) * 8)  # by which the pipeline counts

    def encode(self, x, return_dict=True):
        return super().encode(F.avg_pool2d(x, 64), return_dict)


def _flux2(guidance: bool = False) -> dict[str, Any]:
    """dev, distilled, with `guidance`, else klein."""
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        joint_attention_dim=3 * WIDTH,  # three layers of the text encoder
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=16,
        guidance_embeds=guidance,
        **_LAYERS,
        **_HEADS,
    )
    texts = {"text_encoder": qwen3(3), "tokenizer": qwen_tokenizer()}
    if guidance:
        texts = {"text_encoder": mistral3(3), "tokenizer": mistral3_processor()}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": flux2_vae(), "scheduler": scheduler, **texts}


def _chroma(**known: Any) -> dict[str, Any]:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **_LAYERS,
        **_HEADS,
    )
    transformer.register_to_config(**known)
    texts = FAMILIES["flux"].components()
    texts = {"text_encoder": texts["text_encoder_2"], "tokenizer": texts["tokenizer_2"]}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": flow_vae(), "scheduler": scheduler, **texts}


def _ovis() -> dict[str, Any]:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), **_LAYERS, **_HEADS
    )
    parts = {"transformer": transformer, "vae": flow_vae(), "text_encoder": qwen3(causal=False)}
    return parts | {"tokenizer": qwen_tokenizer(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


def _longcat(vae: type = diffusers.AutoencoderKL) -> dict[str, Any]:
    """The pipeline knows 16 latent channels only."""
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
        **_LAYERS,
        **_HEADS,
    )
    parts = {"transformer": transformer, "vae": flow_vae(16, vae), "text_encoder": qwen2_5_vl()}
    parts |= {"tokenizer": qwen_tokenizer(), "text_processor": qwen2_5_vl_processor()}
    return parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


_FLUX2 = SIZE | {"max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)}
_KLEIN = _FLUX2 | {"guidance_scale": 4.0}
_CHROMA = SIZE | {"guidance_scale": 4.0, "max_sequence_length": 24}
_KONTEXT = SIZE | {"guidance_scale": 1.0, "true_cfg_scale": 4.0, "negative_prompt": "", "max_sequence_length": 24}
_KONTEXT |= {"image": picture(16, 16), "max_area": 16 * 24, "_auto_resize": False}
_HALF = {"strength": 0.5}  # two of four steps

_PACKED, _TOKENS = partial(TinyLoop, packed=in_patches), partial(TinyLoop, packed=in_tokens)


def _renormed(u, c, s):
    """No token is longer than the conditional one."""
    mixed = plain(u, c, s)
    return mixed * (c.norm(dim=-1, keepdim=True) / (mixed.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1)


LOOPS: dict[str, TinyLoop] = {
    "Flux2KleinPipeline": _TOKENS(partial(seeded, _flux2), _KLEIN),
    "Flux2KleinInpaintPipeline": _TOKENS(
        partial(seeded, _flux2), _KLEIN | _HALF | {"image": _PICTURE, "mask_image": _MASK}, steps=4
    ),
    "Flux2Pipeline": _TOKENS(partial(seeded, partial(_flux2, guidance=True)), _FLUX2, guided=0),
    "ChromaPipeline": _PACKED(partial(seeded, _chroma), _CHROMA),
    "ChromaImg2ImgPipeline": _PACKED(partial(seeded, _chroma), _CHROMA | _HALF | {"image": _PICTURE}, steps=4),
    "ChromaInpaintPipeline": _PACKED(
        # it asks the configuration for what no Chroma transformer has
        partial(seeded, partial(_chroma, guidance_embeds=False)),
        _CHROMA | _HALF | {"image": _PICTURE, "mask_image": _MASK},
        steps=4,
    ),
    "FluxKontextPipeline": _PACKED(FAMILIES["flux"].components, _KONTEXT),
    "FluxKontextInpaintPipeline": _PACKED(
        FAMILIES["flux"].components, _KONTEXT | _HALF | {"image": _PICTURE, "mask_image": _MASK}, steps=4
    ),
    "OvisImagePipeline": _PACKED(partial(seeded, _ovis), SIZE | {"guidance_scale": 4.0, "max_sequence_length": 48}),
    "LongCatImagePipeline": _PACKED(
        partial(seeded, _longcat), SIZE | {"guidance_scale": 4.0, "enable_prompt_rewrite": False}, mixed=_renormed
    ),
    "LongCatImageEditPipeline": _PACKED(
        partial(seeded, partial(_longcat, PoolingVae)), {"guidance_scale": 4.0, "image": _PICTURE}, batch=False
    ),
}
