"""Tiny loop of AnyFlow: Wan's text and blocks, flow maps.

It mixes `u + s (c - u)` of one batch, the unconditional half first. Latents are b F c H W for the transformer. Its sister FAR
makes a video chunk by chunk, and its self-attention, compiled (`flex_attention`), reads the past from a cache: it takes
seconds on a CPU.
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH
from tests.helpers.loops.texts_t5 import umt5
from tests.helpers.loops.tiny_loop import TinyLoop, frames_first, seeded
from tests.helpers.loops.wan import FRAMES, SIZES, vae


_SIZES = {name: value for name, value in SIZES.items() if name != "qk_norm"}


def _anyflow() -> dict[str, Any]:
    transformer = diffusers.AnyFlowTransformer3DModel(in_channels=16, out_channels=16, **_SIZES)
    return {"transformer": transformer, "vae": vae(), "scheduler": diffusers.FlowMapEulerDiscreteScheduler(), **umt5()}


_CALL = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "guidance_scale": 5.0,
    "max_sequence_length": MAX_TOKENS,
}
LOOPS = {
    "AnyFlowPipeline": TinyLoop(partial(seeded, _anyflow), _CALL, packed=frames_first),
}
