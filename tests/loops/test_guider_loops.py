"""Stock pipelines whose predictions a guider mixes: HunyuanImage 2.1, its refiner, HunyuanVideo 1.5, guided by regions."""

import pytest
import torch

from goca_guidance import GoCAGuidance, GoCASCFGPipeline, SCFGConfig
from tests.helpers.guided import assert_untouched
from tests.helpers.loops.every import LOOPS
from tests.helpers.loops.tiny_loop import build, run
from tests.helpers.loops.trace import latents, spread, traced


NAMES = ("HunyuanImagePipeline", "HunyuanImageRefinerPipeline", "HunyuanVideo15Pipeline")
PROMPTS = ["a cat and a bus on grass", "potted plant"]
every_guider = pytest.mark.parametrize("name", NAMES)


def guider(name: str, **kwargs) -> GoCAGuidance:
    return GoCAGuidance(LOOPS[name].components()["guider"].guidance_scale, **kwargs)


@every_guider
def test_at_rate_one_it_is_stock(name):
    """Bit for bit, and nothing is left behind."""
    one = guider(name, scfg=SCFGConfig(rate_min=1, rate_max=1))
    pipe = build(name, LOOPS[name], guider=one)
    with one.watching(pipe):
        found = latents(run(pipe, LOOPS[name]))
    assert torch.equal(found, latents(run(build(name, LOOPS[name]), LOOPS[name])))
    assert_untouched(*(part for part in pipe.components.values() if isinstance(part, torch.nn.Module)))


@every_guider
def test_what_is_rated_reaches_the_scheduler(name):
    """Of two prompts, by regions of their words; of HunyuanVideo 1.5 one: of two, a guider cannot tell all template words."""
    loop, ours, count = LOOPS[name], guider(name), 1 if "Video" in name else 2
    pipe = build(name, loop, guider=ours)
    with ours.watching(pipe, keep_regions=True) as seen:
        _, steps = traced(run, pipe, loop, prompt=PROMPTS[:count])
    regions, maps, _ = seen.results()
    assert len(steps) == len(maps) == loop.guided
    for step, scales in zip(steps, maps, strict=True):
        torch.testing.assert_close(
            loop.mixed(step.u, step.c, spread(loop, scales, step.c)), step.given, rtol=1e-4, atol=1e-5
        )
    assert regions[0].labels == (("cat", "bus", "grass"), ("potted", "plant"))[:count]
    assert maps.std() > 0


@every_guider
def test_the_pipeline_says_how_it_is_guided(name):
    with pytest.raises(ValueError, match="guider=GoCAGuidance"):
        GoCASCFGPipeline.from_pipe(build(name, LOOPS[name]))
