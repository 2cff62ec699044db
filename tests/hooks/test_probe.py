"""A transformer that no row names: its layout is found by a probe, and is the row's."""

from unittest.mock import patch

import pytest
import torch

from goca_guidance.denoisers.adapters import ADAPTERS, denoiser_of, family_of
from goca_guidance.denoisers.unknown import Layout, UnknownFamily
from tests.helpers import families
from tests.helpers.families import stock_pipeline
from tests.helpers.guided import NEUTRAL, assert_clean, guided
from tests.helpers.loops.every import LOOPS
from tests.helpers.loops.tiny_loop import build, run
from tests.helpers.loops.trace import latents


REGIONS = {"cat": [1], "grass": [3], "</s>": [4]}
FOUND = {  # joint layers of one grid, latents b c H W: text behind registers, or before the pixels
    "AuraFlowPipeline": "AuraFlowTransformer2DModel",
    "CogView3PlusPipeline": "CogView3PlusTransformer2DModel",
}


@pytest.mark.parametrize("name", FOUND)
def test_a_layout_is_found_out(name, caplog):
    """Regions are those of the row, but for choices that the row makes; a rate of one is stock."""
    loop = LOOPS[name]
    stock = build(name, loop)
    expected = latents(run(stock, loop))
    row = run(guided(stock), loop, region_tokens=REGIONS, output_regions=True)
    with patch.dict(ADAPTERS):
        del ADAPTERS[FOUND[name]]
        pipe = guided(stock)
        assert isinstance(family_of(denoiser_of(pipe.components)), UnknownFamily)
        neutral = latents(run(pipe, loop, scfg=NEUTRAL, region_tokens=REGIONS))
        found = run(pipe, loop, region_tokens=REGIONS, output_regions=True)
    assert torch.equal(neutral, expected)
    assert len(found["regions"]) == 2
    for ours, named in zip(found["regions"], row["regions"], strict=True):
        assert torch.equal(ours.masks, named.masks)
    assert any("No row of facts is known" in record.getMessage() for record in caplog.records)
    assert_clean(pipe)


def test_text_behind_the_pixels_is_found():
    """Stable Diffusion 3's 24 tokens; the second attention of its dual blocks sees no text, and is left out."""
    stock, found = stock_pipeline("sd3"), []
    with patch.dict(ADAPTERS), patch.object(UnknownFamily, "learn", lambda self, layouts: found.append(layouts)):
        del ADAPTERS["SD3Transformer2DModel"]
        with pytest.raises(RuntimeError, match="Expected attention"):  # nothing was learnt
            families.run(guided(stock), "sd3", region_tokens=REGIONS)
    (layouts,) = found
    assert set(layouts) == {f"transformer_blocks.{i}.attn" for i in range(3)}
    assert set(layouts.values()) == {Layout(text=64, pixels=0)}


def test_a_denoiser_in_which_no_text_is_found_is_refused():
    loop = LOOPS["AuraFlowPipeline"]
    stock = build("AuraFlowPipeline", loop)
    with patch.dict(ADAPTERS):
        del ADAPTERS["AuraFlowTransformer2DModel"]
        pipe = guided(stock)
        context = pipe.transformer.context_embedder
        context.register_forward_hook(lambda module, args, output: torch.zeros_like(output))  # reads no text
        with pytest.raises(ValueError, match="no text token could be found in it"):
            run(pipe, loop, region_tokens=REGIONS)
    assert torch.isfinite(latents(run(stock, loop))).all()
