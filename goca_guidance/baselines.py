"""Segmentors that GoCA is compared with, with the same face: `keep` each record, then ask for `regions`."""

import torch
from jaxtyping import Float
from torch import Tensor

from goca_guidance.config import LayerPreset
from goca_guidance.goca import affinity_product, one_hot, token_maps
from goca_guidance.maps import as_maps, blur, nearest, resize
from goca_guidance.records import AttentionRecord, Regions, TokenLayout


class SCFGSegmentor:
    """The segmentor of S-CFG itself (arXiv 2404.05384, section 3; constants of its released code).

    Head-mean cross maps of the two coarsest grids that a step has (16x16 and 8x8 for Stable Diffusion at 512 pixels),
    refined by (S + 3 S^2) / 4 of the sibling self-attention S, smoothed, divided by their spatial mean, averaged over
    layers. The argmax runs over the layout's tokens, which should be all of them. The foreground is where, in the
    unconditional half, the start token is not the larger of itself and the sum of all other tokens.
    """

    layers_read = 2  # coarsest grids

    def __init__(self, preset: LayerPreset, layout: TokenLayout, sink: int = 0):
        self.preset, self.layout, self.sink = preset, layout, sink
        self._records: dict[str, AttentionRecord] = {}

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        return frozenset((*self.preset.cross, *self.preset.self_layers))

    def keep(self, record: AttentionRecord) -> None:
        """Keep a record until the step's grids are known."""
        self._records[record.name] = record

    def regions(self, size: tuple[int, int]) -> Regions:
        """The argmax over tokens, and the foreground, at `size`."""
        grids = sorted({self._records[name].grid for name in self.preset.cross})[: self.layers_read]
        tokens = self._maps(1, self.layout.columns, grids)
        masks = one_hot(
            torch.einsum("bmhw,bmk->bkhw", _mean_of_relative(tokens), self.layout.groups), self.layout.present
        )
        start = self._maps(0, torch.full_like(self.layout.columns[:, :1], self.sink), grids)
        others = [1 - m for m in start]  # a pixel's shares sum to one, and refining and smoothing keep that
        foreground = _mean_of_relative(start) <= _mean_of_relative(others)
        return Regions(nearest(masks, size), nearest(foreground, size), self.layout.labels)

    def _maps(self, branch, columns, grids) -> list[Float[Tensor, "b m H W"]]:
        """Refined, resized and smoothed maps of each layer read."""
        maps = []
        for cross, own in zip(self.preset.cross, self.preset.self_layers, strict=True):
            if (record := self._records[cross]).grid in grids:
                x = token_maps(record.branch(branch), columns, None)
                affinity = self._records[own].branch(branch)
                once = affinity_product(affinity, x)
                refined = (once + 3 * affinity_product(affinity, once)) / 4
                maps.append(blur(resize(as_maps(refined, record.grid), grids[-1]), 3, 0.5**0.5))
        return maps


def _mean_of_relative(maps: list[Tensor]) -> Tensor:
    """Each map over its spatial mean, averaged over layers."""
    return torch.stack([m / (m.mean((-2, -1), keepdim=True) + 1e-8) for m in maps]).mean(0)
