"""Attention records of one denoiser call to region scores: what a segmentor is, and GoCA's."""

from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.method.aggregation import Aggregation
from goca_guidance.method.attention import one_hot
from goca_guidance.method.goca import normalise, refine, rescale
from goca_guidance.method.maps import nearest
from goca_guidance.method.records import AttentionRecord, Regions, TokenLayout


class Segmentor(Protocol):
    """Reads the attention of one denoiser call, made anew for each: `keep` every record, then ask.

    A segmentor answers `scores`, one map for each region of the layout, and can segment real images; or `regions`, and can
    guide; or both. All are made alike.

    Args:
        config: how attention becomes maps, for those that have a choice.
        preset: the denoiser's layers.
        layout: the observed tokens, and how they form regions.
    """

    layout: TokenLayout

    def __init__(self, config: GoCAConfig, preset: LayerPreset, layout: TokenLayout): ...

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        ...

    @property
    def projected(self) -> frozenset[str]:
        """Names of the layers whose output projection is needed."""
        ...

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record of the conditional prediction (1), of the unconditional one (0), or of both, the latter first."""


class ScoringSegmentor(Segmentor, Protocol):
    """A segmentor for real images."""

    def scores(self) -> Float[Tensor, "b k *S"]:
        """One map in [0, 1] for each region of the layout; of its background entities one, or one each."""
        ...


class GuidingSegmentor(Segmentor, Protocol):
    """A segmentor for guided generation.

    Args:
        config, preset, layout: as all segmentors'.
        unconditional_sink: the token that looks at the background is read in the unconditional prediction.
        rescaled_sink: it is read in the conditional one, as if it were a region.
    """

    def __init__(
        self,
        config: GoCAConfig,
        preset: LayerPreset,
        layout: TokenLayout,
        unconditional_sink: bool = False,
        rescaled_sink: bool = False,
    ): ...

    def regions(self, size: tuple[int, ...]) -> Regions:
        """A partition of every image into the layout's regions, and its foreground, at `size`."""
        ...


class GoCASegmentor:
    """GoCA (arXiv 2603.06178) on the records of one denoiser call.

    Maps of the layout's tokens are aggregated over heads and layers (`Aggregation`), averaged to regions and rescaled, blurred
    and brought to [0, 1], and refined. Background entities become one map, the highest of theirs, before they are refined.

    The foreground, as released, is where the refined map of the layout's sink token is below one half: of the conditional
    prediction, or, with `unconditional_sink`, of the unconditional one, which is aggregated by its own layer weights. It is
    its share of all the text's tokens; refined by the conditional self-attention; blurred last. With `rescaled_sink` (ours)
    it is where the sink's own score, as if it were a region of the conditional prediction, is below one half.
    """

    def __init__(
        self,
        config: GoCAConfig,
        preset: LayerPreset,
        layout: TokenLayout,
        unconditional_sink: bool = False,
        rescaled_sink: bool = False,
    ):
        self.config, self.layout, self.rescaled_sink = config, layout, rescaled_sink
        self.order = preset.order if config.refine_order is None else config.refine_order
        preset = preset.reading(config.layers)
        columns = (layout if unconditional_sink else layout.with_sink_as_region).columns
        shared = layout.sink.shape[1] > 0 and not (unconditional_sink or rescaled_sink)
        total = shared or not config.rescale or layout.alone  # where rescaling divides every map, it cancels
        self._made = config, preset
        self._both: tuple[int, ...] = ()  # the predictions, where they are halves of a batch and read as one
        self._conditional = Aggregation(config, preset, columns, refining=self.order > 0, total=total)
        self._unconditional = Aggregation(config, preset, layout.sink, total=True) if unconditional_sink else None

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        return self._conditional.layers

    @property
    def projected(self) -> frozenset[str]:
        """Names of the layers whose output projection is needed."""
        aggregation = self._conditional
        return frozenset(aggregation.preset.text if aggregation.heads == "contribution" else ())

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record of the conditional prediction (1), of the unconditional one (0), or of both, the latter first."""
        if record.name not in self.layers:
            return
        if self._unconditional is not None and len(branches) == 2:
            self._read_together(branches)
            self._conditional.keep(record)
        elif 1 in branches:
            self._conditional.keep(record.branch(1, branches))
        elif self._unconditional is not None:
            self._unconditional.keep(record)

    def _read_together(self, branches):
        """Both predictions are read as one, of twice the images: half as many operations. The conditional one refines."""
        if self._both:
            return
        self._both, words = branches, self.layout.columns
        images, most = len(words), words.shape[1]
        sink = F.pad(self.layout.sink, (0, most - self.layout.sink.shape[1]))
        columns = torch.cat([(sink, words)[branch] for branch in branches])
        first = branches.index(1) * images
        self._conditional = Aggregation(
            *self._made, columns, refining=self.order > 0, total=True, refined=slice(first, first + images)
        )

    def weights(self) -> Float[Tensor, "b l"]:
        """Weight of each text layer in the conditional prediction, in the preset's order."""
        weights = self._conditional.weights()
        return weights.chunk(2)[self._both.index(1)] if self._both else weights

    def scores(self) -> Float[Tensor, "b k *S"]:
        """One map in [0, 1] for each region of the layout, at the finest text layer's grid; background entities are one."""
        return self._scores(self._shares(1)[1][:, : self.layout.columns.shape[1]], self.layout)

    def regions(self, size: tuple[int, ...]) -> Regions:
        """The argmax over regions, and the foreground, at `size`."""
        layout, shares = self.layout, self._shares(1, 0)
        words, sink = shares[1].tensor_split([layout.columns.shape[1]], 1)
        if self.rescaled_sink:
            scores, sink = self._scores(shares[1], layout.with_sink_as_region).tensor_split([-1], 1)
        else:
            maps = self._maps(words, layout)
            sink = shares[0][:, : layout.sink.shape[1]] if 0 in shares else sink
            refined = self._refined(torch.cat([maps, sink], 1))  # their self-attention is read once for both
            scores, sink = refined.tensor_split([maps.shape[1]], 1)
            sink = normalise(sink, self.config)
        return Regions(nearest(one_hot(scores, layout.present), size), nearest(sink < 0.5, size), layout.labels)

    def _shares(self, *branches: int) -> dict[int, Float[Tensor, "b m *S"]]:
        """By prediction, the observed tokens; of all the text's tokens, where the total was asked for."""
        if self._both:
            return dict(zip(self._both, self._shares_of(self._conditional).chunk(2), strict=True))
        read = {1: self._conditional, 0: self._unconditional}
        return {branch: self._shares_of(read[branch]) for branch in branches if read[branch] is not None}

    def _shares_of(self, aggregation):
        tokens, total = aggregation.merged(self._conditional.finest)
        return tokens / total.clamp(min=torch.finfo(total.dtype).tiny)

    def _scores(self, tokens, layout):
        return self._refined(self._maps(tokens, layout))

    def _maps(self, tokens, layout):
        """Those of the regions, before they are refined."""
        content = layout.content if self.config.rescale else torch.zeros_like(layout.content)
        maps = normalise(rescale(tokens, layout.groups, content), self.config)
        if layout.background:
            maps = torch.cat([maps[:, : layout.background].amax(1, keepdim=True), maps[:, layout.background :]], 1)
        return maps

    def _refined(self, maps):
        refining = self._conditional
        return refine(maps, refining.attend, self.order, refining.uneven) if refining.refines else maps
