"""GoCA's core as the paper says it (arXiv 2603.06178), with everything built and stored: the reference of time and numbers.

Every layer's softmax map of all heads is kept until the step ends; per-head outputs and resized maps are built. In float32;
or in float64, to know the rounding of both forms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.method.maps import as_maps, average, blur, min_max, nearest, over, resize
from goca_guidance.method.records import AttentionRecord, Regions, TokenLayout


@dataclass
class NaiveSegmentor:
    """`GoCASegmentor` in its naive form: the same calls, for the records of every family, joint attention and masks included.

    Every field of `GoCAConfig` is supported, and means the same, except the options that trade exactness for
    speed: `agreement_rows` is not, and for `working_size` stands `working`, grids of layers to the grids that are read. Grids
    have two axes, or three, of a video.
    Of the unconditional prediction maps are built where `unconditional_sink` asks for them. Contribution heads need the output
    `projections` too, without bias.
    """

    config: GoCAConfig
    preset: LayerPreset
    layout: TokenLayout
    unconditional_sink: bool = False
    projections: Mapping[str, Float[Tensor, "hd c"]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    working: Mapping[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self):
        config, preset = self.config, self.preset
        self.order = preset.order if config.refine_order is None else config.refine_order
        self.row_normalise = preset.row_normalise if config.row_normalise is None else config.row_normalise
        self._views, self._features = {}, {}  # by layer; by prediction
        self._maps, self._shares = {}, {}  # by prediction and layer: b h p n; b h p 1, or one number

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        pixels = (*self.preset.self_attention, self.preset.reference) if self.config.layers == "agreement" else ()
        return frozenset((*self.preset.text, *pixels, *(self.preset.refine if self.order else ())))

    @property
    def projected(self) -> frozenset[str]:
        """Names of the layers whose output projection is needed."""
        return frozenset(self.preset.text if (self.config.heads or self.preset.heads) == "contribution" else ())

    def keep(self, record: AttentionRecord, branches: tuple[int, ...] = (1,)) -> None:
        """Take a record of the conditional prediction (1), of the unconditional one (0), or of both, the latter first."""
        for branch in branches:
            part = record.branch(branch) if len(branches) == 2 else record
            if part.name in self.layers and (branch == 1 or self.unconditional_sink):
                self._store(part, branch)

    def _store(self, record, branch):
        if record.name == self.preset.reference:
            query = record.query if record.features is None else record.features
            features = record.output if self.preset.features == "output" else query
            features = features.to(self.dtype).transpose(1, 2).flatten(2)
            self._features[branch] = features[..., : self.config.reference_channels]
        self._views[record.name], self._maps[branch, record.name] = record.view, probabilities(record, self.dtype)
        self._shares[branch, record.name] = 1 / record.query.shape[1]
        if record.name in self.projected:
            tensors = (x.to(self.dtype) for x in (record.output, self.projections[record.name]))
            self._shares[branch, record.name] = head_shares(*tensors)

    def weights(self, branch: int = 1) -> Float[Tensor, "b l"]:
        """Weight of each text layer, in the preset's order: <A_p, resize(mean_h A_self)>, clamped, over the sum."""
        if self.config.layers == "uniform":
            uniform = self.layout.groups.new_ones(len(self.layout.labels), len(self.preset.text))
            return uniform / len(self.preset.text)
        grid, found = self._grid(self.preset.reference), []
        features = self._read(self.preset.reference, self._features[branch], grid)
        reference = (features @ features.mT / features.shape[-1] ** 0.5).softmax(-1)
        for name in self.preset.self_attention:
            resized = resize_affinity(self._affinity(name, branch), self._grid(name), self._views[name].grid, grid)
            resized = resized / resized.sum(-1, keepdim=True) if self.row_normalise else resized
            found.append((reference * resized).sum((1, 2)).clamp(min=0))
        return torch.stack([torch.where(sum(found) > 0, one / sum(found), 1 / len(found)) for one in found], -1)

    def _affinity(self, name, branch=1):  # b r p: the mean over heads of a layer's map, pixel keys only
        return self._read(name, self._maps[branch, name][..., self._views[name].image].mean(1), self._grid(name))

    def _grid(self, name):  # of the pixels whose rows are read
        return self.working.get(self._views[name].grid, self._views[name].grid)

    def _read(self, name, rows, grid):  # b r n: of b p n, a row for each pixel of a layer
        return rows if grid == self._views[name].grid else nearest_rows(rows, self._views[name].grid, grid)

    def scores(self) -> Float[Tensor, "b k *S"]:
        """One map in [0, 1] for each region of the layout, at the finest text layer's grid."""
        tokens = columns_of(self._tokens(1), self.layout.columns)
        groups, content = self.layout.groups.to(self.dtype), self.layout.content
        maps = as_maps(tokens.flatten(2).mT @ groups, tuple(tokens.shape[2:]))
        total = (tokens * over(content, tokens)).sum(1, keepdim=True)
        rivals = ((groups > 0) & content[..., None]).any(1).sum(-1)  # a single region of content is left as it is
        divided = (total > 0) & over(rivals > 1, total) & self.config.rescale
        return self._refined(self._normalised(torch.where(divided, maps / total, maps)))

    def regions(self, size: tuple[int, ...]) -> Regions:
        """The argmax over regions, and the foreground: where the sink's share of the text, refined, is below one half."""
        layout, text = self.layout, self._tokens(0 if self.unconditional_sink else 1)
        scores = self.scores()
        winner = scores.masked_fill(~over(layout.present, scores), -torch.inf).argmax(1)
        masks = torch.stack([winner == k for k in range(layout.groups.shape[2])], 1)
        sink = columns_of(text, layout.sink)
        foreground = self._normalised(self._refined(sink)) < 0.5
        return Regions(nearest(masks, size), nearest(foreground, size), layout.labels)

    def _tokens(self, branch):
        """b n *S: A = sum_l w[l] bilinear(sum_h w[h] A[l, h]), clamped at 0, of whose tokens all sum to one at a pixel.

        At a working size it is averaged, of a video each layer; but words that share a softmax with pixels are read in the
        pixels' rows.
        """
        views = {name: self._views[name] for name in self.preset.text}
        grids = {name: self._grid(name) if view.joint else view.grid for name, view in views.items()}
        size, total, weights = max(grids.values(), key=math.prod), 0, self.weights(branch)
        working = self._grid(max(views, key=lambda name: math.prod(views[name].grid)))
        for layer, (name, grid) in enumerate(grids.items()):
            text = (self._maps[branch, name][..., views[name].text] * self._shares[branch, name]).sum(1)
            text = as_maps(self._read(name, text, grid), grid)
            text = resize(text, size)
            total = total + over(weights[:, layer], text) * (average(text, working) if views[name].video else text)
        total = average(total.clamp(min=0), working)
        return total / total.sum(1, keepdim=True)

    def _refined(self, maps):
        if not self.order:
            return maps
        affinity = sum(map(self._affinity, self.preset.refine)) / len(self.preset.refine)
        size, keys = tuple(maps.shape[2:]), self._views[self.preset.refine[0]].grid
        for _ in range(self.order):
            maps = as_maps(affinity @ resize(maps, keys).flatten(2).mT, size)
        return min_max(maps)

    def _normalised(self, maps):
        """Gaussian blur, then min-max; the kernel is given for 64 x 64 maps, and grows or shrinks with them."""
        relative = math.prod(maps.shape[-2:]) ** 0.5 / 64
        size = 2 * math.ceil(self.config.blur_size // 2 * relative) + 1
        return min_max(blur(maps, size, self.config.blur_sigma * relative))


def columns_of(text: Float[Tensor, "b n *S"], columns: Int[Tensor, "b m"]) -> Float[Tensor, "b m *S"]:
    """Some tokens of each image's text."""
    return torch.stack([maps[at] for maps, at in zip(text, columns, strict=True)])


def probabilities(record: AttentionRecord, dtype: torch.dtype) -> Float[Tensor, "b h p n"]:
    """softmax(q k^T) of all heads, pixels and keys."""
    logits = record.query.to(dtype) @ record.key.to(dtype).mT * record.scale
    return (logits if record.mask is None else logits + record.mask.to(dtype)).softmax(-1)


def head_shares(output: Tensor, projection: Float[Tensor, "hd c"]) -> Float[Tensor, "b h p 1"]:
    """<o_h, o> / <o, o> with every per-head output o_h = z_h W_h built (GoCA, heads)."""
    outputs = output @ projection.unflatten(0, (output.shape[1], -1))  # b h p c
    share = (outputs * outputs.sum(1, keepdim=True)).sum(-1, keepdim=True)
    total = share.sum(1, keepdim=True)
    return torch.where(total > 0, share / total, 1 / share.shape[1])


def resize_affinity(
    affinity: Tensor, queries: tuple[int, ...], keys: tuple[int, ...], target: tuple[int, ...]
) -> Float[Tensor, "b P Q"]:
    """A self-attention map b p q on another grid: its keys bilinear, its queries nearest (GoCA, layers)."""
    return nearest_rows(resize(affinity.unflatten(-1, keys), target).flatten(2), queries, target)


def nearest_rows(rows: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Float[Tensor, "b P n"]:
    """Rows b p n of a grid's pixels on another grid, nearest."""
    return F.interpolate(rows.mT.unflatten(-1, grid), target, mode="nearest").flatten(2).mT
