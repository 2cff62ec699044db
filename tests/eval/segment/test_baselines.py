"""DiffSegmenter and FTTM against their papers' words in float64, with every attention map materialised."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from eval.segment.baselines import FTTM, DiffSegmenter, boxes
from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.method.records import TokenLayout
from tests.helpers.attention import IMAGE_FIRST, TEXT_FIRST, joint_record, record


KEYS = 6
SD = (16, 16, 8, 8, 4, 4, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16)  # Stable Diffusion's 16 layers, on grids a quarter as wide
NAMED = {  # for networks that are not Stable Diffusion's
    DiffSegmenter: lambda grids: partial(DiffSegmenter, grid_weights=[0.3, 0.7][:grids]),
    FTTM: lambda grids: partial(FTTM, text_layers=["0"], self_layer="0"),
}
GROUPS = torch.tensor([[0.5, 0, 0], [0.5, 0, 0], [0, 1, 0], [0, 0, 1]])  # a word of two tokens, two of one
COLUMNS = [[1, 2, 4, 5], [3, 5, 0, 1]]  # other tokens in the second image


def layout(images=2, padded=False):
    groups = GROUPS.repeat(images, 1, 1)
    groups[-1, :, 2] *= not padded
    labels = (("potted plant", "cat", "grass"),) * images
    columns = torch.tensor(COLUMNS[:images])
    return TokenLayout(labels, columns, groups, torch.ones(images, 4, dtype=torch.bool), torch.zeros(images, 0).long())


def network(sides, sharp=2.0):
    """Records of layers on square grids, in network order, self-attention before cross-attention; and their preset."""
    cross, own = (tuple(f"{i}.{kind}" for i in range(len(sides))) for kind in ("attn2", "attn1"))
    records = []
    for i, side in enumerate(sides):
        for name, keys in ((own[i], None), (cross[i], KEYS)):
            r = record(name, 2, grid=(side, side), keys=keys, seed=len(records))
            records.append(replace(r, query=sharp * r.query))
    return records, LayerPreset(cross, own, cross[0], own[:1], manual=cross[4:12] if len(sides) == 16 else ())


def scores(segmentor, records, branches=(1,)):
    for r in records:
        segmentor.keep(r, branches)
    return segmentor.scores()


# ---- the naive forms -------------------------------------------------------------------------------------------------
def probs(r):
    return (r.query.double() @ r.key.double().mT * r.scale).softmax(-1).mean(1)


def word_map(r, tokens, grid):
    """Mean of some tokens' columns, as a picture."""
    return torch.stack([probs(r)[i][:, t].mean(-1) for i, t in enumerate(tokens)]).reshape(-1, 1, *grid)


def unit(maps):
    low, high = maps.flatten(1).min(1).values, maps.flatten(1).max(1).values
    return (maps - low[:, None, None, None]) / (high - low)[:, None, None, None]


def enlarged(maps, side):
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)


def words():
    """Of each region, the tokens in each image."""
    return [[c[:2] for c in COLUMNS], [c[2:3] for c in COLUMNS], [c[3:4] for c in COLUMNS]]


def naive_diffsegmenter(records, sides, weights):
    by_name, finest, maps = {r.name: r for r in records}, max(sides), []
    own = [probs(by_name[f"{i}.attn1"]) for i, side in enumerate(sides) if side == finest]
    affinity = torch.stack(own).mean(0)
    for tokens in words():
        total = 0
        for weight, side in zip(weights, sorted(set(sides)), strict=True):
            layers = [word_map(by_name[f"{i}.attn2"], tokens, (s, s)) for i, s in enumerate(sides) if s == side]
            total = total + weight * unit(enlarged(torch.stack(layers).mean(0), finest))
        maps.append(unit((affinity @ total.flatten(1)[..., None]).reshape(-1, 1, finest, finest)))
    return torch.cat(maps, 1)


def flooded_boxes(picture, threshold):
    """Boxes around the parts above the threshold, each found by walking to all eight neighbours."""
    above = {(y, x) for y, x in (picture > threshold * picture.max()).nonzero().tolist()}
    mask = torch.zeros_like(picture)
    while above:
        part, border = set(), [above.pop()]
        while border:
            y, x = border.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & above
            above -= near
            border += near
        ys, xs = [y for y, _ in part], [x for _, x in part]
        mask[min(ys) : max(ys) + 1, min(xs) : max(xs) + 1] = 1
    return mask


