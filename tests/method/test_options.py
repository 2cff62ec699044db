"""The options of the segmentor that trade accuracy for speed: exact where they promise it, else what they are defined to be.

`GoCAConfig.agreement_rows` samples rows, `GoCAConfig.working_size` reads fewer pixels.
"""

import math
from dataclasses import replace

import pytest
import torch

from eval.cost.captured_step import Step
from eval.cost.naive import NaiveSegmentor
from goca_guidance import GoCAConfig
from goca_guidance.config import LayerPreset
from goca_guidance.method import aggregation
from goca_guidance.method.maps import coarser
from goca_guidance.method.records import TokenLayout
from goca_guidance.method.segmentor import GoCASegmentor
from tests.helpers.attention import projection_of, record, same, step
from tests.helpers.guided import every_family


# ---- agreement_rows --------------------------------------------------------------------------------------------------
def grid_of(step: Step, name: str) -> tuple[int, int]:
    return next(record.grid for record in step.calls[0] if record.name == name)


def answers(step: Step, **options) -> tuple:
    """Layer weights, scores, regions."""
    reader = step.ours(GoCAConfig(**options))
    return reader.weights(), reader.scores(), reader.regions((32, 32))


def assert_identical(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert same(ours[2], theirs[2])


SEPARATE, JOINT = ["sd", "sdxl", "pixart-alpha", "pixart-sigma", "hunyuan"], ["flux", "sd3"]


@pytest.mark.parametrize("name", [*SEPARATE, *JOINT])
def test_as_many_rows_as_there_are_are_all_rows(name):
    rows = math.prod(grid_of(step(name), step(name).preset.reference))
    assert_identical(answers(step(name), agreement_rows=rows), answers(step(name)))
    assert not torch.equal(answers(step(name), agreement_rows=rows // 2)[0], answers(step(name))[0])


@pytest.mark.parametrize("working_size", [None, 4])
@pytest.mark.parametrize("row_normalise", [False, True])
@pytest.mark.parametrize("name", [*SEPARATE, *JOINT])
def test_agreement_of_sampled_rows_is_unbiased(name, row_normalise, working_size, monkeypatch):
    """Samples that share out the rows among them average to the agreement of all rows."""
    options = {"row_normalise": row_normalise, "working_size": working_size}
    monkeypatch.setattr(aggregation, "layer_weights", lambda agreements: agreements)
    full, found = answers(step(name), **options)[0], []
    for turn in range(16):

        def chosen(count, wanted, device, turn=turn):
            return torch.arange(turn % (count // wanted), count, count // wanted, device=device)

        monkeypatch.setattr(aggregation, "sample", chosen)
        found.append(answers(step(name), agreement_rows=16, **options)[0])
    assert torch.allclose(torch.stack(found).mean(0), full, rtol=1e-4)
    assert torch.stack(found).std(0).max() > 0 or working_size  # at 4 x 4 there are sixteen rows


@pytest.mark.parametrize("name", [*SEPARATE, "flux"])  # of sd3's sharpened layers a few of 64 rows decide
def test_sampled_rows_are_near_all_rows_and_the_same_at_every_call(name):
    captured, state = step(name), torch.get_rng_state()
    some, again, full = (answers(captured, agreement_rows=rows) for rows in (48, 48, None))
    assert torch.equal(state, torch.get_rng_state())
    assert_identical(some, again)
    assert torch.allclose(some[0], full[0], rtol=0, atol=0.1)
    assert torch.allclose(some[0].sum(-1), torch.ones(2))


# ---- working_size ----------------------------------------------------------------------------------------------------
def both(step: Step, side: int, working, **options) -> tuple[GoCASegmentor, NaiveSegmentor]:
    """Ours at a working size, and the naive form, told which grid each layer's becomes."""
    config = GoCAConfig(working_size=side, **options)
    naive = step.naive(config)
    naive.working = working
    return step.ours(config), naive


def compare(step: Step, side: int, working, **options):
    ours, naive = both(step, side, working, **options)
    assert torch.allclose(ours.weights(), naive.weights(), rtol=0, atol=1e-5)
    assert ours.scores().shape == naive.scores().shape
    assert torch.allclose(ours.scores(), naive.scores(), rtol=0, atol=1e-3)
    found, expected = (segmentor.regions((32, 32)) for segmentor in (ours, naive))
    assert (found.masks == expected.masks).all(1).float().mean() >= 0.995
    assert (found.foreground == expected.foreground).float().mean() >= 0.995
    assert (found.masks.sum(1) == 1).all()


@every_family
def test_a_working_size_of_the_grid_changes_nothing(name):
    grid = max((record.grid for record in step(name).calls[0]), key=math.prod)
    for side in (max(grid), 1000):
        assert_identical(answers(step(name), working_size=side), answers(step(name)))


THIRD = {(16, 16): (6, 6), (8, 8): (6, 6)}


@pytest.mark.parametrize("changes", [{}, {"heads": "contribution"}, {"row_normalise": True}, {"refine_order": 0}])
@every_family
def test_working_size_equals_the_naive_form(name, changes):
    compare(step(name), 4, {(16, 16): (4, 4), (8, 8): (4, 4)}, **changes)


@pytest.mark.parametrize(
    ("side", "working"), [(8, {(16, 16): (8, 8)}), (6, THIRD), (1, {(16, 16): (1, 1), (8, 8): (1, 1)})]
)
@pytest.mark.parametrize("name", ["sd", "hunyuan", "flux"])
def test_other_working_sizes(name, side, working):
    compare(step(name), side, working)


WIDE = [  # 32 x 48 pixels
    ("sd", 12, {(16, 24): (8, 12)}),
    ("sd", 10, {(16, 24): (7, 10), (8, 12): (7, 10)}),
    ("flux", 6, {(8, 12): (4, 6)}),
    ("sd3", 5, {(8, 12): (3, 5)}),
    ("pixart-sigma", 7, {(8, 12): (5, 7)}),
]


@pytest.mark.parametrize(("name", "side", "working"), WIDE)
def test_wide_grids(name, side, working):
    compare(step(name, width=48), side, working)


def invented(fine: tuple[int, int], coarse: tuple[int, int]) -> Step:
    """Random attention of one prompt on any two grids, of which a U-Net's downsampling makes odd ones."""
    names = ("fine.attn1", "fine.attn2", "coarse.attn1", "coarse.attn2")
    grids, keys = (fine, fine, coarse, coarse), (None, 6, None, 6)
    records = [
        record(n, 2, grid=g, keys=k, seed=i) for i, (n, g, k) in enumerate(zip(names, grids, keys, strict=True))
    ]
    records = [replace(r, query=3 * r.query) for r in records]
    layout = TokenLayout(
        (("cat", "bus", "<sos>"),),
        torch.tensor([[2, 3, 0]]),
        torch.eye(3)[None],
        torch.tensor([[True, True, False]]),
        torch.tensor([[0]]),
    )
    preset = LayerPreset(names[1::2], names[::2], "fine.attn2", ("fine.attn1",))
    projections = {r.name: projection_of(r.gram) for r in records}
    own = {"preset": preset, "layout": layout, "projections": projections, "calls": [records]}
    return replace(step("sd"), unconditional_sink=True, **own)


ODD = [  # the finest grid, the next one, working size, what each becomes
    ((15, 11), (8, 6), 8, (8, 6), (8, 6)),
    ((9, 16), (5, 8), 7, (4, 7), (4, 7)),
    ((13, 16), (7, 8), 8, (6, 8), (7, 8)),  # the coarser layer keeps a row more than the finest one
    ((16, 9), (8, 5), 8, (8, 4), (8, 5)),
    ((16, 3), (8, 2), 2, (2, 1), (2, 1)),
    ((1, 12), (1, 6), 3, (1, 3), (1, 3)),
]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("fine", "coarse", "side", "fine_read", "coarse_read"), ODD)
def test_odd_grids(fine, coarse, side, fine_read, coarse_read, stored, monkeypatch):
    if not stored:
        monkeypatch.setattr(aggregation, "STORED", 1)
    assert (coarser(fine, side), coarser(coarse, side)) == (fine_read, coarse_read)
    ours, naive = both(invented(fine, coarse), side, {fine: fine_read, coarse: coarse_read})
    assert ours.scores().shape == naive.scores().shape
    assert torch.allclose(ours.scores(), naive.scores(), rtol=0, atol=1e-3)
    assert torch.equal(ours.regions((32, 32)).foreground, naive.regions((32, 32)).foreground)


@every_family
@pytest.mark.parametrize("side", [None, 6, 4])
def test_layers_too_large_to_store(name, side, monkeypatch):
    stored = answers(step(name), working_size=side)
    monkeypatch.setattr(aggregation, "STORED", 1)
    large = answers(step(name), working_size=side)
    assert torch.allclose(stored[0], large[0], rtol=0, atol=1e-6)
    assert torch.allclose(stored[1], large[1], rtol=0, atol=1e-3)
    assert (stored[2].masks == large[2].masks).all(1).float().mean() >= 0.995
    assert not torch.equal(stored[1], large[1])  # it was another path


# ---- together --------------------------------------------------------------------------------------------------------
@every_family
def test_queues_change_nothing(name, monkeypatch):
    options = {"working_size": 6, "agreement_rows": 9}
    monkeypatch.setattr(aggregation, "BATCH", {"cpu": 1})
    apart = answers(step(name), **options)
    monkeypatch.setattr(aggregation, "BATCH", {"cpu": 10**12})
    together = answers(step(name), **options)
    assert torch.allclose(apart[0], together[0], rtol=0, atol=1e-6)
    assert torch.allclose(apart[1], together[1], rtol=0, atol=1e-6)
    assert (apart[2].masks == together[2].masks).all(1).float().mean() >= 0.999
