"""The weighted sums of the values of some rows, tile by tile (``one_pass.py``).

A nonfinite value is detected in the sums that it has reached, even times 0. Then ``again`` adds
the finite values of each tile, and the others only to the rows that attend to them."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.prefetch import load_columns, use


@triton.jit
def in_order(x):
    """Reshapes [RM, RN, TM, TN] to [BM, BN]."""
    BM: tl.constexpr = x.shape[0] * x.shape[2]
    BN: tl.constexpr = x.shape[1] * x.shape[3]
    return tl.reshape(tl.permute(x, [2, 0, 1, 3]), [BM, BN])


@triton.jit
def as_tile(x, RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr):
    """Reshapes [BM, BN] to [RM, RN, TM, TN]."""
    return tl.permute(tl.reshape(x, [TM, RM, RN, TN]), [1, 2, 0, 3])


@triton.jit
def often_enough(x, LEAST: tl.constexpr):
    """Repeats each row of [BM, BN] LEAST / BM times, to [LEAST, BN], which a product takes."""
    BM: tl.constexpr = x.shape[0]
    BN: tl.constexpr = x.shape[1]
    if BM < LEAST:
        x = tl.broadcast_to(x[:, None, :], [BM, LEAST // BM, BN])
        x = tl.reshape(x, [LEAST, BN])
    return x


@triton.jit
def _add_nonfinite(acc, p, value, value_row, key0, last, inside_d):
    """Adds the nonfinite values of a tile to the rows that attend to them: p != 0, and -1 in place
    of 0."""
    BN: tl.constexpr = p.shape[1]
    c = tl.arange(0, BN)[None, :]
    for k in range(0, tl.minimum(last - key0, BN)):
        p_k = tl.sum(tl.where(c == k, p, 0.0), 1)[:, None]
        at = value + (key0 + tl.cast(k, tl.int64)) * value_row
        v = tl.load(at, mask=inside_d, other=0.0).to(acc.dtype)  # [1, BD]
        share = tl.where(p_k < 0.0, 0.0, p_k) * v
        acc += tl.where((p_k != 0.0) & ((tl.abs(v) < float("inf")) == 0), share, 0.0)
    return acc


@triton.jit
def _add_finite(acc, p, value, value_row, key0, last, inside_d, again):
    """Returns acc + P V of a tile, key by key. ``again``: without the nonfinite values."""
    BN: tl.constexpr = p.shape[1]
    c = tl.arange(0, BN)[None, :]
    for k in range(0, tl.minimum(last - key0, BN)):
        at = value + (key0 + tl.cast(k, tl.int64)) * value_row
        v = tl.load(at, mask=inside_d, other=0.0).to(acc.dtype)  # [1, BD]
        v = tl.where(again & ((tl.abs(v) < float("inf")) == 0), 0.0, v)
        acc += tl.sum(tl.where(c == k, p, 0.0), 1)[:, None] * v
    return acc


@triton.jit
def _weighted_sum(
    acc, p, attended, value, value_row, value_column, key0, last, d, values, again,
    ROUNDED: tl.constexpr, PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns acc + P V of a tile, [LEAST, BD], with P [RM, RN, TM, TN]. ``again``: nonfinite
    values reach only the rows that attend to them, by ``attended``. ROUNDED: P takes the values'
    dtype, as weights in 16 bits do; else the values take that of P."""
    BN: tl.constexpr = p.shape[1] * p.shape[3]
    LEAST: tl.constexpr = acc.shape[0]
    in_rows = often_enough(in_order(p), LEAST)
    marked = tl.where((p == 0.0) & attended, -1.0, p)
    j = key0 + tl.arange(0, BN)
    inside_d = (d < values)[None, :]
    value += d[None, :].to(tl.int64) * value_column
    if acc.dtype == tl.float64:
        # Triton 3.6 does not compile some products.
        acc = _add_finite(acc, in_rows, value, value_row, key0, last, inside_d, again)
        if again:
            acc = _add_nonfinite(
                acc, often_enough(in_order(marked), LEAST), value, value_row, key0, last, inside_d
            )
    else:
        v = tl.load(  # [BN, BD]
            value + j[:, None].to(tl.int64) * value_row,
            mask=(j < last)[:, None] & inside_d,
            other=0.0,
        )
        if again:
            finite = tl.abs(v.to(acc.dtype)) < float("inf")
            if tl.min(finite.to(tl.int32)) == 0:
                acc = _add_nonfinite(
                    acc, often_enough(in_order(marked), LEAST), value, value_row, key0, last,
                    inside_d,
                )  # fmt: skip
            v = tl.where(finite, v, 0.0)
        if not ROUNDED:
            v = v.to(acc.dtype)
        p_v = in_rows.to(v.dtype)
        if TARGET == "none":  # NumPy has no bfloat16
            acc = tl.dot(p_v.to(acc.dtype), v.to(acc.dtype), acc, out_dtype=acc.dtype)
        else:
            acc = tl.dot(p_v, v, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def _row_places(row0, rows, values, LEAST: tl.constexpr, BM: tl.constexpr):
    """Returns where rows of sums begin, [LEAST, 1], and which of them are stored: of rows that are
    there several times the first."""
    r = tl.arange(0, LEAST)
    i = row0 + r // (LEAST // BM)
    inside = (i < rows) & (r % (LEAST // BM) == 0)
    return (i.to(tl.int64) * values)[:, None], inside[:, None]


@triton.jit
def accumulate(
    acc, shrink, p, attended, sums, row0, rows, started, lines, value, value_row, value_column,
    key0, last, values, again,
    BM: tl.constexpr, BD: tl.constexpr, MEMORY: tl.constexpr,
    ROUNDED: tl.constexpr, PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns acc shrink + P V of a tile. With MEMORY, acc is in memory, else in registers.
    ``lines``: those of the first columns, which have been loaded ahead; None: none are."""
    BN: tl.constexpr = p.shape[1] * p.shape[3]
    d = tl.arange(0, BD)
    if MEMORY:
        place, inside = _row_places(row0, rows, values, acc.shape[0], BM)
        # Other threads may have stored what this one loads.
        tl.debug_barrier()
        for d0 in range(0, values, BD):
            here = inside & (d0 + d < values)[None, :]
            at = sums + (place + (d0 + d)[None, :])
            written = inside & (d0 + d < values * started)[None, :]
            acc = tl.load(at, mask=written, other=0.0) * shrink
            if lines is not None:
                use(lines, value)
                lines = load_columns(
                    value, value_row, value_column, key0, last, sums, row0, rows, started, d0 + BD,
                    values, BM, BN, BD,
                )  # fmt: skip
            # Other threads may still load what this one stores.
            tl.debug_barrier()
            acc = _weighted_sum(
                acc, p, attended, value, value_row, value_column, key0, last, d0 + d, values,
                again, ROUNDED, PRECISION, TARGET,
            )  # fmt: skip
            tl.store(at, acc, mask=here)
    else:
        acc = _weighted_sum(
            acc * shrink, p, attended, value, value_row, value_column, key0, last, d, values,
            again, ROUNDED, PRECISION, TARGET,
        )  # fmt: skip
    return acc


@triton.jit
def finish(
    acc, factor, out, sums, row0, rows, started, values,
    BM: tl.constexpr, BD: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """Stores acc times ``factor``. Returns whether a number of acc is nonfinite."""
    place, inside = _row_places(row0, rows, values, acc.shape[0], BM)
    d = tl.arange(0, BD)
    nonfinite = 0
    if MEMORY:
        tl.debug_barrier()
        for d0 in range(0, values, BD):
            here = inside & (d0 + d < values)[None, :]
            at = place + (d0 + d)[None, :]
            written = inside & (d0 + d < values * started)[None, :]
            acc = tl.load(sums + at, mask=written, other=0.0)
            nonfinite = tl.maximum(
                nonfinite, tl.max((tl.abs(acc) < float("inf")).to(tl.int32) ^ 1)
            )
            tl.debug_barrier()
            tl.store(out + at, (acc * factor).to(out.dtype.element_ty), mask=here)
    else:
        here = inside & (d < values)[None, :]
        nonfinite = tl.max((tl.abs(acc) < float("inf")).to(tl.int32) ^ 1)
        tl.store(out + place + d[None, :], (acc * factor).to(out.dtype.element_ty), mask=here)
    return nonfinite
