"""Attention of several queries in one pass over tiles of keys (math.md, section 4).

A program keeps some rows: their largest scores, the sums of their exponentials, and the weighted
sums of the values, which stay in registers, or where values are long in memory that only this
program touches. The scores of a tile never leave the registers, and the softmax stays in their
layout. Where rows alone would not fill the GPU the keys are split over programs.

A value that is not finite is seen when it has reached a sum, even times 0. Then the program starts
again, and takes from each tile first the finite values, then the others for the rows that attend
to them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import aligned, batch_entry, entry_offset
from additive_attn.backends.triton.dropout import keep_factors
from additive_attn.backends.triton.launch import (
    kernel,
    launch,
    matmul_precision,
    registers,
    target,
)
from additive_attn.backends.triton.masks import attending, stored, stored_top, tile_rows
from additive_attn.backends.triton.merging import (
    merge,
    merge_rows,
    softmax_inverse,
    softmax_lse,
)
from additive_attn.backends.triton.numerics import anew, exp, number
from additive_attn.backends.triton.plan import pass_splits
from additive_attn.backends.triton.prefetch import load_columns
from additive_attn.backends.triton.prepare import TICKETS
from additive_attn.backends.triton.score_tiles import (
    is_kept,
    pair_scores,
    row_interval,
    special_tiles,
    store_tile,
)
from additive_attn.backends.triton.value_sums import accumulate, as_tile, finish, often_enough


@triton.jit
def _of_rows(x, LEAST: tl.constexpr):
    """Reshapes [RM, TM] to [LEAST, 1]."""
    BM: tl.constexpr = x.shape[0] * x.shape[1]
    return often_enough(tl.reshape(tl.permute(x, [1, 0]), [BM, 1]), LEAST)


@triton.jit
def _row_results(
    top, total, low, high, mask, mask_row, mask_column, block_tiles, row0, first, last, rows,
    lse, tops, totals, part,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Stores the results of rows [RM, TM]. Returns the factor of their sums of values."""
    attends = attending(
        total == 0.0, low, high, mask, mask_row, mask_column, block_tiles, row0, first, last,
        RM, TM, RN, TN,
    )  # fmt: skip
    top = stored_top(top, total, attends)
    r = tile_rows(row0, RM, TM)
    if tops is None:
        tl.store(lse + r, softmax_lse(top, total), mask=r < rows)
        share = softmax_inverse(top, total)
    else:
        tl.store(tops + part + r, top, mask=r < rows)
        tl.store(totals + part + r, total, mask=r < rows)
        share = tl.full([RM, TM], 1.0, total.dtype)
    return share


@triton.jit
def _softmax_step(score, top, total, TARGET: tl.constexpr):
    """Returns e^{score - top} with the largest score so far, the factor that rescales earlier
    sums, that largest score, and the sum."""
    before = top
    top = tl.maximum(top, tl.max(tl.max(score, 1), 2))
    shift = tl.where(top == float("-inf"), 0.0, top)
    p = exp(score - shift[:, None, :, None], TARGET)
    shrink = exp(before - shift, TARGET)
    return p, shrink, top, total * shrink[:, :, None] + tl.sum(p, 1)


@triton.jit
def _kept(p, seed, n, row0, key0, threshold):
    """Returns P [RM, RN, TM, TN] where dropout keeps it, 0 elsewhere."""
    RM: tl.constexpr = p.shape[0]
    RN: tl.constexpr = p.shape[1]
    TM: tl.constexpr = p.shape[2]
    TN: tl.constexpr = p.shape[3]
    i = row0 + tl.arange(0, RM * TM)
    factors = keep_factors(tl.load(seed), n, i, key0, threshold, 1.0, RM * TM, RN * TN)
    return p * as_tile(factors, RM, TM, RN, TN)


