"""Videos: the same method on grids of frames, rows and columns, and nothing of it as large as a map of all their pixels."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from eval.cost.naive import NaiveSegmentor
from goca_guidance.config import GoCAConfig, LayerPreset, SCFGConfig
from goca_guidance.method import aggregation, attention, goca
from goca_guidance.method.maps import blur, nearest_index
from goca_guidance.method.records import AttentionView, Regions, TokenLayout
from goca_guidance.method.scfg import SCFGSegmentor, rate_map
from goca_guidance.method.segmentor import GoCASegmentor
from tests.helpers.attention import projection_of, record, same


GRID = (5, 4, 6)
SINK = torch.tensor([[0]])
LAYOUT = TokenLayout((("cat", "bus"),), torch.tensor([[2, 3]]), torch.eye(2)[None], torch.ones(1, 2) > 0, SINK)


# ---- invented attention ----------------------------------------------------------------------------------------------
def cross(grid=GRID, layers=3, **preset):
    """Random attention of one prediction: words beside pixels in each layer, and their preset."""
    pixels, words = [f"{i}.attn1" for i in range(layers)], [f"{i}.attn2" for i in range(layers)]
    records = []
    for i in range(layers):
        records += [record(pixels[i], 1, grid=grid, seed=i), record(words[i], 1, grid=grid, keys=6, seed=10 + i)]
    made = LayerPreset(tuple(words), tuple(pixels), words[layers // 2], tuple(pixels[1:]), **preset)
    return [replace(r, query=2 * r.query) for r in records], made


def joint(grid=GRID, layers=3, **preset):
    """The same, of six words before the pixels in one attention."""
    names, count = tuple(map(str, range(layers))), math.prod(grid)
    view = AttentionView(grid, slice(0, 6), slice(6, 6 + count))
    records = [record(name, 1, grid=grid, keys=6 + count, view=view, seed=i) for i, name in enumerate(names)]
    made = LayerPreset(names, names, names[layers // 2], names[1:], **preset)
    return [replace(r, query=2 * r.query) for r in records], made


KINDS = pytest.mark.parametrize("kind", [cross, joint])


def fed(segmentor, records, branches=(1,)):
    for r in records:
        segmentor.keep(r, branches)
    return segmentor


def ours(records, preset, layout=LAYOUT, **options) -> GoCASegmentor:
    return fed(GoCASegmentor(GoCAConfig(**options), preset, layout), records)


def naive(records, preset, working=GRID, **options) -> NaiveSegmentor:
    """In float64."""
    projections = {r.name: projection_of(r.gram) for r in records}
    made = NaiveSegmentor(GoCAConfig(**options), preset, LAYOUT, False, projections, torch.float64)
    made.working = {GRID: working}
    return fed(made, records)


# ---- GoCA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("side", "working"), [(None, GRID), (4, (2, 3, 4)), (3, (1, 2, 3))])
@pytest.mark.parametrize("options", [{}, {"row_normalise": True}, {"heads": "uniform", "rescale": False}], ids=str)
@KINDS
def test_a_video_equals_the_naive_form(kind, options, side, working, stored, monkeypatch):
    """Also where the reference is not the first layer, and where the refining sum is not stored."""
    monkeypatch.setattr(attention, "CPU_BLOCK", 2000)  # several blocks a layer
    if not stored:
        monkeypatch.setattr(aggregation, "STORED", 1)
    records, preset = kind()
    found = ours(records, preset, working_size=side, **options)
    expected = naive(records, preset, working, **options)
    assert torch.allclose(found.weights(), expected.weights().float(), rtol=0, atol=1e-5)
    assert found.scores().shape == (1, 2, *working)
    assert torch.allclose(found.scores(), expected.scores().float(), rtol=0, atol=1e-3)
    regions, theirs = (segmentor.regions((5, 8, 12)) for segmentor in (found, expected))
    assert regions.masks.shape == (1, 2, 5, 8, 12)
    assert (regions.masks == theirs.masks).float().mean() >= 0.995
    assert (regions.foreground == theirs.foreground).float().mean() >= 0.995


def test_a_video_is_the_method_in_one_piece():
    """Every stage in float64, frame by frame where it smooths, from two layers of words beside pixels."""
    records, preset = cross(layers=2)
    (own, words), (own_1, words_1) = records[:2], records[2:]
    frames, height, width = GRID
    probs = {r.name: (r.query.double() @ r.key.double().mT * r.scale).softmax(-1) for r in records}
    f = words_1.query.double().transpose(1, 2).flatten(2)
    reference = (f @ f.mT / f.shape[-1] ** 0.5).softmax(-1)
    weights = torch.stack([(reference * probs[r.name].mean(1)).sum() for r in (own, own_1)])
    merged = 0
    for weight, r in zip(weights / weights.sum(), (words, words_1), strict=True):
        projection = projection_of(r.gram).double()
        each = torch.stack([r.output[:, h].double() @ projection[5 * h : 5 * h + 5] for h in range(3)], 1)
        share = (each * each.sum(1, keepdim=True)).sum(-1)
        merged = merged + weight * (probs[r.name] * (share / share.sum(1, keepdim=True))[..., None]).sum(1)
    tokens = merged.clamp(min=0)[0, :, [2, 3]].mT.unflatten(1, GRID)  # two words, frames, rows, columns
    scores = tokens / tokens.sum(0)
    relative = (height * width) ** 0.5 / 64
    taps = torch.exp(-(torch.tensor([-1.0, 0, 1]).double() ** 2) / (2 * (1.1 * relative) ** 2))
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    for frame in range(frames):  # in space alone, reflected
        padded = F.pad(scores[:, frame, None], (1, 1, 1, 1), mode="reflect")
        scores[:, frame] = F.conv2d(padded, kernel[None, None])[:, 0]
    low, high = scores.flatten(1).amin(1)[:, None], scores.flatten(1).amax(1)[:, None]
    refined = (scores.flatten(1) - low) / (high - low)
    for _ in range(2):
        refined = refined @ probs[own_1.name].mean(1)[0].mT
    low, high = refined.amin(1, keepdim=True), refined.amax(1, keepdim=True)
    expected = ((refined - low) / (high - low)).float().unflatten(1, GRID)[None]
    assert torch.allclose(ours(records, preset).scores(), expected, atol=1e-3)


@KINDS
def test_an_image_is_a_video_of_one_frame(kind):
    (video, preset), (image, _) = kind((1, 4, 6)), kind((4, 6))
    for options in ({}, {"working_size": 4, "heads": "uniform"}):
        one, other = ours(video, preset, **options), ours(image, preset, **options)
        assert torch.allclose(one.scores()[:, :, 0], other.scores(), atol=1e-4)
        ours_, theirs = one.regions((1, 8, 12)), other.regions((8, 12))
        assert torch.equal(ours_.masks[:, :, 0], theirs.masks)
        assert torch.equal(ours_.foreground[:, :, 0], theirs.foreground)


@KINDS
def test_a_batch_of_videos_equals_each_alone(kind):
    records, preset = kind(working_size=4, agreement_rows=9)
    both = [replace(r, query=_both(r.query), key=_both(r.key), output=_both(r.output), value=None) for r in records]
    found = ours(both, preset, LAYOUT.repeat(2))
    for image in (0, 1):
        alone = ours([r.branch(image) for r in both], preset)
        assert torch.allclose(found.weights()[image], alone.weights()[0], atol=1e-6)
        assert torch.allclose(found.scores()[image], alone.scores()[0], atol=1e-4)
    assert not torch.allclose(*found.scores(), atol=1e-2)


@KINDS
def test_the_preset_says_what_the_configuration_leaves_open(kind):
    records, preset = kind()
    some = replace(preset, working_size=4, agreement_rows=9)
    for options in ({}, {"working_size": 3}, {"agreement_rows": 5}):
        asked = {"working_size": 4, "agreement_rows": 9} | options
        found, expected = ours(records, some, **options), ours(records, preset, **asked)
        assert torch.equal(found.weights(), expected.weights())
        assert torch.equal(found.scores(), expected.scores())
    assert ours(records, some).scores().shape == (1, 2, 2, 3, 4)
    assert not torch.equal(ours(records, some).weights(), ours(records, preset, working_size=4).weights())


@pytest.mark.parametrize("working_size", [None, 4])
@KINDS
def test_agreement_of_sampled_rows_is_unbiased(kind, working_size, monkeypatch):
    """Samples that share out the rows among them average to the agreement of all rows, before the reference and after."""
    monkeypatch.setattr(aggregation, "layer_weights", lambda agreements: agreements)
    records, preset = kind(layers=4)
    full, found = ours(records, preset, working_size=working_size).weights(), []
    for turn in range(4):
        monkeypatch.setattr(
            aggregation, "sample", lambda count, wanted, device, turn=turn: torch.arange(turn, count, 4)
        )
        rows = math.prod(GRID if working_size is None else (2, 3, 4)) // 4
        found.append(ours(records, preset, working_size=working_size, agreement_rows=rows).weights())
    assert torch.allclose(torch.stack(found).mean(0), full, rtol=1e-4)
    assert (torch.stack(found).std(0) > 0).all()


# ---- S-CFG -----------------------------------------------------------------------------------------------------------
def mean_probs(r):
    return (r.query @ r.key.mT * r.scale).softmax(-1).mean(1)


def _both(x):
    """An unconditional prediction, then this one."""
    return torch.cat([x.flip(2), x])


@pytest.mark.parametrize("unconditional", [False, True])
@pytest.mark.parametrize(("side", "working"), [(None, GRID), (4, (2, 3, 4))])
@KINDS
def test_scfg_segmentor_of_a_video(kind, side, working, unconditional):
    """(S + 3 S^2) / 4 of head means: rows of the working grid, whose pixels stand for what bilinear resizing takes of them."""
    records, preset = kind(working_size=side)
    both = [replace(r.only(), query=_both(r.query), key=_both(r.key)) for r in records]
    segmentor = SCFGSegmentor(GoCAConfig(), preset, LAYOUT, unconditional_sink=unconditional)
    regions = fed(segmentor, both, (0, 1)).regions(GRID)
    rows = nearest_index(GRID, working, SINK.device)
    basis = torch.eye(math.prod(working)).unflatten(-1, working)[None]
    spread = (basis if working == GRID else F.interpolate(basis, GRID, mode="trilinear"))[0].flatten(1).mT

    def relative(branch, tokens):
        layers, by_name = [], {r.name: r.branch(branch) for r in both}
        for name, beside in zip(preset.text, preset.self_attention, strict=True):
            text, own = by_name[name], by_name[beside]
            s = mean_probs(own)[:, rows][..., own.view.image] @ spread
            c = mean_probs(text)[:, rows][..., text.view.text]
            m = tokens(blur(((s @ c + 3 * s @ s @ c) / 4).mT.unflatten(-1, working), 3, 0.5**0.5))
            layers.append(m / m.mean((2, 3, 4), keepdim=True))
        return torch.stack(layers).mean(0)[0]

    def in_full(masks):
        return masks.flatten()[nearest_index(working, GRID, SINK.device)].unflatten(0, GRID)

    winner = relative(1, lambda maps: maps[:, [2, 3]]).argmax(0)
    assert (regions.masks[0, 1] == in_full(winner)).float().mean() > 0.99
    branch = 0 if unconditional else 1
    sink, others = relative(branch, lambda m: m[:, :1]), relative(branch, lambda m: m[:, 1:].sum(1, keepdim=True))
    assert (regions.foreground[0, 0] == in_full(sink < others)).float().mean() > 0.99
    assert 0 < regions.masks[0, 1].float().mean() < 1


def test_rate_by_hand():
    """|delta| is 2 in the first frame, 4 and 1 in the halves of the second one: one region is of both frames."""
    delta = torch.tensor([[[2.0, 2.0]], [[4.0, 1.0]]])[None, None]
    cat = torch.tensor([[[1, 1]], [[1, 0]]], dtype=torch.bool)
    regions = Regions(
        torch.stack([cat, ~cat])[None], torch.tensor([[[1, 1]], [[0, 0]]]).bool()[None, None], (("a", "b"),)
    )
    sharp = rate_map(delta, regions, 5.0, SCFGConfig(smooth_size=1))  # means: 2 of the foreground, 8/3 and 1
    assert torch.allclose(sharp[0, 0], torch.tensor([[[0.8, 0.8]], [[0.8, 2.0]]]))
    smooth = rate_map(delta, regions, 5.0, SCFGConfig())
    assert torch.allclose(smooth[0, 0, 0], torch.full((1, 2), 0.8))  # nothing of the other frame
    assert torch.allclose(smooth[0, 0, 1], torch.tensor([[0.8 + 0.4238 * 1.2, 2 - 0.4238 * 1.2]]), atol=1e-3)


# ---- memory ----------------------------------------------------------------------------------------------------------
class Largest(TorchFunctionMode):
    """The number of elements of the largest tensor that was made."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for x in found if isinstance(found, tuple) else (found,):
            if isinstance(x, torch.Tensor):
                self.count = max(self.count, min(x.numel(), x.untyped_storage().nbytes() // x.element_size()))
        return found


@pytest.mark.parametrize("make", [GoCASegmentor, SCFGSegmentor])
@KINDS
def test_nothing_is_as_large_as_a_map_of_all_pixels(kind, make, monkeypatch):
    """576 pixels, read at 72 of them: 331,776 numbers, 41,472 in the rows that are read, 5,184 on the working grid."""
    monkeypatch.setattr(attention, "CPU_BLOCK", 2_000)
    monkeypatch.setattr(aggregation, "BATCH", {"cpu": 1})
    records, preset = kind((6, 8, 12), 4, working_size=6, agreement_rows=50)
    with Largest() as largest:
        fed(make(GoCAConfig(), preset, LAYOUT), records).regions((6, 8, 12))
    assert largest.count <= 582 * 15  # the keys


def test_what_is_held_of_a_video_before_its_reference(monkeypatch):
    """Of each earlier layer the rows that are compared, and nothing of the layer itself."""
    records, preset = cross(layers=4, working_size=4, agreement_rows=9)
    monkeypatch.setattr(aggregation, "BATCH", {"cpu": 1})
    segmentor = GoCASegmentor(GoCAConfig(), preset, LAYOUT)
    fed(segmentor, records[:4])
    held = segmentor._conditional
    assert (held._early, held._waiting) == ([], {})
    assert {name: rows.shape for name, rows in held._held.items()} == dict.fromkeys(
        preset.self_attention[:2], (1, 9, 24)
    )
    fed(segmentor, records[4:])
    assert held._held == {}
    assert {maps.shape[3:] for _, maps in held._maps} == {(2, 3, 4)}
    assert held.weights().shape == (1, 4)


@pytest.mark.parametrize("at_a_time", [1, 40, 2**25])
def test_heads_of_a_few_pixels_at_a_time(at_a_time, monkeypatch):
    a, b = record(seed=1), record(seed=2)
    expected = torch.cat([goca.head_weights(r.output, [r.gram]) for r in (a, b)])
    monkeypatch.setattr(goca, "AT_A_TIME", at_a_time)
    found = goca.head_weights(torch.cat([a.output, b.output]), [a.gram, b.gram])
    assert torch.allclose(found, expected, atol=1e-6)


def test_regions_of_videos_are_partitions():
    records, preset = cross()
    regions = ours(records, preset, working_size=4).regions((9, 8, 12))
    assert (regions.masks.sum(1) == 1).all()
    assert regions.foreground.shape == (1, 1, 9, 8, 12)
    assert same(regions, regions.to("cpu"))
