"""Tiny PRX pipelines, in a latent space and in pixels.

u + s (c - u), one batch, unconditional first; the texts are read in one batch too, the negative prompt first. Pixels are
queries, text and pixels keys, text first; a mask tells the valid text. In pixels the mixture is of pictures, not of
velocities. The stock loop gives two timesteps whatever the batch: it takes one prompt.
"""

from functools import partial

import diffusers

from tests.helpers.families import _flow_vae
from tests.helpers.loops.texts_llm import WIDTH, t5gemma
from tests.helpers.loops.tiny_loop import TinyLoop, seeded


TEXT = 24
SIZE = {"height": 32, "width": 16, "guidance_scale": 4.0, "use_resolution_binning": False}
BODY = {"context_in_dim": WIDTH, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 3, "axes_dim": [4, 4]}


def _velocity(mixture, sample, timestep, sigma):
    return (sample - mixture) / (timestep / 1000).clamp(min=0.05)


def _prx() -> dict:
    transformer = diffusers.PRXTransformer2DModel(in_channels=4, **BODY)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": _flow_vae(4), "scheduler": scheduler, **t5gemma(TEXT)}


def _pixel() -> dict:
    transformer = diffusers.PRXTransformer2DModel(in_channels=3, patch_size=4, bottleneck_size=8, **BODY)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "scheduler": scheduler, "prompt_max_tokens": TEXT, **t5gemma(TEXT)}


LOOPS = {
    "PRXPipeline": TinyLoop(partial(seeded, _prx), SIZE, batch=False),
    "PRXPixelPipeline": TinyLoop(partial(seeded, _pixel), SIZE | {"output_type": "pt"}, batch=False, after=_velocity),
}
