"""PixArt-alpha with GoCA and S-CFG, for `custom_pipeline=`.

DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/pixart_alpha.py", trust_remote_code=True)
"""

import diffusers

import goca_guidance


class GoCASCFGPixArtAlphaPipeline(goca_guidance.GoCASCFGPipeline, diffusers.PixArtAlphaPipeline):
    """[`GoCASCFGPipeline`] of PixArt-alpha."""
