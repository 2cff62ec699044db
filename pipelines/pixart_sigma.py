"""PixArt-Sigma with GoCA and S-CFG, for `custom_pipeline=`.

DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/pixart_sigma.py", trust_remote_code=True)
"""

import diffusers

import goca_guidance


class GoCASCFGPixArtSigmaPipeline(goca_guidance.GoCASCFGPipeline, diffusers.PixArtSigmaPipeline):
    """[`GoCASCFGPipeline`] of PixArt-Sigma."""
