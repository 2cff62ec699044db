"""Stable Diffusion 1.x / 2.x with GoCA and S-CFG, for `custom_pipeline=`.

DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/stable_diffusion.py", trust_remote_code=True)
"""

import goca_guidance


class GoCASCFGStableDiffusionPipeline(goca_guidance.GoCASCFGPipeline):
    """[`GoCASCFGPipeline`], found by diffusers because it is the one pipeline class that this file names."""
