"""Every loop that is served, guided by regions: stock where nothing is rated, else what was rated reaches the scheduler."""

from functools import cache

import pytest
import torch

from goca_guidance import GoCASCFGPipeline
from goca_guidance.denoisers.adapters import denoiser_of, family_of
from tests.helpers.guided import NEUTRAL, assert_clean, guided
from tests.helpers.loops.every import LOOPS, stock, stock_call
from tests.helpers.loops.image_places import FIRST
from tests.helpers.loops.tiny_loop import run
from tests.helpers.loops.trace import Step, latents, own, spread, traced


# refused, or mixed by a guider
PENDING = "GlmImage HunyuanImage HunyuanImageRefiner HunyuanVideo15 StableCascadeDecoder".split()
SERVED = sorted(name for name, loop in LOOPS.items() if loop.guided and name.removesuffix("Pipeline") not in PENDING)
PROMPTS = ["a cat and a bus on grass", "potted plant"]
WORDS = [{"cat", "bus", "grass"}, {"potted", "plant"}]
every_loop = pytest.mark.parametrize("name", SERVED)


@cache
def ours(name: str) -> GoCASCFGPipeline:
    """On the stock pipeline's modules."""
    return guided(stock(name))


def named(name: str) -> dict:
    """Regions by the places of their tokens."""
    if first := FIRST.get(name.removesuffix("Pipeline")):
        return {"region_tokens": {"cat": [first + 1], "grass": [first + 2], "</s>": [first]}}
    start = family_of(denoiser_of(ours(name).components)).sink == "start"
    return {"region_tokens": {"cat": [1], "grass": [3]} | ({"<sos>": [0]} if start else {"</s>": [2]})}


def call(name: str, **kwargs):
    return run(ours(name), LOOPS[name], **named(name) | kwargs)


def assert_rated(name: str, output, steps: list[Step]) -> None:
    """What the scheduler gets is mixed by the maps that the output tells, in float64; they differ from place to place."""
    loop, mixing = LOOPS[name], [step for step in steps if step.u is not None]
    assert len(mixing) == len(output.guidance_maps) == len(output.regions) == loop.guided
    for step, scales in zip(mixing, output.guidance_maps, strict=True):
        mixed = loop.mixed(step.u, step.c, spread(loop, scales, step.c))
        torch.testing.assert_close(*own(loop, step, mixed), rtol=1e-4, atol=loop.tolerance)
    assert output.guidance_maps.std() > 0


@every_loop
def test_at_rate_one_it_is_stock(name):
    """Bit for bit."""
    expected, _ = stock_call(name)
    assert torch.equal(latents(call(name, scfg=NEUTRAL)), expected)
    assert_clean(ours(name))


@every_loop
def test_what_is_rated_reaches_the_scheduler(name):
    output, steps = traced(run, ours(name), LOOPS[name], output_regions=True, **named(name))
    assert_rated(name, output, steps)
    assert all((regions.masks.sum(1) == 1).all() for regions in output.regions)
    assert_clean(ours(name))


@pytest.mark.parametrize("name", [n for n in SERVED if LOOPS[n].batch])
def test_two_prompts_of_different_lengths(name):
    """Each has regions and rates of its own, by its own words where an encoder reads them."""
    loop = LOOPS[name]
    asked = {} if loop.words else named(name)
    negative = {"negative_prompt": ["", "red"]} if "negative_prompt" in loop.call else {}
    output, steps = traced(run, ours(name), loop, prompt=PROMPTS, output_regions=True, **negative, **asked)
    assert_rated(name, output, steps)
    if not asked:
        assert all(words <= set(found) for words, found in zip(WORDS, output.regions[0].labels, strict=True))
    first, second = output.guidance_maps.unbind(1)
    assert not torch.equal(first, second)
