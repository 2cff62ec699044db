"""The fast forms of GoCA equal the naive ones, which are written here as the paper says them."""

from dataclasses import replace

import pytest
import torch

from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.method import attention, goca
from goca_guidance.method.maps import blur, min_max, nearest, pull_affinity, row_mass
from goca_guidance.method.records import TokenLayout
from goca_guidance.method.scfg import SCFGSegmentor
from goca_guidance.method.segmentor import GoCASegmentor
from tests.helpers.attention import IMAGE_FIRST, TEXT_FIRST, joint_record, projection_of, record, resized_affinity


def naive_probs(r):
    return (r.query @ r.key.mT * r.scale).softmax(-1)


def naive_head_weights(r):
    """<o_h, o> / <o, o> with every per-head output built."""
    d, projection = r.query.shape[-1], projection_of(r.gram)
    per_head = torch.stack([r.output[:, h] @ projection[h * d : (h + 1) * d] for h in range(r.query.shape[1])], 1)
    whole = per_head.sum(1, keepdim=True)
    return (per_head * whole).sum(-1) / (whole * whole).sum(-1)


# ---- heads -----------------------------------------------------------------------------------------------------------
def test_head_weights_equal_the_naive_form():
    r = record()
    fast = goca.head_weights(r.output, [r.gram])
    assert torch.allclose(fast, naive_head_weights(r), atol=1e-5)
    assert torch.allclose(fast.sum(1), torch.ones(2, 16), atol=1e-5)


def test_layers_one_after_another_keep_their_own_projections():
    a, b = record(seed=1), record(seed=2)
    both = goca.head_weights(torch.cat([a.output, b.output]), [a.gram, b.gram])
    apart = [goca.head_weights(r.output, [r.gram]) for r in (a, b)]
    assert torch.allclose(both, torch.cat(apart), atol=1e-6)


TWICE = torch.eye(2).repeat(2, 2)  # Gram matrix of a projection that adds two heads of two channels


def test_head_weights_by_hand():
    """Two heads that write (3, 0) and (1, 2): o = (4, 2), shares 12/20 and 8/20."""
    z = torch.tensor([[[[3.0, 0.0]], [[1.0, 2.0]]]])
    weights = goca.head_weights(z, [TWICE])
    assert torch.allclose(weights, torch.tensor([[[0.6], [0.4]]]))


def test_head_weights_of_opposition_and_silence():
    """A head that writes against the rest is negative; silent layers are uniform."""
    z = torch.tensor([[[[3.0, 0.0]], [[-1.0, 0.0]]]])
    assert torch.allclose(goca.head_weights(z, [TWICE]), torch.tensor([[[1.5], [-0.5]]]))
    assert torch.allclose(goca.head_weights(z * 0, [TWICE]), torch.tensor([[[0.5], [0.5]]]))


def test_head_weights_are_summed_in_float32():
    """Inner products beyond the range of float16 stay finite: a Gram matrix from the observer has no entry above one."""
    r = record()
    gram = r.gram / r.gram.amax()
    found = goca.head_weights((r.output * 500).half(), [gram.half()])
    assert found.dtype == torch.float32
    assert torch.allclose(found, naive_head_weights(r), atol=0.02)


@pytest.mark.parametrize("block", [1, 40, 2**21])
@pytest.mark.parametrize("weighted", [False, True])
def test_token_maps_equal_the_naive_form(block, weighted, monkeypatch):
    monkeypatch.setattr(attention, "CPU_BLOCK", block)
    r, columns = record(keys=6), torch.tensor([[0, 3, 5], [1, 2, 2]])
    weights = goca.head_weights(r.output, [r.gram]) if weighted else None
    merged = torch.einsum(
        "bhpn,bhp->bpn", naive_probs(r), torch.full((2, 3, 16), 1 / 3) if weights is None else weights
    )
    expected = torch.stack([merged[b][:, columns[b]] for b in range(2)])
    assert torch.allclose(attention.token_maps(r, columns, weights), expected, atol=1e-6)


def test_mask_is_respected():
    r = record(keys=6)
    mask = torch.zeros(2, 1, 1, 6).masked_fill(torch.arange(6) > 3, -10000.0)
    masked = replace(r, mask=mask)
    assert attention.token_maps(masked, torch.tensor([[4, 5]] * 2), None).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("width", "products"), [(64, 1), (128, 1), (72, 0)])
