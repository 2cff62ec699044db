"""Tiny HunyuanImage 2.1 pipelines.

A `guider` component mixes, two calls, conditional first (here u + s (c - u); the released one is an adaptive projection).
Joint attention: image, then the valid tokens of ByT5's glyph text and of Qwen's, then what is not valid; a refiner mixes
Qwen's text. The refiner pipeline sees the picture as further channels, and Qwen's text alone.
"""

from functools import partial

import diffusers
import torch
import transformers
from diffusers.guiders import ClassifierFreeGuidance

from tests.helpers.loops.texts_qwen import WIDTH, qwen2_5_vl, qwen_tokenizer
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


BODY = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 2}
BODY |= {"num_refiner_layers": 1, "text_embed_dim": WIDTH}


def _byt5() -> dict:
    tokenizer = transformers.ByT5Tokenizer()
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizer), **sizes))
    return {"text_encoder_2": encoder, "tokenizer_2": tokenizer}


def _common() -> dict:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder": qwen2_5_vl(),
        "tokenizer": qwen_tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=3.5),
    }


def _image() -> dict:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, text_embed_2_dim=16, rope_axes_dim=(4, 4), **BODY
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=0.75,
    )
    return {"transformer": transformer, "vae": vae, **_common(), **_byt5()}


def _refiner() -> dict:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=4, patch_size=(1, 1, 1), rope_axes_dim=(4, 2, 2), **BODY
    )
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    return {"transformer": transformer, "vae": vae, **_common()}


LATENT = torch.randn(1, 4, 1, 8, 4, generator=torch.Generator().manual_seed(0))
SIZE = {"height": 32, "width": 16}
LOOPS = {
    "HunyuanImagePipeline": TinyLoop(partial(seeded, _image), SIZE),
    "HunyuanImageRefinerPipeline": TinyLoop(partial(seeded, _refiner), SIZE | {"image": LATENT}),
}