def naive_fttm(records, cross, own, side, threshold=0.2):
    by_name = {r.name: r for r in records}
    affinity, maps = probs(by_name[f"{own}.attn1"]), []
    for tokens in words():
        layers = [by_name[f"{i}.attn2"] for i in cross]
        mean = sum(enlarged(word_map(r, tokens, r.grid), side) for r in layers) / len(layers)
        mean, refined = unit(mean), []
        for image, picture in enumerate(mean[:, 0]):
            restricted = (affinity[image] @ affinity[image]) * flooded_boxes(picture, threshold).flatten()
            refined.append((restricted @ picture.flatten()).reshape(1, side, side))
        maps.append(unit(torch.stack(refined)))
    return torch.cat(maps, 1)


# ---- DiffSegmenter ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sides", "given", "weights"),
    [
        (SD, None, (0.3, 0.5, 0.1, 0.1)),  # the paper's
        ((8, 4, 2, 4, 8), [0.3, 0.5, 0.1], (0.3 / 0.9, 0.5 / 0.9, 0.1 / 0.9)),
        ((4, 8), [3, 5], (0.375, 0.625)),
        ((4, 8), [0, 2], (0.0, 1.0)),
        ((4, 4), [7], (1.0,)),
    ],
)
def test_diffsegmenter_equals_the_naive_form(sides, given, weights):
    records, preset = network(sides)
    found = scores(DiffSegmenter(GoCAConfig(), preset, layout(), grid_weights=given), records)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), naive_diffsegmenter(records, sides, weights), atol=1e-4)


@pytest.mark.parametrize("view", [TEXT_FIRST, IMAGE_FIRST])
@pytest.mark.parametrize("method", [DiffSegmenter, FTTM])
def test_joint_attention_reads_words_and_pixels_of_one_softmax(method, view):
    one = joint_record(view, name="0")
    whole = probs(one)
    own, columns = whole[..., view.image], whole[..., view.text]
    for region, tokens in enumerate(words()):
        x = unit(torch.stack([columns[i][:, t].mean(-1) for i, t in enumerate(tokens)]).reshape(2, 1, 4, 4))
        if method is FTTM:
            x = x * torch.stack([flooded_boxes(picture[0], 0.2)[None] for picture in x])
        expected = x.flatten(2).mT
        for _ in range(2 if method is FTTM else 1):
            expected = own @ expected
        found = scores(NAMED[method](1)(GoCAConfig(), LayerPreset(("0",), ("0",), "0", ("0",)), layout()), [one])
        assert torch.allclose(found[:, region : region + 1].double(), unit(expected.mT.reshape(2, 1, 4, 4)), atol=1e-4)


# ---- FTTM ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threshold", [0.2, 0.7])
def test_fttm_equals_the_naive_form(threshold, monkeypatch):
    """The map is inside of boxes that do not cover all of it."""
    monkeypatch.setattr(FTTM, "box_threshold", threshold)
    records, preset = network(SD, sharp=4)
    segmentor = FTTM(GoCAConfig(), preset, layout())
    assert segmentor.layers == {*(f"{i}.attn2" for i in range(4, 9)), "11.attn1"}
    expected = naive_fttm(records, range(4, 9), 11, 8, threshold)
    assert torch.allclose(scores(segmentor, records).double(), expected, atol=1e-4)
    everywhere = naive_fttm(records, range(4, 9), 11, 8, -1)
    assert threshold == 0.2 or (everywhere - expected).abs().max() > 0.05


