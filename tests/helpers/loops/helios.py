"""Tiny loop of Helios: Wan's text and blocks; the video is made chunk by chunk.

It mixes `u + s (c - u)` of two calls, the conditional one first. Latents are b c F H W. Tokens of the past, near and far, fine
and coarse, stand before the chunk's own in self-attention; `attn2` reads UMT5's tokens by the chunk's own alone.
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH
from tests.helpers.loops.texts_t5 import umt5
from tests.helpers.loops.tiny_loop import TinyLoop, seeded
from tests.helpers.loops.wan import FRAMES, SIZES, vae


_SIZES = {name: value for name, value in SIZES.items() if name != "rope_max_seq_len"}


def _helios() -> dict[str, Any]:
    transformer = diffusers.HeliosTransformer3DModel(in_channels=16, out_channels=16, rope_dim=(4, 4, 4), **_SIZES)
    return {
        "transformer": transformer,
        "vae": vae(),
        "scheduler": diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1 / 3),
        **umt5(),
    }


LOOPS = {
    "HeliosPipeline": TinyLoop(
        partial(seeded, _helios),
        {
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "num_latent_frames_per_chunk": 3,
            "history_sizes": [4, 2, 1],
            "guidance_scale": 5.0,
            "max_sequence_length": MAX_TOKENS,
        },
    ),
}
