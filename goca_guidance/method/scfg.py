"""S-CFG (arXiv 2404.05384): its own segmentor, regions to a guidance map, and the scale that carries it into a pipeline."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset, SCFGConfig
from goca_guidance.method.attention import Found, affinity_product, one_hot, over_heads, token_maps
from goca_guidance.method.maps import (
    as_maps,
    axes,
    blur,
    coarser,
    nearest,
    nearest_index,
    on_keys,
    over,
    resize,
    resize_adjoint,
)
from goca_guidance.method.records import AttentionRecord, Regions, TokenLayout


STORED = 4096  # pixels up to which a layer's map is stored (64 MB an image, one layer at a time)


class SCFGSegmentor:
    """The segmentor of S-CFG itself (arXiv 2404.05384, section 3; constants of its released code).

    Head-mean maps of the text layers of the two coarsest grids that a step has (16x16 and 8x8 for Stable Diffusion at 512
    pixels), refined by (S + 3 S^2) / 4 of the sibling self-attention S, smoothed, divided by their spatial mean, averaged over
    layers. The argmax runs over the layout's regions: all single tokens, unless the caller named some. The foreground is
    where, in the prediction that the sink token belongs to (see `GoCASegmentor`), it is less than the sum of all other
    tokens. `rescaled_sink` and most of `config` are not read: this method leaves no such choice open.

    A video's layers are read at the preset's working size and refined as they come, the maps of all tokens: neither S nor its
    keys can be kept.
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
        self.working_size = config.working_size or preset.working_size
        self.layers = frozenset((*preset.text, *preset.self_attention))
        self._records: dict[int, dict[str, AttentionRecord]] = {0: {}, 1: {}}  # by branch and layer
        self._refined: dict[tuple[int, str], Float[Tensor, "b n *S"]] = {}  # of a video, by branch and text layer
        self._text = 0  # tokens

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Keep a record until the step's grids are known (see `GoCASegmentor.keep`)."""
        if record.name in self.preset.text:
            self._text = record.view.text.stop - record.view.text.start
        for branch in branches if record.name in self.layers else ():
            if branch or self.unconditional_sink:
                self._records[branch][record.name] = record.branch(branch, branches).only().alone()
                if record.view.video:
                    self._refine(branch)

    def _refine(self, branch):
        """A video's layer and the one beside it, as soon as both are there."""
        records = self._records[branch]
        for name, beside in zip(self.preset.text, self.preset.self_attention, strict=True):
            if name in records and beside in records:
                words = records.pop(name)
                pixels = records.pop(beside, words)
                self._refined[branch, name] = _refined(words, pixels, coarser(words.grid, self.working_size))

    def regions(self, size: tuple[int, ...]) -> Regions:
        """The argmax over tokens, and the foreground, at `size`."""
        layout, tokens = self.layout, self._maps(0 if self.unconditional_sink else 1)
        if self.unconditional_sink:
            words = self._maps(1, layout.columns)
        else:
            words = [maps.take_along_dim(over(layout.columns, maps), 1) for maps in tokens]
        scores = torch.einsum("bm...,bmk->bk...", _mean_of_relative(words), layout.groups)
        masks = one_hot(scores, layout.present)
        sinks = [maps.take_along_dim(over(layout.sink, maps), 1) for maps in tokens]
        others = [maps.sum(1, keepdim=True) - sink for maps, sink in zip(tokens, sinks, strict=True)]
        foreground = _mean_of_relative(sinks) < _mean_of_relative(others)
        return Regions(nearest(masks, size), nearest(foreground, size), layout.labels)

    def _maps(self, branch, columns=None) -> list[Float[Tensor, "b m *S"]]:
        """Refined, resized and smoothed maps of each layer read, of all tokens where none are named."""
        if columns is None:
            columns = torch.arange(self._text, device=self.layout.sink.device).expand(len(self.layout.sink), -1)
        if self._refined:
            every = [self._refined[branch, name] for name in self.preset.text]
            return [blur(maps.take_along_dim(over(columns, maps), 1), 3, 0.5**0.5) for maps in every]
        records = self._records[branch]
        grids = sorted({records[name].grid for name in self.preset.text})[: self.layers_read]
        maps = []
        for name, beside in zip(self.preset.text, self.preset.self_attention, strict=True):
            if (record := records[name]).grid in grids:
                refined = _twice(_attending(records[beside]), token_maps(record, columns, None))
                maps.append(blur(resize(as_maps(refined, record.grid), grids[-1]), 3, 0.5**0.5))
        return maps


