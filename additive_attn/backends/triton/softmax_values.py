"""The softmax of rows of scores, and the weighted sum of the values."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.dropout import keep_factor, keep_factors
from additive_attn.backends.triton.launch import VARYING
from additive_attn.backends.triton.numerics import number


@triton.jit(do_not_specialize=VARYING)
def lse_kernel(
    scores, lse, tops, inverses, weights, entry_begin, rows, row_begin, row_count, keys, key_begin,
    key_count, score_padded, BLOCK: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of a row of scores, and its softmax if wanted. The largest score and 1 / sum
    are kept apart too: beside a score of -1e9, with which many models mask, lse cannot hold the
    logarithm of the sum."""
    program = tl.program_id(0)
    entry = tl.cast(entry_begin + program // row_count, tl.int64)
    row = entry * rows + row_begin + program % row_count
    scores += program.to(tl.int64) * score_padded
    j = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], float("-inf"), scores.dtype.element_ty)
    sums = tl.zeros([BLOCK], scores.dtype.element_ty)
    for key0 in range(0, score_padded, BLOCK):
        x = tl.load(scores + key0 + j, mask=key0 + j < score_padded, other=float("-inf"))
        before = maximum
        maximum = tl.maximum(maximum, x)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        sums = sums * tl.exp(before - shift) + tl.exp(x - shift)
    most = tl.max(maximum, 0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(sums * tl.exp(maximum - shift), 0)
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    tl.store(lse + row, tl.where(empty, float("-inf"), shift + tl.log(total)))
    tl.store(tops + program, shift)
    tl.store(inverses + program, inverse)
    if NEED_WEIGHTS:
        for key0 in range(0, key_count, BLOCK):
            inside = key0 + j < key_count
            x = tl.load(scores + key0 + j, mask=inside, other=float("-inf"))
            p = tl.where(x == float("-inf"), 0.0, tl.exp(x - shift) * inverse)
            tl.store(
                weights + row * keys + key_begin + key0 + j, p.to(weights.dtype.element_ty),
                mask=inside,
            )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def value_kernel(
    scores, tops, inverses, value, value_outer, value_inner, value_row, value_column,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    out, inner, entries, entry_begin, row_begin, row_count, key_begin, key_count,
    score_padded, values, left, right, splits, keys_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split][entry][row] = sum_j P_ij D_ij value_j over a range of keys.

    A value that is not finite is left out first: 0 * Inf would reach the rows that may not attend
    to it. Where there was one, a second loop adds such values to the rows that may."""
    row_tiles = tl.cdiv(row_count, BM)
    value_tiles = tl.cdiv(values, BD)
    program = tl.program_id(0)
    row0 = program % row_tiles * BM
    rest = program // row_tiles
    d = rest % value_tiles * BD + tl.arange(0, BD)
    rest = rest // value_tiles
    split = rest % splits
    n, o, m = batch_entry(entry_begin + rest // splits, inner)
    entry = n - entry_begin
    r = row0 + tl.arange(0, BM)
    top = tl.load(tops + entry * row_count + r, mask=r < row_count, other=0.0)[:, None]
    begin = split * keys_per_split
    first = tl.maximum(row_begin + row0 - left, key_begin) - key_begin
    last = tl.minimum(row_begin + row0 + BM + right, key_begin + key_count) - key_begin
    first = tl.maximum(begin, first // BN * BN)
    last = tl.minimum(begin + keys_per_split, last)
    scores += (entry * row_count + r)[:, None] * score_padded
    inside = (r < row_count)[:, None]
    value += o * value_outer + m * value_inner + d[None, :].to(tl.int64) * value_column
    seed += o * seed_outer + m * seed_inner
    acc = tl.zeros([BM, BD], scores.dtype.element_ty)
    strange = tl.zeros([BN, BD], acc.dtype)
    for k0 in range(first, last, BN):
        p, v = _block(
            scores, top, value, value_row, seed, threshold, keep_bits, inside, d, values,
            n, row_begin + r, key_begin, k0, last, BM, BN, DROPOUT,
        )  # fmt: skip
        v = v.to(acc.dtype)
        strange += v * 0.0  # NaN from the first number on that is not finite
        v = tl.where(tl.abs(v) < float("inf"), v, 0.0)
        if BM == 1:
            acc += tl.sum(tl.reshape(p, [BN])[:, None] * v, 0)[None, :]
        else:
            acc = tl.dot(p, v, acc, input_precision=PRECISION)
    if tl.max((strange != 0.0).to(tl.int32)) != 0:
        for c in range(first, last):
            x = tl.load(scores + c, mask=inside, other=float("-inf"))
            p = tl.exp(x - top)
            if DROPOUT:
                keep_scale = number(keep_bits).to(p.dtype)
                p *= keep_factor(
                    tl.load(seed), n, row_begin + r, key_begin + c, threshold, keep_scale
                )[:, None]
            v = tl.load(
                value + (key_begin + tl.cast(c, tl.int64)) * value_row,
                mask=(d < values)[None, :], other=0.0,
            ).to(acc.dtype)  # fmt: skip
            used = (x != float("-inf")) & ((tl.abs(v) < float("inf")) == 0)
            acc += tl.where(used, p * v, 0.0)
    acc *= tl.load(inverses + entry * row_count + r, mask=r < row_count, other=0.0)[:, None]
    row = (split * entries + entry) * row_count + r
    tl.store(
        out + row[:, None] * values + d[None, :], acc.to(out.dtype.element_ty),
        mask=inside & (d < values)[None, :],
    )  # fmt: skip


@triton.jit
def _block(
    scores, top, value, value_row, seed, threshold, keep_bits, inside, d, values,
    n, i, key_begin, k0, last, BM: tl.constexpr, BN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """e^{score - top} o D of rows i and BN keys, and the values of these keys."""
    c = k0 + tl.arange(0, BN)
    # What lies beyond the last key is -inf.
    x = tl.load(scores + c[None, :], mask=inside, other=float("-inf"))
    p = tl.where(x == float("-inf"), 0.0, tl.exp(x - top))
    if DROPOUT:
        keep_scale = number(keep_bits).to(p.dtype)
        p *= keep_factors(tl.load(seed), n, i, key_begin + k0, threshold, keep_scale, BM, BN)
    v = tl.load(
        value + (key_begin + c)[:, None].to(tl.int64) * value_row,
        mask=(c < last)[:, None] & (d < values)[None, :], other=0.0,
    )  # fmt: skip
    return p, v
