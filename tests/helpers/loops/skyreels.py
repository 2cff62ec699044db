"""Tiny loops of SkyReels V2: Wan's blocks, latents and calls; diffusion forcing gives each latent frame a timestep of its own.

All mix `u + s (c - u)` of two calls, the conditional one first. With diffusion forcing each latent frame has a scheduler
of its own, a copy of the pipeline's; a long video is made in parts that overlap.
"""

from functools import partial
from typing import Any

import diffusers
import transformers

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH, clip_vision, picture, video
from tests.helpers.loops.texts_t5 import umt5
from tests.helpers.loops.tiny_loop import TinyLoop, later_frames, seeded
from tests.helpers.loops.wan import FRAMES, PICTURE, SIZES, vae


def _skyreels(in_channels: int = 16, **changes) -> dict[str, Any]:
    made = diffusers.SkyReelsV2Transformer3DModel(in_channels=in_channels, out_channels=16, **SIZES | changes)
    scheduler = diffusers.UniPCMultistepScheduler(
        flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    return {"transformer": made, "vae": vae(), "scheduler": scheduler, **umt5()}


def _image_to_video() -> dict[str, Any]:
    parts = _skyreels(in_channels=36, **PICTURE)
    return parts | clip_vision(transformers.CLIPVisionModelWithProjection)


_forcing = partial(_skyreels, inject_sample_info=True)
_SMALL = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 5.0}
_CALL = _SMALL | {"num_frames": FRAMES, "max_sequence_length": MAX_TOKENS}
_alone = partial(TinyLoop, partial(seeded, _forcing), batch=False)  # stock fails with two prompts
LOOPS = {
    "SkyReelsV2Pipeline": TinyLoop(partial(seeded, _skyreels), _CALL),
    "SkyReelsV2ImageToVideoPipeline": TinyLoop(  # the transformer counts 512 tokens of text
        partial(seeded, _image_to_video), _SMALL | {"num_frames": FRAMES, "image": picture()}
    ),
    "SkyReelsV2DiffusionForcingPipeline": _alone(_CALL),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _alone(_CALL | {"image": picture()}, own=later_frames),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _alone(
        _CALL | {"video": video(5), "num_frames": 13, "base_num_frames": 13, "overlap_history": 5},
        own=lambda latents: latents[:, :, 2:],
    ),
}
