"""Attention computed again, in blocks of query rows: some tokens' maps, products with maps. No p x p map is ever stored.

In float32 whatever the model's dtype; every use of a map is a sum that is taken block by block.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goca_guidance.method.maps import over
from goca_guidance.method.records import AttentionRecord


CPU_BLOCK = 2**20  # probabilities of an image held at one time, over heads, query rows and keys: a CPU's cache
BLOCK = 2**24  # on any other device, of all images (64 MB)


def token_maps(
    record: AttentionRecord, columns: Int[Tensor, "b m"], weights: Float[Tensor, "b h p"] | None
) -> Float[Tensor, "b p m"]:
    """A[p, n] = sum_h w[h, p] softmax(q_h k_h^T)[p, n] for the observed text tokens only; uniform heads without weights.

    `columns` count from the first text key; in joint attention the softmax runs over the pixels' keys too.
    """
    columns = columns + record.view.text.start
    return joined([pick(p, columns, weights, rows) for rows, p in probabilities(record)], 1)


def pick(
    probs: Float[Tensor, "b h r n"],
    columns: Int[Tensor, "b m"] | slice,
    weights: Float[Tensor, "b h p"] | None,
    rows: slice,
) -> Float[Tensor, "b r m"]:
    """Some columns of a block of query rows, summed over heads with the rows' weights, or averaged."""
    if isinstance(columns, slice):
        wanted = probs[..., columns]
    else:
        wanted = probs.gather(-1, columns[:, None, None, :].expand(-1, probs.shape[1], probs.shape[2], -1))
    return wanted.mean(1) if weights is None else (wanted * weights[:, :, rows, None]).sum(1)


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
def probabilities(
    record: AttentionRecord, rows: Int[Tensor, " rows"] | None = None
) -> Iterator[tuple[slice, Float[Tensor, "b h r n"]]]:
    """Recomputed float32 probabilities in blocks of query rows, few enough at a time to stay small."""
    query = record.query if rows is None else record.query[:, :, rows]
    key, mask = record.key.float().mT, None if record.mask is None else record.mask.float()
    if mask is not None and mask.shape[-2] > 1 and rows is not None:
        mask = mask[:, :, rows]
    batch, heads, count, _ = query.shape
    held = CPU_BLOCK if query.device.type == "cpu" else BLOCK // batch
    step = max(1, held // (heads * key.shape[-1]))
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        logits = query[:, :, block].float() * record.scale @ key
        if mask is not None:
            logits = logits + (mask if mask.shape[-2] == 1 else mask[:, :, block])
        yield block, logits.softmax(-1)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def one_hot(scores: Float[Tensor, "b k *S"], present: Bool[Tensor, "b k"]) -> Bool[Tensor, "b k *S"]:
    """The argmax as masks: one region a pixel, the first one of equals; padding never wins."""
    winner = scores.masked_fill(~over(present, scores), -torch.inf).argmax(1, keepdim=True)
    return winner == over(torch.arange(scores.shape[1], device=scores.device), scores[0])
