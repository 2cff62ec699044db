"""GoCA's reductions of one layer's attention by fused kernels (Triton): no probability is ever written to memory.

The forms in PyTorch (`attention.py`, `aggregation.py`) are what they must equal, and what runs wherever a record is
not `usable`. `GOCA_TRITON=1` turns kernels on, 0 off; off unless it is set: an H200 found an earlier form right, but what
a whole step gains was not measured. Under Triton's interpreter (`TRITON_INTERPRET=1`) they run on the CPU too, as in their
tests.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from goca_guidance.method.records import AttentionRecord
from goca_guidance.schema import switched_on


WIDEST = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}  # channels of a head: registers hold no more
LEAST = (8, 0)  # compute capability: Ampere
SMALL = 16  # the least width of a product on tensor cores
FULL = 264  # tiles that fill a card: two for each of an H100's multiprocessors
COLUMNS = 64  # words of a tile
ADDRESSABLE = 2**31  # elements of a tensor: beyond, offsets inside an image might not fit 32 bits
LOG2E = 1.4426950408889634
SLOWER = "Attention is read without fused kernels, which takes longer: {}."
Form = tuple[torch.Size, tuple[int, ...], torch.dtype]  # what of a tensor a launch depends on


class NotLaunchedError(RuntimeError):
    """A kernel's first launch failed, and nothing was computed; from now on no record is `usable`."""


# ---- whether ---------------------------------------------------------------------------------------------------------
@cache
def enabled() -> bool:
    """Whether `GOCA_TRITON` turns kernels on; read at the first use.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    return switched_on("GOCA_TRITON")


def usable(record: AttentionRecord) -> bool:
    """Whether kernels are on and know all that this record is; what keeps a GPU from its speed is warned of, once."""
    if not enabled():
        return False
    query, key, mask = record.query, record.key, record.mask
    reason = hindrance(query.device) or unknown(_form(query), _form(key), None if mask is None else _form(mask))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, mask, record.output)):
        reason = reason or "gradients are wanted"
    if reason is not None and query.device.type == "cuda":
        _warn(SLOWER.format(reason))
    return reason is None


_failed: list[str] = []  # why the first launch failed, in words


def hindrance(device: torch.device) -> str | None:
    """What keeps kernels from running on a device at all, in words."""
    return _failed[0] if _failed else _lacking(device)


@cache
def _lacking(device):
    try:
        code = _code()
    except Exception as error:  # a broken one may raise anything
        return f"Triton cannot be imported ({error})"
    if code.interpreted():
        return None if device.type == "cpu" else "Triton's interpreter runs on the CPU alone"
    if device.type != "cuda":
        return f"they need a CUDA device, and this is {device.type}"
    if torch.version.hip is not None:
        return "they were never tried on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        return f"they need compute capability {_dotted(LEAST)}, and this GPU's is {_dotted(capability)}"
    return None


def _dotted(version):
    return ".".join(map(str, version))


@lru_cache(maxsize=1024)
def unknown(query: Form, key: Form, mask: Form | None) -> str | None:
    """What of a record's tensors no kernel knows, in words."""
    (shape, _, dtype), (keys, _, other) = query, key
    if dtype != other:
        return f"queries are {dtype} and keys {other}"
    if dtype not in WIDEST:
        return f"queries are {dtype}"
    if shape[3] > WIDEST[dtype]:
        return f"heads are {shape[3]} wide, more than {WIDEST[dtype]} in {dtype}"
    if shape[:2] != keys[:2] or not all(shape) or not all(keys):
        return f"queries are {tuple(shape)} and keys {tuple(keys)}"
    if mask is not None:
        full = (*shape[:3], keys[2])
        fits = len(mask[0]) == 4 and all(a in (1, b) for a, b in zip(mask[0], full, strict=True))
        if not fits or mask[2] not in WIDEST or mask[0][3] != full[3]:
            return f"a mask is {mask[2]} of {tuple(mask[0])}, for logits of {full}"
    if max(x[0].numel() for x in (query, key, mask or query)) >= ADDRESSABLE:
        return "tensors have 2**31 elements or more"
    return None