def test_products_of_half_precision_lose_nothing(width, products, dtype, monkeypatch):
    """A scale of 1/8 goes to the query, another one to the logits; in place of the matrix units: exact products on the CPU."""
    exact, seen = torch.bmm, []

    def bmm(query, key, out, out_dtype=None):
        seen.append(out_dtype)
        return exact(query.float(), key.float(), out=out)

    monkeypatch.setattr(attention, "HALF_PRODUCTS", ("cpu",))
    monkeypatch.setattr(torch, "bmm", bmm)
    r = record(d=width, keys=6)
    r = replace(r, query=r.query.to(dtype), key=r.key.to(dtype))
    ((_, found),) = attention.probabilities(r)
    assert seen == [torch.float32 if products else None]
    expected = (r.query.double() @ r.key.double().mT * r.scale).softmax(-1)
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("view", [TEXT_FIRST, IMAGE_FIRST])
def test_joint_token_maps_divide_by_all_keys_and_read_text_only(view):
    r, columns = joint_record(view), torch.tensor([[0, 5], [1, 2]])
    words = naive_probs(r).mean(1)[..., view.text]
    expected = torch.stack([words[b][:, columns[b]] for b in range(2)])
    assert torch.allclose(attention.token_maps(r, columns, None), expected, atol=1e-6)
    assert (words.sum(-1) < 1).all()


# ---- layers ----------------------------------------------------------------------------------------------------------
def agreement_of(r, reference, mass=None):
    """Agreement of a layer with an affinity on a 4 x 4 grid, block by block."""
    rows, pulled = pull_affinity(reference, (4, 4), r.grid, r.grid)
    found = attention.Found()
    for block, mean, _ in attention.over_heads(r, rows):
        found.add(block, goca.agreement(mean[..., r.view.image], pulled[block.images, block.rows], mass))
    return found.total()


@pytest.mark.parametrize("block", [1, 100, 2**21])
@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (8, 8)])
def test_agreement_equals_the_naive_form(grid, block, monkeypatch):
    monkeypatch.setattr(attention, "CPU_BLOCK", block)
    reference = goca.pseudo_attention(torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(1)))
    r = record(grid=grid)
    resized = resized_affinity(naive_probs(r).mean(1), grid, (4, 4))
    assert torch.allclose(agreement_of(r, reference), (reference * resized).sum((1, 2)), atol=1e-5)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (8, 8)])
def test_row_normalised_agreement(grid):
    reference = goca.pseudo_attention(torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(1)))
    r = record(grid=grid)
    resized = resized_affinity(naive_probs(r).mean(1), grid, (4, 4))
    resized = resized / resized.sum(-1, keepdim=True)
    found = agreement_of(r, reference, row_mass((4, 4), grid, torch.device("cpu")))
    assert torch.allclose(found, (reference * resized).sum((1, 2)), atol=1e-5)


