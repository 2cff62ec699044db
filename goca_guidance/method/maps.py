"""Operations on maps: one blur, one min-max, one resize convention, and the adjoints of the resizes.

A grid `*S` is H W, an image, or F H W, a video; its tokens are row-major. What smooths does so in space, frame by frame.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def _constant(function):
    """Tensors that depend on sizes alone are made once: a guided step must not wait for them.

    They serve inside and outside of inference mode.
    """
    return lru_cache(maxsize=64)(torch.inference_mode(False)(torch.no_grad()(function)))


def axes(maps: Tensor) -> tuple[int, ...]:
    """The axes of a map's pixels, all but image and region."""
    return tuple(range(2, maps.ndim))


def over(values: Tensor, maps: Tensor) -> Tensor:
    """Values for the first axes of some maps, with axes of one for the others: they multiply as they are."""
    return values.reshape(*values.shape, *[1] * (maps.ndim - values.ndim))


def min_max(maps: Float[Tensor, "b k *S"]) -> Float[Tensor, "b k *S"]:
    """Each map to [0, 1] over its pixels (GoCA, per-token min-max). A constant map becomes zeros, never NaN."""
    low, high = maps.amin(axes(maps), keepdim=True), maps.amax(axes(maps), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


def blur(maps: Float[Tensor, "b k *S"], size: int, sigma: float) -> Float[Tensor, "b k *S"]:
    """Gaussian blur in space with reflected borders; `size` odd, `sigma` in pixels, the true standard deviation.

    The window shrinks to the largest odd one that reflection allows when a map is smaller than the kernel.
    """
    rows, columns = (_gaussian(min(size, 2 * n - 1), sigma, maps.dtype, maps.device) for n in maps.shape[-2:])
    frames = maps.flatten(1, -3)
    padded = F.pad(frames, (len(columns) // 2,) * 2 + (len(rows) // 2,) * 2, mode="reflect")
    blurred = padded.unfold(-1, len(columns), 1).matmul(columns).unfold(-2, len(rows), 1).matmul(rows)
    return blurred.reshape(maps.shape)


@_constant
def _gaussian(size: int, sigma: float, dtype, device) -> Float[Tensor, " taps"]:
    offsets = torch.arange(size, dtype=dtype, device=device) - size // 2
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return taps / taps.sum()


def resize(maps: Float[Tensor, "b k *S"], size: tuple[int, ...]) -> Float[Tensor, "b k *T"]:
    """Bilinear in space and linear over frames, pixel centres (align_corners=False), no antialiasing."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode=mode, align_corners=False)


def average(maps: Float[Tensor, "b k *S"], size: tuple[int, ...]) -> Float[Tensor, "b k *T"]:
    """Each pixel the mean of those that it covers, at the least in part."""
    pool: Callable = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d
    return maps if maps.shape[2:] == size else pool(maps, size)


def nearest(masks: Bool[Tensor, "b k *S"], size: tuple[int, ...]) -> Bool[Tensor, "b k *T"]:
    """Nearest resizing of masks: a partition stays a partition."""
    grid = tuple(masks.shape[2:])
    return masks if grid == size else masks.flatten(2)[..., nearest_index(grid, size, masks.device)].unflatten(2, size)


def as_maps(tokens: Float[Tensor, "b p k"], grid: tuple[int, ...]) -> Float[Tensor, "b k *S"]:
    """Pixel tokens in row-major order to maps."""
    return tokens.mT.unflatten(-1, grid)


def resize_adjoint(maps: Float[Tensor, "b k *T"], size: tuple[int, ...]) -> Float[Tensor, "b k *S"]:
    """Transpose of `resize` from `size` to the size of `maps`: <resize(a), m> = <a, resize_adjoint(m)>."""
    if maps.shape[2:] == size:
        return maps
    sides = zip(size, maps.shape[2:], strict=True)
    *frames, rows, columns = (_linear_matrix(a, b, maps.dtype, maps.device) for a, b in sides)
    maps = rows.mT @ maps @ columns
    return torch.einsum("gf,bkghw->bkfhw", frames[0], maps) if frames else maps


def on_keys(
    change: Callable, rows: Float[Tensor, "*b r q"], grid: tuple[int, ...], target: tuple[int, ...]
) -> Float[Tensor, "*b r Q"]:
    """Rows of attention whose keys are brought from `grid` to `target`, by `resize` or by `resize_adjoint`."""
    if grid == target:
        return rows
    return change(rows.flatten(0, -3).unflatten(-1, grid), target).flatten(2).unflatten(0, rows.shape[:-2])


@_constant
def row_mass(reference: tuple[int, ...], grid: tuple[int, ...], device) -> Float[Tensor, " q"]:
    """What each key of `grid` adds to a row's sum when the row is resized to the `reference` grid."""
    return resize_adjoint(torch.ones(1, 1, *reference, dtype=torch.float32, device=device), grid).flatten()


@_constant
def _linear_matrix(source: int, target: int, dtype, device) -> Float[Tensor, "target source"]:
    """Rows are target pixels: `matrix @ x` is the one-dimensional `resize` of x."""
    eye = torch.eye(source, dtype=dtype, device=device)[None]
    return F.interpolate(eye, target, mode="linear", align_corners=False)[0].mT


@_constant
def nearest_index(source: tuple[int, ...], target: tuple[int, ...], device) -> Int[Tensor, " p"]:
    """For each target pixel (row-major) the source pixel that nearest resizing reads."""
    return _row_major([torch.arange(b, device=device) * a // b for a, b in zip(source, target, strict=True)], source)


def _row_major(places: list[Int[Tensor, " _"]], grid: tuple[int, ...]) -> Int[Tensor, " p"]:
    """Tokens of a grid, for all combinations of some places along each axis."""
    tokens = places[0]
    for along, side in zip(places[1:], grid[1:], strict=True):
        tokens = (tokens[:, None] * side + along).flatten()
    return tokens


def pull_affinity(
    affinity: Float[Tensor, "b P Q"], reference: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "b rows q"]]:
    """Adjoint of GoCA's affinity resize (keys bilinear, queries nearest) from a layer's grids to the `reference` grid.

    Returns the query rows that the resize reads at all, and the pulled affinity in those rows, so that
    <affinity, resize(a)> = <pulled, a[rows]> for any affinity `a` of the layer. A fine layer needs few of its rows: of 4 x 4
    queries and a reference of 2 x 2, nearest resizing reads rows and columns 0 and 2, so the query rows 0, 2, 8 and 10. Of
    1 x 1 queries it reads one row four times, which is then one row of the sum of four.
    """
    rows = rows_read(queries, reference, affinity.device)
    pulled = resize_adjoint(affinity.unflatten(-1, reference), keys).flatten(2)
    if len(rows) < pulled.shape[1]:  # some rows are read more than once
        ours, theirs = "zyx"[-len(queries) :], "fhw"[-len(queries) :]
        sums = ",".join(map("".join, zip(ours, theirs, strict=True))) + f",b{theirs}q->b{ours}q"
        read = [_read(a, b, affinity.device) for a, b in zip(queries, reference, strict=True)]
        targets = [targets.to(pulled.dtype) for _, targets in read]
        pulled = torch.einsum(sums, *targets, pulled.unflatten(1, reference)).flatten(1, -2)
    return rows, pulled


@_constant
def rows_read(queries: tuple[int, ...], reference: tuple[int, ...], device) -> Int[Tensor, " rows"]:
    """The query rows that nearest resizing to the `reference` grid reads, in order."""
    return _row_major([_read(a, b, device)[0] for a, b in zip(queries, reference, strict=True)], queries)


@_constant
def places_of_rows(
    queries: tuple[int, ...], reference: tuple[int, ...], wanted: int | None, device
) -> Int[Tensor, " p"]:
    """For each query row its place among those of `rows_read`, or among so many of them as are `wanted`; or else -1."""
    rows = rows_read(queries, reference, device)
    rows = rows if wanted is None or wanted >= len(rows) else rows[sample(len(rows), wanted, device)]
    places = torch.full((math.prod(queries),), -1, device=device)
    return places.index_copy(0, rows, torch.arange(len(rows), device=device))


@_constant
def other_rows(
    queries: tuple[int, ...], reference: tuple[int, ...], wanted: int | None, device
) -> Int[Tensor, " others"]:
    """The query rows that have no place by `places_of_rows`, in order."""
    places = places_of_rows(queries, reference, wanted, device)
    read = len(rows_read(queries, reference, device))
    return places.argsort(stable=True)[: len(places) - min(read, wanted or read)]  # nothing waits for a size


def coarser(grid: tuple[int, ...], side: int | None) -> tuple[int, ...]:
    """The grid, shrunk until the longer side of a picture is at most `side`, and frames are at most half as many.

    Frames and pictures shrink apart, so that the pictures of a longer video are read as sharply. That frames are half as many
    (ours) shrinks space and time about alike in the usual videos: Wan's 21 x 30 x 52 is 12 x 14 x 24 at 24.
    """
    *frames, height, width = grid
    shrink = min(1.0, (side or max(height, width)) / max(height, width))
    fewer = [min(count, max(1, side // 2)) if side else count for count in frames]
    return *fewer, max(1, round(height * shrink)), max(1, round(width * shrink))


@_constant
def sample(count: int, wanted: int, device) -> Int[Tensor, " wanted"]:
    """So many different numbers below `count`, in order, the same ones at every call."""
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")[:wanted]
    return chosen.sort().values.to(device)


@_constant
def _read(source: int, target: int, device) -> tuple[Int[Tensor, " read"], Float[Tensor, "read target"]]:
    """Along one axis: the source pixels that nearest resizing reads, and which target pixels read each of them."""
    index = torch.arange(target, device=device) * source // target
    read = index if target <= source else torch.arange(source, device=device)
    return read, (read[:, None] == index).to(torch.float32)
