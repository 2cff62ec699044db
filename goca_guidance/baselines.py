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
    layers. The argmax runs over the layout's regions: all single tokens, unless the caller named some. The foreground is
    where, in the prediction that the sink token belongs to (see `GoCASegmentor`), it is not the larger of itself and the
    sum of all other tokens.
    """

    layers_read = 2  # coarsest grids
    projected: frozenset[str] = frozenset()

    def __init__(self, preset: LayerPreset, layout: TokenLayout, unconditional_sink: bool = False):
        self.preset, self.layout, self.unconditional_sink = preset, layout, unconditional_sink
        self.layers = frozenset((*preset.cross, *preset.own))  # names of the layers that must be observed
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
        text = self._conditional[self.preset.cross[0]].view.text
        every = torch.arange(text.stop - text.start, device=self.layout.sink.device).expand(len(self.layout.sink), -1)
        if self.unconditional_sink or any(len(names) < every.shape[1] for names in self.layout.labels):
            tokens = self._maps(self._unconditional if self.unconditional_sink else self._conditional, every)
        start = [maps.take_along_dim(self.layout.sink[..., None, None], 1) for maps in tokens]
        others = [maps.sum(1, keepdim=True) - own for maps, own in zip(tokens, start, strict=True)]
        foreground = _mean_of_relative(start) <= _mean_of_relative(others)
        return Regions(nearest(masks, size), nearest(foreground, size), self.layout.labels)

    def _maps(self, records, columns) -> list[Float[Tensor, "b m H W"]]:
        """Refined, resized and smoothed maps of each layer read."""
        grids = sorted({records[name].grid for name in self.preset.cross})[: self.layers_read]
        maps = []
        for cross, own in zip(self.preset.cross, self.preset.own, strict=True):
            if (record := records[cross]).grid in grids:
                once = affinity_product(records[own], token_maps(record, columns, None))
                refined = (once + 3 * affinity_product(records[own], once)) / 4
                maps.append(blur(resize(as_maps(refined, record.grid), grids[-1]), 3, 0.5**0.5))
        return maps


def _mean_of_relative(maps: list[Tensor]) -> Tensor:
    """Each map over its spatial mean, averaged over layers."""
    return torch.stack([m / (m.mean((-2, -1), keepdim=True) + 1e-8) for m in maps]).mean(0)
