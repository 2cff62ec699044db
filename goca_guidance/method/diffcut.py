"""DiffCut (arXiv 2406.02842): unsupervised regions by recursive normalised cuts of an encoder's features.

Pure functions of tensors. The paper's features are the output of the last self-attention layer of the U-Net's encoder, at
timestep 50 and with an empty prompt. The released code's refinement of the regions (PAMR, median) is left out.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from goca_guidance.method.maps import resize


def cut(
    features: Float[Tensor, "b c H W"], size: tuple[int, int], threshold: float = 0.5, alpha: float = 10
) -> Int[Tensor, "b Y X"]:
    """Regions of each image at `size`, numbered from 0 (DiffCut, the whole; `threshold` is the paper's tau).

    The paper's size is 128 x 128. The numbers name nothing: each image counts its own regions.
    """
    if not torch.isfinite(features).all():
        raise ValueError("Expected finite features, but they hold NaN or infinity: use float32 or bfloat16.")
    grid = features.shape[-2], features.shape[-1]
    labels = [recursive_cut(image, threshold) for image in affinity(features.flatten(2).mT, alpha)]
    return upsample(features, torch.stack(labels).unflatten(-1, grid), size)


def affinity(features: Float[Tensor, "b p c"], alpha: float = 10) -> Float[Tensor, "b p p"]:
    """Cosine similarity, min-max to [0, 1] over all pairs of an image's pixels, to the power alpha (DiffCut, affinity).

    In float32. Where all similarities of an image are equal, every pair is as like as can be: ones.
    """
    unit = F.normalize(features.float(), dim=-1)
    similar = unit @ unit.mT
    low, high = similar.amin((1, 2), keepdim=True), similar.amax((1, 2), keepdim=True)
    return torch.where(high > low, (similar - low) / torch.where(high > low, high - low, 1), 1) ** alpha


def recursive_cut(affinity: Float[Tensor, "p p"], threshold: float = 0.5, candidates: int = 100) -> Int[Tensor, " p"]:
    """Regions of a weighted graph: a region is cut in two while its best normalised cut is below `threshold` (tau).

    DiffCut, recursive clustering; Shi and Malik (2000), grouping algorithm. Each region is a graph of its own: affinities to
    the pixels outside are left out. A region of one pixel is never cut; there is no other least size, as in the released
    code. Regions are numbered in the order of their first pixels. The cuts are computed in float64 on the CPU: tau decides by
    a single number.

    Args:
        affinity: symmetric, not negative.
        candidates: splitting points that are tried on each eigenvector.
    """
    weights = affinity.detach().cpu().double()
    waiting, regions = [torch.arange(len(weights), device=weights.device)], []
    while waiting:
        nodes = waiting.pop()
        side, value = bipartition(weights[nodes][:, nodes], candidates)
        if value < threshold:
            waiting += [nodes[side], nodes[~side]]
        else:
            regions.append(nodes)
    labels = torch.empty(len(weights), dtype=torch.long, device=weights.device)
    for number, nodes in enumerate(sorted(regions, key=lambda nodes: int(nodes[0]))):
        labels[nodes] = number
    return labels.to(affinity.device)


def bipartition(weights: Float[Tensor, "n n"], candidates: int) -> tuple[Bool[Tensor, " n"], float]:
    """The best split of a graph along its second eigenvector, and the split's normalised cut; infinite where there is none.

    The splitting points lie evenly between 0.99 of the eigenvector's extremes, as in the released code. Nodes that have no
    weight at all are split off first, at no cost: nothing holds them.
    """
    held = weights.sum(1) > 0
    if len(weights) < 2 or not held.any():
        return held, torch.inf
    if not held.all():
        return held, 0.0
    vector = second_eigenvector(weights)
    low, high = 0.99 * vector.min(), 0.99 * vector.max()
    steps = torch.linspace(0, 1, candidates, dtype=weights.dtype, device=weights.device)
    sides = vector > (low + (high - low) * steps)[:, None]
    values = normalised_cut(weights, sides)
    best = values.argmin()
    return sides[best], values[best].item()


def second_eigenvector(weights: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Generalised eigenvector of (D - W) y = lambda D y with the second smallest eigenvalue (Shi and Malik).

    Solved as D^-1/2 (D - W) D^-1/2 z = lambda z with y = D^-1/2 z. The known first one, z = D^1/2 1 with lambda = 0, is moved
    to lambda = 3, above all others, which are 2 at most: so it is not mistaken for the second one where that is zero too, in
    a graph of several components.
    """
    root = weights.sum(1).sqrt()
    laplacian = torch.eye(len(root), dtype=weights.dtype, device=weights.device) - weights / torch.outer(root, root)
    first = root / root.norm()
    return torch.linalg.eigh(laplacian + 3 * torch.outer(first, first)).eigenvectors[:, 0] / root


def normalised_cut(weights: Float[Tensor, "n n"], sides: Bool[Tensor, "t n"]) -> Float[Tensor, " t"]:
    """cut(A, B) / assoc(A, V) + cut(A, B) / assoc(B, V) of each bipartition (Shi and Malik, NCut).

    Infinite where a side has no weight.
    """
    inside = sides.to(weights.dtype)
    across = ((inside @ weights) * (1 - inside)).sum(-1)
    degree = weights.sum(1)
    one, other = inside @ degree, (1 - inside) @ degree
    return torch.where((one > 0) & (other > 0), across / one + across / other, torch.inf)


def upsample(
    features: Float[Tensor, "b c H W"], labels: Int[Tensor, "b H W"], size: tuple[int, int]
) -> Int[Tensor, "b Y X"]:
    """Each pixel of the bilinearly enlarged features takes the region of the nearest prototype (DiffCut, assignment).

    Nearest in cosine; a prototype is the mean of its region's unit features. The released code leaves the prototypes at their
    own lengths, so that there a loose region yields pixels to a compact one.
    """
    unit = F.normalize(features.float(), dim=1)
    return torch.stack([_nearest(*image) for image in zip(unit, resize(unit, size), labels, strict=True)])


def _nearest(
    unit: Float[Tensor, "c H W"], enlarged: Float[Tensor, "c Y X"], labels: Int[Tensor, "H W"]
) -> Int[Tensor, "Y X"]:
    names = labels.unique()
    members = (labels.flatten() == names[:, None]).to(unit.dtype)
    prototypes = F.normalize(members @ unit.flatten(1).mT, dim=1)  # the direction of the mean is the sum's
    return names[torch.einsum("kc,cyx->kyx", prototypes, enlarged).argmax(0)]
