"""Tiny Lumina-Next and Lumina 2 pipelines.

Lumina-Next: u + s (c - u) on the first three latent channels alone, one batch, *conditional first*; cross-attention (`attn2`)
beside self-attention (`attn1`), mixed by a gate. Lumina 2: two calls, conditional first, the mixture's norm along each row set
back to the conditional prediction's; a single stream of each image's valid text, then its pixels, padded at the end, behind
refiners that mix the text.
"""

from functools import partial

import diffusers
import torch

from tests.helpers.families import _flow_vae, _vae
from tests.helpers.loops.texts_llm import WIDTH, gemma2
from tests.helpers.loops.tiny_loop import TinyLoop, negated, seeded


SIZE = {"height": 64, "width": 32, "guidance_scale": 4.0}  # the pipelines shrink by 8 whatever the autoencoder


def _lumina() -> dict:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": _vae(levels=4), "scheduler": scheduler, **gemma2()}


def _lumina2() -> dict:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(256, 32, 32),
        cap_feat_dim=WIDTH,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return {"transformer": transformer, "vae": _flow_vae(4), "scheduler": scheduler, **gemma2(max_length=256)}


def _three_channels(u: torch.Tensor, c: torch.Tensor, s: torch.Tensor | float) -> torch.Tensor:
    u, c = u[:, :4], c[:, :4]  # the others are a variance
    return negated(torch.cat([u[:, :3], c[:, 3:]], 1), c, s)


def _rows_as_long(u: torch.Tensor, c: torch.Tensor, s: torch.Tensor | float) -> torch.Tensor:
    mixture = negated(u, c, s)
    return mixture * (c.norm(dim=-1, keepdim=True) / mixture.norm(dim=-1, keepdim=True))


LOOPS = {
    "LuminaPipeline": TinyLoop(
        partial(seeded, _lumina), SIZE | {"clean_caption": False}, mixed=_three_channels, conditional_first=True
    ),
    "Lumina2Pipeline": TinyLoop(
        partial(seeded, _lumina2),
        SIZE | {"system_prompt": "You are an assistant.", "max_sequence_length": 64},
        mixed=_rows_as_long,
    ),
}
