"""GoCA (arXiv 2603.06178) on one denoiser call: attention records in, regions out."""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.method.attention import affinity_product, joined, one_hot, pick, probabilities, token_maps
from goca_guidance.method.goca import (
    STORED,
    agreement,
    head_weights,
    layer_weights,
    normalise,
    pseudo_attention,
    refine,
    rescale,
)
from goca_guidance.method.maps import (
    as_maps,
    coarser,
    nearest,
    nearest_index,
    pull_affinity,
    resize,
    resize_adjoint,
    row_mass,
    sample,
)
from goca_guidance.method.records import AttentionRecord, Regions, TokenLayout


BATCH = {"cpu": 2**18}  # elements of queries that are worth a call of their own: fewer wait for others of their shape
LARGE_BATCH = 2**22  # on any other device


class GoCASegmentor:
    """One denoiser call's attention to region scores: `keep` each record, then ask.

    A record is reduced as soon as it can be: a cross layer to the observed tokens' maps, a self layer, once the reference
    layer was seen, to its agreement and its part of the refining affinity. Small records of equal shape are reduced together.

    The foreground comes from the map of the layout's sink token: of the conditional prediction, or, with
    `unconditional_sink`, of the unconditional one. The layer weights of the conditional prediction serve both.
    """

    def __init__(self, config: GoCAConfig, preset: LayerPreset, layout: TokenLayout, unconditional_sink: bool = False):
        self.config, self.layout, self.unconditional_sink = config, layout, unconditional_sink
        self.preset = preset.middle if config.layers == "manual" else preset
        self.heads = config.heads or preset.heads
        self.order = preset.order if config.refine_order is None else config.refine_order
        self.row_normalise = preset.row_normalise if config.row_normalise is None else config.row_normalise
        self._own = frozenset(preset.own if config.layers == "agreement" else ())
        self._fine = frozenset(preset.fine if self.order else ())
        self._pixel_layers = self._own | self._fine | (frozenset([preset.reference]) if self._own else frozenset())
        self._waiting: dict[tuple, list[AttentionRecord]] = {}  # by what is asked of them, and shape
        self._early: list[tuple[AttentionRecord, tuple[int, int]]] = []  # self layers seen before the reference
        self._affinity: Tensor | None = None  # pseudo self-attention of the reference, at `_grid`
        self._pulled: dict[tuple, tuple] = {}  # by grids of queries and keys: what `_pull` gives
        self._agreements: dict[str, Float[Tensor, " b"]] = {}
        self._maps: list[tuple[list[str], Float[Tensor, "l b m H W"]]] = []
        self._sinks: list[tuple[list[str], Float[Tensor, "l b s H W"]]] = []
        self._sum: Float[Tensor, "b p q"] | None = None  # of the fine layers' self-attention
        self._large: list[AttentionRecord] = []  # fine layers too large for it
        self._finest = (0, 0)  # grid of the maps, but for the working size
        self._keys, self._joint = (0, 0), False  # of the fine layers: grid of the pixel keys, keys that are text

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        return self._pixel_layers | frozenset(self.preset.cross)

    @property
    def projected(self) -> frozenset[str]:
        """Names of the layers whose output projection is needed."""
        return frozenset(self.preset.cross if self.heads == "contribution" else ())

    # ---- what the network brings -------------------------------------------------------------------------------------
    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record of the conditional prediction (1), of the unconditional one (0), or of both, the latter first."""
        if 1 in branches and record.name in self._pixel_layers:
            conditional = self._sampled(record.branch(1, branches))
            if self._own and record.name == self.preset.reference:
                self._see_reference(conditional)
            self._keep_pixels(conditional, record.grid)
        if record.name in self.preset.cross:
            self._keep_words(record, branches)

    def _sampled(self, record):
        """The record at the working size."""
        grid = coarser(record.grid, self.config.working_size)
        if grid == record.grid:
            return record
        return record.at(grid, nearest_index(record.grid, grid, record.query.device))

    def _together(self, record):
        """Whether the conditional prediction's words are read with its pixels, from one softmax."""
        return record.view.joint and record.name in self._own

    def _keep_words(self, record, branches):
        self._finest = max(self._finest, record.grid, key=math.prod)
        wanted = tuple(b for b in branches if (self.unconditional_sink if b == 0 else not self._together(record)))
        if wanted:
            part = record if wanted == branches else record.branch(wanted[0])
            self._add(("words", wanted), part.only("output", "gram"))

    def _see_reference(self, record):
        tensor = record.output if self.preset.features == "output" else record.features
        features = (record.query if tensor is None else tensor).transpose(1, 2).flatten(2)
        self._affinity, self._grid = pseudo_attention(features, self.config.reference_channels), record.grid
        early, self._early = self._early, []
        for waiting in early:
            self._keep_pixels(*waiting)

    def _keep_pixels(self, record, keys):
        """`keys`: grid of the pixel keys, which are all there at any working size."""
        own, fine = record.name in self._own, record.name in self._fine
        needed = ("output", "gram") if self._together(record) and self.heads == "contribution" else ()
        if own and self._affinity is None:
            self._early.append((record.only(*needed).alone(), keys))
            return
        if fine:
            self._keys, self._joint = keys, record.view.joint
            self._finest = max(self._finest, keys, key=math.prod)
            if record.query.shape[2] * keys[0] * keys[1] > STORED**2:
                self._large.append(record.only().alone())
                fine = False
        if own or fine:
            self._add(("pixels", keys, own, fine), record.only(*needed))

    def _add(self, asked, record):
        """Records that are too small for a call of their own wait for others of their shape."""
        key = (
            asked,
            record.query.shape,
            record.key.shape,
            str(record.view),
            record.scale,
            getattr(record.mask, "shape", None),
        )
        waiting = self._waiting.setdefault(key, [])
        waiting.append(record)
        if len(waiting) * record.query.numel() >= BATCH.get(record.query.device.type, LARGE_BATCH):
            self._reduce(key)

    def _reduce(self, key):
        (kind, *asked), records = key[0], self._waiting.pop(key)
        (self._reduce_words if kind == "words" else self._reduce_pixels)(stacked(records), records, *asked)

    # ---- reductions --------------------------------------------------------------------------------------------------
    def _reduce_words(self, record, records, branches):
        """Maps of the observed tokens."""
        columns = self._columns(branches).repeat(len(records), 1)
        self._store(records, token_maps(record, columns, self._head_weights(record, records)), branches)

    def _columns(self, branches):
        """Tokens to read: in the unconditional prediction the sink; with both, it is repeated to as many columns."""
        columns, sink = self.layout.columns, self.layout.sink
        if branches == (0, 1):
            return torch.cat([sink.repeat(1, columns.shape[1])[:, : columns.shape[1]], columns])
        return sink if branches == (0,) else columns if self.unconditional_sink else torch.cat([columns, sink], 1)

    def _head_weights(self, record, records):
        if self.heads == "uniform":
            return None
        return head_weights(record.output, [layer.gram for layer in records], self.config.clamp_heads)

    def _store(self, records, maps, branches):
        names, images = [layer.name for layer in records], len(self.layout.sink)
        maps = as_maps(maps, records[0].grid).unflatten(0, (len(records), -1))
        m, s = self.layout.columns.shape[1], self.layout.sink.shape[1]
        if 0 in branches:
            self._sinks.append((names, maps[:, :images, :s]))
        elif not self.unconditional_sink:
            self._sinks.append((names, maps[:, :, m:]))
        if 1 in branches:
            self._maps.append((names, maps[:, -images:, :m]))

    def _reduce_pixels(self, record, records, keys, own, fine):
        """Agreement with the reference, in the rows that its grid reads; the sum that refines, and words, in all rows."""
        layers, agreed, words, columns, weights = len(records), [], [], None, None
        if together := self._together(record):
            columns = self._columns((1,)).repeat(layers, 1) + record.view.text.start
            weights = self._head_weights(record, records)
        some, reference, mass = self._pull(record, keys) if own else (None, None, None)
        passes = [some] if some is None or not (fine or together) else [some, None]
        for rows in passes:
            for block, probs in probabilities(record, rows):
                pixels = probs[..., record.view.image].mean(1).unflatten(0, (layers, -1))
                if own and rows is some:
                    agreed.append(agreement(pixels, reference[:, block], mass))
                if fine and rows is None:
                    self._add_up(block, pixels, record.query.shape[2])
                if together and rows is None:
                    words.append(pick(probs, columns, weights, block))
        if own:
            names = [layer.name for layer in records]
            self._agreements.update(zip(names, torch.stack(agreed).sum(0).unbind(0), strict=True))
        if together:
            self._store(records, joined(words, 1), (1,))

    def _add_up(self, block, pixels, rows):
        if self._sum is None:
            self._sum = pixels.new_zeros(pixels.shape[1], rows, pixels.shape[-1])
        self._sum[:, block] += pixels[0] if len(pixels) == 1 else pixels.sum(0)

    def _pull(self, record, keys):
        """The reference's affinity as a layer is compared with it: rows (None for all), affinity, row mass."""
        grids = record.grid, keys
        if grids not in self._pulled:
            rows, affinity = pull_affinity(self._affinity, self._grid, *grids)
            wanted = self.config.agreement_rows
            if wanted is not None and wanted < len(rows) and not record.view.joint:
                chosen = sample(len(rows), wanted, rows.device)
                rows, affinity = rows[chosen], affinity[:, chosen] * (len(rows) / wanted)
            mass = row_mass(self._grid, keys, rows.device) if self.row_normalise else None
            self._pulled[grids] = None if len(rows) == record.query.shape[2] else rows, affinity, mass
        return self._pulled[grids]

    # ---- answers -----------------------------------------------------------------------------------------------------
    def weights(self) -> Float[Tensor, "b l"]:
        """Weight of each cross layer, in the preset's order."""
        for key in list(self._waiting):
            self._reduce(key)
        self._affinity = None
        self._pulled.clear()
        if not self._own:
            layers = len(self.preset.cross)
            return self.layout.groups.new_ones(len(self.layout.labels), layers) / layers
        return layer_weights(torch.stack([self._agreements[name] for name in self.preset.own], -1))

    def scores(self) -> Float[Tensor, "b k H W"]:
        """One map in [0, 1] for each region of the layout, at the finest cross-attention grid."""
        return self._scores(self.weights())

    def _scores(self, weights):
        tokens, layout, config = self._merge(self._maps, weights), self.layout, self.config
        content = layout.content if config.rescale else torch.zeros_like(layout.content)
        maps = normalise(rescale(tokens, layout.groups, content), config)
        return refine(maps, self._attend, self.order, self._joint) if self._fine else maps

    def _attend(self, x: Float[Tensor, "b p k"], grid: tuple[int, int]) -> Float[Tensor, "b p k"]:
        """A_self x, up to a factor; x is resized to the grid of the keys where that is finer."""
        if self._sum is None:
            x = resize(as_maps(x, grid), self._keys).flatten(2).mT
            return torch.stack([affinity_product(record, x) for record in self._large]).mean(0)
        if grid != self._keys:
            self._sum = resize_adjoint(self._sum.unflatten(-1, self._keys), grid).flatten(-2)
            self._keys = grid
        return self._sum @ x

    def _merge(self, maps, weights):
        """A = sum_l w[l] bilinear(A[l]) at the finest grid, clamped at zero: layers of one grid are summed before."""
        by_name, merged = dict(zip(self.preset.cross, weights.unbind(1), strict=True)), {}
        for names, layers in maps:
            of_layers = torch.stack([by_name[name] for name in names])[..., None, None, None]
            total, grid = (of_layers * layers).sum(0), layers.shape[-2:]
            merged[grid] = merged[grid] + total if grid in merged else total
        working = coarser(self._finest, self.config.working_size)
        size = max(*merged, working, key=math.prod)
        whole = sum(resize(total, size) for total in merged.values()).clamp(min=0)
        return whole if size == working else F.adaptive_avg_pool2d(whole, working)

    def regions(self, size: tuple[int, int]) -> Regions:
        """The argmax over regions, and the foreground: where the sink token's map is below one half."""
        weights = self.weights()
        masks = one_hot(self._scores(weights), self.layout.present)
        sink = normalise(self._merge(self._sinks, weights), self.config)
        return Regions(nearest(masks, size), nearest(sink < 0.5, size), self.layout.labels)


def stacked(records: list[AttentionRecord]) -> AttentionRecord:
    """Records of equal shape as one, whose batch holds their images one layer after another."""
    if len(records) == 1:
        return records[0]
    first, tensors = records[0], {}
    for name in ("query", "key", "output", "mask"):
        parts = [getattr(record, name) for record in records]
        if parts[0] is not None:
            tensors[name] = torch.cat([part.expand(len(first.query), *part.shape[1:]) for part in parts])
    changes: dict[str, Any] = tensors
    return replace(first, **changes)
