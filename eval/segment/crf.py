"""Fully connected CRF with Gaussian edge potentials (Krähenbühl and Koltun, NIPS 2011): mean-field inference on one image.

Written here because pydensecrf, the field's package, ships no wheels and does not build on current Pythons. Conventions are
that package's: scores are clipped, not normalised; both kernels are normalised symmetrically; a pixel sends a message to
itself too. The bilateral kernel is filtered by a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010), as
there; the spatial one exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse


Filter = Callable[[np.ndarray], np.ndarray]  # [N k] -> [N k]: sums over all pixels, weighted by a kernel

SIDE = 500  # pixels on the longer side of Pascal VOC's pictures, on which the papers' theta_alpha is given
LEAST = 1e-5  # scores are clipped to it before the logarithm
REACH = 5  # standard deviations to which the spatial kernel is summed: beyond, it is below 4e-6


@dataclass(frozen=True)
class CRF:
    """Constants of the energy, by the paper's symbols (its equation 3); the defaults are those that FTTM and GoCA use.

    Args:
        w1, theta_alpha, theta_beta: weight of the bilateral kernel; its standard deviation in pixels of a picture of 500 on
            the longer side, as Pascal VOC's are (of others in proportion), and in grey levels (0 to 255) of each colour.
        w2, theta_gamma: weight of the spatial kernel; its standard deviation in pixels.
        iterations: of mean-field.
    """

    w1: float = 4.0
    theta_alpha: float = 67.0
    theta_beta: float = 3.0
    w2: float = 3.0
    theta_gamma: float = 1.0
    iterations: int = 10

    def __post_init__(self):
        if min(self.theta_alpha, self.theta_beta, self.theta_gamma) <= 0 or min(self.w1, self.w2, self.iterations) < 0:
            raise ValueError(
                f"Expected positive deviations, and weights and iterations of at least 0, but got {self}."
            )


def refine(probabilities: np.ndarray, image: np.ndarray, parameters: CRF | None = None) -> np.ndarray:
    """Marginals [k H W] float32 of the labels after mean-field inference; they sum to one at each pixel.

    Args:
        probabilities: [k H W], scores in [0, 1], which need not sum to one: the unary energy is -log of each.
        image: [H W 3] uint8, of the same size.
        parameters: None takes the defaults.
    """
    crf, (labels, height, width) = parameters or CRF(), probabilities.shape
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"Expected an image of ({height}, {width}, 3) uint8, the scores' size, but got {image.shape} {image.dtype}."
        )
    if not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError("Expected scores in [0, 1], but some are outside or NaN: bring each map to [0, 1] first.")
    unary = -np.log(np.clip(probabilities.reshape(labels, -1).T.astype(np.float32), LEAST, 1))
    kernels = [
        (crf.w1, symmetric(permutohedral(bilateral_features(image, crf)), height * width)),
        (crf.w2, symmetric(spatial((height, width), crf.theta_gamma), height * width)),
    ]
    return mean_field(unary, kernels, crf.iterations).T.reshape(probabilities.shape)


def mean_field(unary: np.ndarray, kernels: Sequence[tuple[float, Filter]], iterations: int) -> np.ndarray:
    """Q [N k] after some rounds of Q <- softmax(-unary + sum_m w_m K_m Q) (algorithm 1, Potts compatibility).

    Under Potts every label pays for the mass of all others, or, which the softmax does not tell apart, earns its own.
    """
    marginals = softmax(-unary)
    for _ in range(iterations):
        marginals = softmax(sum((weight * kernel(marginals) for weight, kernel in kernels), -unary))
    return marginals


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis. scipy's makes more copies."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def symmetric(kernel: Filter, count: int) -> Filter:
    """D^-1/2 K D^-1/2 with D = K 1: symmetric normalisation, as in the authors' implementation."""
    scale = kernel(np.ones((count, 1), np.float32)) ** -0.5
    return lambda values: scale * kernel(scale * values)


def spatial(size: tuple[int, int], theta: float) -> Filter:
    """Sums with the Gaussian of the pixels' distance, up to a factor; nothing comes from outside the image."""

    def kernel(values):
        maps = values.reshape(*size, -1)
        sums = ndimage.gaussian_filter(maps, theta, mode="constant", truncate=REACH, axes=(0, 1))
        return sums.reshape(values.shape)

    return kernel


def bilateral_features(image: np.ndarray, crf: CRF) -> np.ndarray:
    """[N 5]: column, row and colours of each pixel, in standard deviations of the bilateral kernel."""
    rows, columns = np.indices(image.shape[:2]) / (crf.theta_alpha * max(image.shape[:2]) / SIDE)
    return np.concatenate([columns[..., None], rows[..., None], image / crf.theta_beta], -1).reshape(-1, 5)


