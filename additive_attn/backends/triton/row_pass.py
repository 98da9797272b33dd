"""Scores and dO V^T of a small backward in one kernel. Large calls take two (``score_tiles``, a
product of torch).

Where rows alone fill the GPU, or their keys are few, a program computes the tiles of some rows one
after the other, and stores scores and products. Then it loads them again, row by row, for P and G
(math.md, eq. 9). Else it computes one tile, and ``row_gradient`` computes the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import aligned, batch_entry, entry_offset
from additive_attn.backends.triton.launch import kernel, launch, registers
from additive_attn.backends.triton.masks import stored
from additive_attn.backends.triton.one_pass import product_precision
from additive_attn.backends.triton.opposite import Flags
from additive_attn.backends.triton.plan import Piece
from additive_attn.backends.triton.row_gradient import (
    row_gradients,
    row_pairs,
    row_sum,
    store_row_pairs,
)
from additive_attn.backends.triton.score_tiles import (
    is_kept,
    pair_scores,
    row_interval,
    special_tiles,
    store_tile,
)
from additive_attn.spec.call import Upstream


@triton.jit
def product(acc, x, y, PRECISION: tl.constexpr, TARGET: tl.constexpr):
    """Returns acc + x y. x and y of different dtypes are converted to that of the sums."""
    SAME: tl.constexpr = x.dtype == y.dtype
    if TARGET == "none" or not SAME:  # NumPy has no bfloat16
        x = x.to(acc.dtype)
        y = y.to(acc.dtype)
    return tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _store_products(
    to, stride, grad_out, go_row, go_column, value, value_row, value_column, row0, key0, rows,
    keys, values, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Stores dO V^T of a tile, rows and keys in order; a product takes at least 16 rows."""
    LEAST: tl.constexpr = 16 if BM < 16 else BM
    r = tl.arange(0, LEAST)
    i = (row0 + r)[:, None]
    j = (key0 + tl.arange(0, BN))[None, :]
    of_row = (i < rows) & (r < BM)[:, None]
    acc = tl.zeros([LEAST, BN], to.dtype.element_ty)
    for d0 in range(0, values, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(
            grad_out + i.to(tl.int64) * go_row + d[None, :].to(tl.int64) * go_column,
            mask=of_row & (d < values)[None, :],
            other=0.0,
        )
        y = tl.load(
            value + j.to(tl.int64) * value_row + d[:, None].to(tl.int64) * value_column,
            mask=(j < keys) & (d < values)[:, None],
            other=0.0,
        )
        acc = product(acc, x, y, PRECISION, TARGET)
    tl.store(to + i * stride + j, acc, mask=of_row & (j < stride))


@triton.jit
def _store_rows(
    scores, products, gradient, lse, grad_weights, gw_row, gw_column, grad_lse, gl_row, seed, n,
    threshold, keep_bits, row0, rows, row_padded, keys, key_padded, score_padded,
    BM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Stores G and P o D of BM rows, as ``row_gradient_kernel`` does."""
    ACC: tl.constexpr = scores.dtype.element_ty
    j = 4 * tl.arange(0, BLOCK // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    for r0 in range(row0, row0 + BM, ROWS):
        i = r0 + tl.arange(0, ROWS)
        row = i[:, None, None]
        inside = row < rows
        x = scores + row * score_padded
        dp = products + row * score_padded
        to = gradient + 4 * row
        given = grad_weights
        if grad_weights is not None:
            given += row.to(tl.int64) * gw_row
        base = tl.load(lse + i, mask=i < rows, other=0.0)[:, None, None]
        base = tl.where(tl.abs(base) == float("inf"), float("nan"), base)
        totals = tl.zeros([ROWS, BLOCK // 4, 4], ACC)
        deltas = tl.zeros([ROWS, BLOCK // 4, 4], ACC)
        for key0 in range(0, keys, BLOCK):
            p, g, factor, attended = row_pairs(
                x, dp, base, i, inside, j, score_padded, score_padded,
                given, gw_column, seed, n, threshold, keep_bits, 0, key0, ACC, BLOCK,
                TARGET,
            )  # fmt: skip
            totals += p
            deltas += p * g
        total = row_sum(totals)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        delta = row_sum(deltas) * inverse
        if grad_lse is not None:
            share = tl.load(grad_lse + i.to(tl.int64) * gl_row, mask=i < rows, other=0.0)
            delta -= share[:, None, None]
        for key0 in range(0, key_padded, BLOCK):
            p, g, factor, attended = row_pairs(
                x, dp, base, i, inside, j, score_padded, score_padded,
                given, gw_column, seed, n, threshold, keep_bits, 0, key0, ACC, BLOCK,
                TARGET,
            )  # fmt: skip
            store_row_pairs(
                x, to, p, g, factor, attended, inverse, delta, inside, j, key0,
                row_padded, key_padded, score_padded,
            )  # fmt: skip


@kernel
def row_pass_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    prepared, weight_outer, weight_inner,
    mask, mask_outer, mask_inner, mask_row, mask_column, block_tiles,
    lengths, length_outer, length_inner, length_row,
    value, value_outer, value_inner, value_row, value_column,
    grad_out, go_outer, go_inner, go_row, go_column,
    grad_weights, gw_outer, gw_inner, gw_row, gw_column,
    grad_lse, gl_outer, gl_inner, gl_row,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    lse, scores, products, gradient, flags,
    inner, rows, row_padded, keys, key_padded, score_padded, hidden, padded, values, left, right,
    splits, keys_per_split,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr, SPLIT: tl.constexpr,
    BD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    DIFFERENCE: tl.constexpr, PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """For BM rows of an entry, stores P o D in ``scores`` [entry][row][key], G in ``gradient`` as
    ``row_gradient_kernel`` does, and ``flags`` as ``score_kernel`` does. Without ``gradient``,
    stores scores of a range of their keys, and dO V^T in ``products``. ALIGNED: the values and dO
    of all entries are."""
    BM: tl.constexpr = RM * TM
    BN: tl.constexpr = RN * TN
    ACC: tl.constexpr = scores.dtype.element_ty
    row_tiles = row_padded // BM
    tile = row_tiles - 1 - tl.program_id(0) % row_tiles  # under a causal mask, the longest first
    row0 = tile * BM
    begin = tl.program_id(0) // row_tiles % splits * keys_per_split
    n, o, m = batch_entry(tl.program_id(0) // row_tiles // splits, inner)
    if lengths is not None:
        lengths += o * length_outer + m * length_inner
    if mask is not None:
        mask += o * mask_outer + m * mask_inner
    if grad_weights is not None:
        grad_weights += o * gw_outer + m * gw_inner
    if grad_lse is not None:
        grad_lse += o * gl_outer + m * gl_inner
    if seed is not None:
        seed += o * seed_outer + m * seed_inner
    at_weight = o * weight_outer + m * weight_inner
    scores += n * rows * score_padded
    products += n * rows * score_padded
    key_tiles = score_padded // BN
    flags += (n * tl.cdiv(rows, BM) + tile) * key_tiles
    low, high = row_interval(lengths, length_row, row0, rows, keys, left, right, RM, TM)
    end = tl.minimum(begin + keys_per_split, score_padded)
    for key0 in tl.range(begin, end, BN, disable_licm=True):
        computed = tl.max(tl.minimum(high, key0 + BN) - tl.maximum(low, key0)) > 0
        if block_tiles is not None:
            computed &= is_kept(
                mask, mask_row, mask_column, block_tiles, row0, key0, rows, keys, BM, BN
            )
        any_opposite = 0
        if computed:
            at_query = o * query_exp_outer + m * query_exp_inner
            at_key = o * key_exp_outer + m * key_exp_inner
            special = special_tiles(
                query_rows, key_rows, at_query, at_key, row0, key0, rows, keys, BM, BN, 1
            )
            score, attended, any_opposite = pair_scores(
                query + o * query_outer + m * query_inner, key + o * key_outer + m * key_inner,
                query_row, query_h, key_row, key_h, query_rows, key_rows, at_query, at_key,
                prepared, at_weight, low, high, mask, mask_row, mask_column, block_tiles,
                row0, key0, rows, keys, hidden, padded, special,
                RM, TM, RN, TN, SPLIT, DIFFERENCE, TARGET, ACC,
            )  # fmt: skip
            kept = stored(score, attended)
            store_tile(scores, kept, 0, row0, key0, rows, score_padded)
            _store_products(
                products, score_padded,
                grad_out + entry_offset(o, go_outer, m, go_inner, ALIGNED), go_row, go_column,
                value + entry_offset(o, value_outer, m, value_inner, ALIGNED), value_row,
                value_column, row0, key0, rows, keys, values, BM, BN, BD, PRECISION, TARGET,
            )  # fmt: skip
        else:
            nothing = tl.zeros([RM, RN, TM, TN], ACC)
            store_tile(scores, nothing - float("inf"), 0, row0, key0, rows, score_padded)
            store_tile(products, nothing, 0, row0, key0, rows, score_padded)
        tl.store(flags + key0 // BN, any_opposite, mask=row0 < rows)
    if gradient is not None:
        # Other threads have stored what this one loads.
        tl.debug_barrier()
        _store_rows(
            scores, products, gradient + n * row_padded * key_padded, lse + n * rows,
            grad_weights, gw_row, gw_column, grad_lse, gl_row, seed, n, threshold, keep_bits,
            row0, rows, row_padded, keys, key_padded, score_padded, BM, ROWS, BLOCK, TARGET,
        )  # fmt: skip


def row_pass(
    p: Problem, lse: Tensor, upstream: Upstream, gradient: Tensor
) -> tuple[Tensor, Flags]:
    """Fills G of all rows, padded. Returns P o D, padded, and the tiles with opposite pairs."""
    tile = tiles.row_pass_tile(
        p.entries, p.rows, p.keys, p.padded, p.values, p.dtype.itemsize, p.processors
    )
    if tile is not None:
        scores, _, flags = _launch(p, tile, lse, upstream, gradient)
        return scores, flags
    scores, products, flags = _launch(
        p, tiles.score_tile(p.rows), lse, Upstream(out=upstream.out), None
    )
    row_gradients(p, Piece(0, p.entries, 0, p.rows), lse, upstream, scores, products, gradient)
    return scores, flags


def _launch(
    p: Problem, tile: tiles.Tile, lse: Tensor, upstream: Upstream, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Flags]:
    """Returns scores, or with ``gradient`` P o D, and products, both padded, and the tiles with
    opposite pairs."""
    row_tiles, key_tiles = -(-p.rows // tile.rows), -(-p.keys // tile.keys)
    score_padded, splits = key_tiles * tile.keys, key_tiles
    row_padded, key_padded = row_tiles * tile.rows, 0
    if gradient is not None:
        splits, row_padded, key_padded = 1, gradient.shape[2], 4 * gradient.shape[1]
    scores, products = torch.empty(
        2, p.entries, p.rows, score_padded, dtype=p.accumulator, device=p.device
    )
    shape = p.entries, row_tiles, key_tiles
    flags = Flags(torch.empty(shape, dtype=torch.int32, device=p.device), tile.rows, tile.keys)
    grad_out = p.batched(upstream.out, 2)
    launch(
        row_pass_kernel, p.entries * (row_padded // tile.rows) * splits, scores,
        *p.inputs(), *p.prepared_arguments(), *p.mask_arguments(), *p.length_arguments(),
        p.value, *p.value_strides, *grad_out, *p.batched(upstream.weights, 2),
        *p.batched(upstream.lse, 1), *p.dropout_arguments(), lse, scores, products, gradient,
        flags.tiles, p.batch.inner, p.rows, row_padded, p.keys, key_padded, score_padded,
        p.hidden, p.padded, p.values, p.left, p.right, splits, score_padded // splits,
        **tile.sizes(), **tiles.row_pass_blocks(tile, p.values, key_padded),
        ALIGNED=aligned(*p.value_strides[:2], *grad_out[1:3]), PRECISION=product_precision(p),
        **p.form(), num_warps=tile.warps, num_stages=1,
        **registers(min(255, 2048 // tile.warps)),
    )  # fmt: skip
    return scores, products, flags
