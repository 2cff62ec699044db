"""Fully connected CRF with Gaussian edge potentials (Krähenbühl and Koltun, NIPS 2011): mean-field inference on one image.

Written here because pydensecrf, the field's package, ships no wheels and does not build on current Pythons. Conventions are
that package's: scores are clipped, not normalised; both kernels are normalised symmetrically; a pixel sends a message to
itself too. The bilateral kernel is filtered by a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010), as
there; the spatial one exactly.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from goca_guidance.config import CRF


Filter = Callable[[Float[Tensor, "k N"]], Float[Tensor, "k N"]]  # sums over all pixels, weighted by a kernel

SIDE = 500  # pixels on the longer side of Pascal VOC's pictures, on which the papers' theta_alpha is given
LEAST = 1e-5  # scores are clipped to it before the logarithm
REACH = 5  # standard deviations to which the spatial kernel is summed: beyond, it is below 4e-6


def labels_by_crf(scores: Float[Tensor, "k H W"], image: UInt8[Tensor, "H W 3"], crf: CRF) -> Int[Tensor, "H W"]:
    """The most likely label of each pixel, whose unary energy is -log of a label's share of the scores. On the CPU."""
    kept = scores.cpu().float().clamp(LEAST, 1)
    return marginals(kept / kept.sum(0), image.cpu(), crf).argmax(0)


def marginals(scores: Float[Tensor, "k H W"], image: UInt8[Tensor, "H W 3"], crf: CRF) -> Float[Tensor, "k H W"]:
    """Marginals of the labels after mean-field inference; they sum to one at each pixel.

    `scores` in [0, 1] need not sum to one: the unary energy is -log of each.
    """
    size = scores.shape[1:]
    unary = -scores.flatten(1).float().clamp(LEAST, 1).log()
    kernels = [
        (crf.w1, symmetric(permutohedral(bilateral_features(image, crf)), size.numel())),
        (crf.w2, symmetric(spatial(size, crf.theta_gamma), size.numel())),
    ]
    return mean_field(unary, kernels, crf.iterations).unflatten(1, size)


def mean_field(
    unary: Float[Tensor, "k N"], kernels: Sequence[tuple[float, Filter]], iterations: int
) -> Float[Tensor, "k N"]:
    """Q after some rounds of Q <- softmax(-unary + sum_m w_m K_m Q) (algorithm 1, Potts compatibility).

    Under Potts every label pays for the mass of all others, or, which the softmax does not tell apart, earns its own.
    """
    found = (-unary).softmax(0)
    for _ in range(iterations):
        found = sum((weight * kernel(found) for weight, kernel in kernels), -unary).softmax(0)
    return found


def symmetric(kernel: Filter, count: int) -> Filter:
    """D^-1/2 K D^-1/2 with D = K 1: symmetric normalisation, as in the authors' implementation."""
    scale = kernel(torch.ones(1, count)) ** -0.5
    return lambda values: scale * kernel(scale * values)


def spatial(size: Sequence[int], theta: float) -> Filter:
    """Sums with the Gaussian of the pixels' distance, up to a factor; nothing comes from outside the image."""
    reach = round(REACH * theta)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / theta) ** 2)

    def kernel(values):
        maps = F.conv2d(values.reshape(-1, 1, *size), taps[None, None, :, None], padding=(reach, 0))
        return F.conv2d(maps, taps[None, None, None], padding=(0, reach)).flatten(1)

    return kernel