@cache
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


# ---- launches --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Plan:
    """All of a launch but its tensors. Made once for each form of its tensors, and known by identity.

    `kernel`: its name in `triton_kernels`. `numbers`: its arguments after the tensors, in order. `constants`: what it
    is compiled for, by name. `options`: warps and stages, Triton's keywords.
    """

    kernel: str
    grid: tuple[int, int, int]
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def launch(
    plan: Plan, read: Sequence[Tensor | None], written: Sequence[Tensor | None], added: Sequence[Tensor | None] = ()
) -> None:
    """Every launch of a kernel. `read`, `written`, `added` (both): its tensors in this order, None for what it lacks.

    From the second launch of a plan on the compiled kernel is called without Triton's search for it.

    Raises:
        NotLaunchedError: the first launch of a plan failed: nothing was computed.
    """
    given, first = [*read, *written, *added], cast(Tensor, read[0])
    compiled_for = [(x.dtype, x.data_ptr() % 16) for x in given if x is not None]
    key = (plan, first.get_device(), *compiled_for)
    tensors = [first if x is None else x for x in given]
    with torch.cuda.device_of(first) if _several_gpus() else nullcontext():
        ready = _ready.get(key)
        if ready is None:
            _launch_first(plan, tensors, key)
        else:
            run, arguments = ready
            run(*tensors, *arguments)


@cache
def _several_gpus():
    return torch.cuda.device_count() > 1


_ready: dict[tuple, tuple[Callable, tuple]] = {}  # compiled kernels, with what follows the tensors


def _launch_first(plan, tensors, key):
    try:
        kernel = getattr(_code(), plan.kernel)
        compiled = kernel[plan.grid](*tensors, *plan.numbers, **plan.constants, **plan.options)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _failed.append(f"their first launch failed ({reason})")
        _warn(SLOWER.format(_failed[0]))
        raise NotLaunchedError(reason) from error
    if compiled is not None:  # the interpreter has none
        constants = [plan.constants[name] for name in kernel.arg_names if name in plan.constants]
        _ready[key] = compiled[plan.grid], (*plan.numbers, *constants)


@cache
def _code():
    return import_module("goca_guidance.method.triton_kernels")


# ---- the three -------------------------------------------------------------------------------------------------------
def log_sum_exp(record: AttentionRecord, rows: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "b h p"]:
    """log sum_n exp(scale q k + mask), natural, over all keys; with `rows` set at those rows only."""
    query, key = _side_by_side(record.query), _side_by_side(record.key)
    count = None if rows is None else len(rows)
    plan = _plan_log_sum_exp(*_forms(query, key, record.mask), record.scale, count)
    out = query.new_empty(query.shape[:3], dtype=torch.float32)
    launch(plan, (query, key, record.mask, rows), (out,))
    return out


