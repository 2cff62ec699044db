"""A tiny HiDream-I1 pipeline.

u + s (c - u), one batch, unconditional first. Joint attention: image (padded to the largest where it is no square), then
T5's text, Llama's last layer, and the Llama layer of the block; single blocks see the same order.
"""

from functools import partial

import diffusers
import transformers

from tests.helpers.families import _clip, _flow_vae, _t5
from tests.helpers.loops.texts_llm import WIDTH, llama3
from tests.helpers.loops.tiny_loop import TinyLoop, negated, seeded


TEXT = 24


def _hidream() -> dict:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=16,  # the pipeline always makes 128 x 128 latent pixels, of any aspect
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, WIDTH],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(160, 128),
        llama_layers=[0, 1, 1],
    )
    clip = transformers.CLIPTextModelWithProjection
    texts = _clip(clip, max_length=128) | _clip(clip, "_2", max_length=128) | _t5("_3") | llama3("_4", TEXT)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"transformer": transformer, "vae": _flow_vae(4), "scheduler": scheduler, **texts}


LOOPS = {
    "HiDreamImagePipeline": TinyLoop(
        partial(seeded, _hidream),
        {"height": 64, "width": 16, "guidance_scale": 4.0, "max_sequence_length": TEXT},
        mixed=negated,
    )
}
