"""S-CFG (arXiv 2404.05384): regions to a guidance map, and the guidance scale that carries it into a stock pipeline."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from goca_guidance.config import SCFGConfig
from goca_guidance.maps import blur
from goca_guidance.records import Regions


def rate_map(
    delta: Float[Tensor, "b c H W"], regions: Regions, scale: float, config: SCFGConfig
) -> Float[Tensor, "b 1 H W"]:
    """Rate of every pixel's guidance: its region's mean |delta| is brought to the foreground's (S-CFG, section 3).

    rate[k] = mean_foreground |delta| / mean_region_k |delta|, painted back, limited to [rate_min, rate_max] and to
    ceiling / scale, smoothed. |.| is the norm over channels. Before the limits, an image with an empty foreground has rate
    one, and so has a region whose delta vanishes.
    """
    if config.rate_min == config.rate_max == 1:
        return torch.ones_like(delta[:, :1], dtype=torch.float32)
    strength = delta.float().norm(dim=1, keepdim=True)
    target, region = region_means(strength, regions.foreground), region_means(strength, regions.masks)
    known = (region > 0) & (target > 0)
    rates = torch.where(known, target / torch.where(known, region, 1), 1.0)
    rate = torch.einsum("bk,bkhw->bhw", rates, regions.masks.float())[:, None]
    rate = rate.clamp(config.rate_min, config.rate_max).clamp(max=config.ceiling / scale)
    return 1 + blur(rate - 1, config.smooth_size, config.smooth_sigma)  # as blur(rate), and exactly one where rate is


def region_means(values: Float[Tensor, "b 1 H W"], masks: Tensor) -> Float[Tensor, "b k"]:
    """Mean of `values` inside each mask [b k H W]; zero for an empty one."""
    masks = masks.float()
    return (values * masks).sum((-2, -1)) / masks.sum((-2, -1)).clamp(min=1)


class SpatialGuidanceScale(float):
    """A guidance scale whose product with the guidance difference varies over the image.

    A float in every other respect, so that a stock pipeline's checks and logs see the scalar, while its
    `scale * (cond - uncond)` becomes `scale * rate(delta) * delta`. `rate(delta, scale)` returns b 1 H W, or None for a
    step without regions, in which the product is the plain one.
    """

    rate: Callable[[Tensor, float], Tensor | None]

    def __new__(cls, value: float, rate: Callable[[Tensor, float], Tensor | None]):
        self = super().__new__(cls, value)
        self.rate = rate
        return self

    def __mul__(self, other):
        if not isinstance(other, torch.Tensor) or other.ndim < 3:
            return float(self) * other
        rate = self.rate(other, float(self))
        if rate is None:
            return float(self) * other
        return (float(self) * rate * other.float()).to(other.dtype)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """`delta * scale`, where torch sees the tensor first."""
        if func in (torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul):
            scale, tensor = sorted(args[:2], key=lambda argument: isinstance(argument, torch.Tensor))
            return scale * tensor
        plain = [float(a) if isinstance(a, cls) else a for a in args]
        return func(*plain, **{k: float(v) if isinstance(v, cls) else v for k, v in (kwargs or {}).items()})

    def __reduce__(self):
        return float, (float(self),)
