"""Attention records of one denoiser call to region scores. The specification is the naive form, `eval/cost/naive.py`:
one page that builds and stores every map. What stands here gives the same numbers without storing them.
"""

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.method.attention import affinity_product, joined, one_hot, pick, probabilities, token_maps
from goca_guidance.method.goca import (
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
STORED = 10_000  # pixels up to which the refining layers' sum is stored (400 MB an image)


class Segmentor(Protocol):
    """Reads the attention of one denoiser call, made anew for each: `keep` every record, then ask.

    A segmentor answers `scores`, one map for each region of the layout, and can segment real images; or `regions`, and can
    guide; or both. All are made alike.

    Args:
        config: how attention becomes maps, for those that have a choice.
        preset: the denoiser's layers.
        layout: the observed tokens, and how they form regions.
        unconditional_sink: in which prediction the token that looks at the background is read.
    """

    layout: TokenLayout

    def __init__(
        self, config: GoCAConfig, preset: LayerPreset, layout: TokenLayout, unconditional_sink: bool = False
    ): ...

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

    def scores(self) -> Float[Tensor, "b k H W"]:
        """One map in [0, 1] for each region of the layout."""
        ...


class GuidingSegmentor(Segmentor, Protocol):
    """A segmentor for guided generation."""

    def regions(self, size: tuple[int, int]) -> Regions:
        """A partition of every image into the layout's regions, and its foreground, at `size`."""
        ...


class GoCASegmentor:
    """GoCA (arXiv 2603.06178) on the records of one denoiser call, each reduced as soon as it can be.

    What happens to a record, by the preset's lists that name its layer (one record may be on several):

    - text layer: its observed tokens' maps, heads weighted (`_keep_words`). Of the unconditional prediction, and only with
      `unconditional_sink`, the sink's map alone.
    - self-attention layer: compared with the pseudo self-attention of the reference layer. Before that was seen, the record
      itself is held (`_early`); then it becomes one number an image (`_agreements`).
    - refining layer: added to one sum of all of them (`_sum`), or held where that is too large (`_large`).
    - reference layer: its dense features give the pseudo self-attention (`_affinity`), which lets the early ones go on.

    Work of equal kind and shape waits in `_waiting` until it fills a call; a layer of joint attention has words and pixels
    from one softmax. So between two records are held: maps of the layers reduced so far, the affinity and its forms on
    other grids, the sum, and whatever waits. `weights`, `scores` and `regions` first reduce what still waits.

    The foreground comes from the map of the layout's sink token: of the conditional prediction, or, with
    `unconditional_sink`, of the unconditional one. The layer weights of the conditional prediction serve both.
    """

    def __init__(self, config: GoCAConfig, preset: LayerPreset, layout: TokenLayout, unconditional_sink: bool = False):
        self.config, self.layout, self.unconditional_sink = config, layout, unconditional_sink
        self.preset = preset = preset.reading(config.layers)
        self.heads = config.heads or preset.heads
        self.order = preset.order if config.refine_order is None else config.refine_order
        self.row_normalise = preset.row_normalise if config.row_normalise is None else config.row_normalise
        self._compared = frozenset(preset.self_attention if config.layers == "agreement" else ())
        self._refining = frozenset(preset.refine if self.order else ())
        self._pixel_layers = self._compared | self._refining | frozenset([preset.reference] if self._compared else [])
        self._waiting: dict[tuple, list[AttentionRecord]] = {}  # by what is asked of them, and shape
        self._early: list[tuple[AttentionRecord, tuple[int, int]]] = []  # compared layers seen before the reference
        self._affinity: Tensor | None = None  # pseudo self-attention of the reference, at `_reference_grid`
        self._reference_grid = (0, 0)
        self._pulled: dict[tuple, tuple] = {}  # by grids of queries and keys: what `_pull` gives
        self._agreements: dict[str, Float[Tensor, " b"]] = {}  # by compared layer
        self._maps: list[
            tuple[list[str], Float[Tensor, "l b m H W"]]
        ] = []  # of the observed tokens, with the layers' names
        self._sinks: list[tuple[list[str], Float[Tensor, "l b s H W"]]] = []  # of the sink token
        self._sum: Float[Tensor, "b p q"] | None = None  # of the refining layers' self-attention
        self._large: list[AttentionRecord] = []  # refining layers too large for it
        self._refining_keys = (0, 0)  # grid of the refining layers' pixel keys
        self._joint = False  # whether the refining layers' keys are words too
        self._finest = (0, 0)  # finest grid of all maps; theirs, unless the working size is coarser

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        return self._pixel_layers | frozenset(self.preset.text)

    @property
    def projected(self) -> frozenset[str]:
        """Names of the layers whose output projection is needed."""
        return frozenset(self.preset.text if self.heads == "contribution" else ())

    # ---- what the network brings -------------------------------------------------------------------------------------
    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record of the conditional prediction (1), of the unconditional one (0), or of both, the latter first."""
        if 1 in branches and record.name in self._pixel_layers:
            conditional = self._at_working_size(record.branch(1, branches))
            if self._compared and record.name == self.preset.reference:
                self._keep_reference(conditional)
            self._keep_pixels(conditional, record.grid)
        if record.name in self.preset.text:
            self._keep_words(record, branches)

    def _at_working_size(self, record):
        """Fewer queries; the keys stay."""
        grid = coarser(record.grid, self.config.working_size)
        if grid == record.grid:
            return record
        return record.at(grid, nearest_index(record.grid, grid, record.query.device))

    def _has_words_and_pixels(self, record):
        """Whether the conditional prediction's words are read with its pixels, from one softmax."""
        return record.view.joint and record.name in self._compared

    def _keep_words(self, record, branches):
        self._finest = max(self._finest, record.grid, key=math.prod)
        unconditional, conditional = self.unconditional_sink, not self._has_words_and_pixels(record)
        wanted = tuple(branch for branch in branches if (conditional if branch else unconditional))
        if wanted:
            record = record if wanted == branches else record.branch(wanted[0])
            self._wait(("words", wanted), record.only("output", "gram"))

    def _keep_reference(self, record):
        tensor = record.output if self.preset.features == "output" else record.features
        features = (record.query if tensor is None else tensor).transpose(1, 2).flatten(2)
        self._affinity = pseudo_attention(features, self.config.reference_channels)
        self._reference_grid = record.grid
        early, self._early = self._early, []
        for record, key_grid in early:
            self._keep_pixels(record, key_grid)

    def _keep_pixels(self, record, key_grid):
        """`key_grid`: of the pixel keys, which are all there at any working size."""
        compared, refining = record.name in self._compared, record.name in self._refining
        needed = ("output", "gram") if self._has_words_and_pixels(record) and self.heads == "contribution" else ()
        if compared and self._affinity is None:
            self._early.append((record.only(*needed).alone(), key_grid))
            return
        if refining:
            self._refining_keys, self._joint = key_grid, record.view.joint
            self._finest = max(self._finest, key_grid, key=math.prod)
            if record.query.shape[2] * math.prod(key_grid) > STORED**2:
                self._large.append(record.only().alone())
                refining = False
        if compared or refining:
            self._wait(("pixels", key_grid, compared, refining), record.only(*needed))

    def _wait(self, asked, record):
        """Records that are too small for a call of their own wait for others of their shape, of which the same is asked."""
        view, mask = record.view, getattr(record.mask, "shape", None)
        tokens = view.grid, *((part.start, part.stop) for part in (view.text, view.image))  # slices have no hash
        alike = asked, record.query.shape, record.key.shape, tokens, record.scale, mask
        waiting = self._waiting.setdefault(alike, [])
        waiting.append(record)
        if len(waiting) * record.query.numel() >= BATCH.get(record.query.device.type, LARGE_BATCH):
            self._reduce(alike)

    def _reduce(self, alike):
        (kind, *asked), records = alike[0], self._waiting.pop(alike)
        (self._reduce_words if kind == "words" else self._reduce_pixels)(stacked(records), records, *asked)

    # ---- reductions: `stack` holds the `records` of several layers, one after another in the batch ----------------------
    def _reduce_words(self, stack, records, branches):
        """Maps of the observed tokens."""
        columns = self._columns(branches).repeat(len(records), 1)
        self._store(records, token_maps(stack, columns, self._head_weights(stack, records)), branches)

    def _columns(self, branches):
        """Tokens to read: in the unconditional prediction the sink; with both, it is repeated to as many columns."""
        columns, sink = self.layout.columns, self.layout.sink
        if branches == (0, 1):
            return torch.cat([sink.repeat(1, columns.shape[1])[:, : columns.shape[1]], columns])
        return sink if branches == (0,) else columns if self.unconditional_sink else torch.cat([columns, sink], 1)

    def _head_weights(self, stack, records):
        return None if self.heads == "uniform" else head_weights(stack.output, [record.gram for record in records])

    def _store(self, records, maps, branches):
        """Maps of the columns that `_columns` named: the observed tokens', the sink's (of which repetitions are cut off)."""
        names, images = [record.name for record in records], len(self.layout.sink)
        maps = as_maps(maps, records[0].grid).unflatten(0, (len(records), -1))
        m, s = self.layout.columns.shape[1], self.layout.sink.shape[1]
        if 0 in branches:
            self._sinks.append((names, maps[:, :images, :s]))
        elif not self.unconditional_sink:
            self._sinks.append((names, maps[:, :, m:]))
        if 1 in branches:
            self._maps.append((names, maps[:, -images:, :m]))

    def _reduce_pixels(self, stack, records, key_grid, compared, refining):
        """Agreement with the reference, in the rows that its grid reads; the sum that refines, and words, in all rows.

        All three are taken from a block of probabilities while it is there. Where agreement reads fewer rows than the
        others, its rows are computed a second time.
        """
        layers, agreed, words = len(records), [], []
        rows, reference, mass = self._pull(stack, key_grid) if compared else (None, None, None)
        with_words = self._has_words_and_pixels(stack)
        if with_words:
            columns = self._columns((1,)).repeat(layers, 1) + stack.view.text.start
            weights = self._head_weights(stack, records)
        for chosen in [rows] if rows is None or not (refining or with_words) else [rows, None]:
            for block, probs in probabilities(stack, chosen):
                pixels = probs[..., stack.view.image].mean(1).unflatten(0, (layers, -1))
                if compared and chosen is rows:
                    agreed.append(agreement(pixels, reference[:, block], mass))
                if refining and chosen is None:
                    self._add_up(block, pixels, stack.query.shape[2])
                if with_words and chosen is None:
                    words.append(pick(probs, columns, weights, block))
        if compared:
            names = [record.name for record in records]
            self._agreements.update(zip(names, torch.stack(agreed).sum(0).unbind(0), strict=True))
        if with_words:
            self._store(records, joined(words, 1), (1,))

    def _add_up(self, block, pixels, rows):
        if self._sum is None:
            self._sum = pixels.new_zeros(pixels.shape[1], rows, pixels.shape[-1])
        self._sum[:, block] += pixels[0] if len(pixels) == 1 else pixels.sum(0)

    def _pull(self, record, key_grid):
        """The reference's affinity as a layer is compared with it: rows (None for all), affinity, row mass."""
        grids = record.grid, key_grid
        if grids not in self._pulled:
            rows, affinity = pull_affinity(self._affinity, self._reference_grid, *grids)
            wanted = self.config.agreement_rows
            if wanted is not None and wanted < len(rows) and not record.view.joint:
                chosen = sample(len(rows), wanted, rows.device)
                rows, affinity = rows[chosen], affinity[:, chosen] * (len(rows) / wanted)
            mass = row_mass(self._reference_grid, key_grid, rows.device) if self.row_normalise else None
            self._pulled[grids] = None if len(rows) == record.query.shape[2] else rows, affinity, mass
        return self._pulled[grids]

    # ---- answers -----------------------------------------------------------------------------------------------------
    def weights(self) -> Float[Tensor, "b l"]:
        """Weight of each text layer, in the preset's order."""
        for alike in list(self._waiting):
            self._reduce(alike)
        self._affinity = None
        self._pulled.clear()
        if not self._compared:
            layers = len(self.preset.text)
            return self.layout.groups.new_ones(len(self.layout.labels), layers) / layers
        return layer_weights(torch.stack([self._agreements[name] for name in self.preset.self_attention], -1))

    def scores(self) -> Float[Tensor, "b k H W"]:
        """One map in [0, 1] for each region of the layout, at the finest text layer's grid."""
        return self._scores(self.weights())

    def _scores(self, weights):
        tokens, layout, config = self._merge(self._maps, weights), self.layout, self.config
        content = layout.content if config.rescale else torch.zeros_like(layout.content)
        maps = normalise(rescale(tokens, layout.groups, content), config)
        return refine(maps, self._attend, self.order, self._joint) if self._refining else maps

    def _attend(self, x: Float[Tensor, "b p k"], grid: tuple[int, int]) -> Float[Tensor, "b p k"]:
        """A_self x, up to a factor; x is resized to the grid of the keys where that is finer."""
        if self._sum is None:
            x = resize(as_maps(x, grid), self._refining_keys).flatten(2).mT
            return torch.stack([affinity_product(record, x) for record in self._large]).mean(0)
        if grid != self._refining_keys:
            self._sum = resize_adjoint(self._sum.unflatten(-1, self._refining_keys), grid).flatten(-2)
            self._refining_keys = grid
        return self._sum @ x

    def _merge(self, maps, weights):
        """A = sum_l w[l] bilinear(A[l]) at the finest grid, clamped at zero: layers of one grid are summed before."""
        by_name, merged = dict(zip(self.preset.text, weights.unbind(1), strict=True)), {}
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