def pixels(
    record: AttentionRecord,
    lse: Float[Tensor, "b h p"],
    rows: Int[Tensor, " rows"] | None = None,
    slots: Int[Tensor, " visited"] | None = None,
    reference: Float[Tensor, "b known q"] | None = None,
    row_mass: Float[Tensor, " q"] | None = None,
    total: Float[Tensor, "b p q"] | None = None,
    add: bool = True,
) -> Float[Tensor, " b"] | None:
    """Of the mean over heads of the self-attention: agreement with `reference`, as `goca.agreement`; its sum.

    Args:
        record: a layer whose pixel keys are of the queries' grid.
        lse: of its rows over all keys, natural.
        rows: those that are visited, all by default.
        slots: of each visited row the row of the reference that it is compared with, or -1; without them the first
            with the first, and so on.
        reference: with it the agreement is returned, summed over rows; contiguous, float32 or half precision.
        row_mass: divide a row's agreement by what it weighs.
        total: the map goes there, or, with `add`, is added to what is there; all rows must be visited; contiguous.
    """
    query, key, lse = _side_by_side(record.query), _side_by_side(record.key), _side_by_side(lse)
    first, end, _ = record.view.image.indices(key.shape[2])
    has = (slots is not None, reference is not None, row_mass is not None, 0 if total is None else 1 + add)
    known = 0 if reference is None else reference.shape[1]
    count = None if rows is None else len(rows)
    forms = _forms(query, key, record.mask)
    plan = _plan_pixels(*forms, record.scale, lse.stride(), first, end, count, known, has)
    tiles = query.shape[0], query.shape[2] if rows is None else len(rows), plan.grid[1]
    match = None if reference is None else query.new_empty(tiles, dtype=torch.float32)
    weight = None if match is None or row_mass is None else torch.empty_like(match)
    read, written = (query, key, record.mask, lse, rows, slots, reference, row_mass), (match, weight)
    launch(plan, read, written, (total,)) if add else launch(plan, read, (*written, total))
    if match is None:
        return None
    return match.sum((1, 2)) if weight is None else (match.sum(-1) / weight.sum(-1)).sum(-1)


def words(
    record: AttentionRecord,
    columns: Int[Tensor, "b m"] | None,
    weights: Float[Tensor, "b h p"] | None = None,
    zww: Float[Tensor, "b p hd"] | None = None,
    lse: Float[Tensor, "b h p"] | None = None,
    total: bool = False,
) -> Float[Tensor, "b p _"]:
    """Columns of the attention, counted from the first text key, summed over heads, as `attention.token_maps`.

    Args:
        columns: None for all of the text.
        weights: of heads; or
        zww: z W W^T of the layer's output z, by which heads' shares are found, as in `goca.head_weights`; else the mean.
        lse: of the rows over all keys, natural; else it is found.
        total: one more column, the sum of all the text's, of the mean over heads.
    """
    query, key = _side_by_side(record.query), _side_by_side(record.key)
    text = record.view.text
    count = text.stop - text.start
    m = count if columns is None else columns.shape[1]
    if lse is None and m > 2 * COLUMNS:  # once, not for each block of columns
        lse = log_sum_exp(record)
    lse = None if lse is None else _side_by_side(lse)
    z = None if zww is None else _side_by_side(cast(Tensor, record.output))
    strides = tuple(None if x is None else x.stride() for x in (lse, weights, z, zww))
    asked = text.start, count if total else 0, m, columns is not None
    plan = _plan_words(*_forms(query, key, record.mask), record.scale, strides, *asked)
    out = query.new_empty((query.shape[0], query.shape[2], m + total), dtype=torch.float32)
    columns = None if columns is None else columns.contiguous()
    launch(plan, (query, key, record.mask, lse, columns, weights, z, zww), (out,))
    return out


# ---- plans: integers of a launch, from shapes and strides ------------------------------------------------------------
def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _form(x: Tensor) -> Form:
    return x.shape, x.stride(), x.dtype


def _forms(query, key, mask):
    return _form(query), _form(key), None if mask is None else _form(mask), query.device.type == "cpu"


@lru_cache(maxsize=1024)
def _plan_log_sum_exp(query, key, mask, wide, scale, some):
    (b, h, p, d), _, dtype = query
    count = p if some is None else some
    strides, constants = _layer(query, key, mask, wide)
    rows, columns, options = _tile_of_rows(d, dtype)
    numbers = (*strides, count, key[0][2], p, scale * LOG2E)
    constants = {"BM": rows, "BN": columns, **constants, "ROWS": some is not None}
    return Plan("log_sum_exp", (_blocks(count, rows), h, b), numbers, constants, options)


