"""GoCA (arXiv 2603.06178), its stages as pure functions of tensors. Heads -> layers -> rescaling -> refinement.

Attention is recomputed in float32 whatever the model's dtype. No layer's p x p map is ever stored: every use of one is a sum
that is taken in blocks of query rows. Two p x p tensors are held an image: the pseudo self-attention of the reference layer,
with what of it a layer of another grid is compared with, and, unless pixels are too many, the sum that refines.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from goca_guidance.config import GoCAConfig
from goca_guidance.method.attention import joined, softmax
from goca_guidance.method.maps import as_maps, blur, min_max, over


AT_A_TIME = 2**25  # elements of an image's output whose heads are weighted at one time (128 MB): a video has more


# ---- heads (paper: auto aggregation, heads) --------------------------------------------------------------------------
def head_weights(output: Float[Tensor, "b h p d"], grams: Sequence[Float[Tensor, "hd hd"]]) -> Float[Tensor, "b h p"]:
    """Share of each head in what the layer writes at each pixel: <o_h, o> / <o, o> with o = sum_h o_h (GoCA, heads).

    `grams` holds W W^T of the layer's output projection W, or of several layers whose images follow one another in the
    batch; any factor cancels. The shares sum to one over heads; one may be negative or above one. Uniform
    where the layer writes nothing. No per-head output is built: <o_h, o> = sum over the channels of head h of z * (z W W^T),
    of which z W W^T has the output's dtype and the sum is float32.
    """
    heads, pixels = output.shape[1], max(1, AT_A_TIME // (output.shape[1] * output.shape[3]))
    found = []
    for part in output.split(pixels, 2):
        z = part.transpose(1, 2).flatten(2)
        zww = joined([layer @ gram.to(z.dtype) for layer, gram in zip(z.chunk(len(grams)), grams, strict=True)], 0)
        found.append((z.float() * zww.float()).unflatten(-1, (heads, -1)).sum(-1).mT)
    return shares(joined(found, -1), dim=1)


def shares(values: Tensor, dim: int) -> Tensor:
    """Values over their sum along `dim`; uniform where the sum is not positive."""
    total = values.sum(dim, keepdim=True)
    return torch.where(total > 0, values / total, 1 / values.shape[dim])


# ---- layers (paper: auto aggregation, layers) ------------------------------------------------------------------------
def pseudo_attention(features: Float[Tensor, "b p c"], channels: int | None = None) -> Float[Tensor, "b p p"]:
    """A_p = softmax(F F^T / sqrt(c)) of dense features F (GoCA, layers). `channels` keeps the first few only."""
    features = features.float()[..., :channels]
    logits = features @ features.mT
    logits *= features.shape[-1] ** -0.5
    return softmax(logits)


def agreement(
    probs: Float[Tensor, "*b r q"], reference: Float[Tensor, "... r q"], row_mass: Float[Tensor, " q"] | None = None
) -> Float[Tensor, " *b"]:
    """What some rows of a layer's self-attention add to <A_p, resize(A_self)> = <pulled A_p, A_self> (GoCA, layers).

    `reference`: the same rows of A_p, pulled to the layer's grid. `row_mass` divides each resized row by its sum, which the
    released code does not.
    """
    match = (probs * reference).sum(-1)
    return (match if row_mass is None else match / (probs @ row_mass)).sum(-1)


def layer_weights(agreements: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """Agreements clamped at zero, divided by their sum over layers; uniform where none agrees."""
    return shares(agreements.clamp(min=0), dim=-1)


# ---- rescaling (paper: per-pixel rescaling) --------------------------------------------------------------------------
def rescale(
    tokens: Float[Tensor, "b m *S"], groups: Float[Tensor, "b m k"], content: Bool[Tensor, "b m"]
) -> Float[Tensor, "b k *S"]:
    """Average the tokens of a region and divide by the pixel's sum over content tokens (GoCA, per-pixel rescaling).

    Any per-pixel normaliser cancels here, so the special tokens' share never needs computing. With fewer than two regions
    of content there is nothing to compare at a pixel and the quotient would be constant: such a map is left as it is.
    """
    regions = torch.einsum("bm...,bmk->bk...", tokens, groups)
    total = torch.einsum("bm...,bm->b...", tokens, content.to(tokens.dtype))[:, None]
    rivals = ((groups > 0) & content[..., None]).any(1).sum(-1)
    usable = (total > 0) & over(rivals > 1, tokens)
    return torch.where(usable, regions / torch.where(usable, total, 1), regions)


def normalise(maps: Float[Tensor, "b k *S"], config: GoCAConfig) -> Float[Tensor, "b k *S"]:
    """Gaussian blur, then min-max per map (GoCA, per-token renormalisation).

    The paper's maps are 64 x 64; on maps of another size the kernel, window and sigma, grows or shrinks with them. A video's
    frames are blurred each by itself; its lowest and highest value are those of all frames.
    """
    relative = (maps.shape[-2] * maps.shape[-1]) ** 0.5 / 64
    reach = math.ceil(config.blur_size // 2 * relative)
    return min_max(blur(maps, 2 * reach + 1, config.blur_sigma * relative))


# ---- refinement ------------------------------------------------------------------------------------------------------
def refine(
    maps: Float[Tensor, "b k *S"],
    attend: Callable[[Float[Tensor, "b p k"], tuple[int, ...]], Float[Tensor, "b p k"]],
    order: int,
    uneven: bool = False,
) -> Float[Tensor, "b k *S"]:
    """x <- A_self x, `order` times, then min-max: A_self is the mean over heads and layers (GoCA, self-attention refinement).

    `attend` gives A_self x, up to a factor, for x on a grid. Unless they are `uneven`, the rows of A_self have one sum: a
    constant that is taken off x comes off A x too, and min-max does not see it. Where attention is nearly uniform, as at the
    first steps, that keeps the digits that matter.
    """
    grid = tuple(maps.shape[2:])
    x = maps.flatten(2).mT
    for _ in range(order):
        x = attend(x if uneven else x - x.mean(1, keepdim=True), grid)
    return min_max(as_maps(x, grid))
