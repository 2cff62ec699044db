"""One blur, one min-max, one resize convention, each pinned; the adjoints are adjoints."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from goca_guidance.method import maps
from tests.helpers.attention import resized_affinity


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
videos = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
pairs = st.tuples(sizes, sizes) | st.tuples(videos, videos)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_min_max_by_hand():
    x = torch.tensor([[[[1.0, 3.0], [2.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]]])
    expected = torch.tensor([[[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert torch.equal(maps.min_max(x), expected)


def test_min_max_of_a_video_is_of_all_its_frames():
    x = torch.tensor([1.0, 3.0, 2.0, 5.0]).view(1, 1, 2, 1, 2)
    assert maps.min_max(x).flatten().tolist() == [0.0, 0.5, 0.25, 1.0]


@given(sizes | videos, st.integers(0, 99))
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


@pytest.mark.parametrize("size", [(3, 5, 4), (2, 1, 1), (1, 6, 2)])
def test_blur_of_a_video_is_that_of_each_frame(size):
    x = random(2, 3, *size)
    alone = [maps.blur(frame, 5, 1.1) for frame in x.unbind(2)]
    assert torch.equal(maps.blur(x, 5, 1.1), torch.stack(alone, 2))


def test_resize_convention():
    """Pixel centres: 2 -> 4 puts the ends on the border pixels' values."""
    x = torch.tensor([[[[0.0, 1.0]]]])
    assert torch.allclose(maps.resize(x, (1, 4)), torch.tensor([[[[0.0, 0.25, 0.75, 1.0]]]]))


@pytest.mark.parametrize("size", [(4, 3, 7), (2, 3, 7), (9, 6, 7), (4, 5, 6)])
def test_resize_of_a_video_is_bilinear_in_space_and_linear_over_frames(size):
    x = random(2, 3, 4, 5, 6)
    space = torch.stack([maps.resize(frame, size[1:]) for frame in x.unbind(2)], 2)
    lines = space.permute(0, 1, 3, 4, 2).flatten(0, 2)
    expected = F.interpolate(lines, size[0], mode="linear").unflatten(0, (2, 3, size[1])).permute(0, 1, 4, 2, 3)
    assert torch.allclose(maps.resize(x, size), expected, atol=1e-12)


def test_average_by_hand():
    x = torch.arange(16.0).view(1, 1, 2, 2, 4)
    assert maps.average(x, (1, 1, 2)).flatten().tolist() == [6.5, 8.5]
    assert maps.average(x[:, :, 0], (1, 2)).flatten().tolist() == [2.5, 4.5]
    assert maps.average(x, (2, 2, 4)) is x


@given(pairs, st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_resize_adjoint(grids, seed):
    source, target = grids
    a, m = random(1, 2, *source, seed=seed), random(1, 2, *target, seed=seed + 1)
    left, right = (maps.resize(a, target) * m).sum(), (a * maps.resize_adjoint(m, source)).sum()
    assert torch.allclose(left, right, atol=1e-9)


@given(sizes | videos, st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_nearest_index_is_interpolates(source, factor):
    x = random(1, 1, *source)
    for target in [tuple(n * factor for n in source), tuple(max(1, n // factor) for n in source)]:
        ours = x.flatten(2)[..., maps.nearest_index(source, target, x.device)].unflatten(-1, target)
        assert torch.equal(ours, F.interpolate(x, target, mode="nearest"))


PAIRS = [(grid, reference) for grid in [(2, 2), (4, 4), (8, 8), (4, 2), (8, 4)] for reference in [(4, 4), (4, 2)]]
VIDEOS = [((2, 4, 3), (2, 4, 3)), ((5, 4, 6), (2, 2, 3)), ((1, 2, 2), (3, 4, 4)), ((4, 2, 2), (2, 4, 2))]


@pytest.mark.parametrize(("grid", "reference"), PAIRS + VIDEOS)
def test_pulled_affinity_is_the_adjoint_of_the_resize(grid, reference):
    pixels, wanted = math.prod(grid), math.prod(reference)
    a, r = random(2, pixels, pixels), random(2, wanted, wanted, seed=1)
    rows, pulled = maps.pull_affinity(r, reference, grid, grid)
    assert len(rows) <= min(pixels, wanted)
    assert torch.allclose((r * resized_affinity(a, grid, reference)).sum((1, 2)), (pulled * a[:, rows]).sum((1, 2)))


def test_nearest_keeps_a_partition():
    masks = F.one_hot(torch.randint(3, (1, 4, 4), generator=torch.Generator().manual_seed(0)), 3).movedim(-1, 1).bool()
    assert (maps.nearest(masks, (9, 6)).sum(1) == 1).all()
    assert (maps.nearest(masks[:, :, None], (3, 9, 6)).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("grid", "side", "expected"),
    [
        ((21, 30, 52), 24, (12, 14, 24)),  # Wan, 832 x 480, 81 frames
        ((33, 45, 80), 24, (12, 14, 24)),  # longer and larger, and as many tokens
        ((33, 16, 24), 24, (12, 16, 24)),  # pictures are not read less sharply where there are many
        ((1, 30, 52), 24, (1, 14, 24)),
        ((3, 2, 2), 1, (1, 1, 1)),
        ((5, 4, 4), None, (5, 4, 4)),
        ((30, 52), 24, (14, 24)),
    ],
)
def test_coarser(grid, side, expected):
    assert maps.coarser(grid, side) == expected
