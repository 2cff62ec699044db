"""Flux.1 with GoCA and S-CFG, for `custom_pipeline=`.

DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/flux.py", trust_remote_code=True)
"""

import diffusers

import goca_guidance


class GoCASCFGFluxPipeline(goca_guidance.GoCASCFGPipeline, diffusers.FluxPipeline):
    """[`GoCASCFGPipeline`] of Flux.1."""
