"""GoCA (arXiv 2603.06178): attention records to regions. Heads -> layers -> rescaling -> refinement.

Statistics are float32 whatever the model's dtype. No layer's p x p attention map is ever stored: every use of one is a sum
that is taken in blocks of query rows, or scaled-dot-product attention with the wanted maps as values. The one p x p tensor
is the pseudo self-attention of the reference layer, while the layers' weights are computed.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.maps import as_maps, blur, min_max, nearest, pull_affinity, resize, resize_adjoint
from goca_guidance.records import AttentionRecord, Regions, TokenLayout


BLOCK = {"cpu": 2**21}  # probabilities held at one time, over batch, heads, query rows and keys: a CPU's cache
LARGE_BLOCK = 2**26  # on any other device (256 MB)


# ---- heads (paper: auto aggregation, heads) --------------------------------------------------------------------------
def head_weights(
    output: Float[Tensor, "b h p d"], projection: Float[Tensor, "hd c"], clamp: bool = False
) -> Float[Tensor, "b h p"]:
    """Share of each head in what the layer writes at each pixel: <o_h, o> / <o, o> with o = sum_h o_h (GoCA, heads).

    `projection` is the layer's output projection without bias. The shares sum to one over heads; one may be negative or
    above one, unless `clamp`. Uniform where the layer writes nothing. No per-head output is built:
    <o_h, o> = sum over the channels of head h of z * (o W^T).
    """
    heads = output.shape[1]
    z = output.float().transpose(1, 2).flatten(2)
    weight = projection.float()
    share = (z * (z @ weight @ weight.mT)).unflatten(-1, (heads, -1)).sum(-1).mT
    return shares(share.clamp(min=0) if clamp else share, dim=1)


def shares(values: Tensor, dim: int) -> Tensor:
    """Values over their sum along `dim`; uniform where the sum is not positive."""
    total = values.sum(dim, keepdim=True)
    return torch.where(total > 0, values / torch.where(total > 0, total, 1), 1 / values.shape[dim])


def token_maps(
    record: AttentionRecord, columns: Int[Tensor, "b m"], weights: Float[Tensor, "b h p"] | None
) -> Float[Tensor, "b p m"]:
    """A[p, n] = sum_h w[h, p] softmax(q_h k_h^T)[p, n] for the observed text tokens only; uniform heads without weights.

    `columns` count from the first text key; in joint attention the softmax runs over the pixels' keys too.
    """
    b, heads, pixels, _ = record.query.shape
    merged = torch.empty(b, pixels, columns.shape[1], device=record.query.device)
    index = columns[:, None, None, :].expand(b, heads, 1, -1)
    for rows in blocks(record, pixels):
        probs = attention(record, rows)[..., record.view.text]
        wanted = probs.gather(-1, index.expand(-1, -1, probs.shape[2], -1))
        if weights is None:
            merged[:, rows] = wanted.mean(1)
        else:
            merged[:, rows] = torch.einsum("bhpm,bhp->bpm", wanted, weights[:, :, rows])
    return merged


# ---- layers (paper: auto aggregation, layers) ------------------------------------------------------------------------
def pseudo_attention(features: Float[Tensor, "b p c"], channels: int | None = None) -> Float[Tensor, "b p p"]:
    """A_p = softmax(F F^T / sqrt(c)) of dense features F (GoCA, layers). `channels` keeps the first few only."""
    features = features.float()[..., :channels]
    return (features @ features.mT * features.shape[-1] ** -0.5).softmax(-1)


def agreement(
    record: AttentionRecord,
    rows: Int[Tensor, " rows"],
    reference: Float[Tensor, "b rows q"],
    row_mass: Float[Tensor, " q"] | None = None,
) -> Float[Tensor, " b"]:
    """<A_p, resize(mean_h A_self)> = <reference, mean_h A_self[rows]>, with A_p pulled to the layer's grid (GoCA, layers).

    `row_mass` divides each resized row by its sum, which the released code does not.
    """
    total = reference.new_zeros(len(reference))
    for block in blocks(record, len(rows)):
        probs = attention(record, rows[block])[..., record.view.image].mean(1)
        match = (probs * reference[:, block]).sum(-1)
        total += (match if row_mass is None else match / (probs @ row_mass)).sum(-1)
    return total


def layer_weights(agreements: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """Agreements clamped at zero, divided by their sum over layers; uniform where none agrees."""
    return shares(agreements.clamp(min=0), dim=-1)


# ---- rescaling (paper: per-pixel rescaling) --------------------------------------------------------------------------
def rescale(
    tokens: Float[Tensor, "b m H W"], groups: Float[Tensor, "b m k"], content: Bool[Tensor, "b m"]
) -> Float[Tensor, "b k H W"]:
    """Average the tokens of a region and divide by the pixel's sum over content tokens (GoCA, per-pixel rescaling).

    Any per-pixel normaliser cancels here, so the special tokens' share never needs computing. With fewer than two regions
    of content there is nothing to compare at a pixel and the quotient would be constant: such a map is left as it is.
    """
    regions = torch.einsum("bmhw,bmk->bkhw", tokens, groups)
    total = torch.einsum("bmhw,bm->bhw", tokens, content.to(tokens.dtype))[:, None]
    rivals = ((groups > 0) & content[..., None]).any(1).sum(-1)
    usable = (total > 0) & (rivals > 1)[:, None, None, None]
    return torch.where(usable, regions / torch.where(usable, total, 1), regions)


def normalise(maps: Float[Tensor, "b k H W"], config: GoCAConfig) -> Float[Tensor, "b k H W"]:
    """Gaussian blur, then min-max per map (GoCA, per-token renormalisation).

    The paper's maps are 64 x 64; on maps of another size the kernel, window and sigma, grows or shrinks with them.
    """
    relative = (maps.shape[-2] * maps.shape[-1]) ** 0.5 / 64
    reach = math.ceil(config.blur_size // 2 * relative)
    return min_max(blur(maps, 2 * reach + 1, config.blur_sigma * relative))


# ---- refinement ------------------------------------------------------------------------------------------------------
def refine(maps: Float[Tensor, "b k H W"], records: list[AttentionRecord], order: int) -> Float[Tensor, "b k H W"]:
    """x <- A_self x, `order` times, then min-max: A_self is the mean over heads and layers (GoCA, self-attention refinement).

    Every record shares the maps' grid. mean_h softmax(q_h k_h^T) x is attention with value x, averaged over heads.
    """
    x = maps.flatten(2).mT
    for _ in range(order):
        x = torch.stack([affinity_product(record, x) for record in records]).mean(0)
    return min_max(as_maps(x, records[0].grid)) if records and order else maps


def affinity_product(record: AttentionRecord, x: Float[Tensor, "b p k"]) -> Float[Tensor, "b p k"]:
    """mean_h softmax(q_h k_h^T) x by fused attention, whose kernels want values as wide as a head: x is padded to that.

    In joint attention the text keys' values are zero: a pixel's row sums to the share of the pixels' keys.
    """
    query, key, width = record.query.float(), record.key.float(), record.query.shape[-1]
    mask = None if record.mask is None else record.mask.float()
    first, keys, _ = record.view.image.indices(key.shape[2])
    x = F.pad(x, (0, 0, first, key.shape[2] - keys))
    products = []
    for part in x.split(width, dim=-1):
        value = F.pad(part, (0, width - part.shape[-1]))[:, None].expand(-1, query.shape[1], -1, -1)
        product = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=record.scale)
        products.append(product.mean(1)[..., : part.shape[-1]])
    return torch.cat(products, -1)


# ---- attention in blocks ---------------------------------------------------------------------------------------------
def attention(record: AttentionRecord, rows: slice | Int[Tensor, " rows"]) -> Float[Tensor, "b h rows n"]:
    """Recomputed probabilities of some query rows, float32."""
    logits = record.query[:, :, rows].float() @ record.key.float().mT * record.scale
    if record.mask is not None:
        mask = record.mask.float()
        logits = logits + (mask if mask.shape[-2] == 1 else mask[:, :, rows])
    return logits.softmax(-1)


def blocks(record: AttentionRecord, rows: int) -> Iterator[slice]:
    """Slices of `rows` query rows, few enough at a time for the probabilities of all heads to stay small."""
    batch, heads, _, _ = record.query.shape
    step = max(1, BLOCK.get(record.query.device.type, LARGE_BLOCK) // (batch * heads * record.key.shape[2]))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def one_hot(scores: Float[Tensor, "b k H W"], present: Bool[Tensor, "b k"]) -> Bool[Tensor, "b k H W"]:
    """The argmax as masks: one region a pixel, the first one of equals; padding never wins."""
    winner = scores.masked_fill(~present[..., None, None], -torch.inf).argmax(1)
    return F.one_hot(winner, scores.shape[1]).movedim(-1, 1).bool()


# ---- the method on one denoiser call ---------------------------------------------------------------------------------
class GoCASegmentor:
    """One denoiser call's attention to region scores: `keep` each record of the conditional prediction, then ask.

    Kept between the two: the observed tokens' map of each cross layer, and the queries and keys of the self layers. The
    foreground comes from the map of the layout's sink token: of the conditional prediction, or, with
    `unconditional_sink`, of the unconditional one, whose records go to `keep_unconditional`. The layer weights of the
    conditional prediction serve both.
    """

    def __init__(self, config: GoCAConfig, preset: LayerPreset, layout: TokenLayout, unconditional_sink: bool = False):
        self.config, self.preset, self.layout = config, preset, layout
        self.unconditional_sink = unconditional_sink
        self.heads = config.heads or preset.heads
        self.order = preset.order if config.refine_order is None else config.refine_order
        self.row_normalise = preset.row_normalise if config.row_normalise is None else config.row_normalise
        self._kept = set(preset.fine) if self.order else set()
        if config.layers == "agreement":
            self._kept |= {*preset.own, preset.reference}
        self._records: dict[str, AttentionRecord] = {}
        self._maps: dict[str, Tensor] = {}
        self._sinks: dict[str, Tensor] = {}

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        return frozenset(self._kept | set(self.preset.cross))

    @property
    def projected(self) -> frozenset[str]:
        """Names of the layers whose output projection is needed."""
        return frozenset(self.preset.cross if self.heads == "contribution" else ())

    def keep(self, record: AttentionRecord) -> None:
        """Reduce one record of the conditional prediction to what the sums need."""
        if record.name in self._kept:
            self._records[record.name] = record.queries_and_keys()
            if record.name == self.preset.reference:
                self._grid, self._features = record.grid, self._dense_features(record)
        if record.name in self.preset.cross:
            if self.unconditional_sink:
                self._maps[record.name] = self._cross_map(record, self.layout.columns)
            else:
                maps = self._cross_map(record, torch.cat([self.layout.columns, self.layout.sink], 1))
                parts = maps.split([self.layout.columns.shape[1], self.layout.sink.shape[1]], 1)
                self._maps[record.name], self._sinks[record.name] = parts

    def keep_unconditional(self, record: AttentionRecord) -> None:
        """Reduce one record of the unconditional prediction to the map of its sink token."""
        if self.unconditional_sink and record.name in self.preset.cross:
            self._sinks[record.name] = self._cross_map(record, self.layout.sink)

    def _cross_map(self, record, columns):
        weights = None
        if self.heads == "contribution":
            weights = head_weights(record.output, record.projection, self.config.clamp_heads)
        return as_maps(token_maps(record, columns, weights), record.grid)

    def _dense_features(self, record):
        tensor = record.output if self.preset.features == "output" else record.features
        return (record.query if tensor is None else tensor).transpose(1, 2).flatten(2)

    def weights(self) -> Float[Tensor, "b l"]:
        """Weight of each cross layer, in the preset's order."""
        if self.config.layers == "uniform":
            return self.layout.groups.new_ones(len(self.layout.labels), len(self._maps)) / len(self._maps)
        affinity = pseudo_attention(self._features, self.config.reference_channels)
        pulled, ones, found = {}, affinity.new_ones(1, 1, *self._grid), []
        for record in (self._records[name] for name in self.preset.own):
            if record.grid not in pulled:
                mass = resize_adjoint(ones, record.grid).flatten() if self.row_normalise else None
                pulled[record.grid] = (*pull_affinity(affinity, self._grid, record.grid), mass)
            found.append(agreement(record, *pulled[record.grid]))
        return layer_weights(torch.stack(found, -1))

    def scores(self) -> Float[Tensor, "b k H W"]:
        """One map in [0, 1] for each region of the layout, at the finest cross-attention grid."""
        return self._scores(self.weights())

    def _scores(self, weights):
        tokens, layout, config = self._merge(self._maps, weights), self.layout, self.config
        content = layout.content if config.rescale else torch.zeros_like(layout.content)
        maps = normalise(rescale(tokens, layout.groups, content), config)
        return refine(maps, [self._records[name] for name in self.preset.fine] if self.order else [], self.order)

    def _merge(self, maps, weights):
        """A = sum_l w[l] bilinear(A[l]) at the finest grid, clamped at zero."""
        size = max((maps[name].shape[-2:] for name in self.preset.cross), key=lambda grid: grid[0] * grid[1])
        merged = sum(
            weights[:, l, None, None, None] * resize(maps[name], size) for l, name in enumerate(self.preset.cross)
        )
        return merged.clamp(min=0)

    def regions(self, size: tuple[int, int]) -> Regions:
        """The argmax over regions, and the foreground: where the sink token's map is below one half."""
        weights = self.weights()
        masks = one_hot(self._scores(weights), self.layout.present)
        sink = normalise(self._merge(self._sinks, weights), self.config)
        return Regions(nearest(masks, size), nearest(sink < 0.5, size), self.layout.labels)
