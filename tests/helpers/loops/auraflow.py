"""A tiny AuraFlow pipeline.

u + s (c - u), one batch, unconditional first. Joint attention: eight registers, text, image; padding is zeros and is
attended to.
"""

from functools import partial

import diffusers

from tests.helpers.families import _vae
from tests.helpers.loops.texts_llm import umt5
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


def _auraflow() -> dict:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return {"transformer": transformer, "vae": _vae(), "scheduler": scheduler, **umt5()}


LOOPS = {
    "AuraFlowPipeline": TinyLoop(
        partial(seeded, _auraflow), {"height": 32, "width": 16, "guidance_scale": 4.0, "max_sequence_length": 24}
    )
}
