"""One blur, one min-max, one resize convention, each pinned; the adjoints are adjoints."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from goca_guidance.method import maps
from tests.helpers.attention import resized_affinity


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_min_max_by_hand():
    x = torch.tensor([[[[1.0, 3.0], [2.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]]])
    expected = torch.tensor([[[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert torch.equal(maps.min_max(x), expected)


@given(sizes, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_min_max_stays_in_the_unit_interval(size, seed):
    x = maps.min_max(random(2, 3, *size, seed=seed) * 100 - 50)
    assert x.min() >= 0
    assert x.max() <= 1


@pytest.mark.parametrize(("size", "sigma"), [(5, 1.1), (3, 0.5**0.5)])
def test_blur_is_torchvisions(size, sigma):
    transforms = pytest.importorskip("torchvision.transforms.functional", reason="torchvision is the reference")
    x = random(2, 3, 11, 8)
    assert torch.allclose(maps.blur(x, size, sigma), transforms.gaussian_blur(x, size, sigma), atol=1e-12)


def test_blur_taps_have_the_true_sigma():
    """The 3x3 smoother of S-CFG: released taps .212 / .576 / .212 are sigma 0.7071."""
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[..., 2, 2] = 1
    row = maps.blur(impulse, 3, 0.5**0.5).sum(-2)[0, 0]
    assert torch.allclose(row, torch.tensor([0, 0.2119, 0.5761, 0.2119, 0]), atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4), (2, 3)])
def test_blur_of_a_map_smaller_than_the_kernel(size):
    assert torch.allclose(maps.blur(torch.ones(1, 1, *size), 5, 1.1), torch.ones(1, 1, *size))


def test_resize_convention():
    """Pixel centres: 2 -> 4 puts the ends on the border pixels' values."""
    x = torch.tensor([[[[0.0, 1.0]]]])
    assert torch.allclose(maps.resize(x, (1, 4)), torch.tensor([[[[0.0, 0.25, 0.75, 1.0]]]]))


@given(sizes, sizes, st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_resize_adjoint(source, target, seed):
    a, m = random(1, 2, *source, seed=seed), random(1, 2, *target, seed=seed + 1)
    left, right = (maps.resize(a, target) * m).sum(), (a * maps.resize_adjoint(m, source)).sum()
    assert torch.allclose(left, right, atol=1e-9)


@given(sizes, st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_nearest_index_is_interpolates(source, factor):
    x = random(1, 1, *source)
    for target in [
        (source[0] * factor, source[1] * factor),
        (max(1, source[0] // factor), max(1, source[1] // factor)),
    ]:
        ours = x.flatten(-2)[..., maps.nearest_index(source, target, x.device)].unflatten(-1, target)
        assert torch.equal(ours, F.interpolate(x, target, mode="nearest"))


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (8, 8), (4, 2), (8, 4)])
@pytest.mark.parametrize("reference", [(4, 4), (4, 2)])
def test_pulled_affinity_is_the_adjoint_of_the_resize(grid, reference):
    pixels, wanted = grid[0] * grid[1], reference[0] * reference[1]
    a, r = random(2, pixels, pixels), random(2, wanted, wanted, seed=1)
    rows, pulled = maps.pull_affinity(r, reference, grid, grid)
    assert len(rows) <= min(pixels, wanted)
    assert torch.allclose((r * resized_affinity(a, grid, reference)).sum((1, 2)), (pulled * a[:, rows]).sum((1, 2)))


def test_nearest_keeps_a_partition():
    masks = F.one_hot(torch.randint(3, (1, 4, 4), generator=torch.Generator().manual_seed(0)), 3).movedim(-1, 1).bool()
    assert (maps.nearest(masks, (9, 6)).sum(1) == 1).all()