def _twice(attend: Callable[[Tensor], Tensor], x: Float[Tensor, "b p m"]) -> Float[Tensor, "b p m"]:
    """(S + 3 S^2) / 4 times x."""
    once = attend(x)
    return (once + 3 * attend(once)) / 4


def _attending(record: AttentionRecord) -> Callable[[Float[Tensor, "b p m"]], Float[Tensor, "b p m"]]:
    """S x of a layer's attention S: the mean over heads is stored where it is small, and else computed every time."""
    if record.query.shape[2] > STORED:
        return partial(affinity_product, record)
    found = Found()
    for block, mean, _ in over_heads(record):
        found.add(block, mean[..., record.view.image])
    return partial(torch.matmul, found.whole())


def _refined(words: AttentionRecord, pixels: AttentionRecord, grid: tuple[int, ...]) -> Float[Tensor, "b n *S"]:
    """(S + 3 S^2) / 4 times the maps of all tokens, on a coarser grid, on which S alone is small."""
    rows = nearest_index(words.grid, grid, words.query.device)
    found = Found()
    for block, mean, _ in over_heads(pixels.at(grid, rows)):
        found.add(block, on_keys(resize_adjoint, mean[..., pixels.view.image], pixels.grid, grid))
    affinity = found.whole()
    text = words.view.text
    every = torch.arange(text.stop - text.start, device=rows.device).expand(len(words.query), -1)
    refined = _twice(partial(torch.matmul, affinity), token_maps(words.at(grid, rows), every, None))
    return as_maps(refined, grid)


def _mean_of_relative(maps: list[Tensor]) -> Tensor:
    """Each map over its spatial mean, averaged over layers."""
    return torch.stack([m / (m.mean(axes(m), keepdim=True) + 1e-8) for m in maps]).mean(0)


def rate_map(
    delta: Float[Tensor, "b c *S"], regions: Regions, scale: float, config: SCFGConfig
) -> Float[Tensor, "b 1 *S"]:
    """Rate of every pixel's guidance: its region's mean |delta| is brought to the foreground's (S-CFG, section 3).

    rate[k] = mean_foreground |delta| / mean_region_k |delta|, painted back, limited to [rate_min, rate_max] and to
    ceiling / scale, smoothed, and with `equal_mean` brought to a mean of one. |.| is the norm over channels; a video's means
    are over space and time. Before the limits, an image with an empty foreground has rate one, and so has a region whose delta
    vanishes.
    """
    if config.rate_min == config.rate_max == 1:
        return torch.ones_like(delta[:, :1], dtype=torch.float32)
    strength = delta.float().norm(dim=1, keepdim=True)
    target, region = region_means(strength, regions.foreground), region_means(strength, regions.masks)
    known = (region > 0) & (target > 0)
    rates = torch.where(known, target / torch.where(known, region, 1), 1.0)
    rate = torch.einsum("bk,bk...->b...", rates, regions.masks.float())[:, None]
    rate = rate.clamp(config.rate_min, config.rate_max).clamp(max=config.ceiling / scale)
    rate = 1 + blur(rate - 1, config.smooth_size, config.smooth_sigma)  # as blur(rate), and exactly one where rate is
    return rate / over(weighted_mean(rate, strength), rate) if config.equal_mean else rate


def weighted_mean(rate: Float[Tensor, "b 1 *S"], strength: Float[Tensor, "b 1 *S"]) -> Float[Tensor, " b"]:
    """Mean rate of each image, where a pixel counts by the strength of its guidance; one where there is none."""
    total = strength.flatten(1).sum(1)
    return torch.where(total > 0, (rate * strength).flatten(1).sum(1) / torch.where(total > 0, total, 1), 1.0)


def region_means(values: Float[Tensor, "b 1 *S"], masks: Tensor) -> Float[Tensor, "b k"]:
    """Mean of `values` inside each mask [b k *S]; zero for an empty one."""
    masks = masks.float()
    return (values * masks).sum(axes(masks)) / masks.sum(axes(masks)).clamp(min=1)


class SpatialGuidanceScale(float):
    """A guidance scale whose product with the guidance difference varies over the image.

    A float in every other respect, so that a stock pipeline's checks and logs see the scalar, while its
    `scale * (cond - uncond)` becomes `scale * rate(delta) * delta`. `rate(delta, scale)` returns b 1 *S, or None for a
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
