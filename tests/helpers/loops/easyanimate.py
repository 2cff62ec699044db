"""Tiny loops of EasyAnimate.

All mix `u + s (c - u)` of one batch, the unconditional half first. Latents are b c F H W, tokens are row-major over frames,
rows and columns in patches of 1 x 2 x 2. Joint attention `attn1`: Qwen2-VL's tokens, chat template and padding with them and
without a mask, then the video's. Masked videos are further channels (all is
masked here: diffusers 0.42.1's own call fails with another mask).
The pipeline with a control video is not here: its call fails in its `encode_prompt`.
"""

from functools import partial
from typing import Any

import diffusers
import torch

from tests.helpers.loops.pictures import HEIGHT, WIDTH
from tests.helpers.loops.texts_qwen import WIDTH as TEXT
from tests.helpers.loops.texts_qwen import qwen2_5_vl, qwen_tokenizer
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


FRAMES = 9  # three latent frames


def _vae() -> diffusers.AutoencoderKLMagvit:
    """Shrinks frames by 4 and pixels by 8."""
    down = (
        "SpatialDownBlock3D",
        "SpatialTemporalDownBlock3D",
        "SpatialTemporalDownBlock3D",
        "SpatialTemporalDownBlock3D",
    )
    up = ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D")
    return diffusers.AutoencoderKLMagvit(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def _easy(in_channels: int = 4) -> dict[str, Any]:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=TEXT,
        num_layers=2,
        mmdit_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    return {
        "transformer": transformer,
        "vae": _vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": qwen2_5_vl(),
        "tokenizer": qwen_tokenizer(),
    }


_VIDEO = torch.rand(1, 3, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
_CALL: dict[str, Any] = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "guidance_scale": 5.0,
    "negative_prompt": "",
}
LOOPS = {
    "EasyAnimatePipeline": TinyLoop(partial(seeded, _easy), _CALL),
    "EasyAnimateInpaintPipeline": TinyLoop(
        partial(seeded, partial(_easy, 9)),
        _CALL | {"video": _VIDEO, "mask_video": torch.full_like(_VIDEO[:, :1], 255)},
        batch=False,  # it takes a video for each
    ),
}
