"""The softmax of rows of scores, and the weighted sum of the values (math.md, eq. 2)."""

from __future__ import annotations

import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.dropout import keep_factor, keep_factors
from additive_attn.backends.triton.launch import kernel
from additive_attn.backends.triton.masks import overflowed
from additive_attn.backends.triton.numerics import number


@kernel
def lse_kernel(
    scores, lse, tops, inverses, weights, entry_begin, rows, row_begin, row_count, keys, key_begin,
    key_count, score_padded, BLOCK: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of a row of scores, and its softmax unless ``weights`` is None. The largest
    score and 1 / sum are kept apart too: beside a score of -1e9, with which many models mask, lse
    cannot hold the logarithm of the sum."""
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
    top = tl.max(maximum, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp(maximum - shift), 0)
    none = (total == 0.0) | overflowed(top)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    inverse = tl.where(overflowed(top), float("nan"), inverse)
    tl.store(lse + row, tl.where(none, float("-inf"), shift + tl.log(total)))
    tl.store(tops + program, shift)
    tl.store(inverses + program, inverse)
    if weights is not None:
        weights += row * keys + key_begin
        for key0 in range(0, key_count, BLOCK):
            inside = key0 + j < key_count
            x = tl.load(scores + key0 + j, mask=inside, other=float("-inf"))
            p = tl.where(x == float("-inf"), 0.0, tl.exp(x - shift) * inverse)
            tl.store(weights + key0 + j, p.to(weights.dtype.element_ty), mask=inside)


@kernel
def value_kernel(
    scores, tops, inverses, value, value_outer, value_inner, value_row, value_column,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    out, inner, entries, entry_begin, row_begin, row_count, key_begin, key_count,
    score_padded, values, left, right, splits, keys_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SPARSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split][entry][row] = sum_j P_ij D_ij value_j over a range of keys.

    A value that is not finite is left out first: 0 * Inf would reach the rows that may not attend
    to it. Where there was one, a second loop adds such values to the rows that may."""
    row_tiles = tl.cdiv(row_count, BM)
    value_tiles = tl.cdiv(values, BD)
    program = tl.program_id(0)
    row0 = program % row_tiles * BM
    program = program // row_tiles
    d = program % value_tiles * BD + tl.arange(0, BD)
    program = program // value_tiles
    split = program % splits
    n, o, m = batch_entry(entry_begin + program // splits, inner)
    entry = n - entry_begin
    r = row0 + tl.arange(0, BM)
    i = row_begin + r
    top = tl.load(tops + entry * row_count + r, mask=r < row_count, other=0.0)[:, None]
    begin = split * keys_per_split
    first = tl.maximum(row_begin + row0 - left, key_begin) - key_begin
    last = tl.minimum(row_begin + row0 + BM + right, key_begin + key_count) - key_begin
    first = tl.maximum(begin, first // BN * BN)
    last = tl.minimum(begin + keys_per_split, last)
    scores += (entry * row_count + r)[:, None] * score_padded
    inside = (r < row_count)[:, None]
    value += o * value_outer + m * value_inner + d[None, :].to(tl.int64) * value_column
    if seed is not None:
        seed += o * seed_outer + m * seed_inner
    acc = tl.zeros([BM, BD], scores.dtype.element_ty)
    nonfinite = tl.zeros([BN, BD], acc.dtype)
    for k0 in range(first, last, BN):
        c = k0 + tl.arange(0, BN)
        # What lies beyond the last key is -inf.
        x = tl.load(scores + c[None, :], mask=inside, other=float("-inf"))  # [BM, BN]
        if not SPARSE or tl.max(tl.max((x != float("-inf")).to(tl.int32), 1), 0) != 0:
            p = tl.where(x == float("-inf"), 0.0, tl.exp(x - top))
            if seed is not None:
                keep_scale = number(keep_bits).to(p.dtype)
                p *= keep_factors(
                    tl.load(seed), n, i, key_begin + k0, threshold, keep_scale, BM, BN
                )
            v = tl.load(  # [BN, BD]
                value + (key_begin + c)[:, None].to(tl.int64) * value_row,
                mask=(c < last)[:, None] & (d < values)[None, :], other=0.0,
            ).to(acc.dtype)  # fmt: skip
            nonfinite += v * 0.0  # NaN from the first number on that is not finite
            v = tl.where(tl.abs(v) < float("inf"), v, 0.0)
            if BM == 1:
                acc += tl.sum(tl.reshape(p, [BN])[:, None] * v, 0)[None, :]
            else:
                acc = tl.dot(p, v, acc, input_precision=PRECISION)
    if tl.max((nonfinite != 0.0).to(tl.int32)) != 0:
        for c in range(first, last):
            x = tl.load(scores + c, mask=inside, other=float("-inf"))  # [BM, 1]
            p = tl.exp(x - top)
            if seed is not None:
                keep_scale = number(keep_bits).to(p.dtype)
                keep = keep_factor(tl.load(seed), n, i, key_begin + c, threshold, keep_scale)
                p *= keep[:, None]
            v = tl.load(  # [BN, BD]
                value + (key_begin + tl.cast(c, tl.int64)) * value_row,
                mask=(d < values)[None, :], other=0.0,
            ).to(acc.dtype)  # fmt: skip
            attended = (x != float("-inf")) & ((tl.abs(v) < float("inf")) == 0)
            acc += tl.where(attended, p * v, 0.0)
    acc *= tl.load(inverses + entry * row_count + r, mask=r < row_count, other=0.0)[:, None]
    row = (split * entries + entry) * row_count + r
    tl.store(
        out + row[:, None] * values + d[None, :], acc.to(out.dtype.element_ty),
        mask=inside & (d < values)[None, :],
    )  # fmt: skip
