"""Stable Diffusion 1.x / 2.x with GoCA and S-CFG, for `custom_pipeline=`.

DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/stable_diffusion.py", trust_remote_code=True)
"""

import diffusers

import goca_guidance


class GoCASCFGStableDiffusionPipeline(goca_guidance.GoCASCFGPipeline, diffusers.StableDiffusionPipeline):
    """[`GoCASCFGPipeline`] of Stable Diffusion 1.x / 2.x."""