# ---- the permutohedral lattice ---------------------------------------------------------------------------------------
def permutohedral(features: np.ndarray) -> Filter:
    """Sums with exp(-|f_i - f_j|^2 / 2) over all pairs of points, approximately and in linear time (Adams et al.).

    Each value is splatted to the corners of the simplex around its point, blurred along the lattice's d + 1 directions by
    (1/2, 1, 1/2), and sliced: sparse matrices that are built once. As in the authors' implementation a corner that no point
    touches is not there, and nothing is blurred through it. The factor gives a point on a corner the weight 1 on itself.
    """
    count, dimensions = features.shape
    corners, weights = enclosing_simplex(features)
    codes, shifts = encode(corners)
    lattice, column = np.unique(codes, return_inverse=True)
    row = np.repeat(np.arange(count), dimensions + 1)
    entries = weights.ravel().astype(np.float32), (row, column.ravel())
    slicing = sparse.csr_array(entries, shape=(count, len(lattice)))
    splatting = slicing.T.tocsr()
    blurs = [blur(lattice, shift) for shift in shifts]
    factor = np.float32(1 / (1 + 2.0**-dimensions))

    def kernel(values):
        values = splatting @ values
        for step in blurs:
            values = step @ values
        return factor * (slicing @ values)

    return kernel


def enclosing_simplex(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners [N d+1 d+1] of the lattice simplex around each point, and barycentric weights [N d+1] (Adams et al.).

    The lattice lies in the plane of d + 1 coordinates that sum to zero; corner k has coordinates that are k modulo d + 1. The
    points are scaled so that the whole filter's standard deviation is 1.
    """
    d = features.shape[1]
    points = elevate(features)
    nearest = np.round(points / (d + 1)).astype(np.int64)
    excess = nearest.sum(1, keepdims=True)  # the rounded point may lie off the plane: bring it back
    order = np.argsort(nearest * (d + 1) - points, axis=1, kind="stable")  # from the largest remainder
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(d + 1)[None], axis=1)
    rank = rank + excess
    wrapped = (rank < 0).astype(np.int64) - (rank > d)
    rank, zero = rank + wrapped * (d + 1), (nearest + wrapped) * (d + 1)
    steps = np.arange(d + 1)
    canonical = np.where(steps[:, None] + steps <= d, steps[:, None], steps[:, None] - (d + 1))  # corner, rank
    corners = zero[:, None] + canonical[:, rank].swapaxes(0, 1)
    remainder = np.empty_like(points)
    np.put_along_axis(remainder, rank, (points - zero) / (d + 1), axis=1)  # falling
    weights = np.concatenate(
        [1 + remainder[:, -1:] - remainder[:, :1], (remainder[:, :-1] - remainder[:, 1:])[:, ::-1]], 1
    )
    return corners, weights


def elevate(features: np.ndarray) -> np.ndarray:
    """Points [N d] into the plane [N d+1], orthogonally, scaled to the blur's deviation sqrt(2/3) (d + 1)."""
    d = features.shape[1]
    row, column = np.indices((d + 1, d))
    basis = np.where(row <= column, 1.0, np.where(row == column + 1, -row, 0.0))
    return features @ (basis / np.linalg.norm(basis, axis=0) * np.sqrt(2 / 3) * (d + 1)).T


def encode(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each corner [N d+1], and what a step in each of the d + 1 directions adds to it.

    The first d coordinates as the digits of one number; a step is d + 1 along one coordinate, less 1 along all.
    """
    d = corners.shape[-1] - 1
    keys = corners[..., :d]
    low, high = keys.min((0, 1)) - (d + 1), keys.max((0, 1)) + (d + 1)
    radix = [int(n) for n in high - low + 1]
    strides = [int(np.prod(radix[:i], dtype=object)) for i in range(d + 1)]
    if strides[d] >= 2**63:
        raise ValueError(
            "Expected kernels of at least about one grey level and pixel, but these are too narrow to number."
        )
    digits = np.array(strides[:d])
    return (keys - low) @ digits, (d + 1) * np.append(digits, 0) - digits.sum()


def blur(lattice: np.ndarray, shift: int) -> sparse.csr_array:
    """Each corner, and half of its two neighbours along one direction; `lattice` holds the corners' numbers, sorted."""
    count = len(lattice)
    place = np.searchsorted(lattice, lattice + shift).clip(max=count - 1)
    here = np.flatnonzero(lattice[place] == lattice + shift)
    entries = np.full(len(here), 0.5, np.float32), (here, place[here])
    ahead = sparse.csr_array(entries, shape=(count, count))
    return (sparse.eye_array(count, dtype=np.float32) + ahead + ahead.T).tocsr()
