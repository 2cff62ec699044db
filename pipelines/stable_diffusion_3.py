"""Stable Diffusion 3 with GoCA and S-CFG, for `custom_pipeline=`.

DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/stable_diffusion_3.py", trust_remote_code=True)
"""

import diffusers

import goca_guidance


class GoCASCFGStableDiffusion3Pipeline(goca_guidance.GoCASCFGPipeline, diffusers.StableDiffusion3Pipeline):
    """[`GoCASCFGPipeline`] of Stable Diffusion 3."""
