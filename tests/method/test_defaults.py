"""The process's default dtype and device are of no consequence: every tensor says its own."""

import pytest
import torch

from goca_guidance.config import GoCAConfig, SCFGConfig
from goca_guidance.denoisers.layouts import class_layout, named_layout, prompt_layout, token_layout
from goca_guidance.method.diffcut import cut
from goca_guidance.method.records import Regions
from goca_guidance.method.scfg import SCFGSegmentor, rate_map
from tests.helpers.attention import step
from tests.helpers.defaults import default, forget_constants
from tests.helpers.families import FAMILIES
from tests.helpers.tokens import clip, t5


DEFAULTS = [(torch.bfloat16, None), (torch.float16, None), (torch.float64, None), (torch.float32, "meta")]
CONFIGS = (GoCAConfig(), GoCAConfig(row_normalise=True, working_size=6, agreement_rows=9), GoCAConfig.vanilla())


def same(a, b) -> bool:
    return all(x.dtype == y.dtype and x.device == y.device and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def forget():
    """Nothing is kept of what other tests made."""
    forget_constants()


@pytest.mark.parametrize("defaults", DEFAULTS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_maps_and_regions(name, defaults):
    """Before, during and after: what was made in another default is kept, and serves."""
    captured = step(name)

    def found():
        ours = [captured.ours(config) for config in CONFIGS]
        scfg = captured._fed(
            SCFGSegmentor(GoCAConfig(), captured.preset, captured.layout, captured.unconditional_sink)
        )
        regions = [segmentor.regions(captured.latent) for segmentor in (*ours, scfg)]
        return [s.scores() for s in ours] + [m for r in regions for m in (r.masks, r.foreground)]

    before = found()
    forget_constants()
    with default(*defaults):
        during = found()
    assert same(during, before)
    assert same(found(), before)


@pytest.mark.parametrize("defaults", DEFAULTS, ids=str)
def test_layouts_rates_and_cuts(defaults):
    text, sentence, named = clip("a cat on grass", "a bus"), t5("a cat on grass"), clip("cat, grass")
    delta, features = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[:, 0, :4], masks[:, 1, 4:] = True, True
    regions = Regions(masks, masks[:, :1], (("up", "down"),))

    def found():
        layouts = [
            prompt_layout(text, "start"),
            prompt_layout(sentence, "end"),
            token_layout(text, "start"),
            named_layout({"cat": [2], "grass": [4]}, 2, 24, "start"),
            class_layout(named, [["cat", "grass"]]),
        ]
        tensors = [x for layout in layouts for x in (layout.columns, layout.groups, layout.content, layout.sink)]
        return [*tensors, rate_map(delta, regions, 5.0, SCFGConfig()), cut(features, (9, 9))]

    before = found()
    with default(*defaults):
        assert same(found(), before)
    assert same(found(), before)
