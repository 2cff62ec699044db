"""Tiny loops of AnimateDiff.

All mix `u + s (c - u)` of one batch, the unconditional half first. Latents are b c F H W; the U-Net lays a video's frames side
by side in the batch, and the pipelines repeat the text for each of them: `attentions` read the text and a frame's own
pixels, `motion_modules` one pixel's place in all frames (`attn1` and `attn2` both).
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.families import _sdxl
from tests.helpers.loops.pictures import picture, video
from tests.helpers.loops.tiny_loop import TinyLoop, seeded
from tests.helpers.tiny import tiny_components


FRAMES = 3
HEIGHT, WIDTH = 32, 16
_ADAPTER = {"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_norm_num_groups": 4}
_ADAPTER |= {"motion_num_attention_heads": 2, "motion_max_seq_length": 8}


def _stable() -> dict[str, Any]:
    parts = tiny_components()
    for name in ("safety_checker", "requires_safety_checker"):
        parts.pop(name, None)
    return parts | {"motion_adapter": diffusers.MotionAdapter(**_ADAPTER)}


def _xl() -> dict[str, Any]:
    return _sdxl() | {"motion_adapter": diffusers.MotionAdapter(use_motion_mid_block=False, **_ADAPTER)}


def _controlled() -> dict[str, Any]:
    parts = _stable()
    controlnet = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
    return parts | {"controlnet": controlnet}


def _sparse() -> dict[str, Any]:
    parts = _stable()
    controlnet = diffusers.SparseControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        in_channels=4,
        conditioning_channels=3,
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        cross_attention_dim=32,
        conditioning_embedding_out_channels=(8, 8),
        norm_num_groups=1,
        use_simplified_condition_embedding=False,
    )
    return parts | {"controlnet": controlnet}


_SMALL: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 5.0}
_CALL = _SMALL | {"num_frames": FRAMES}
_VIDEO = _SMALL | {"video": video(FRAMES, HEIGHT, WIDTH), "strength": 0.5}
LOOPS = {
    "AnimateDiffPipeline": TinyLoop(partial(seeded, _stable), _CALL),
    "AnimateDiffSDXLPipeline": TinyLoop(partial(seeded, _xl), _CALL),
    "AnimateDiffControlNetPipeline": TinyLoop(
        partial(seeded, _controlled), _CALL | {"conditioning_frames": video(FRAMES, HEIGHT, WIDTH)}, batch=False
    ),
    "AnimateDiffSparseControlNetPipeline": TinyLoop(
        partial(seeded, _sparse), _CALL | {"conditioning_frames": [picture(HEIGHT, WIDTH)]}
    ),
    "AnimateDiffVideoToVideoPipeline": TinyLoop(partial(seeded, _stable), _VIDEO, steps=4, batch=False),
    "AnimateDiffVideoToVideoControlNetPipeline": TinyLoop(
        partial(seeded, _controlled),
        _VIDEO | {"conditioning_frames": video(FRAMES, HEIGHT, WIDTH)},
        steps=4,
        batch=False,
    ),
}
