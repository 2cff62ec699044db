"""Modular pipelines on the tiny components."""

import diffusers
import pytest

from tests.helpers.families import stock_pipeline


MODULAR = {"sdxl": "StableDiffusionXLAutoBlocks", "sd3": "StableDiffusion3AutoBlocks"}
needs_modular_sd3 = pytest.mark.skipif(
    not hasattr(diffusers, MODULAR["sd3"]), reason="diffusers before 0.39 has no modular Stable Diffusion 3"
)


def modular_pipeline(name):
    blocks = getattr(diffusers, MODULAR[name])()
    modular, components = blocks.init_pipeline(), stock_pipeline(name).components
    wanted = {spec.name for spec in blocks.expected_components} - {"guider"}
    modular.update_components(**{n: part for n, part in components.items() if n in wanted and part is not None})
    modular.set_progress_bar_config(disable=True)
    return modular
