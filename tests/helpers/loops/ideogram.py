"""A tiny Ideogram 4 pipeline.

s c + (1 - s) u, two denoisers, conditional first: the one without words is another one, and sees the image alone. A single
stream of padding, text, image. The text encoder's layers are called, not the encoder itself.
"""

from functools import partial

import diffusers

from tests.helpers.loops.texts_qwen import WIDTH, qwen3_vl, qwen_tokenizer
from tests.helpers.loops.tiny_loop import TinyLoop, in_tokens, negated, seeded


LAYERS = 36  # the pipeline takes the states behind 13 of them


def _transformer() -> diffusers.Ideogram4Transformer2DModel:
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=13 * WIDTH,
        mrope_section=(2, 2, 2),
    )


def _ideogram() -> dict:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=1,
        layers_per_block=1,
        sample_size=32,
    )
    return {
        "transformer": _transformer(),
        "unconditional_transformer": _transformer(),
        "vae": vae,
        "text_encoder": qwen3_vl(LAYERS, causal=False),
        "tokenizer": qwen_tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


LOOPS = {
    "Ideogram4Pipeline": TinyLoop(
        partial(seeded, _ideogram),
        {"height": 64, "width": 32, "guidance_scale": 7.0, "guidance_schedule": None, "max_sequence_length": 48},
        mixed=negated,
        target_last=True,
        packed=in_tokens,
    )
}
