"""The operator ``additive_attn::forward`` on a GPU.

A bounded number of scores at a time, so few that they stay in the second-level cache: the scores
of all pairs, a tile per program; the log-sum-exp of each row; the weighted sum of the values, the
keys split over programs where rows alone would not fill the machine. So the score kernel has all
registers to itself: with the accumulators of an online softmax beside its tiles it spilled, or
spent more instructions per tanh, in every shape that was tried. One query per entry has kernels of
its own (``single.py``)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import configs, single
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.launch import batch_entry, launch, target
from additive_attn.backends.triton.numerics import keep_factor, keep_factors, number


@triton.jit(do_not_specialize=configs.VARYING)
def _lse_kernel(
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


@triton.jit(do_not_specialize=configs.VARYING)
def _value_kernel(
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


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    p = Problem(query, key, value, weight, attn_mask, lengths, seed, left, right, dropout_p, scale)
    shape = (*p.batch.shape, p.rows)
    if p.entries == 0 or p.rows == 0 or p.keys == 0:
        weights = query.new_zeros((*shape, p.keys) if need_weights else (0,))
        lse = query.new_full(shape, -torch.inf, dtype=p.accumulator)
        return query.new_zeros((*shape, p.values)), weights, lse
    if p.rows == 1:
        return single.forward(p, need_weights)
    weights = query.new_zeros((*shape, p.keys) if need_weights else (0,))
    lse = query.new_empty(shape, dtype=p.accumulator)
    tile = configs.value_tile(p.rows, p.wide)
    out = query.new_empty((*shape, p.values))
    flat = out.view(p.entries, p.rows, p.values)
    for entry, entries, row, rows in p.chunks():
        begin, end = p.key_range(row, row + rows)
        count = end - begin
        scores = p.scores(entry, entries, row, rows, begin, count)
        tops, inverses = lse.new_empty(2, entries * rows)
        launch(
            _lse_kernel, entries * rows, scores,
            scores, lse, tops, inverses, weights, entry, p.rows, row, rows, p.keys, begin, count,
            scores.shape[-1], NEED_WEIGHTS=need_weights, **configs.row_block(count),
        )  # fmt: skip
        programs = entries * -(-rows // tile["BM"]) * -(-p.values // tile["BD"])
        splits, per_split = configs.splits(programs, count, tile["BN"], p.processors)
        # Consecutive in memory: some rows of one entry, or all rows of some entries.
        part = flat[entry : entry + entries, row : row + rows]
        parts = part if splits == 1 else scores.new_empty(splits, *part.shape)
        launch(
            _value_kernel, programs * splits, scores,
            scores, tops, inverses, p.value, *p.value_strides, *p.dropout_arguments(),
            parts, p.batch.inner, entries, entry, row, rows, begin, count,
            scores.shape[-1], p.values, p.left, p.right, splits, per_split,
            DROPOUT=p.seed is not None, PRECISION=precision(p), **tile,
        )  # fmt: skip
        if splits > 1:
            part.copy_(parts.sum(0))
        del scores  # before the next ones are allocated
    return out, weights, lse


def precision(p: Problem) -> str:
    """TF32 holds 16-bit numbers exactly; for float32 the user decides."""
    if target() == "hip":
        return "ieee"
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if p.dtype in (torch.float16, torch.bfloat16) or allowed else "ieee"
