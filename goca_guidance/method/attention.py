"""Attention computed again, in blocks of query rows: some tokens' maps, products with maps. No p x p map is ever stored.

In float32 whatever the model's dtype; every use of a map is a sum that is taken block by block.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goca_guidance.method.maps import over
from goca_guidance.method.records import AttentionRecord


CPU_BLOCK = 2**21  # probabilities held at one time, a CPU's caches: of one head, where those of all heads are more
BLOCK = 2**24  # on any other device, of all heads (64 MB)
IN_PLACE = ("cpu", "cuda")  # devices whose products and softmax may write into a tensor that is there
HALF = (torch.float16, torch.bfloat16)
HALF_PRODUCTS = ("cuda",) if torch.version.cuda else ()  # devices that multiply them to float32, on matrix units


class Block(NamedTuple):
    """Which images, heads and query rows some probabilities are of."""

    images: slice
    heads: slice
    rows: slice


Pick = Callable[[Float[Tensor, "b h r n"], Block], Float[Tensor, "b r m"]]


def token_maps(
    record: AttentionRecord, columns: Int[Tensor, "b m"], weights: Float[Tensor, "b h p"] | None
) -> Float[Tensor, "b p m"]:
    """A[p, n] = sum_h w[h, p] softmax(q_h k_h^T)[p, n] for the observed text tokens only; uniform heads without weights.

    `columns` count from the first text key; in joint attention the softmax runs over the pixels' keys too.
    """
    columns, found = columns + record.view.text.start, Found()
    pick = None if weights is None else weighted(columns, weights)
    for block, mean, picked in over_heads(record, pick=pick, mean=pick is None):
        found.add(block, some_keys(mean, columns[block.images]) if picked is None else picked)
    return found.whole()


def some_keys(rows: Float[Tensor, "b *r n"], columns: Int[Tensor, "b m"] | slice) -> Float[Tensor, "b *r m"]:
    """Of rows of attention some keys only: for each image those in its `columns`, or a slice."""
    if isinstance(columns, slice):
        return rows[..., columns]
    columns = columns.view(len(columns), *[1] * (rows.ndim - 2), -1)
    return rows.gather(-1, columns.expand(*rows.shape[:-1], -1))


def weighted(columns: Int[Tensor, "b m"] | slice, weights: Float[Tensor, "b h p"]) -> Pick:
    """For `over_heads`: some keys, summed over heads with the rows' weights."""

    def pick(probs, block):
        wanted = some_keys(probs, columns if isinstance(columns, slice) else columns[block.images])
        return (wanted * weights[block][..., None]).sum(1)

    return pick


def affinity_product(record: AttentionRecord, x: Float[Tensor, "b q k"]) -> Float[Tensor, "b p k"]:
    """mean_h softmax(q_h k_h^T) x by fused attention, whose kernels want values as wide as a head: x is padded to that.

    In joint attention the text keys' values are zero: a pixel's row sums to the share of the pixels' keys.
    """
    record = record.float()
    query, width = record.query, record.query.shape[-1]
    first, keys, _ = record.view.image.indices(record.key.shape[2])
    x = F.pad(x, (0, 0, first, record.key.shape[2] - keys))
    products = []
    for part in x.split(width, dim=-1):
        value = F.pad(part, (0, width - part.shape[-1]))[:, None].expand(-1, query.shape[1], -1, -1)
        product = F.scaled_dot_product_attention(query, record.key, value, attn_mask=record.mask, scale=record.scale)
        products.append(product.mean(1)[..., : part.shape[-1]])
    return joined(products, -1)


# ---- attention in blocks ---------------------------------------------------------------------------------------------
def over_heads(
    record: AttentionRecord,
    rows: Int[Tensor, " rows"] | None = None,
    pick: Pick | None = None,
    mean: bool = True,
    layer: int | None = None,
) -> Iterator[tuple[Block, Any, Any]]:
    """Blocks of probabilities reduced over heads: the mean b r n, and what is picked b r m; None where it is not asked for."""
    heads, average, picked = record.query.shape[1], None, None
    for block, probs in probabilities(record, rows, layer):
        if mean and probs.shape[1] == heads:
            average = probs.mean(1)
        elif mean:
            average = probs[:, 0] / heads if average is None else average.add_(probs[:, 0], alpha=1 / heads)
        if pick is not None:
            part = pick(probs, block)
            picked = part if picked is None else picked + part
        if block.heads.stop == heads:
            yield block, average, picked
            average = picked = None