@pytest.mark.parametrize("view", [TEXT_FIRST, IMAGE_FIRST])
def test_joint_agreement_and_refinement_read_pixels_only(view):
    """A row of pixel keys sums to less than one, and nothing makes up for the words' share."""
    r, x = joint_record(view), torch.rand(2, 16, 7, generator=torch.Generator().manual_seed(3))
    own = naive_probs(r).mean(1)[..., view.image]
    reference = goca.pseudo_attention(torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(agreement_of(r, reference), (reference * own).sum((1, 2)), atol=1e-5)
    assert torch.allclose(attention.affinity_product(r, x), own @ x, atol=1e-6)


def test_pseudo_attention_channels():
    """One channel only is the released benchmark code's reference."""
    f = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(goca.pseudo_attention(f, 1), (f[..., :1] @ f[..., :1].mT).softmax(-1))


def test_layer_weights_by_hand():
    weights = goca.layer_weights(torch.tensor([[1.0, 3.0, -2.0], [-1.0, -1.0, 0.0]]))
    assert torch.allclose(weights, torch.tensor([[0.25, 0.75, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


# ---- rescaling -------------------------------------------------------------------------------------------------------
def test_rescale_by_hand():
    """Two pixels, three tokens; tokens 0 and 1 are one region, 2 another; each pixel is divided by its sum."""
    tokens = torch.tensor([[[[0.2, 0.1]], [[0.4, 0.1]], [[0.2, 0.2]]]])
    groups = torch.tensor([[[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]]])
    scores = goca.rescale(tokens, groups, torch.ones(1, 3, dtype=torch.bool))
    assert torch.allclose(scores, torch.tensor([[[[0.375, 0.25]], [[0.25, 0.5]]]]))


def test_special_tokens_do_not_divide():
    tokens = torch.tensor([[[[0.2]], [[0.6]], [[0.2]]]])
    scores = goca.rescale(tokens, torch.eye(3)[None], torch.tensor([[True, False, True]]))
    assert torch.allclose(scores.flatten(), torch.tensor([0.5, 1.5, 0.5]))


def test_one_content_token_keeps_its_own_map():
    """Divided by itself it would be constant, and say nothing."""
    tokens = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(goca.rescale(tokens, torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)), tokens)


def test_silent_pixels_and_padding_stay_finite():
    scores = goca.rescale(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    assert torch.equal(scores, torch.zeros(1, 3, 2, 2))


# ---- refinement ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("regions", [1, 5, 8])  # heads are five channels wide: less, as much, more
def test_refinement_equals_the_naive_form(regions):
    records = [record(seed=1), record(seed=2)]
    x = torch.rand(2, regions, 4, 4, generator=torch.Generator().manual_seed(3))
    affinity = torch.stack([naive_probs(r).mean(1) for r in records]).mean(0)
    once = torch.stack([attention.affinity_product(r, x.flatten(2).mT) for r in records]).mean(0)
    assert torch.allclose(once, affinity @ x.flatten(2).mT, atol=1e-6)
    expected = min_max((affinity @ (affinity @ x.flatten(2).mT)).mT.unflatten(-1, (4, 4)))
    refined = goca.refine(x, lambda maps, grid: affinity @ maps, 2)
    assert torch.allclose(refined, expected, atol=1e-3)  # min-max enlarges what two products left


def test_refinement_by_nearly_uniform_attention_keeps_its_digits():
    """Two products leave differences of 1e-9 between pixels, which float32 does not hold beside the maps' mean."""
    uneven = 1 + 1e-4 * torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    affinity = uneven / uneven.sum(-1, keepdim=True)
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = min_max((affinity @ (affinity @ x.flatten(2).mT)).mT.unflatten(-1, (4, 4)))
    refined = goca.refine(x.float(), lambda maps, grid: affinity.float() @ maps, 2)
    assert (refined - expected).abs().max() < 0.02


# ---- together --------------------------------------------------------------------------------------------------------
PRESET = LayerPreset(("fine.attn2", "coarse.attn2"), ("fine.attn1", "coarse.attn1"), "fine.attn2", ("fine.attn1",))
SINK = torch.tensor([[0]])


def segmentor_and_records(guided, config=None, b=1):
    full = 2 * b if guided else b
    records = [
        record("fine.attn1", full, seed=1),
        record("fine.attn2", full, seed=2, keys=6),
        record("coarse.attn1", full, grid=(2, 2), seed=3),
        record("coarse.attn2", full, grid=(2, 2), seed=4, keys=6),
    ]
    groups = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])[None].repeat(b, 1, 1)
    content = torch.tensor([[True, True, False]]).repeat(b, 1)
    columns, sink = torch.tensor([[2, 3, 0]]).repeat(b, 1), SINK.repeat(b, 1) if guided else SINK[:, :0]
    layout = TokenLayout((("cat", "bus", "<sos>"),) * b, columns, groups, content, sink)
    segmentor = GoCASegmentor(config or GoCAConfig(), PRESET, layout, unconditional_sink=guided)
    for r in records:
        segmentor.keep(r, (0, 1) if guided else (1,))
    return segmentor, records


def test_segmentor_is_the_paper_in_one_piece():
    """Every stage naive, in order, from the same records."""
    segmentor, (own_f, fine, own_c, coarse) = segmentor_and_records(guided=False)
    maps_ = [
        torch.einsum("bhpn,bhp->bpn", naive_probs(r), naive_head_weights(r))[..., [2, 3, 0]] for r in (fine, coarse)
    ]
    reference = goca.pseudo_attention(fine.query.transpose(1, 2).flatten(2))
    own = [resized_affinity(naive_probs(r).mean(1), r.grid, (4, 4)) for r in (own_f, own_c)]
    agreements = torch.stack([(reference * a).sum((1, 2)) for a in own], -1)
    w = agreements / agreements.sum(-1, keepdim=True)
    grids = [m.mT.unflatten(-1, r.grid) for m, r in zip(maps_, (fine, coarse), strict=True)]
    big = [g if g.shape[-1] == 4 else torch.nn.functional.interpolate(g, (4, 4), mode="bilinear") for g in grids]
    merged = sum(w[:, i, None, None, None] * m for i, m in enumerate(big)).clamp(min=0)
    scores = min_max(blur(merged / merged[:, :2].sum(1, keepdim=True), 3, 1.1 * 4 / 64))
    affinity = naive_probs(own_f).mean(1)
    expected = min_max((affinity @ affinity @ scores.flatten(2).mT).mT.unflatten(-1, (4, 4)))
    assert torch.allclose(segmentor.scores(), expected, atol=1e-3)


def test_regions_are_a_partition_and_use_both_halves():
    segmentor, records = segmentor_and_records(guided=True)
    regions = segmentor.regions((8, 8))
    assert regions.masks.shape == (1, 3, 8, 8)
    assert (regions.masks.sum(1) == 1).all()
    assert regions.foreground.shape == (1, 1, 8, 8)
    alone = GoCASegmentor(GoCAConfig(), PRESET, segmentor.layout)
    for r in records:
        alone.keep(r.branch(1))
    assert torch.equal(nearest(attention.one_hot(alone.scores(), alone.layout.present), (8, 8)), regions.masks)


@pytest.mark.parametrize(
    "config",
    [
        GoCAConfig.vanilla(),
        GoCAConfig.released(),
        GoCAConfig(row_normalise=True),
        GoCAConfig(refine_order=0),
    ],
)
def test_every_configuration_gives_scores_in_the_unit_interval(config):
    scores = segmentor_and_records(guided=False, config=config)[0].scores()
    assert torch.isfinite(scores).all()
    assert scores.min() >= 0
    assert scores.max() <= 1


def naive_merged(own_f, fine, own_c, coarse):
    """Of one prediction, all tokens [b n H W]: heads weighted, layers by that prediction's own weights, clamped."""
    reference = goca.pseudo_attention(fine.query.transpose(1, 2).flatten(2))
    own = [resized_affinity(naive_probs(r).mean(1), r.grid, (4, 4)) for r in (own_f, own_c)]
    agreements = torch.stack([(reference * a).sum((1, 2)) for a in own], -1)
    w, maps_ = agreements / agreements.sum(-1, keepdim=True), []
    for r in (fine, coarse):
        m = torch.einsum("bhpn,bhp->bpn", naive_probs(r), naive_head_weights(r)).mT.unflatten(-1, r.grid)
        maps_.append(m if m.shape[-1] == 4 else torch.nn.functional.interpolate(m, (4, 4), mode="bilinear"))
    return sum(w[:, i, None, None, None] * m for i, m in enumerate(maps_)).clamp(min=0)


def naive_refined(record, maps_):
    affinity = naive_probs(record).mean(1)
    return min_max((affinity @ affinity @ maps_.flatten(2).mT).mT.unflatten(-1, (4, 4)))


def test_released_foreground_is_where_the_refined_unconditional_start_token_is_low():
    """Its share of all tokens, by the unconditional weights; refined by the conditional attention; then blurred."""
    segmentor, records = segmentor_and_records(guided=True)
    merged = naive_merged(*(r.branch(0) for r in records))
    share = (merged / merged.sum(1, keepdim=True))[:, :1]
    expected = min_max(blur(naive_refined(records[0].branch(1), share), 3, 1.1 * 4 / 64)) < 0.5
    assert torch.equal(segmentor.regions((4, 4)).foreground, expected)
    assert 0 < expected.float().mean() < 1


@pytest.mark.parametrize("heads", ["contribution", "uniform"])
def test_released_foreground_in_the_conditional_prediction(heads):
    """As above, where the unconditional text has no such token."""
    _, (own_f, fine, own_c, coarse) = segmentor_and_records(guided=False)
    layout = TokenLayout((("cat", "bus"),), torch.tensor([[2, 3]]), torch.eye(2)[None], torch.ones(1, 2) > 0, SINK)
    segmentor = GoCASegmentor(GoCAConfig(heads=heads), PRESET, layout)
    for r in (own_f, fine, own_c, coarse):
        segmentor.keep(r)
    if heads == "uniform":  # the share of each head is one over their number
        fine, coarse = (
            replace(r, output=torch.ones_like(r.output), gram=torch.eye(len(r.gram))) for r in (fine, coarse)
        )
    merged = naive_merged(own_f, fine, own_c, coarse)
    share = (merged / merged.sum(1, keepdim=True))[:, :1]
    expected = min_max(blur(naive_refined(own_f, share), 3, 1.1 * 4 / 64)) < 0.5
    assert torch.equal(segmentor.regions((4, 4)).foreground, expected)
    assert 0 < expected.float().mean() < 1


def test_conditional_foreground_is_where_the_sinks_own_score_is_low():
    """Rescaled by the content, as a region is; nothing of the unconditional prediction is read."""
    _, (own_f, fine, own_c, coarse) = segmentor_and_records(guided=False)
    layout = TokenLayout((("cat", "bus"),), torch.tensor([[2, 3]]), torch.eye(2)[None], torch.ones(1, 2) > 0, SINK)
    segmentor = GoCASegmentor(GoCAConfig(), PRESET, layout, rescaled_sink=True)
    for r in (own_f, fine, own_c, coarse):
        segmentor.keep(r)
        segmentor.keep(replace(r, key=r.key.flip(2)), (0,))
    merged = naive_merged(own_f, fine, own_c, coarse)
    scores = min_max(blur(merged[:, [2, 3, 0]] / merged[:, [2, 3]].sum(1, keepdim=True), 3, 1.1 * 4 / 64))
    expected = naive_refined(own_f, scores)
    regions = segmentor.regions((4, 4))
    assert torch.equal(regions.masks[:, 0], expected[:, 0] >= expected[:, 1])
    assert torch.equal(regions.foreground, expected[:, 2:] < 0.5)
    assert 0 < regions.foreground.float().mean() < 1


def test_background_entities_are_one_map_before_it_is_refined():
    """So it reaches one once, where each by itself would."""
    _, records = segmentor_and_records(guided=False)
    every = torch.ones(1, 3) > 0
    layout = TokenLayout(
        (("sky", "sea", "cat"),), torch.tensor([[2, 3, 4]]), torch.eye(3)[None], every, SINK[:, :0], 2
    )
    segmentor = GoCASegmentor(GoCAConfig(), PRESET, layout)
    for r in records:
        segmentor.keep(r)
    merged = naive_merged(*records)[:, 2:5]
    maps_ = min_max(blur(merged / merged.sum(1, keepdim=True), 3, 1.1 * 4 / 64))
    expected = naive_refined(records[0], torch.stack([maps_[:, :2].amax(1), maps_[:, 2]], 1))
    assert torch.allclose(segmentor.scores(), expected, atol=1e-3)
    each = naive_refined(records[0], maps_)
    assert not torch.allclose(each[:, :2].amax(1), expected[:, 0], atol=1e-2)


@pytest.mark.parametrize("source", ["raw query", "query", "output"])
def test_joint_segmentor_is_the_method_in_one_piece(source):
    """One call for words and pixels, uniform heads, the sink in the conditional prediction, each source of dense features."""
    raw = torch.randn(1, 3, 16, 5, generator=torch.Generator().manual_seed(9))
    a, b = (joint_record(TEXT_FIRST, name=name, b=1, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    a = replace(a, features=raw) if source == "raw query" else a
    features = {"raw query": raw, "query": a.query, "output": a.output}[source].transpose(1, 2).flatten(2)
    kind = "output" if source == "output" else "query"
    preset = LayerPreset(("a", "b"), ("a", "b"), "a", ("b",), heads="uniform", features=kind)
    every = torch.ones(1, 2, dtype=torch.bool)
    layout = TokenLayout((("cat", "bus"),), torch.tensor([[2, 3]]), torch.eye(2)[None], every, torch.tensor([[5]]))
    segmentor = GoCASegmentor(GoCAConfig(), preset, layout)
    for r in (a, b):
        segmentor.keep(r)
        segmentor.keep(joint_record(TEXT_FIRST, name=r.name, b=1, seed=5), (0,))  # whose sink is not asked for
    assert (segmentor.layers, segmentor.projected) == ({"a", "b"}, frozenset())

    probs, reference = [naive_probs(r).mean(1) for r in (a, b)], goca.pseudo_attention(features)
    agreements = torch.stack([(reference * p[..., 6:]).sum((1, 2)) for p in probs], -1)
    weights = agreements / agreements.sum(-1, keepdim=True)
    assert torch.allclose(segmentor.weights(), weights, atol=1e-6)
    merged = sum(weights[:, i, None, None] * p[..., :6] for i, p in enumerate(probs)).mT.unflatten(-1, (4, 4))
    words, end = merged[:, [2, 3]], (merged / merged.sum(1, keepdim=True))[:, [5]]
    scores = min_max(blur(words / words.sum(1, keepdim=True), 3, 1.1 * 4 / 64))
    own = probs[1][..., 6:]
    refined, end = (min_max((own @ own @ x.flatten(2).mT).mT.unflatten(-1, (4, 4))) for x in (scores, end))
    end = min_max(blur(end, 3, 1.1 * 4 / 64))
    regions = segmentor.regions((4, 4))
    assert torch.allclose(segmentor.scores(), refined, atol=1e-3)
    assert torch.equal(regions.masks[:, 0], refined[:, 0] >= refined[:, 1])
    assert torch.equal(regions.foreground, end < 0.5)
    assert 0 < regions.foreground.float().mean() < 1


@pytest.mark.parametrize("unconditional", [True, False])
@pytest.mark.parametrize("columns", [[0, 1, 2, 3, 4, 5], [2, 3]])
def test_scfg_segmentor_equals_the_naive_form(columns, unconditional):
    """(S + 3 S^2) / 4 of head means, smoothed, over the spatial mean, averaged over layers.

    The layout's tokens compete for pixels; for the foreground the sink always competes with all others.
    """
    _, records = segmentor_and_records(guided=True)
    own_f, fine, own_c, coarse = records
    m = len(columns)
    layout = TokenLayout(
        (tuple("abcdef"[:m]),), torch.tensor([columns]), torch.eye(m)[None], torch.ones(1, m, dtype=torch.bool), SINK
    )
    segmentor = SCFGSegmentor(GoCAConfig(), PRESET, layout, unconditional_sink=unconditional)
    for r in records:
        segmentor.keep(r, (0, 1))

    def naive(branch):
        maps = []
        for cross, own in ((fine, own_f), (coarse, own_c)):
            s, c = (naive_probs(r.branch(branch)).mean(1) for r in (own, cross))
            m = ((s @ c + 3 * s @ s @ c) / 4).mT.unflatten(-1, cross.grid)
            m = m if m.shape[-1] == 4 else torch.nn.functional.interpolate(m, (4, 4), mode="bilinear")
            maps.append(blur(m, 3, 0.5**0.5))
        return maps

    def relative(maps):
        return torch.stack([m / m.mean((-2, -1), keepdim=True) for m in maps]).mean(0)

    regions = segmentor.regions((4, 4))
    assert torch.equal(regions.masks[0].int().argmax(0), relative(naive(1))[0, columns].argmax(0))
    sink = naive(0 if unconditional else 1)
    start, others = [m[:, :1] for m in sink], [m[:, 1:].sum(1, keepdim=True) for m in sink]
    assert torch.equal(regions.foreground, relative(start) < relative(others))


def test_a_tie_is_no_foreground_of_scfg():
    """Two tokens of equal keys: the sink is as large as all others, exactly, at every pixel."""
    own_f, fine, own_c, coarse = segmentor_and_records(guided=False)[1]
    layout = TokenLayout((("a", "b"),), torch.tensor([[0, 1]]), torch.eye(2)[None], torch.ones(1, 2) > 0, SINK)
    segmentor = SCFGSegmentor(GoCAConfig(), PRESET, layout)
    for r in (own_f, fine, own_c, coarse):
        if r.name.endswith("attn2"):
            same = r.key[:, :, :1].repeat(1, 1, 2, 1)
            r = replace(r.only(), key=same, view=replace(r.view, text=slice(0, 2)))
        segmentor.keep(r)
    assert not segmentor.regions((4, 4)).foreground.any()


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_one_region_of_several_tokens_is_left_as_it_is(tokens):
    """Its quotient is constant but for rounding, which min-max would enlarge to noise."""
    maps = torch.rand(1, tokens, 8, 8, generator=torch.Generator().manual_seed(0))
    groups = torch.full((1, tokens, 1), 1 / tokens)
    scores = goca.rescale(maps, groups, torch.ones(1, tokens, dtype=torch.bool))
    assert torch.allclose(scores[:, 0], maps.mean(1))


def test_only_what_is_used_is_observed():
    vanilla, _ = segmentor_and_records(guided=False, config=GoCAConfig.vanilla(refine_order=0))
    assert vanilla.layers == {"fine.attn2", "coarse.attn2"}


def test_padding_never_wins():
    masks = attention.one_hot(torch.tensor([[[[0.0]], [[9.0]]]]), torch.tensor([[True, False]]))
    assert masks.flatten().tolist() == [True, False]