@kernel
def attend_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    prepared, weight_outer, weight_inner,
    mask, mask_outer, mask_inner, mask_row, mask_column, block_tiles,
    lengths, length_outer, length_inner, length_row,
    value, value_outer, value_inner, value_row, value_column,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    out, sums, lse, tops, totals, scores, merged,
    inner, entries, rows, keys, hidden, padded, values, left, right, splits, keys_per_split,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr, SPLIT: tl.constexpr,
    BD: tl.constexpr, MEMORY: tl.constexpr, STORED: tl.constexpr, CHUNK: tl.constexpr,
    FLAGS: tl.constexpr, ALIGNED: tl.constexpr, DIFFERENCE: tl.constexpr, PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Some rows of an entry attend to a range of its keys. Without ``tops`` the range is all keys,
    and ``out`` and ``lse`` are final; else ``out`` is [split][entry][row], for ``merge_kernel``,
    or with ``merged`` the last program of these rows. STORED: the scores are kept. MEMORY: the
    sums of the values lie in ``sums``, as large as ``out``, BD columns at a time. FLAGS: tiles
    whose flags are loaded at once. ALIGNED: values of all entries begin at multiples of 16."""
    BM: tl.constexpr = RM * TM
    BN: tl.constexpr = RN * TN
    LEAST: tl.constexpr = 16 if BM < 16 else BM
    ACC: tl.constexpr = lse.dtype.element_ty
    ROUNDED: tl.constexpr = query.dtype.element_ty.primitive_bitwidth == 16
    row_tiles = tl.cdiv(rows, BM)
    program = tl.program_id(0)
    # Under a causal mask the longest rows come first.
    row0 = (row_tiles - 1 - program % row_tiles) * BM
    split = program // row_tiles % splits
    n, o, m = batch_entry(program // row_tiles // splits, inner)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, keys)
    at_weight = o * weight_outer + m * weight_inner
    at_query = o * query_exp_outer + m * query_exp_inner
    at_key = o * key_exp_outer + m * key_exp_inner
    query += o * query_outer + m * query_inner
    key += o * key_outer + m * key_inner
    value += entry_offset(o, value_outer, m, value_inner, ALIGNED)
    if lengths is not None:
        lengths += o * length_outer + m * length_inner
    if mask is not None:
        mask += o * mask_outer + m * mask_inner
    if seed is not None:
        seed += o * seed_outer + m * seed_inner
    low, high = row_interval(lengths, length_row, row0, rows, keys, left, right, RM, TM)
    first = tl.maximum(tl.min(low) // BN * BN, begin)
    last = tl.minimum(tl.max(high), end)
    part = (tl.cast(split, tl.int64) * entries + n) * rows
    parts = out + part * values
    sums += part * values
    keep_scale = number(keep_bits).to(ACC) if seed is not None else 1.0
    attempt = 0
    while attempt < 2:
        again = attempt > 0
        started, special = 0, 0
        top = tl.full([RM, TM], float("-inf"), ACC)
        total = tl.zeros([RM, TM, TN], ACC)
        acc = tl.zeros([LEAST, BD], ACC)
        start, stop = begin if STORED else first, end if STORED else last
        for key0 in tl.range(start, stop, BN, disable_licm=True):
            tile = (key0 - start) // BN
            if tile % FLAGS == 0:
                special = special_tiles(
                    query_rows, key_rows, at_query, at_key, row0, key0, rows, keys, BM, BN, FLAGS
                )
            computed = True
            if STORED or block_tiles is not None:
                computed = (key0 < last) & (key0 + BN > first)
                if block_tiles is not None:
                    computed &= is_kept(
                        mask, mask_row, mask_column, block_tiles, row0, key0, rows, keys, BM, BN
                    )
            if computed:
                from_key, to_key = row_interval(
                    lengths, length_row, anew(row0, tile), rows, keys, left, right, RM, TM
                )
                score, attended, _any = pair_scores(
                    query, key, query_row, query_h, key_row, key_h, query_rows, key_rows,
                    at_query, at_key, prepared, at_weight,
                    from_key, to_key, mask, mask_row, mask_column, block_tiles, anew(row0, tile),
                    key0, rows, keys, hidden, padded, (special >> (tile % FLAGS)) & 1,
                    RM, TM, RN, TN, SPLIT, DIFFERENCE, TARGET, ACC,
                )  # fmt: skip
                if STORED:
                    store_tile(scores, stored(score, attended), n, row0, key0, rows, keys)
                lines = None
                if MEMORY and TARGET == "cuda" and ACC == tl.float32:
                    lines = load_columns(
                        value, value_row, value_column, key0, last, sums, anew(row0, tile), rows,
                        started, 0, values, BM, BN, BD,
                    )  # fmt: skip
                score = tl.where(attended, score, float("-inf"))
                p, shrink, top, total = _softmax_step(score, top, total, TARGET)
                if seed is not None:
                    p = _kept(p, seed, n, row0, key0, threshold)
                acc = accumulate(
                    acc, _of_rows(shrink, LEAST), p, attended, sums, anew(row0, tile), rows,
                    started, lines, value, value_row, value_column, key0, last, values, again,
                    BM, BD, MEMORY, ROUNDED, PRECISION, TARGET,
                )  # fmt: skip
                started = 1
            elif STORED:
                minus = tl.full([RM, RN, TM, TN], float("-inf"), ACC)
                store_tile(scores, minus, n, row0, key0, rows, keys)

        share = keep_scale * _row_results(
            top, tl.sum(total, 2), low, high, mask, mask_row, mask_column, block_tiles,
            row0, first, last, rows, lse + n * rows, tops, totals, part, RM, TM, RN, TN,
        )  # fmt: skip
        nonfinite = finish(
            acc, _of_rows(share, LEAST), parts, sums, row0, rows, started, values, BM, BD, MEMORY
        )
        attempt = tl.where(nonfinite != 0, attempt + 1, 2)

    if merged is not None:
        merge_rows(
            prepared.tickets + n * row_tiles + row0 // BM, out, tops, totals, merged, lse,
            n, row0, entries, rows, values, splits, BM, BD, CHUNK,
        )  # fmt: skip


def attend(p: Problem, need_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attends. Requires at least one entry, row and key."""
    shape = (*p.batch.shape, p.rows)
    count = p.entries * p.rows
    out = torch.empty(*shape, p.values, dtype=p.dtype, device=p.device)
    lse = torch.empty(shape, dtype=p.accumulator, device=p.device)
    weights = out.new_empty((*shape, p.keys) if need_weights else (0,))
    size = p.dtype.itemsize
    # A range of keys has two tiles at least.
    least = -(-p.processors // (p.entries * max(1, p.keys // 128)))
    tile = tiles.attend_tile(p.rows, p.padded, p.wide, p.values, least, size)
    columns = tiles.attend_columns(p.values, p.wide, tile, size)
    programs = p.entries * -(-p.rows // tile.rows)
    splits, per_split = pass_splits(
        programs, p.keys, tile.keys, p.processors * max(1, 8 // tile.warps)
    )
    parts, tops, totals, scores, merged = out, None, None, None, None
    if splits > 1 or need_weights:
        parts = lse.new_empty(splits, count, p.values)
        tops, totals = lse.new_empty(2, splits, count)
    if need_weights:
        scores = lse.new_empty(count, p.keys)
    chunk = 0
    if splits > 1 and not need_weights and programs <= TICKETS.value:
        chunk = tiles.merged_ranges(tile, columns, p.values, splits)
        merged = out if chunk else None
    memory = columns < p.values
    sums = (
        torch.empty_like(parts, dtype=lse.dtype) if memory and parts.dtype != lse.dtype else parts
    )
    launch(
        attend_kernel, programs * splits, lse,
        *p.inputs(), *p.prepared_arguments(), *p.mask_arguments(), *p.length_arguments(),
        p.value, *p.value_strides, *p.dropout_arguments(),
        parts, sums, lse, tops, totals, scores, merged, p.batch.inner, p.entries, p.rows, p.keys,
        p.hidden, p.padded, p.values, p.left, p.right, splits, per_split,
        **tile.sizes(), BD=columns, MEMORY=memory, STORED=need_weights, CHUNK=chunk,
        FLAGS=tiles.flag_tiles(tile, min(per_split, p.keys)),
        ALIGNED=aligned(*p.value_strides[:2]), PRECISION=product_precision(p),
        **p.form(), num_warps=tile.warps, num_stages=1, **registers(min(255, 2048 // tile.warps)),
    )  # fmt: skip
    if tops is not None and totals is not None and merged is None:
        given = weights if need_weights else None
        merge(p, count, splits, parts, tops, totals, scores, out, given, lse)
    return out, weights, lse


def product_precision(p: Problem) -> str:
    """Returns the precision of products with the values. Three products of TF32 are as exact as
    float32."""
    if target() != "cuda" or p.dtype != torch.float32:
        return "ieee"
    return "tf32" if matmul_precision() == "tf32" else "tf32x3"
