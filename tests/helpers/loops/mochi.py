"""Tiny loop of Mochi.

It mixes `u + s (c - u)` of one batch, the unconditional half first. Latents are b c F H W, tokens are row-major over
frames, rows and columns in patches of 1 x 2 x 2. Joint attention, one kernel call for each image of the batch: the video's
tokens, then the valid ones of T5's.
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.families import MAX_TOKENS
from tests.helpers.loops.pictures import HEIGHT, WIDTH
from tests.helpers.loops.texts_t5 import t5
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


FRAMES = 13  # three latent frames


def _vae() -> diffusers.AutoencoderKLMochi:
    """The pipeline takes it to shrink frames by 6 and pixels by 8, as Mochi's does."""
    return diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )


def _mochi() -> dict[str, Any]:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=MAX_TOKENS,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return {"transformer": transformer, "vae": _vae(), "scheduler": scheduler, **t5()}


LOOPS = {
    "MochiPipeline": TinyLoop(
        partial(seeded, _mochi),
        {
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "guidance_scale": 5.0,
            "max_sequence_length": MAX_TOKENS,
        },
    ),
}
