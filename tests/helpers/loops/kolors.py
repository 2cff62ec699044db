"""Tiny Kolors pipelines: Stable Diffusion XL's U-Net and loop with ChatGLM's text, padded on the left and attended to."""

from functools import partial

import diffusers

from tests.helpers.families import XL_UNET
from tests.helpers.loops.pictures import picture
from tests.helpers.loops.texts_llm import chatglm
from tests.helpers.loops.tiny_loop import TinyLoop, seeded
from tests.helpers.tiny import tiny_components


TEXT = 256  # whatever the call says
SIZE = {"height": 32, "width": 16, "guidance_scale": 5.0}


def _kolors() -> dict:
    text = {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32, "cross_attention_dim": 24}
    parts = tiny_components(**XL_UNET, **text)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return {"unet": parts["unet"], "vae": parts["vae"], "scheduler": scheduler, **chatglm(TEXT)}


LOOPS = {
    "KolorsPipeline": TinyLoop(partial(seeded, _kolors), SIZE),
    "KolorsImg2ImgPipeline": TinyLoop(
        partial(seeded, _kolors), SIZE | {"image": picture(32, 16), "strength": 0.5}, steps=4
    ),
}
