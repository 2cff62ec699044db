"""Operations on maps: one blur, one min-max, one resize convention, and the adjoints of the resizes."""

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


def min_max(maps: Float[Tensor, "b k H W"]) -> Float[Tensor, "b k H W"]:
    """Each map to [0, 1] over its pixels (GoCA, per-token min-max). A constant map becomes zeros, never NaN."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1)


def blur(maps: Float[Tensor, "b k H W"], size: int, sigma: float) -> Float[Tensor, "b k H W"]:
    """Gaussian blur with reflected borders; `size` odd, `sigma` in pixels, the true standard deviation.

    The window shrinks to the largest odd one that reflection allows when a map is smaller than the kernel.
    """
    rows, columns = (_gaussian(min(size, 2 * n - 1), sigma, maps.dtype, maps.device) for n in maps.shape[-2:])
    padded = F.pad(maps, (len(columns) // 2,) * 2 + (len(rows) // 2,) * 2, mode="reflect")
    return padded.unfold(-1, len(columns), 1).matmul(columns).unfold(-2, len(rows), 1).matmul(rows)


@_constant
def _gaussian(size: int, sigma: float, dtype, device) -> Float[Tensor, " taps"]:
    offsets = torch.arange(size, dtype=dtype, device=device) - size // 2
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return taps / taps.sum()


def resize(maps: Float[Tensor, "b k H W"], size: tuple[int, int]) -> Float[Tensor, "b k Y X"]:
    """Bilinear, pixel centres (align_corners=False), no antialiasing."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def nearest(masks: Bool[Tensor, "b k H W"], size: tuple[int, int]) -> Bool[Tensor, "b k Y X"]:
    """Nearest resizing of masks: a partition stays a partition."""
    if masks.shape[-2:] == size:
        return masks
    return masks.flatten(-2)[..., nearest_index((masks.shape[-2], masks.shape[-1]), size, masks.device)].unflatten(
        -1, size
    )


def as_maps(tokens: Float[Tensor, "b p k"], grid: tuple[int, int]) -> Float[Tensor, "b k H W"]:
    """Pixel tokens in row-major order to maps."""
    return tokens.mT.unflatten(-1, grid)


def resize_adjoint(maps: Float[Tensor, "b k Y X"], size: tuple[int, int]) -> Float[Tensor, "b k H W"]:
    """Transpose of `resize` from `size` to the size of `maps`: <resize(a), m> = <a, resize_adjoint(m)>."""
    if maps.shape[-2:] == size:
        return maps
    sides = zip(size, maps.shape[-2:], strict=True)
    rows, columns = (_bilinear_matrix(a, b, maps.dtype, maps.device) for a, b in sides)
    return rows.mT @ maps @ columns


@_constant
def row_mass(reference: tuple[int, int], grid: tuple[int, int], device) -> Float[Tensor, " q"]:
    """What each key of `grid` adds to a row's sum when the row is resized to the `reference` grid."""
    return resize_adjoint(torch.ones(1, 1, *reference, dtype=torch.float32, device=device), grid).flatten()


@_constant
def _bilinear_matrix(source: int, target: int, dtype, device) -> Float[Tensor, "target source"]:
    """Rows are target pixels: `matrix @ x` is the one-dimensional `resize` of x."""
    eye = torch.eye(source, dtype=dtype, device=device)[None]
    return F.interpolate(eye, target, mode="linear", align_corners=False)[0].mT


@_constant
def nearest_index(source: tuple[int, int], target: tuple[int, int], device) -> Int[Tensor, " p"]:
    """For each target pixel (row-major) the source pixel that nearest resizing reads."""
    rows, columns = (torch.arange(b, device=device) * a // b for a, b in zip(source, target, strict=True))
    return (rows[:, None] * source[1] + columns).flatten()


def pull_affinity(
    affinity: Float[Tensor, "b P Q"], reference: tuple[int, int], queries: tuple[int, int], keys: tuple[int, int]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "b rows q"]]:
    """Adjoint of GoCA's affinity resize (keys bilinear, queries nearest) from a layer's grids to the `reference` grid.

    Returns the query rows that the resize reads at all, and the pulled affinity in those rows, so that
    <affinity, resize(a)> = <pulled, a[rows]> for any affinity `a` of the layer. A fine layer needs few of its rows: of 4 x 4
    queries and a reference of 2 x 2, nearest resizing reads rows and columns 0 and 2, so the query rows 0, 2, 8 and 10. Of
    1 x 1 queries it reads one row four times, which is then one row of the sum of four.
    """
    (y, y_targets), (x, x_targets) = (_read(a, b, affinity.device) for a, b in zip(queries, reference, strict=True))
    pulled = resize_adjoint(affinity.unflatten(-1, reference), keys).flatten(-2)
    if len(y) * len(x) < pulled.shape[1]:  # some rows are read more than once
        targets = y_targets.to(pulled.dtype), x_targets.to(pulled.dtype)
        pulled = torch.einsum("yh,xw,bhwq->byxq", *targets, pulled.unflatten(1, reference)).flatten(1, 2)
    return (y[:, None] * queries[1] + x).flatten(), pulled


def coarser(grid: tuple[int, int], side: int | None) -> tuple[int, int]:
    """The grid, shrunk until its longer side is at most `side`."""
    shrink = min(1.0, (side or max(grid)) / max(grid))
    return max(1, round(grid[0] * shrink)), max(1, round(grid[1] * shrink))


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
