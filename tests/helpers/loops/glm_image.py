"""A tiny GLM-Image pipeline.

u + s (c - u), two calls, conditional first. The denoiser sees the prior's image tokens and quoted text as glyphs; the words
of the prompt never reach it: an encoder of vision and language has turned them into the prior's tokens, which are given
here.
"""

from functools import partial

import diffusers
import torch
import transformers

from tests.helpers.families import _flow_vae
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


def _glm_image() -> dict:
    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    tokenizer = transformers.ByT5Tokenizer()
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    return {
        "transformer": transformer,
        "tokenizer": tokenizer,
        "text_encoder": transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizer), **sizes)),
        "processor": None,
        "vision_language_encoder": None,
        "vae": _flow_vae(4),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }


LOOPS = {
    "GlmImagePipeline": TinyLoop(
        partial(seeded, _glm_image),
        {"height": 32, "width": 16, "guidance_scale": 1.5, "prior_token_ids": torch.arange(32)[None]},
        batch=False,
    )
}
