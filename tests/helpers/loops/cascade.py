"""Tiny Stable Cascade pipelines.

lerp(u, c, s), one batch, *conditional first*; a U-Net called `prior` or `decoder`, whose attention reads image and text
keys, and in the prior an image prompt's.
"""

from functools import partial

import diffusers
import torch
import transformers
from diffusers.models import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from tests.helpers.families import _clip
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


def _unet(**changes) -> StableCascadeUNet:
    sizes = {
        "timestep_ratio_embedding_dim": 16,
        "block_out_channels": (16, 32),
        "num_attention_heads": (2, 4),
        "down_num_layers_per_block": (1, 2),
        "up_num_layers_per_block": (2, 1),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 1),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        "conditioning_dim": 32,
        "clip_text_pooled_in_channels": 32,
        "clip_seq": 4,
    }
    return StableCascadeUNet(**sizes | changes)


def _prior() -> dict:
    prior = _unet(
        in_channels=4, out_channels=4, clip_text_in_channels=32, clip_image_in_channels=32, switch_level=(False,)
    )
    texts = _clip(transformers.CLIPTextModelWithProjection)
    return {"prior": prior, "scheduler": diffusers.DDPMWuerstchenScheduler(), **texts}


def _decoder() -> dict:
    decoder = _unet(
        in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=4, kernel_size=3, self_attn=(False, True)
    )
    vqgan = PaellaVQModel(levels=2, bottleneck_blocks=1, embed_dim=8, latent_channels=4, num_vq_embeddings=16)
    texts = _clip(transformers.CLIPTextModelWithProjection)
    return {"decoder": decoder, "scheduler": diffusers.DDPMWuerstchenScheduler(), "vqgan": vqgan, **texts}


EMBEDDING = torch.randn(1, 4, 6, 3, generator=torch.Generator().manual_seed(0))
LOOPS = {
    "StableCascadePriorPipeline": TinyLoop(
        partial(seeded, _prior),
        {"height": 512, "width": 256, "guidance_scale": 4.0, "output_type": "pt"},
        conditional_first=True,
    ),
    "StableCascadeDecoderPipeline": TinyLoop(
        partial(seeded, _decoder),
        {"image_embeddings": EMBEDDING, "guidance_scale": 2.0},
        batch=False,
        conditional_first=True,
    ),
}
