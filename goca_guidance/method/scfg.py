"""S-CFG (arXiv 2404.05384): its own segmentor, regions to a guidance map, and the scale that carries it into a pipeline."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset, SCFGConfig
from goca_guidance.method.attention import affinity_product, one_hot, token_maps
from goca_guidance.method.maps import as_maps, blur, nearest, resize
from goca_guidance.method.records import AttentionRecord, Regions, TokenLayout


class SCFGSegmentor:
    """The segmentor of S-CFG itself (arXiv 2404.05384, section 3; constants of its released code).

    Head-mean maps of the text layers of the two coarsest grids that a step has (16x16 and 8x8 for Stable Diffusion at 512
    pixels), refined by (S + 3 S^2) / 4 of the sibling self-attention S, smoothed, divided by their spatial mean, averaged over
    layers. The argmax runs over the layout's regions: all single tokens, unless the caller named some. The foreground is
    where, in the prediction that the sink token belongs to (see `GoCASegmentor`), it is less than the sum of all other
    tokens. `config` and `rescaled_sink` are not read: this method leaves no such choice open.
    """

    layers_read = 2  # coarsest grids
    projected: frozenset[str] = frozenset()  # heads are not weighted

    def __init__(
        self,
        config: GoCAConfig,
        preset: LayerPreset,
        layout: TokenLayout,
        unconditional_sink: bool = False,
        rescaled_sink: bool = False,
    ):
        self.preset, self.layout, self.unconditional_sink = preset, layout, unconditional_sink
        self.layers = frozenset((*preset.text, *preset.self_attention))
        self._conditional: dict[str, AttentionRecord] = {}
        self._unconditional: dict[str, AttentionRecord] = {}

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Keep a record until the step's grids are known (see `GoCASegmentor.keep`)."""
        for branch in branches if record.name in self.layers else ():
            if branch or self.unconditional_sink:
                part = record.branch(branch, branches)
                (self._conditional if branch else self._unconditional)[record.name] = part.only().alone()

    def regions(self, size: tuple[int, int]) -> Regions:
        """The argmax over tokens, and the foreground, at `size`."""
        tokens = self._maps(self._conditional, self.layout.columns)
        masks = one_hot(
            torch.einsum("bmhw,bmk->bkhw", _mean_of_relative(tokens), self.layout.groups), self.layout.present
        )
        text = self._conditional[self.preset.text[0]].view.text
        every = torch.arange(text.stop - text.start, device=self.layout.sink.device).expand(len(self.layout.sink), -1)
        if self.unconditional_sink or any(len(names) < every.shape[1] for names in self.layout.labels):
            tokens = self._maps(self._unconditional if self.unconditional_sink else self._conditional, every)
        sinks = [maps.take_along_dim(self.layout.sink[..., None, None], 1) for maps in tokens]
        others = [maps.sum(1, keepdim=True) - sink for maps, sink in zip(tokens, sinks, strict=True)]
        foreground = _mean_of_relative(sinks) < _mean_of_relative(others)
        return Regions(nearest(masks, size), nearest(foreground, size), self.layout.labels)

    def _maps(self, records, columns) -> list[Float[Tensor, "b m H W"]]:
        """Refined, resized and smoothed maps of each layer read."""
        grids = sorted({records[name].grid for name in self.preset.text})[: self.layers_read]
        maps = []
        for name, beside in zip(self.preset.text, self.preset.self_attention, strict=True):
            if (record := records[name]).grid in grids:
                once = affinity_product(records[beside], token_maps(record, columns, None))
                refined = (once + 3 * affinity_product(records[beside], once)) / 4
                maps.append(blur(resize(as_maps(refined, record.grid), grids[-1]), 3, 0.5**0.5))
        return maps


def _mean_of_relative(maps: list[Tensor]) -> Tensor:
    """Each map over its spatial mean, averaged over layers."""
    return torch.stack([m / (m.mean((-2, -1), keepdim=True) + 1e-8) for m in maps]).mean(0)


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
        wide = torch.promote_types(other.dtype, torch.float32)  # what torch computes a plain product in
        return (float(self) * rate.to(wide) * other.to(wide)).to(other.dtype)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """`delta * scale`, where torch sees the tensor first."""
        if func in (torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul):
            scale, tensor = args[:2] if isinstance(args[1], torch.Tensor) else args[1::-1]
            return scale * tensor
        plain = [float(a) if isinstance(a, cls) else a for a in args]
        return func(*plain, **{k: float(v) if isinstance(v, cls) else v for k, v in (kwargs or {}).items()})

    def __reduce__(self):
        return float, (float(self),)
