"""DiffCut against cuts by hand, every bipartition of small graphs, and scipy."""

from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from goca_guidance.method import diffcut


def blocks(sizes, across):
    """Ones inside of each block, `across` between them."""
    names = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.where(names[:, None] == names, 1.0, across)


def random_graph(seed, n):
    weights = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return (weights + weights.T) / 2 + torch.eye(n, dtype=torch.float64)


def naive_ncut(weights, side):
    n = len(weights)
    cut = sum(weights[i, j].item() for i in range(n) for j in range(n) if side[i] and not side[j])
    one = sum(weights[i, j].item() for i in range(n) for j in range(n) if side[i])
    other = sum(weights[i, j].item() for i in range(n) for j in range(n) if not side[i])
    return cut / one + cut / other


def planted(seed=0, noise=0.05):
    """Features of two images, 4 x 6 pixels: three columns of directions, in different orders."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.stack(
        [torch.tensor([0, 0, 1, 1, 2, 2]).repeat(4, 1), torch.tensor([0, 1, 1, 1, 1, 2]).repeat(4, 1)]
    )
    directions = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q[:3]
    features = directions[labels].movedim(-1, 1) * 3 + noise * torch.randn(2, 8, 4, 6, generator=g)
    return features, labels


# ---- affinity --------------------------------------------------------------------------------------------------------
def test_affinity_equals_the_naive_form():
    features = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    for image, found in zip(features, diffcut.affinity(features, 10), strict=True):
        cosine = torch.tensor([[torch.dot(a, b) / (a.norm() * b.norm()) for a in image] for b in image])
        expected = ((cosine - cosine.min()) / (cosine.max() - cosine.min())) ** 10
        assert torch.allclose(found, expected, atol=1e-5)


def test_pixels_that_are_all_alike_are_one_region():
    for features in (torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.rand(1, 3, 1, 1)):
        assert torch.equal(diffcut.cut(features, (4, 4)), torch.zeros(1, 4, 4, dtype=torch.long))


# ---- one cut ---------------------------------------------------------------------------------------------------------
def test_cut_of_two_blocks_by_hand():
    """3 + 2 nodes, 0.1 across: cut 0.6, associations 9.6 and 4.6. Inside of a block every cut costs 1."""
    weights = blocks([3, 2], 0.1)
    value = 0.6 / 9.6 + 0.6 / 4.6
    side, found = diffcut.bipartition(weights.double(), 100)
    assert side.tolist() in ([True] * 3 + [False] * 2, [False] * 3 + [True] * 2)
    assert found == pytest.approx(value, rel=1e-5)
    assert diffcut.recursive_cut(weights, value + 1e-4).tolist() == [0, 0, 0, 1, 1]
    assert diffcut.recursive_cut(weights, value - 1e-4).tolist() == [0] * 5
    inside = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    assert torch.allclose(diffcut.normalised_cut(torch.ones(3, 3), inside), torch.tensor([1, 1, torch.inf]))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 7))
def test_a_cut_lies_between_the_best_of_all_and_the_best_of_its_eigenvector(seed, n):
    weights = random_graph(seed, n)
    side, value = diffcut.bipartition(weights, 100)
    every = [naive_ncut(weights, s) for s in product([False, True], repeat=n) if 0 < sum(s) < n]
    values, vectors = scipy.linalg.eigh(torch.diag(weights.sum(1)) - weights, torch.diag(weights.sum(1)))
    assert value == pytest.approx(naive_ncut(weights, side.tolist()), rel=1e-9)
    assert values[1] - 1e-9 <= min(every) <= value + 1e-9  # the relaxed problem's value bounds them all
    extremes = 0.99 * vectors[:, 1].min(), 0.99 * vectors[:, 1].max()
    tried = [naive_ncut(weights, (vectors[:, 1] > t).tolist()) for t in np.linspace(*extremes, 100)]
    assert value == pytest.approx(min(tried), rel=1e-6)


def test_eigenvector_equals_scipys_generalised_one():
    weights = random_graph(1, 10)
    expected = scipy.linalg.eigh(torch.diag(weights.sum(1)) - weights, torch.diag(weights.sum(1)))[1][:, 1]
    found = diffcut.second_eigenvector(weights).numpy()
    assert abs(found @ expected) == pytest.approx(np.linalg.norm(found) * np.linalg.norm(expected), rel=1e-9)


@pytest.mark.parametrize("across", [1e-4, 0.0])
def test_planted_halves_are_the_best_of_all_bipartitions(across):
    """Ten nodes; also where the halves do not touch, and two eigenvalues are zero."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    weights = (random_graph(3, 10) * blocks([4, 6], across))[order][:, order]
    side, value = diffcut.bipartition(weights, 100)
    every = diffcut.normalised_cut(
        weights, torch.tensor([s for s in product([False, True], repeat=10) if 0 < sum(s) < 10])
    )
    assert value == pytest.approx(every.min().item(), abs=1e-12)
    assert set(order[side].tolist()) in ({0, 1, 2, 3}, {4, 5, 6, 7, 8, 9})


# ---- recursion -------------------------------------------------------------------------------------------------------
def test_recursion_finds_planted_clusters_in_the_order_of_their_first_pixels():
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    names = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 8, 11]))[order]
    weights = blocks([5, 8, 11], 0.02)[order][:, order]
    found = diffcut.recursive_cut(weights)
    firsts = list(dict.fromkeys(names.tolist()))
    assert found.tolist() == [firsts.index(name) for name in names.tolist()]


def test_nodes_without_any_neighbour_are_regions_of_their_own():
    assert diffcut.recursive_cut(torch.eye(40)).tolist() == list(range(40))


def test_nodes_without_weight_are_one_region():
    weights = F.pad(blocks([3, 2], 0.1), (2, 0, 2, 0))
    assert diffcut.recursive_cut(weights).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert diffcut.recursive_cut(torch.zeros(4, 4)).tolist() == [0] * 4


def test_whole_finds_planted_clusters_and_a_batch_is_its_images():
    features, labels = planted()
    found = diffcut.cut(features, (4, 6))
    assert torch.equal(found, labels)
    alone = torch.cat([diffcut.cut(image[None], (4, 6)) for image in features])
    assert torch.equal(found, alone)
    assert torch.equal(diffcut.cut(features.bfloat16(), (4, 6)), labels)
    assert torch.equal(diffcut.cut(features, (4, 6), threshold=0.0), torch.zeros_like(labels))


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite features"):
        diffcut.cut(torch.full((1, 2, 2, 2), torch.nan), (2, 2))


# ---- enlargement -----------------------------------------------------------------------------------------------------
def test_upsampling_by_hand():
    """Of four pixels the second is 3/4 the left feature, the third 1/4; lengths do not count."""
    features = torch.tensor([[5.0, 0.0], [0.0, 0.1]])[None, :, None]
    assert diffcut.upsample(features, torch.tensor([[[0, 1]]]), (1, 4)).tolist() == [[[0, 0, 1, 1]]]


def test_upsampling_equals_the_naive_form():
    features, labels = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0)), planted()[1]
    unit = features / features.norm(dim=1, keepdim=True)
    large = F.interpolate(unit, (7, 9), mode="bilinear", align_corners=False)
    found = diffcut.upsample(features, labels * 2, (7, 9))  # a number may be missing
    for i, y, x in product(range(2), range(7), range(9)):
        means = [unit[i][:, labels[i] == k].mean(1) for k in range(3)]
        assert found[i, y, x] == 2 * int(np.argmax([F.cosine_similarity(large[i, :, y, x], m, dim=0) for m in means]))