@lru_cache(maxsize=1024)
def _plan_pixels(query, key, mask, wide, scale, lse, first, end, some, known, has):
    (b, h, p, d), _, dtype = query
    count, width = p if some is None else some, end - first
    strides, constants = _layer(query, key, mask, wide)
    rows, columns, options = _tile_of_pixels(d, dtype, b, count, width)
    numbers = (*strides, *lse[:2], count, first, width, h, known, scale * LOG2E)
    constants = {"BM": rows, "BN": columns, **constants, "ROWS": some is not None}
    constants |= dict(zip(("SLOTS", "COMPARE", "MASS", "SUM"), has, strict=True))
    return Plan("pixels", (_blocks(count, rows), _blocks(width, columns), b), numbers, constants, options)


@lru_cache(maxsize=1024)
def _plan_words(query, key, mask, wide, scale, outer, first, text, m, listed):
    (b, h, p, d), _, dtype = query
    lse, weights, z, zww = outer
    nothing = (0, 0, 0)
    y = nothing if zww is None else (zww[0], d, zww[1])  # a token's heads lie side by side
    strides, constants = _layer(query, key, mask, wide, z or nothing, y)
    rows, columns, options = _tile_of_words(d, dtype, text)
    written = m + (text > 0)
    wanted = min(COLUMNS, max(SMALL, _power_of_two(written)))
    strides += (lse or nothing)[:2] + (weights or nothing)
    strides += tuple(s // constants["UNIT"] for x in (z or nothing, y) for s in x[:3])
    numbers = (*strides, p, first, key[0][2], m, text, h, scale * LOG2E)
    heads = 1 if weights is not None else 2 if z is not None else 0
    constants = {"BM": rows, "BN": columns, "M": wanted, **constants}
    constants |= {"LSE": lse is not None, "COLUMNS": listed, "HEADS": heads, "TOTAL": text > 0}
    return Plan("words", (_blocks(p, rows), b, _blocks(written, wanted)), numbers, constants, options)


def _layer(query, key, mask, wide, *more):
    """Strides of query, key and mask, and what a kernel is compiled for; `more`: strides that count the same units."""
    shape, own, dtype = query
    d, keys = shape[3], key[1]
    unit = 8 if all(s % 8 == 0 for x in (own, keys, *more) for s in x[:3]) else 1
    strides = tuple(s // unit for x in (own, keys) for s in x[:3])
    added = (0, 0, 0, 0)
    if mask is not None:
        added = tuple(0 if size == 1 else stride for size, stride in zip(*mask[:2], strict=True))
    by = 0 if mask is None else 1 if mask[0][2] == 1 else 2
    a, b = _split(d)
    exact = "tf32x3" if dtype == torch.float32 else "tf32"  # three products of TF32 make one of float32
    return strides + added, {"D": d, "A": a, "B": b, "UNIT": unit, "MASK": by, "WIDE": wide, "EXACT": exact}


def _split(d: int) -> tuple[int, int]:
    """A head's width as a power of two, and another one, or none, that takes the rest."""
    a = max(SMALL, 1 << (d.bit_length() - 1))
    return a, 0 if d <= a else max(SMALL, _power_of_two(d - a))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _tile_of_rows(d, dtype):
    if dtype != torch.float32:
        return 128, 64, _options(4)
    return (64, 64, _options(4)) if d <= 64 else (32, 32, _options(4))


def _tile_of_pixels(d, dtype, batch, rows, keys):
    if dtype == torch.float32 and d > 64:
        return 32, 32, _options(4)
    if dtype != torch.float32 and d <= 128 and batch * _blocks(rows, 128) * _blocks(keys, 128) >= FULL:
        return 128, 128, _options(8)
    return 64, 64, _options(4)


def _tile_of_words(d, dtype, text):
    if d <= (40 if dtype == torch.float32 else 128):
        return 64, 64, _options(4)
    return 16 if text and dtype == torch.float32 else 32, 32, _options(4)  # with a total, more rows spill


def _options(warps):
    return {"num_warps": warps, "num_stages": 2}
