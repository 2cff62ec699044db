"""Krea 2 and ERNIE-Image, tiny.

Krea 2 mixes as `c + s (c - u)`, guided from s > 0, with two calls a step, the conditional one first; keys are text, then
pixels; latents are packed, and the text, several layers of it, is mixed by blocks of its own before. Its text has a fixed
length: prompt, padding, and the template's suffix. ERNIE mixes as `u + s (c - u)`, one call a step, the unconditional half
first; keys are pixels, then text, padded to the longest; latents are b c H W, patches of 2 x 2 already.
"""

from functools import partial
from typing import Any

import diffusers

from tests.helpers.loops.flux_like import flux2_vae
from tests.helpers.loops.qwen import LATENT_CHANNELS, qwen_vae
from tests.helpers.loops.texts_qwen import WIDTH, mistral3, mistral3_processor, qwen3_vl, qwen_tokenizer
from tests.helpers.loops.tiny_loop import TinyLoop, in_patches, seeded


SIZE = {"height": 16, "width": 24}  # 4 x 6 tokens


def _krea() -> dict[str, Any]:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    parts = {"transformer": transformer, "vae": qwen_vae(), "text_encoder": qwen3_vl(causal=False)}
    parts |= {"tokenizer": qwen_tokenizer(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return parts | {"text_encoder_select_layers": (1, 2)}


def _ernie() -> dict[str, Any]:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(8, 4, 4),
    )
    parts = {"transformer": transformer, "vae": flux2_vae(), "text_encoder": mistral3().model}
    parts |= {"tokenizer": mistral3_processor().tokenizer}
    return parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


LOOPS: dict[str, TinyLoop] = {
    "Krea2Pipeline": TinyLoop(
        partial(seeded, _krea),
        SIZE | {"guidance_scale": 4.0, "negative_prompt": "", "max_sequence_length": 24},
        excess=1,
        packed=in_patches,
    ),
    "ErnieImagePipeline": TinyLoop(partial(seeded, _ernie), SIZE | {"guidance_scale": 4.0}),
}
