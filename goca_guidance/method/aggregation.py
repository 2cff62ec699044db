"""Auto aggregation over heads and layers (GoCA, Gap I) of one prediction, without any stored map of attention.

The specification is the naive form, `eval/cost/naive.py`: one page that builds and stores every map. What stands here gives
the same numbers without storing them.
"""

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from goca_guidance.config import GoCAConfig, LayerPreset
from goca_guidance.method import kernels
from goca_guidance.method.attention import HALF, Found, affinity_product, joined, over_heads, some_keys, weighted
from goca_guidance.method.goca import AT_A_TIME, agreement, head_weights, layer_weights, pseudo_attention
from goca_guidance.method.maps import (
    as_maps,
    average,
    coarser,
    nearest_index,
    on_keys,
    other_rows,
    over,
    places_of_rows,
    pull_affinity,
    resize,
    resize_adjoint,
    row_mass,
    sample,
)
from goca_guidance.method.records import AttentionRecord


BATCH = {"cpu": 2**18}  # elements of queries that are worth a call of their own: fewer wait for others of their shape
LARGE_BATCH = 2**22  # on any other device
STORED = 10_000  # pixels up to which the refining layers' sum is stored (400 MB an image), those of the working size


class Aggregation:
    """Maps of some text tokens, averaged over heads and layers by GoCA's weights; each record is reduced as soon as it can be.

    What happens to a record, by the preset's lists that name its layer (one record may be on several):

    - text layer: its observed tokens' maps, heads weighted (`_keep_words`).
    - self-attention layer: compared with the pseudo self-attention of the reference layer. Before that was seen, the record
      itself is held (`_early`); then it becomes one number an image (`_agreements`).
    - refining layer: added to one sum of all of them (`_sum`), or held where that is too large (`_large`).
    - reference layer: its dense features give the pseudo self-attention (`_affinity`), which lets the early ones go on.
      Kernels read it for every layer: a half-precision model's is float16 then.

    At a working size a layer has fewer rows, but all its keys: each block of them comes to the working grid as it is made.
    A video's layers are all of one grid. None waits for the reference, as its keys are hundreds of megabytes: of an early one
    the rows that are compared are held (`_held`). Words are averaged to the working grid at once.

    Work of equal kind and shape waits in `_waiting` until it fills a call; a layer of joint attention has words and pixels
    from one softmax. So between two records are held: maps of the layers reduced so far, the affinity and its forms on
    other grids, the sum, and whatever waits. `weights` and `merged` first reduce what still waits.

    Args:
        config: the choices.
        preset: which layers are on which list.
        columns: positions of the observed tokens in the text, [b m].
        refining: keep what refines maps (`attend`).
        refined: images whose attention it is, where others stand beside them.
        total: give the sum of all the text's tokens too. It is one but where a negative head weight makes a merged map
            negative, which is clamped, and in joint attention, where pixels have a share: so with weighted heads every
            token's map is merged.
    """

    def __init__(
        self,
        config: GoCAConfig,
        preset: LayerPreset,
        columns: Int[Tensor, "b m"],
        refining: bool = False,
        total: bool = False,
        refined: slice | None = None,
    ):
        self.config, self.preset, self.columns, self.total = config, preset, columns, total
        self._all = slice(0, len(columns))
        self._refined = refined or self._all
        self.heads = config.heads or preset.heads
        self.row_normalise = preset.row_normalise if config.row_normalise is None else config.row_normalise
        self.working_size = config.working_size or preset.working_size
        self.agreement_rows = config.agreement_rows or preset.agreement_rows
        self._compared = frozenset(preset.self_attention if config.layers == "agreement" else ())
        self._refining = frozenset(preset.refine if refining else ())
        self._pixel_layers = self._compared | self._refining | frozenset([preset.reference] if self._compared else [])
        self._waiting: dict[tuple, list[AttentionRecord]] = {}  # by what is asked of them, and shape
        self._early: list[tuple[AttentionRecord, tuple[int, ...]]] = []  # compared layers seen before the reference
        self._held: dict[str, Float[Tensor, "b r q"]] = {}  # the same of a video: their rows
        self._affinity: Tensor | None = None  # pseudo self-attention of the reference, at `_reference_grid`
        self._reference_grid: tuple[int, ...] = ()
        self._pulled: dict[tuple, tuple] = {}  # by grids of queries and keys: what `_pull` gives
        self._columns_of: dict[tuple, Int[Tensor, "b m"]] = {}  # by length of the batch and first text key: `_columns`
        self._agreements: dict[str, Float[Tensor, " b"]] = {}  # by compared layer
        self._maps: list[tuple[list[str], Float[Tensor, "l b m *S"]]] = []  # of tokens, with the layers' names
        self._sum: Float[Tensor, "b p q"] | None = None  # of the refining layers' self-attention
        self._large: list[AttentionRecord] = []  # refining layers too large for it
        self._refining_keys: tuple[int, ...] = ()  # grid of the keys of the sum, or of the layers too large for it
        self.joint = False  # whether the keys are words and pixels
        self.uneven = (
            False  # whether the keys of refining layers are pixels and others: rows of pixels have no one sum
        )
        self.finest: tuple[int, ...] = (
            0,
        )  # of text and refining layers; that of the maps, unless there is a working size

    @property
    def refines(self) -> bool:
        """Whether there is anything that refines."""
        return bool(self._refining)

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that must be observed."""
        return self._pixel_layers | frozenset(self.preset.text)

    # ---- what the network brings -------------------------------------------------------------------------------------
    def keep(self, record: AttentionRecord) -> None:
        """Take a record of the prediction."""
        if record.name in self.preset.text:
            self.joint = record.view.joint  # known before a large record is reduced at once
        if record.name in self._pixel_layers:
            working = self._at_working_size(record)
            if self._compared and record.name == self.preset.reference:
                self._keep_reference(working, record.grid)
            self._keep_pixels(working, record.grid)
        if record.name in self.preset.text:
            self._keep_words(record)

    def _at_working_size(self, record):
        """Fewer queries; the keys stay."""
        grid = coarser(record.grid, self.working_size)
        if grid == record.grid:
            return record
        return record.at(grid, nearest_index(record.grid, grid, record.query.device))

    def _has_words_and_pixels(self, record):
        """Whether words are read with pixels, from one softmax."""
        return record.view.joint and record.name in self._compared

    def _keep_words(self, record):
        self.finest = max(self.finest, record.grid, key=math.prod)
        self.joint = record.view.joint
        if not self._has_words_and_pixels(record):
            self._wait(("words",), record.only("output", "gram"))

    def _keep_reference(self, record, key_grid):
        tensor = record.output if self.preset.features == "output" else record.features
        features = (record.query if tensor is None else tensor).transpose(1, 2).flatten(2)
        self._affinity = pseudo_attention(features, self.config.reference_channels)
        if record.query.dtype in HALF and self._by_kernels(record, "pixels", key_grid):
            self._affinity = self._affinity.half()  # as the features were; its roundings average out in an agreement
        self._reference_grid = record.grid
        early, self._early = self._early, []
        while early:
            self._keep_pixels(*early.pop(0))  # and let it go
        for name, rows in self._held.items():
            _, reference, mass = self._pull(record, record.grid)
            self._agreements[name] = agreement(rows, reference, mass)
        self._held.clear()

    def _keep_pixels(self, record, key_grid):
        """`key_grid`: of the pixel keys, which are all there at any working size."""
        compared, refining = record.name in self._compared, record.name in self._refining
        needed = ("output", "gram") if self._has_words_and_pixels(record) and self.heads == "contribution" else ()
        if compared and self._affinity is None and not record.view.video:
            self._early.append((record.only(*needed).alone(), key_grid))
            return
        if refining:
            first, end, _ = record.view.image.indices(record.key.shape[2])
            self.uneven = end - first < record.key.shape[2]
            large = math.prod(record.grid) > STORED
            self._refining_keys = key_grid if large else record.grid
            self.finest = max(self.finest, key_grid, key=math.prod)
            if large:
                self._large.append(of_images(record, len(self.columns), self._refined).only().alone())
                refining = False
        if compared or refining:
            self._wait(("pixels", key_grid, compared, refining), record.only(*needed))

    def _wait(self, asked, record):
        """Records that are too small for a call of their own wait for others of their shape, of which the same is asked.

        Kernels take a record at once.
        """
        kind, *how = asked
        if self._by_kernels(record, *asked):
            with suppress(kernels.NotLaunchedError):
                return (self._fused_words if kind == "words" else self._fused_pixels)(record, *how)
        view, given = record.view, (getattr(record.mask, "shape", None), record.lse is None)
        tokens = view.grid, *((part.start, part.stop) for part in (view.text, view.image))  # slices have no hash
        alike = asked, record.query.shape, record.key.shape, tokens, record.scale, given
        waiting = self._waiting.setdefault(alike, [])
        waiting.append(record)
        size = max(record.query.numel(), record.key.numel() if record.view.video else 0)
        if len(waiting) * size >= BATCH.get(record.query.device.type, LARGE_BATCH):
            self._reduce(alike)

    def _reduce(self, alike):
        (kind, *asked), records = alike[0], self._waiting.pop(alike)
        (self._reduce_words if kind == "words" else self._reduce_pixels)(stacked(records), records, *asked)

    # ---- reductions by kernels: of one record ------------------------------------------------------------------------
    def _by_kernels(self, record, kind, key_grid=None, *_):
        """Whether kernels do what is asked of a record: its pixels must be on the grid of its keys."""
        return (kind == "words" or (key_grid == record.grid and not record.view.video)) and kernels.usable(record)

    def _fused_words(self, record):
        self._store([record], self._words_by_kernels(record))

    def _fused_pixels(self, record, key_grid, compared, refining):
        """What `_reduce_pixels` does. Images that refine are read in all rows at once, others in those that are compared."""
        with_words = self._has_words_and_pixels(record)
        if with_words and record.lse is None:
            record = replace(record, lse=kernels.log_sum_exp(record))
        words = self._words_by_kernels(record) if with_words else None
        refined = self._refined if refining else slice(0, 0)
        rest = [slice(0, refined.start), slice(refined.stop, self._all.stop)] if compared else []
        found = {}  # by first image; the sum is changed last, when all else was launched
        for images in (*rest, refined):
            if images.start < images.stop:
                part = of_images(record, self._all.stop, images)
                found[images.start] = self._pixels_by_kernels(part, images, compared, images is refined)
        if compared:
            self._agreements[record.name] = joined([found[first] for first in sorted(found)], 0)
        if with_words:
            self._store([record], words)

    def _pixels_by_kernels(self, part, images, compared, refining):
        """Agreements of some images, where they are compared; their self-attention is added to the sum where it refines."""
        grid, places, total = part.grid, None, self._sum if refining else None
        rows, reference, mass = self._pull(part, grid) if compared else (None, None, None)
        if refining and rows is not None:
            rows, places = None, places_of_rows(grid, self._reference_grid, self.agreement_rows, rows.device)
        lse = kernels.log_sum_exp(part, rows) if part.lse is None else part.lse
        if refining and total is None:
            total = lse.new_empty(len(lse), math.prod(grid), math.prod(grid))
        reference = None if reference is None else reference[images]
        found = kernels.pixels(part, lse, rows, places, reference, mass, total, self._sum is not None)
        if refining:
            self._sum = total
        return found

    def _words_by_kernels(self, record) -> Float[Tensor, "b p m"]:
        """What `_reduce_words` stores. The shares of heads are found on the way, where z W W^T is no larger than a layer."""
        weights, zww, shares = None, None, self.heads == "contribution"
        if shares:
            output = record.output
            if output.shape == record.query.shape and output[0].numel() <= AT_A_TIME:
                zww = output.transpose(1, 2).flatten(2) @ record.gram.to(output.dtype)
            else:
                weights = self._head_weights(record, [record])
        columns = None if self.total and shares else self.columns
        total = self.total and self.joint and not shares
        return kernels.words(record, columns, weights, zww, record.lse, total)

    # ---- reductions: `stack` holds the `records` of several layers, one after another in the batch ----------------------
    def _reduce_words(self, stack, records):
        """Maps of the observed tokens."""
        pick, words = self._picking(stack, self._head_weights(stack, records)), Found()
        for block, mean, picked in over_heads(stack, None, pick, pick is None, len(self.columns)):
            words.add(block, self._words(stack, block, mean, picked))
        self._store(records, words.whole())

    def _picking(self, stack, weights):
        """Of weighted heads the observed tokens; with a total, all. None where the words are read off the heads' mean."""
        if weights is None:
            return None
        return weighted(stack.view.text if self.total else self._columns(stack), weights)

    def _words(self, stack, block, mean, picked) -> Float[Tensor, "b r m"]:
        """In a block of rows what was picked; without weights the observed tokens, and beside them the total."""
        if picked is not None:
            return picked
        found = some_keys(mean, self._columns(stack)[block.images])
        if self.total and self.joint:
            return torch.cat([found, mean[..., stack.view.text].sum(-1, keepdim=True)], -1)
        return found

    def _columns(self, stack) -> Int[Tensor, "b m"]:
        """The observed tokens among the keys, for each image of each layer."""
        key = len(stack.query), stack.view.text.start
        if key not in self._columns_of:
            self._columns_of[key] = self.columns.repeat(key[0] // len(self.columns), 1) + key[1]
        return self._columns_of[key]

    def _head_weights(self, stack, records):
        return None if self.heads == "uniform" else head_weights(stack.output, [record.gram for record in records])

    def _store(self, records, rows: Float[Tensor, "b p m"]):
        names = [record.name for record in records]
        view = records[0].view
        maps = as_maps(rows, view.grid)
        maps = average(maps, coarser(view.grid, self.working_size)) if view.video else maps
        self._maps.append((names, maps.unflatten(0, (len(records), -1))))

    def _reduce_pixels(self, stack, records, key_grid, compared, refining):
        """Agreement with the reference, in the rows that its grid reads; the sum that refines, and words, in all rows.

        All three are taken from a block of probabilities while it is there. Where agreement reads some rows only, they go
        first, and the others after them.
        """
        layers, found, words = len(records), Found(), Found()
        rows, compare = self._comparison(stack, key_grid) if compared else (None, None)
        with_words = self._has_words_and_pixels(stack)
        weights = self._head_weights(stack, records) if with_words else None
        passes = [(rows, self._all if compared or with_words else self._refined)]
        if rows is not None and (refining or with_words):
            rest = other_rows(stack.grid, self._reference_grid or stack.grid, self.agreement_rows, rows.device)
            passes.append((rest, self._all if with_words else self._refined))
        for chosen, images in passes:
            part, count = of_images(stack, len(self.columns), images), images.stop - images.start
            of_rows = weights if weights is None or chosen is None else weights[:, :, chosen]
            for block, mean, picked in over_heads(part, chosen, self._picking(stack, of_rows), True, count):
                pixels = mean[..., stack.view.image].unflatten(0, (-1, min(count, len(mean))))
                first = images.start + block.images.start % count
                place = slice(first, first + pixels.shape[1]), block.rows
                if compared and chosen is rows:
                    found.add(block, compare(place, pixels).flatten(0, 1))
                if refining:
                    self._add_up(place, chosen, pixels, stack.grid, key_grid)
                if with_words:
                    words.add(block, self._words(stack, block, mean, picked))
        names = [record.name for record in records]
        if compared:
            held, of_layers = (self._held, found.whole) if self._affinity is None else (self._agreements, found.total)
            held.update(zip(names, of_layers().unflatten(0, (layers, -1)), strict=True))
        if with_words:
            maps = words.whole()
            self._store(
                records, maps if rows is None else maps[:, torch.cat([chosen for chosen, _ in passes]).argsort()]
            )

    def _add_up(self, place, chosen, pixels, grid, key_grid):
        """Pixels [l b r q] of some images and rows, which count among those `chosen` where not all are."""
        (images, rows), first = place, self._refined.start
        start, stop = max(images.start, first), min(images.stop, self._refined.stop)
        if start >= stop:
            return
        pixels = pixels[:, start - images.start : stop - images.start]
        total = on_keys(resize_adjoint, pixels[0] if len(pixels) == 1 else pixels.sum(0), key_grid, grid)
        if self._sum is None:
            self._sum = total.new_zeros(self._refined.stop - first, math.prod(grid), total.shape[-1])
        part = self._sum[start - first : stop - first]
        if chosen is None:
            part[:, rows] += total
        else:
            part.index_add_(1, chosen[rows], total)

    def _comparison(self, record, key_grid):
        """Which rows are compared (None for all), and how a block of them is: what it adds to the layers' agreements.

        Before the reference was seen, the block itself, its keys on the grid of the reference.
        """
        if self._affinity is None:
            rows = self._some(record, math.prod(record.grid))
            return rows, lambda place, pixels: on_keys(resize, pixels, key_grid, record.grid)
        keys = key_grid if record.grid == key_grid else self._reference_grid
        rows, reference, mass = self._pull(record, keys)
        return rows, lambda place, pixels: agreement(on_keys(resize, pixels, key_grid, keys), reference[place], mass)

    def _pull(self, record, key_grid):
        """The reference's affinity as a layer is compared with it: rows (None for all), affinity, row mass."""
        grids = record.grid, key_grid
        if grids not in self._pulled:
            rows, affinity = pull_affinity(self._affinity, self._reference_grid, *grids)
            chosen = self._some(record, len(rows))
            if chosen is not None:
                rows, affinity = rows[chosen], affinity[:, chosen] * (len(rows) / len(chosen))
            mass = row_mass(self._reference_grid, key_grid, rows.device) if self.row_normalise else None
            every = len(rows) == record.query.shape[2]
            self._pulled[grids] = None if every else rows, affinity.contiguous(), mass
        return self._pulled[grids]

    def _some(self, record, count):
        """Which of the rows are compared, where not all are."""
        wanted = self.agreement_rows
        if wanted is None or wanted >= count:
            return None
        return sample(count, wanted, record.query.device)

    # ---- answers -----------------------------------------------------------------------------------------------------
    def weights(self) -> Float[Tensor, "b l"]:
        """Weight of each text layer, in the preset's order."""
        for alike in list(self._waiting):
            self._reduce(alike)
        self._affinity = None
        self._pulled.clear()
        if not self._compared:
            layers, (_, maps) = len(self.preset.text), self._maps[0]
            return maps.new_ones(maps.shape[1], layers) / layers
        return layer_weights(torch.stack([self._agreements[name] for name in self.preset.self_attention], -1))

    def merged(self, finest: tuple[int, ...]) -> tuple[Float[Tensor, "b m *S"], Tensor]:
        """A = sum_l w[l] bilinear(A[l]) of the observed tokens at the `finest` grid, clamped at zero, and the text's total.

        Layers of one grid are summed before they are resized. At a working size the maps are averaged, an image's at last.
        """
        by_name = dict(zip(self.preset.text, self.weights().unbind(1), strict=True))
        alike: dict[Any, list] = {}  # by grid
        for names, layers in self._maps:
            alike.setdefault(tuple(layers.shape[3:]), []).append((names, layers))
        working = coarser(finest, self.working_size)
        size, resized = max(*alike, working, key=math.prod), []
        for parts in alike.values():
            layers = joined([layers for _, layers in parts], 0)
            of_layers = torch.stack([by_name[name] for names, _ in parts for name in names], 1)[:, None]
            total = of_layers @ layers.flatten(2).transpose(0, 1)  # b 1 l by b l m*S
            resized.append(resize(total.view(layers.shape[1:]), size))
        whole = average(sum(resized[1:], resized[0]).clamp(min=0), working)
        if self.total and self.heads == "contribution":
            return whole.take_along_dim(over(self.columns, whole), 1), whole.sum(1, keepdim=True)
        return (whole[:, :-1], whole[:, -1:]) if self.total and self.joint else (whole, whole.new_ones(()))

    def attend(self, x: Float[Tensor, "b p k"], grid: tuple[int, ...]) -> Float[Tensor, "b p k"]:
        """A_self x of the refining layers, up to a factor; x is resized to the grid of the keys where that is finer."""
        if self._sum is None:
            x = resize(as_maps(x, grid), self._refining_keys).flatten(2).mT
            return torch.stack([affinity_product(record, x) for record in self._large]).mean(0)
        if grid != self._refining_keys:
            self._sum = on_keys(resize_adjoint, self._sum, self._refining_keys, grid)
            self._refining_keys = grid
        return self._sum @ x


def stacked(records: list[AttentionRecord]) -> AttentionRecord:
    """Records of equal shape as one, whose batch holds their images one layer after another."""
    if len(records) == 1:
        return records[0]
    first, tensors = records[0], {}
    for name in ("query", "key", "output", "mask", "lse"):
        parts = [getattr(record, name) for record in records]
        if parts[0] is not None:
            tensors[name] = torch.cat([part.expand(len(first.query), *part.shape[1:]) for part in parts])
    changes: dict[str, Any] = tensors
    return replace(first, **changes)


def of_images(stack: AttentionRecord, layer: int, images: slice) -> AttentionRecord:
    """Some images of each layer, of which `layer` images follow one another."""
    if images == slice(0, layer):
        return stack

    def some(x):
        return None if x is None else x.unflatten(0, (-1, layer))[:, images].flatten(0, 1)

    mask = stack.mask if stack.mask is None or stack.mask.shape[0] == 1 else some(stack.mask)
    changes: dict[str, Any] = {name: some(getattr(stack, name)) for name in ("query", "key", "output", "lse")}
    return replace(stack, value=None, mask=mask, **changes)
