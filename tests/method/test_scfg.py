"""S-CFG's rate, by hand and against float64; the spatial scale is a float that knows one more thing."""

import copy
import pickle

import pytest
import torch

from goca_guidance.config import SCFGConfig
from goca_guidance.method.records import Regions
from goca_guidance.method.scfg import SpatialGuidanceScale, rate_map


SHARP = SCFGConfig(smooth_size=1)  # no smoothing


def two_regions(foreground=((1, 1), (0, 0))):
    """Upper and lower half of a 2x2 picture."""
    masks = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [1, 1]], [[0, 0], [0, 0]]], dtype=torch.bool)[None]
    return Regions(masks, torch.tensor(foreground, dtype=torch.bool)[None, None], (("up", "down"),))


def test_rate_by_hand():
    """|delta| is 2, 4 above and 1, 1 below; the foreground is above: rates 1 and 3."""
    delta = torch.tensor([[[[2.0, 0.0], [1.0, 0.0]], [[0.0, 4.0], [0.0, 1.0]]]])
    assert torch.equal(rate_map(delta, two_regions(), 5.0, SHARP)[0, 0], torch.tensor([[1.0, 1.0], [3.0, 3.0]]))


@pytest.mark.parametrize(("scale", "expected"), [(5.0, 3.0), (7.5, 2.0), (30.0, 0.5)])
def test_ceiling_limits_guidance(scale, expected):
    delta = torch.tensor([[[[9.0, 9.0], [0.1, 0.1]]]])
    rate = rate_map(delta, two_regions(), scale, SHARP)
    assert rate[0, 0, 1, 0].item() == pytest.approx(expected)


def test_smoothing_is_a_blur_of_the_rate():
    delta = torch.tensor([[[[2.0, 2.0], [1.0, 1.0]]]])
    smooth = rate_map(delta, two_regions(), 5.0, SCFGConfig())
    above, below = 1 + 0.4238, 2 - 0.4238  # two rows, reflected: a row keeps .576 and takes twice .212 of the other
    assert torch.allclose(smooth[0, 0, :, 0], torch.tensor([above, below]), atol=1e-3)


def test_degenerate_images_are_plain():
    """Empty foreground, or no guidance anywhere: rate one, exactly."""
    delta = torch.tensor([[[[2.0, 2.0], [1.0, 1.0]]]])
    nothing = two_regions(((0, 0), (0, 0)))
    assert torch.equal(rate_map(delta, nothing, 5.0, SCFGConfig()), torch.ones(1, 1, 2, 2))
    assert torch.equal(rate_map(delta * 0, two_regions(), 5.0, SCFGConfig()), torch.ones(1, 1, 2, 2))


def test_limits_of_one_are_exactly_one():
    delta = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    config = SCFGConfig(rate_min=1, rate_max=1)
    assert torch.equal(rate_map(delta, two_regions(), 7.5, config), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("scale", [1.5, 5.0, 12.0])
def test_equal_mean_moves_guidance_and_adds_none(scale):
    """The same pattern of rates; |rate delta| sums to |delta|, image by image, also where a limit or the ceiling acts."""
    generator = torch.Generator().manual_seed(0)
    delta = (
        torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
        * torch.tensor([1, 0.01, 0])[:, None, None, None]
    )
    delta[:, :, 4:] *= 3
    masks = torch.zeros(3, 2, 8, 8, dtype=torch.bool)
    masks[:, 0, :4], masks[:, 1, 4:] = True, True
    regions = Regions(masks, torch.rand(3, 1, 8, 8, generator=generator) < 0.5, (("up", "down"),) * 3)
    plain, moved = (rate_map(delta, regions, scale, SCFGConfig(equal_mean=on)) for on in (False, True))
    strength = delta.norm(dim=1, keepdim=True)
    assert (moved * strength).sum((1, 2, 3)).tolist() == pytest.approx(strength.sum((1, 2, 3)).tolist(), rel=1e-5)
    assert plain.std((2, 3))[0] > 0.1
    torch.testing.assert_close(moved / moved[:, :, :1, :1], plain / plain[:, :, :1, :1])
    assert torch.equal(moved[2], plain[2])


def test_equal_mean_brings_regions_to_the_mean_of_the_image():
    """By hand, without limits: |delta| is 2, 4 above and 1, 1 below, 2 in the mean, whatever the foreground is."""
    delta = torch.tensor([[[[2.0, 4.0], [1.0, 1.0]]]])
    free = SCFGConfig(rate_min=0.01, rate_max=100, ceiling=1e6, smooth_size=1, equal_mean=True)
    for foreground in (((1, 1), (0, 0)), ((0, 0), (0, 1)), ((1, 1), (1, 1))):
        rate = rate_map(delta, two_regions(foreground), 5.0, free)
        torch.testing.assert_close(rate[0, 0], torch.tensor([[2 / 3, 2 / 3], [2.0, 2.0]]))


def test_rate_of_half_precision_is_float32():
    delta = torch.full((1, 4, 2, 2), 300.0).half()
    rate = rate_map(delta, two_regions(), 7.5, SCFGConfig())
    assert rate.dtype == torch.float32
    assert torch.equal(rate, torch.ones(1, 1, 2, 2))


# ---- the scale -------------------------------------------------------------------------------------------------------
def half_rate(delta, scale):
    return torch.full_like(delta[:, :1], 0.5, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (1, 6, 16)])  # latents, and latents that are packed into tokens
@pytest.mark.parametrize("product", [lambda s, d: s * d, lambda s, d: d * s, lambda s, d: torch.mul(d, s)])
def test_products_with_a_difference_are_spatial(product, shape):
    delta = torch.randn(shape)
    assert torch.allclose(product(SpatialGuidanceScale(4.0, half_rate), delta), 2 * delta)


def test_everything_else_is_a_float():
    scale = SpatialGuidanceScale(4.0, half_rate)
    assert scale > 1
    assert scale - 1 == 3.0
    assert scale * 2 == 8.0
    assert f"{scale}" == "4.0"
    assert torch.equal(torch.full((2,), scale), torch.tensor([4.0, 4.0]))
    assert torch.equal(scale * torch.ones(3), torch.full((3,), 4.0))
    assert torch.equal(torch.ones(2) + scale, torch.tensor([5.0, 5.0]))
    assert pickle.loads(pickle.dumps(scale)) == copy.deepcopy(scale) == 4.0


def test_no_rate_is_the_plain_product():
    delta = torch.randn(1, 4, 2, 2).bfloat16()
    assert torch.equal(SpatialGuidanceScale(7.5, lambda *_: None) * delta, 7.5 * delta)
    assert torch.equal(SpatialGuidanceScale(7.5, lambda d, s: torch.ones(1, 1, 2, 2)) * delta, 7.5 * delta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.1, 7.3, 12.0, 1 / 3])
def test_a_rate_of_one_is_the_plain_product_in_every_dtype(scale, dtype):
    delta = torch.randn(2, 4, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    spatial = SpatialGuidanceScale(scale, lambda d, s: torch.ones(2, 1, 64, 64, dtype=torch.float32))
    for product in (spatial * delta, delta * spatial):
        assert product.dtype == dtype
        assert torch.equal(product, scale * delta)


@pytest.mark.parametrize(
    "changes", [{"rate_min": 0}, {"rate_min": 2, "rate_max": 1}, {"ceiling": 0}, {"segmentor": "x"}]
)
def test_bad_configuration(changes):
    with pytest.raises(ValueError, match="Expected"):
        SCFGConfig(**changes)
