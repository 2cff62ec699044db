"""HunyuanDiT with GoCA and S-CFG, for `custom_pipeline=`.

DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/hunyuandit.py", trust_remote_code=True)
"""

import diffusers

import goca_guidance


class GoCASCFGHunyuanDiTPipeline(goca_guidance.GoCASCFGPipeline, diffusers.HunyuanDiTPipeline):
    """[`GoCASCFGPipeline`] of HunyuanDiT."""
