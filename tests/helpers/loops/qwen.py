"""Qwen-Image's pipelines, tiny.

All mix as `u + s (c - u)` with two calls a step, the conditional one first, and then set each token's norm back to the
conditional prediction's (2.1 does not, layered only if asked). Latents are packed, b n 64: a token holds 2 x 2 latent
pixels (2.1: one). Keys are text, then pixels. The grids of the pictures stand in `img_shapes`, the target first, then the
pictures that are edited; layered has `layers + 1` targets. In 2.1 the pictures stand among the text, and the target last.
"""

from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tests.helpers.loops.texts_qwen import (
    WIDTH,
    qwen2_5_vl,
    qwen2_5_vl_processor,
    qwen3_vl,
    qwen3_vl_processor,
    qwen_tokenizer,
)
from tests.helpers.loops.tiny_loop import TinyLoop, in_patches, in_tokens, plain, seeded


SIZE = {"height": 16, "width": 24}  # 4 x 6 tokens
LATENT_CHANNELS = 8  # not four: latents would pass for pixels with transparency


def picture(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def half_mask(width: int = 24, height: int = 16) -> Image.Image:
    """The left half is repainted."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


class PoolingVae(diffusers.AutoencoderKLQwenImage):
    """Shrinks pixels by 2 ** levels: pools them first, for the edit pipelines make a megapixel of every picture."""

    def pool(self, levels: int) -> "PoolingVae":
        self.pooled = 2 ** (levels - len(self.temperal_downsample))
        self.temperal_downsample = [False] * levels  # by which a pipeline counts
        return self

    def encode(self, x, return_dict=True):
        return super().encode(F.avg_pool3d(x, (1, self.pooled, self.pooled)), return_dict)


def qwen_vae(levels: int = 1, channels: int = LATENT_CHANNELS, pixels: int = 3) -> diffusers.AutoencoderKLQwenImage:
    """Shrinks pixels by 2 ** levels."""
    vae = (diffusers.AutoencoderKLQwenImage if levels == 1 else PoolingVae)(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
        input_channels=pixels,
    )
    return vae if levels == 1 else vae.pool(levels)


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}


def _parts(levels: int = 1, processor: bool = False, pixels: int = 3, **changes) -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        joint_attention_dim=WIDTH,
        **_HEADS,
        **changes,
    )
    parts = {"transformer": transformer, "vae": qwen_vae(levels, pixels=pixels), "text_encoder": qwen2_5_vl()}
    parts |= {"tokenizer": qwen_tokenizer(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return parts | ({"processor": qwen2_5_vl_processor()} if processor else {})


def _controlled(more: int = 0) -> dict[str, Any]:
    """With a ControlNet; the inpainting one sees the mask as further channels."""
    control = diffusers.QwenImageControlNetModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=1,
        joint_attention_dim=WIDTH,
        extra_condition_channels=more,
        **_HEADS,
    )
    return _parts() | {"controlnet": control}


def _parts_21() -> dict[str, Any]:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, context_in_dim=WIDTH, mlp_ratio=1, **_HEADS
    )
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * 8,
        latents_std=[1.5] * 8,
    )
    parts = {"transformer": transformer, "vae": vae, "text_encoder": qwen3_vl(), "processor": qwen3_vl_processor()}
    return parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


def _renormed(u, c, s):
    """Each token as long as the conditional one."""
    mixed = plain(u, c, s)
    return mixed * (c.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))


def _in_layers(maps):
    return torch.cat([in_patches(layer) for layer in maps.unbind(2)], 1)


_LOOP = partial(TinyLoop, mixed=_renormed, packed=in_patches)
_GUIDED = {"negative_prompt": "", "true_cfg_scale": 4.0}
_CALL = SIZE | _GUIDED
_HALF = {"strength": 0.5}  # two of four steps
_CONTROL = _CALL | {"control_image": picture()}
# Edit pipelines bring every picture to about a megapixel: the autoencoder here shrinks by 128, to 3 x 4 tokens
_EDIT = _CALL | {"height": 512, "width": 768}

LOOPS: dict[str, TinyLoop] = {
    "QwenImagePipeline": _LOOP(partial(seeded, _parts), _CALL),
    "QwenImageImg2ImgPipeline": _LOOP(partial(seeded, _parts), _CALL | _HALF | {"image": picture()}, steps=4),
    "QwenImageInpaintPipeline": _LOOP(
        partial(seeded, _parts), _CALL | _HALF | {"image": picture(), "mask_image": half_mask()}, steps=4
    ),
    "QwenImageControlNetPipeline": _LOOP(partial(seeded, _controlled), _CONTROL),
    "QwenImageControlNetInpaintPipeline": _LOOP(
        partial(seeded, partial(_controlled, 4)), _CONTROL | {"control_mask": half_mask()}
    ),
    "QwenImageEditPipeline": _LOOP(
        partial(seeded, partial(_parts, 7, processor=True)), _EDIT | {"image": picture()}, batch=False
    ),
    "QwenImageEditInpaintPipeline": _LOOP(
        partial(seeded, partial(_parts, 7, processor=True)),
        _EDIT | _HALF | {"image": picture(), "mask_image": half_mask()},
        steps=4,
        batch=False,
    ),
    "QwenImageEditPlusPipeline": _LOOP(
        partial(seeded, partial(_parts, 7, processor=True)),
        _EDIT | {"image": [picture(), picture(16, 24)]},
        batch=False,
    ),
    "QwenImageLayeredPipeline": TinyLoop(
        partial(
            seeded, partial(_parts, 6, processor=True, pixels=4, use_layer3d_rope=True, use_additional_t_cond=True)
        ),
        # diffusers 0.42.1 returns no latents here
        _GUIDED | {"image": picture(mode="RGBA"), "layers": 2, "output_type": "pt"},
        packed=_in_layers,
    ),
    "QwenImage21Pipeline": TinyLoop(
        partial(seeded, _parts_21),
        {"height": 64, "width": 96} | _GUIDED,
        packed=in_tokens,
        target_last=True,
    ),
}
