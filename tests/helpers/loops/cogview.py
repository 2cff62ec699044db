"""Tiny CogView3-Plus and CogView4 pipelines.

u + s (c - u). CogView3-Plus: one batch, unconditional first. CogView4: two calls, conditional first, each with its own
length of text, padded on the left to a multiple of 16. Joint attention, text first.
"""

from functools import partial

import diffusers

from tests.helpers.families import _flow_vae, _t5
from tests.helpers.loops.pictures import picture
from tests.helpers.loops.texts_llm import WIDTH, glm
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


TEXT = 24
SIZE = {"height": 32, "width": 16, "guidance_scale": 4.0}
HEADS = {"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "time_embed_dim": 8, "condition_dim": 4}


def _cogview3() -> dict:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, text_embed_dim=32, pos_embed_max_size=16, sample_size=16, **HEADS
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    return {"transformer": transformer, "vae": _flow_vae(4), "scheduler": scheduler, **_t5()}


def _cogview4(control: bool = False) -> dict:
    channels = {"in_channels": 8 if control else 4, "out_channels": 4}
    transformer = diffusers.CogView4Transformer2DModel(
        text_embed_dim=WIDTH, rope_axes_dim=(16, 16), sample_size=16, **channels, **HEADS
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    return {"transformer": transformer, "vae": _flow_vae(4), "scheduler": scheduler, **glm()}


LOOPS = {
    "CogView3PlusPipeline": TinyLoop(partial(seeded, _cogview3), SIZE | {"max_sequence_length": TEXT}),
    "CogView4Pipeline": TinyLoop(partial(seeded, _cogview4), SIZE),
    "CogView4ControlPipeline": TinyLoop(
        partial(seeded, partial(_cogview4, control=True)), SIZE | {"control_image": picture(32, 16)}
    ),
}