def test_fttm_reads_the_layers_that_a_row_names():
    records, preset = network((4, 8, 4, 8))
    segmentor = FTTM(GoCAConfig(), preset, layout(), text_layers=["3", "1.attn2"], self_layer="2")
    assert segmentor.layers == {"1.attn2", "3.attn2", "2.attn1"}
    expected = naive_fttm(records, (1, 3), 2, 4)
    assert torch.allclose(scores(segmentor, records).double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (FTTM, {}, "1.x, for which FTTM names its layers, .* `text_layers` and `self_layer`"),
        (FTTM, {"text_layers": ["1"]}, "FTTM names its layers"),
        (FTTM, {"self_layer": "1"}, "FTTM names its layers"),
        (FTTM, {"text_layers": ["10"], "self_layer": "1"}, "but got '10': the nearest are"),
        (FTTM, {"text_layers": ["1"], "self_layer": "1.attn2"}, "but got '1.attn2': the nearest are 1.attn1"),
        (DiffSegmenter, {}, "1.x, for which DiffSegmenter names its layers, .* `grid_weights`"),
        (DiffSegmenter, {"grid_weights": [1.0]}, r"each of the 2 grids \[\(4, 4\), \(8, 8\)\]"),
        (DiffSegmenter, {"grid_weights": [0.0, 0.0]}, "at least 0 and one above"),
        (DiffSegmenter, {"grid_weights": [-1.0, 2.0]}, "at least 0 and one above"),
    ],
)
def test_no_layer_is_taken_because_it_happens_to_exist(method, given, message):
    """Ten layers are not Stable Diffusion's: what the paper reads has no place among them."""
    records, preset = network((4, 8) * 5)
    with pytest.raises(ValueError, match=message):
        scores(method(GoCAConfig(), preset, layout(), **given), records)


def test_boxes_by_hand():
    """Pixels that meet at a corner are one part; two parts have two boxes, one of them a pixel; nothing has none."""
    picture = torch.zeros(4, 7)
    picture[0, 1], picture[1, 2], picture[3, 6], picture[3, 0] = 2, 1, 0.5, 0.4
    mask = boxes(torch.stack([picture, torch.zeros(4, 7)])[None], 0.2)
    expected = torch.zeros(4, 7, dtype=torch.bool)
    expected[:2, 1:3] = True
    expected[3, 6] = True
    assert torch.equal(mask[0, 0], expected)
    assert not mask[0, 1].any()


def test_missing_scipy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(ImportError, match=r"goca-guidance\[eval\]"):
        boxes(torch.ones(1, 1, 2, 2), 0.2)


# ---- both ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [DiffSegmenter, FTTM])
def test_of_a_guided_batch_the_conditional_half_is_read(method):
    records, preset = network((8, 4, 8))
    found = scores(NAMED[method](2)(GoCAConfig(), preset, layout(1)), records, (0, 1))
    alone = scores(NAMED[method](2)(GoCAConfig(), preset, layout(1)), [r.branch(1) for r in records])
    assert torch.equal(found, alone)
    segmentor = NAMED[method](2)(GoCAConfig(), preset, layout(1))
    for r in records:
        segmentor.keep(r.branch(0), (0,))
        segmentor.keep(r.branch(1), (1,))
    assert torch.equal(segmentor.scores(), found)
    assert segmentor.projected == frozenset()


@pytest.mark.parametrize("method", [DiffSegmenter, FTTM])
def test_a_batch_is_its_images(method):
    records, preset = network((8, 4, 8))
    together = scores(NAMED[method](2)(GoCAConfig(), preset, layout()), records)
    for image in range(2):
        whole = layout()
        single = TokenLayout(
            whole.labels[:1], *(getattr(whole, n)[image : image + 1] for n in ("columns", "groups", "content", "sink"))
        )
        alone = scores(NAMED[method](2)(GoCAConfig(), preset, single), [r.branch(image) for r in records])
        assert torch.allclose(together[image : image + 1], alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [DiffSegmenter, FTTM])
def test_statistics_are_float32_and_padding_is_zero(method, dtype):
    records, preset = network((8, 4, 8))
    halves = [replace(r, query=r.query.to(dtype), key=r.key.to(dtype)) for r in records]
    exact = [replace(r, query=r.query.float(), key=r.key.float()) for r in halves]
    found, expected = (scores(NAMED[method](2)(GoCAConfig(), preset, layout(padded=True)), r) for r in (halves, exact))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert found.min() == 0
    assert found.max() == 1
    assert (found[1, 2] == 0).all()
