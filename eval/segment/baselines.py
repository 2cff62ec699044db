"""Rivals that read the words' attention too: a `ScoringSegmentor` (`goca_guidance.method.segmentor`) for each paper.

Which prompt is read, how often the network runs, and what happens to the scores afterwards, is the caller's business.
Neither reads `config`: the methods leave no such choice open.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset, layers_named
from goca_guidance.method.attention import affinity_product, token_maps
from goca_guidance.method.goca import refine
from goca_guidance.method.maps import as_maps, min_max, resize
from goca_guidance.method.records import AttentionRecord, TokenLayout


class DiffSegmenter:
    """DiffSegmenter (arXiv 2309.02773; constants of its released code).

    Head-mean maps of the text layers, averaged over those of each grid, resized to the finest grid, min-max, and summed with
    weights by grid; multiplied once by the mean self-attention of the finest grid's layers; min-max per class. The paper
    applies the last min-max after resizing to the picture.

    The paper runs the network once for each class, with a prompt of its own for it.

    Args:
        grid_weights: one for each grid, from the coarsest to the finest; divided by their sum. None takes the paper's, of the
            grids 8, 16, 32 and 64 of Stable Diffusion 1.x at 512 pixels, and no other model.
    """

    projected: frozenset[str] = frozenset()  # heads are not weighted

    def __init__(
        self,
        config: GoCAConfig,
        preset: LayerPreset,
        layout: TokenLayout,
        grid_weights: Sequence[float] | None = None,
    ):
        if grid_weights is None:
            check_known(preset, "DiffSegmenter", "`grid_weights`")
        self.grid_weights = (0.3, 0.5, 0.1, 0.1) if grid_weights is None else tuple(grid_weights)
        self.preset, self.layout = preset, layout
        self.layers = frozenset((*preset.text, *preset.self_attention))
        self._maps: dict[tuple[int, int], list[Tensor]] = {}  # of the text layers, by grid
        self._finest: list[AttentionRecord] = []  # self-attention layers of the finest grid so far

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record (see `Segmentor.keep`)."""
        if 1 not in branches or record.name not in self.layers:
            return
        record = record.branch(1, branches)
        if record.name in self.preset.text:
            self._maps.setdefault(record.grid, []).append(word_maps(record, self.layout))
        if record.name in self.preset.self_attention:
            layers = [*self._finest, record.only().alone()]
            finest = max(math.prod(layer.grid) for layer in layers)
            self._finest = [layer for layer in layers if math.prod(layer.grid) == finest]

    def scores(self) -> Float[Tensor, "b k H W"]:
        """One map in [0, 1] for each region of the layout, at the finest grid; a constant map is zero."""
        grids, weights = sorted(self._maps, key=math.prod), self.grid_weights
        if len(weights) != len(grids) or min(weights) < 0 or not sum(weights):
            raise ValueError(
                f"Expected a `grid_weights` for each of the {len(grids)} grids {grids}, at least 0 and one above, but got "
                f"{list(weights)}."
            )
        maps = [min_max(resize(torch.stack(self._maps[grid]).mean(0), grids[-1])) for grid in grids]
        merged = torch.stack([weight * m for weight, m in zip(weights, maps, strict=True)]).sum(0) / sum(weights)
        return refine(merged, self._attend, 1, self._finest[0].view.joint)

    def _attend(self, x: Float[Tensor, "b p k"], grid: tuple[int, int]) -> Float[Tensor, "b p k"]:
        return torch.stack([affinity_product(record, x) for record in self._finest]).mean(0)


class FTTM:
    """From Text to Mask (arXiv 2309.04109; constants of its released code for Pascal VOC). Not GoCA's "FTTM" row.

    Head-mean maps of the middle text layers, resized to the grid of one self-attention layer, averaged, min-max; class
    activation refinement: the map, kept inside the boxes around its parts above `box_threshold`, is multiplied by that layer's
    self-attention, `power` times as in the released code; min-max. The background's score is (2 threshold - highest score)^2,
    which is the caller's business.

    Args:
        text_layers, self_layer: names of the layers. None takes the paper's: of the 16 layers of Stable Diffusion 1.x, and no
            other model's, the cross layers 4 to 8 and the self layer 11, counted from 0.
    """

    box_threshold = 0.2  # of the map's maximum; the paper has 0.5 for COCO
    power = 2
    projected: frozenset[str] = frozenset()  # heads are not weighted

    def __init__(
        self,
        config: GoCAConfig,
        preset: LayerPreset,
        layout: TokenLayout,
        text_layers: Sequence[str] | None = None,
        self_layer: str | None = None,
    ):
        if not text_layers or not self_layer:
            check_known(preset, "FTTM", "`text_layers` and `self_layer`")
        self.layout = layout
        self.text = frozenset(layers_named(text_layers, preset.text) if text_layers else preset.text[4:9])
        own = layers_named([self_layer], preset.self_attention) if self_layer else preset.self_attention[11:12]
        self.self_attention = own[-1]
        self.layers = self.text | {self.self_attention}
        self._maps: list[Tensor] = []
        self._refining: AttentionRecord  # of the self-attention layer, once it was seen

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record (see `Segmentor.keep`)."""
        if 1 not in branches or record.name not in self.layers:
            return
        record = record.branch(1, branches)
        if record.name in self.text:
            self._maps.append(word_maps(record, self.layout))
        if record.name == self.self_attention:
            self._refining = record.only().alone()

    def scores(self) -> Float[Tensor, "b k H W"]:
        """One map in [0, 1] for each region of the layout, at the self-attention layer's grid; a constant map is zero."""
        refining, grid = self._refining, self._refining.grid
        maps = min_max(torch.stack([resize(maps, grid) for maps in self._maps]).mean(0))
        inside = maps * boxes(maps, self.box_threshold)
        return refine(inside, lambda x, _: affinity_product(refining, x), self.power, refining.view.joint)


def check_known(preset: LayerPreset, paper: str, settings: str) -> None:
    """ValueError for a model that a paper's choice of layers says nothing about."""
    if not preset.manual:
        raise ValueError(
            f"Expected Stable Diffusion 1.x, for which {paper} names its layers, but got another model: give the row "
            f"{settings}, chosen for this one."
        )


def boxes(maps: Float[Tensor, "b k H W"], threshold: float) -> Bool[Tensor, "b k H W"]:
    """The pixels in the boxes around each map's connected parts above `threshold` times its maximum (FTTM, refinement).

    Pixels that meet at a corner are connected, as in the contours of the released code.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError(
            "Expected scipy for FTTM's boxes, but it is missing: install goca-guidance[eval]."
        ) from error
    above = (maps > threshold * maps.amax((-2, -1), keepdim=True)).flatten(0, 1).cpu().numpy()
    inside = torch.zeros(above.shape, dtype=torch.bool)
    for pixels, part in zip(above, inside, strict=True):
        numbered, _ = ndimage.label(pixels, structure=[[1] * 3] * 3)
        for box in ndimage.find_objects(numbered):
            part[box] = True
    return inside.view(maps.shape).to(maps.device)


def word_maps(record: AttentionRecord, layout: TokenLayout) -> Float[Tensor, "b k H W"]:
    """Head-mean cross map of each region, averaged over the region's tokens."""
    tokens = as_maps(token_maps(record, layout.columns, None), record.grid)
    return torch.einsum("bmhw,bmk->bkhw", tokens, layout.groups)
