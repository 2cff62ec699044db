"""The device side of `kernels`: three Triton kernels. Nothing but `kernels` imports this, and only where they are on.

All compute logits to base 2, q k^T on the inputs' own dtype with float32 sums; softmax runs over all keys. A head of D
channels is read as A, a power of two, and B that take the rest: 40 = 32 + 16. Strides count UNIT elements, as the
compiler reads 16 bytes at once only where it knows that rows lie so far apart. Each output element has one writer: the
same input gives the same bits. WIDE, for the interpreter, whose product of bfloat16 is wrong: in float32, which is what
tensor cores sum.
"""

from typing import no_type_check  # the tests' type checker must not wrap what Triton reads as source

import triton
import triton.language as tl


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)  # what -inf in a mask becomes: such a key weighs nothing, and no difference is NaN
COUNTERS = ("count", "first", "n", "m", "text", "known")  # alignment does not hang on them: one code for all sizes


def interpreted() -> bool:
    """Whether these were defined under Triton's interpreter."""
    return not isinstance(pixels, triton.runtime.JITFunction)


# ---- parts -----------------------------------------------------------------------------------------------------------
@triton.jit
@no_type_check
def _load(
    base, rows, stride,
    D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows, all within bounds, by WIDTH channels from FROM on; zeros beyond D."""
    channel = FROM + tl.arange(0, WIDTH)
    at = base + (rows * stride)[:, None] * UNIT + channel[None, :]
    x = tl.load(at) if FROM + WIDTH <= D else tl.load(at, mask=channel[None, :] < D, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
@no_type_check
def _scores(
    qa, qb, k, keys, k_row, factor, mask, rows, mask_row, mask_key,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of a tile, scaled after the product. MASK: 0 none, 1 added by key, 2 by row and key."""
    s = tl.dot(qa, tl.trans(_load(k, keys, k_row, D, 0, A, UNIT, WIDE)), input_precision=EXACT)
    if B > 0:
        s = tl.dot(qb, tl.trans(_load(k, keys, k_row, D, A, B, UNIT, WIDE)), s, input_precision=EXACT)
    s = s * factor
    if MASK == 1:
        s += tl.maximum(tl.load(mask + keys * mask_key).to(tl.float32) * LOG2E, FLOOR)[None, :]
    if MASK == 2:
        at = mask + rows[:, None] * mask_row + keys[None, :] * mask_key
        s += tl.maximum(tl.load(at).to(tl.float32) * LOG2E, FLOOR)
    return s


@triton.jit
@no_type_check
def _row_lse(
    qa, qb, k, k_row, factor, mask, rows, mask_row, mask_key, n,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr,
    MASK: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp to base 2 of each row over n keys, as they come."""
    top, total = tl.full([BM], FLOOR, tl.float32), tl.zeros([BM], tl.float32)
    for start in range(0, n, BN):
        key = start + tl.arange(0, BN)
        inside = tl.minimum(key, n - 1)
        s = _scores(qa, qb, k, inside, k_row, factor, mask, rows, mask_row, mask_key, D, A, B, UNIT, MASK, WIDE, EXACT)
        s = tl.where(key[None, :] < n, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    return top + tl.log2(total)


@triton.jit
@no_type_check
def _rows_of(index, count, BM: tl.constexpr, ROWS: tl.constexpr):
    """Positions in the list of rows, and the query rows that they stand for; beyond the end the last one again."""
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = tl.minimum(at, count - 1)
    return at, (tl.load(index + inside).to(tl.int32) if ROWS else inside)


# ---- the three -------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=COUNTERS)
@no_type_check
def log_sum_exp(
    q, k, mask, index, out,
    q_b, q_h, q_row, k_b, k_h, k_row, mask_b, mask_h, mask_row, mask_key, count, n, height, factor,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr,
    MASK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows, heads, images. `out`, `height` rows: natural logarithm, where it is asked for."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at, rows = _rows_of(index, count, BM, ROWS)
    q += (image * q_b + head * q_h) * UNIT
    k += (image * k_b + head * k_h) * UNIT
    mask += image * mask_b + head * mask_h
    qa = _load(q, rows, q_row, D, 0, A, UNIT, WIDE)
    qb = _load(q, rows, q_row, D, A, B, UNIT, WIDE) if B > 0 else qa
    lse = _row_lse(
        qa, qb, k, k_row, factor, mask, rows, mask_row, mask_key, n, BM, BN, D, A, B, UNIT, MASK, WIDE, EXACT
    )
    tl.store(out + (image * tl.num_programs(1) + head) * height + rows, lse * LN2, mask=at < count)


@triton.jit(do_not_specialize=COUNTERS)
@no_type_check
def pixels(
    q, k, mask, lse, index, slots, reference, mass, match, weight, total,
    q_b, q_h, q_row, k_b, k_h, k_row, mask_b, mask_h, mask_row, mask_key, lse_b, lse_h,
    count, first, wide, heads, known, factor,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr,
    MASK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, COMPARE: tl.constexpr, MASS: tl.constexpr,
    SUM: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows, blocks of pixel keys, images. `match`, `weight`: images, rows, blocks of keys.

    The mean over heads of a tile of rows by pixel keys stays in registers: multiplied with the reference and summed;
    SUM 1: written to `total`, 2: added to it.
    """
    block, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at, rows = _rows_of(index, count, BM, ROWS)
    pixel = block * BN + tl.arange(0, BN)
    keys = first + tl.minimum(pixel, wide - 1)
    q, k, mask, lse = q + image * q_b * UNIT, k + image * k_b * UNIT, mask + image * mask_b, lse + image * lse_b
    mean = tl.zeros([BM, BN], tl.float32)
    for head in range(heads):
        query, key, bias = q + head * q_h * UNIT, k + head * k_h * UNIT, mask + head * mask_h
        qa = _load(query, rows, q_row, D, 0, A, UNIT, WIDE)
        qb = _load(query, rows, q_row, D, A, B, UNIT, WIDE) if B > 0 else qa
        s = _scores(qa, qb, key, keys, k_row, factor, bias, rows, mask_row, mask_key, D, A, B, UNIT, MASK, WIDE, EXACT)
        mean += tl.exp2(s - (tl.load(lse + head * lse_h + rows) * LOG2E)[:, None])
    valid = (at < count)[:, None] & (pixel < wide)[None, :]
    mean = tl.where(valid, mean / heads, 0.0)
    if COMPARE:
        slot = tl.load(slots + tl.minimum(at, count - 1)) if SLOTS else at
        here = reference + ((image * known + slot) * wide)[:, None] + pixel[None, :]
        pulled = tl.load(here, mask=valid & (slot >= 0)[:, None], other=0.0)
        to = (image * count + at) * tl.num_programs(1) + block
        tl.store(match + to, tl.sum(mean * pulled, 1), mask=at < count)
        if MASS:
            share = tl.load(mass + pixel, mask=pixel < wide, other=0.0)
            tl.store(weight + to, tl.sum(mean * share[None, :], 1), mask=at < count)
    if SUM > 0:
        here = total + ((image * count + rows) * wide)[:, None] + pixel[None, :]
        if SUM == 2:
            mean += tl.load(here, mask=valid, other=0.0)
        tl.store(here, mean, mask=valid)


@triton.jit(do_not_specialize=COUNTERS)
@no_type_check
def words(
    q, k, mask, lse, columns, weights, z, zww, out,
    q_b, q_h, q_row, k_b, k_h, k_row, mask_b, mask_h, mask_row, mask_key, lse_b, lse_h, w_b, w_h, w_row,
    z_b, z_h, z_row, y_b, y_h, y_row, count, first, n, m, text, heads, factor,
    BM: tl.constexpr, BN: tl.constexpr, M: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    UNIT: tl.constexpr, MASK: tl.constexpr, LSE: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
    TOTAL: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows, images, blocks of M columns. LSE: given, else found here. COLUMNS: of a list, else all m.

    HEADS: 0 their mean, 1 by given weights, 2 by their shares <z_h, (z W W^T)_h>, found on the way. TOTAL: one more column,
    the mean over heads of what the row gives to `text` keys from the first on.
    """
    image = tl.program_id(1).to(tl.int64)
    at, rows = _rows_of(columns, count, BM, False)
    column = tl.program_id(2) * M + tl.arange(0, M)
    wanted = tl.minimum(column, m - 1)
    wanted = first + (tl.load(columns + image * m + wanted).to(tl.int32) if COLUMNS else wanted)
    q, k, z, zww = q + image * q_b * UNIT, k + image * k_b * UNIT, z + image * z_b * UNIT, zww + image * y_b * UNIT
    mask, lse, weights = mask + image * mask_b, lse + image * lse_b, weights + image * w_b
    plain, weighted = tl.zeros([BM, M], tl.float32), tl.zeros([BM, M], tl.float32)
    shares, total = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for head in range(heads):
        query, key, bias = q + head * q_h * UNIT, k + head * k_h * UNIT, mask + head * mask_h
        qa = _load(query, rows, q_row, D, 0, A, UNIT, WIDE)
        qb = _load(query, rows, q_row, D, A, B, UNIT, WIDE) if B > 0 else qa
        if LSE:
            row = tl.load(lse + head * lse_h + rows) * LOG2E
        else:
            row = _row_lse(
                qa, qb, key, k_row, factor, bias, rows, mask_row, mask_key, n, BM, BN, D, A, B, UNIT, MASK, WIDE, EXACT
            )
        if TOTAL:  # the text again, a tile at a time
            for start in range(0, text, BN):
                at_key = start + tl.arange(0, BN)
                there = first + tl.minimum(at_key, text - 1)
                s = _scores(
                    qa, qb, key, there, k_row, factor, bias, rows, mask_row, mask_key, D, A, B, UNIT, MASK, WIDE, EXACT
                )
                s = tl.where(at_key[None, :] < text, s, float("-inf"))
                total += tl.sum(tl.exp2(s - row[:, None]), 1)
        s = _scores(
            qa, qb, key, wanted, k_row, factor, bias, rows, mask_row, mask_key, D, A, B, UNIT, MASK, WIDE, EXACT
        )
        s = tl.exp2(s - row[:, None])
        if HEADS == 1:
            weighted += s * tl.load(weights + head * w_h + rows * w_row)[:, None]
        else:
            plain += s
        if HEADS == 2:
            o, y = z + head * z_h * UNIT, zww + head * y_h * UNIT
            part = _load(o, rows, z_row, D, 0, A, UNIT, True) * _load(y, rows, y_row, D, 0, A, UNIT, True)
            share = tl.sum(part, 1)
            if B > 0:
                part = _load(o, rows, z_row, D, A, B, UNIT, True) * _load(y, rows, y_row, D, A, B, UNIT, True)
                share += tl.sum(part, 1)
            weighted += s * share[:, None]
            shares += share
    if HEADS == 0:
        weighted = plain / heads
    if HEADS == 2:
        some = shares > 0
        weighted = tl.where(some[:, None], weighted / tl.where(some, shares, 1.0)[:, None], plain / heads)
    width = m
    if TOTAL:
        width = m + 1
        weighted = tl.where((column == m)[None, :], (total / heads)[:, None], weighted)
    to = out + (image * count + at[:, None]) * width + column[None, :]
    tl.store(to, weighted, mask=(at < count)[:, None] & (column < width)[None, :])