def probabilities(
    record: AttentionRecord, rows: Int[Tensor, " rows"] | None = None, layer: int | None = None
) -> Iterator[tuple[Block, Float[Tensor, "b h r n"]]]:
    """Recomputed float32 probabilities in blocks, few enough at a time to stay small; each is read before the next is asked.

    `rows`: of the queries these only, in this order. `layer`: images of a layer, where several layers follow one another in
    the batch; no block is of parts of two. All heads of a block follow one another.
    """
    query = record.query if rows is None else record.query[:, :, rows]
    mask = None if record.mask is None else record.mask.float()
    if mask is not None and mask.shape[-2] > 1 and rows is not None:
        mask = mask[:, :, rows]
    key, after = record.key, None  # the scale, where it is applied after the product
    options: dict[str, Any] = {}
    if _in_half(query, key, record.scale):
        options["out_dtype"] = torch.float32
        query, after = (query * record.scale, None) if _is_exact(record.scale) else (query, record.scale)
    else:
        query, key = query.float() * record.scale, key.float()
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    reused, buffer = query.device.type in IN_PLACE and not learns, None
    for block in _blocks(query.device.type, query.shape[:3], key.shape[2], layer or len(query)):
        part = query[block]
        size = part.shape[0] * part.shape[1], part.shape[2], key.shape[2]
        if reused and (buffer is None or buffer.shape != size):
            buffer = query.new_empty(size, dtype=torch.float32)
        logits = torch.bmm(part.flatten(0, 1), key[block[:2]].flatten(0, 1).mT, out=buffer, **options)
        if after is not None:
            logits *= after
        logits = logits.unflatten(0, part.shape[:2])
        if mask is not None:
            logits += mask[tuple(x if n > 1 else slice(None) for x, n in zip(block, mask.shape[:3], strict=True))]
        yield block, softmax(logits)


def _in_half(query: Tensor, key: Tensor, scale: float) -> bool:
    """Whether the product is of half-precision numbers, which loses nothing: their products are exact in float32.

    A scale that is no power of two is applied to the logits then: by an H100's assumed rates (45 TFLOP/s, 2.7 TB/s) writing
    them once more takes as long as a float32 product of heads 67 wide, so narrow ones stay in float32.
    """
    known = query.device.type in HALF_PRODUCTS and query.dtype == key.dtype and query.dtype in HALF
    return known and (_is_exact(scale) or query.shape[-1] > 96)


def _is_exact(scale: float) -> bool:
    """Whether a product with it has the same digits."""
    return math.frexp(scale)[0] == 0.5


def _blocks(device: str, size: torch.Size, keys: int, layer: int) -> Iterator[Block]:
    """As many whole images as are held at one time, or rows of one: on a CPU those of one head after another."""
    batch, heads, count = size
    held = CPU_BLOCK if device == "cpu" else BLOCK
    images = held // (heads * count * keys)
    group = heads if images or device != "cpu" else 1
    step = count if images else max(1, held // (group * keys))
    for part in _slices(batch, layer, max(1, images)):
        for start in range(0, count, step):
            for head in range(0, heads, group):
                yield Block(part, slice(head, head + group), slice(start, min(start + step, count)))


def _slices(batch: int, layer: int, most: int) -> Iterator[slice]:
    """Of a batch of layers: so many images at the most, of whole layers or of one."""
    whole = layer if most < layer else batch
    step = most if most < layer else most - most % layer
    for first in range(0, batch, whole):
        for start in range(first, first + whole, step):
            yield slice(start, min(start + step, first + whole))


class Found:
    """What the blocks of a record gave, put together again."""

    def __init__(self):
        self._parts: dict[int, list[Tensor]] = {}  # by first image, in the order of rows

    def add(self, block: Block, part: Tensor) -> None:
        self._parts.setdefault(block.images.start, []).append(part)

    def whole(self) -> Float[Tensor, "b p ..."]:
        """One row after another."""
        return joined([joined(parts, 1) for parts in self._parts.values()], 0)

    def total(self) -> Float[Tensor, "b ..."]:
        """Summed over blocks of rows."""
        return joined([sum(parts[1:], parts[0]) for parts in self._parts.values()], 0)


def softmax(logits: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """Over the last axis, in the place of the logits, which nobody else may need."""
    place = (
        logits if logits.device.type in IN_PLACE and not (logits.requires_grad and torch.is_grad_enabled()) else None
    )
    return torch.softmax(logits, -1, out=place)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def one_hot(scores: Float[Tensor, "b k *S"], present: Bool[Tensor, "b k"]) -> Bool[Tensor, "b k *S"]:
    """The argmax as masks: one region a pixel, the first one of equals; padding never wins."""
    winner = scores.masked_fill(~over(present, scores), -torch.inf).argmax(1, keepdim=True)
    return winner == over(torch.arange(scores.shape[1], device=scores.device), scores[0])