def bilateral_features(image: UInt8[Tensor, "H W 3"], crf: CRF) -> Float[Tensor, "N 5"]:
    """Column, row and colours of each pixel, in standard deviations of the bilateral kernel, float64."""
    height, width, _ = image.shape
    sides = (torch.arange(side, dtype=torch.float64) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    places = torch.stack([columns, rows], -1) / (crf.theta_alpha * max(height, width) / SIDE)
    return torch.cat([places, image.double() / crf.theta_beta], -1).flatten(0, 1)


# ---- the permutohedral lattice ---------------------------------------------------------------------------------------
def permutohedral(features: Float[Tensor, "N d"]) -> Filter:
    """Sums with exp(-|f_i - f_j|^2 / 2) over all pairs of points, approximately and in linear time (Adams et al.).

    Each value is splatted to the corners of the simplex around its point, blurred along the lattice's d + 1 directions by
    (1/2, 1, 1/2), and sliced. As in the authors' implementation a corner that no point touches is not there, and nothing is
    blurred through it. The factor gives a point on a corner the weight 1 on itself.
    """
    corners, weights = enclosing_simplex(features)
    codes, shifts = encode(corners)
    lattice, places = torch.unique(codes, return_inverse=True)
    slicing, splatting = both_ways(places, weights.float(), len(lattice))
    steps = [(neighbours(lattice, shift), neighbours(lattice, -shift)) for shift in shifts]
    factor = 1 / (1 + 2.0 ** -features.shape[1])

    def kernel(values):
        sums = splatting @ values.T
        for ahead, behind in steps:
            around = F.pad(sums, (0, 0, 0, 1))  # the last row is what is not there
            sums = sums + (around[ahead] + around[behind]) / 2
        return factor * (slicing @ sums).T

    return kernel


def both_ways(places: Int[Tensor, "N D"], weights: Float[Tensor, "N D"], count: int) -> tuple[Tensor, Tensor]:
    """Sparse matrices [N count] and its transpose, whose row i has the weights of point i at its places."""
    points, corners = places.shape
    order = places.flatten().argsort(stable=True)
    starts = torch.bincount(places.flatten(), minlength=count).cumsum(0)
    with warnings.catch_warnings():  # torch calls the format a beta
        warnings.simplefilter("ignore", UserWarning)
        rows = torch.arange(0, points * corners + 1, corners)
        slicing = torch.sparse_csr_tensor(rows, places.flatten(), weights.flatten(), (points, count))
        return slicing, torch.sparse_csr_tensor(
            F.pad(starts, (1, 0)), order // corners, weights.flatten()[order], (count, points)
        )


def enclosing_simplex(features: Float[Tensor, "N d"]) -> tuple[Int[Tensor, "N D D"], Float[Tensor, "N D"]]:
    """Corners of the lattice simplex around each point, and barycentric weights, D = d + 1 (Adams et al.).

    The lattice lies in the plane of d + 1 coordinates that sum to zero; corner k has coordinates that are k modulo d + 1. The
    points are scaled so that the whole filter's standard deviation is 1.
    """
    d = features.shape[1]
    points = elevate(features)
    nearest = (points / (d + 1)).round()
    excess = nearest.sum(1, keepdim=True).long()  # the rounded point may lie off the plane: bring it back
    nearest = nearest.long()
    order = (nearest * (d + 1) - points).argsort(dim=1, stable=True)  # from the largest remainder
    rank = order.argsort(1) + excess
    wrapped = (rank < 0).long() - (rank > d).long()
    rank, zero = rank + wrapped * (d + 1), (nearest + wrapped) * (d + 1)
    steps = torch.arange(d + 1)
    both = steps[:, None] + steps  # corner, rank
    canonical = steps[:, None] - (d + 1) * (both > d)
    corners = zero[:, None] + canonical[:, rank].transpose(0, 1)
    falling = torch.empty_like(points).scatter_(1, rank, (points - zero) / (d + 1))
    first = 1 + falling[:, -1:] - falling[:, :1]
    return corners, torch.cat([first, (falling[:, :-1] - falling[:, 1:]).flip(1)], 1)


def elevate(features: Float[Tensor, "N d"]) -> Float[Tensor, "N D"]:
    """Points into the plane of one more coordinate, orthogonally, scaled to the blur's deviation sqrt(2/3) (d + 1)."""
    d = features.shape[1]
    row, column = (torch.arange(n) for n in (d + 1, d))
    row = row[:, None]
    basis = ((row <= column).float() - (row == column + 1) * row).to(features.dtype)
    return features @ (basis / basis.norm(dim=0) * (2 / 3) ** 0.5 * (d + 1)).T


def encode(corners: Int[Tensor, "N D D"]) -> tuple[Int[Tensor, "N D"], list[int]]:
    """A number for each corner, and what a step in each of the D directions adds to it.

    The first d coordinates as the digits of one number; a step is d + 1 along one coordinate, less 1 along all.
    """
    keys, d = corners[..., :-1], corners.shape[-1] - 1
    low, high = keys.amin((0, 1)) - (d + 1), keys.amax((0, 1)) + (d + 1)
    strides = [1]
    for radix in (high - low + 1).tolist():
        strides.append(strides[-1] * radix)
    if strides[d] >= 2**63:
        raise ValueError(
            "Expected kernels of at least about one grey level and pixel, but these are too narrow to number."
        )
    digits = torch.tensor(strides[:d], dtype=torch.long)
    return ((keys - low) * digits).sum(-1), [(d + 1) * stride - sum(strides[:d]) for stride in [*strides[:d], 0]]


def neighbours(lattice: Int[Tensor, " M"], shift: int) -> Int[Tensor, " M"]:
    """Place of the corner that is a step away from each, of corners by their sorted numbers; M where there is none."""
    place = torch.searchsorted(lattice, lattice + shift).clamp(max=len(lattice) - 1)
    return torch.where(lattice[place] == lattice + shift, place, len(lattice))
