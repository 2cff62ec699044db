"""Tiny loops of AnyFlow: Wan's text and blocks, flow maps.

Both mix `u + s (c - u)` of one batch, the unconditional half first. Latents are b F c H W for the transformer. FAR makes a
video chunk by chunk; the past is read from a cache or from coarse tokens.
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH
from tests.helpers.loops.texts_t5 import umt5
from tests.helpers.loops.tiny_loop import TinyLoop, seeded
from tests.helpers.loops.wan import FRAMES, SIZES, vae


_SIZES = {name: value for name, value in SIZES.items() if name != "qk_norm"}


def _anyflow(model: type = diffusers.AnyFlowTransformer3DModel, **changes) -> dict[str, Any]:
    transformer = model(in_channels=16, out_channels=16, **_SIZES, **changes)
    return {"transformer": transformer, "vae": vae(), "scheduler": diffusers.FlowMapEulerDiscreteScheduler(), **umt5()}


_far = partial(_anyflow, diffusers.AnyFlowFARTransformer3DModel, chunk_partition=(1, 2), full_chunk_limit=2)
_CALL = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "guidance_scale": 5.0,
    "max_sequence_length": MAX_TOKENS,
}
LOOPS = {
    "AnyFlowPipeline": TinyLoop(partial(seeded, _anyflow), _CALL),
    "AnyFlowFARPipeline": TinyLoop(partial(seeded, _far), _CALL),
}
