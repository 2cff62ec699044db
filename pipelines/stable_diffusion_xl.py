"""Stable Diffusion XL with GoCA and S-CFG, for `custom_pipeline=`.

DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/stable_diffusion_xl.py", trust_remote_code=True)
"""

import diffusers

import goca_guidance


class GoCASCFGStableDiffusionXLPipeline(goca_guidance.GoCASCFGPipeline, diffusers.StableDiffusionXLPipeline):
    """[`GoCASCFGPipeline`] of Stable Diffusion XL."""
