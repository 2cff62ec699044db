"""Denoisers of videos: latents b c F H W, in a row of facts each, code where facts do not do."""

from goca_guidance.denoisers.base import Family


# ---- rows ------------------------------------------------------------------------------------------------------------
FRAMES: dict[str, type[Family]] = {}
