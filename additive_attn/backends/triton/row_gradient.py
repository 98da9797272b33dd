"""G of a row: the gradient of its scores (math.md, eq. 9)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.dropout import keep_factors
from additive_attn.backends.triton.launch import kernel, launch, target
from additive_attn.backends.triton.masks import attended_pairs, interval
from additive_attn.backends.triton.numerics import exp, number
from additive_attn.backends.triton.plan import Piece, splits
from additive_attn.spec.call import Upstream


@triton.jit
def row_pairs(
    scores, products, base, i, inside, j, score_padded, product_row,
    grad_weights, gw_column, seed, n, threshold, keep_bits, key_begin, key0,
    ACC: tl.constexpr, BLOCK: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns P before it is divided by its sum, dP, the dropout factors, and which are attended,
    of keys key0 + j: [ROWS, BLOCK / 4, 4]."""
    ROWS: tl.constexpr = base.shape[0]
    c = key0 + j
    x = tl.load(scores + c, mask=inside & (c < score_padded), other=float("-inf"))
    g = tl.load(products + c, mask=inside & (c < product_row), other=0.0)
    attended = x != float("-inf")  # -inf is stored beyond the last key too
    p = tl.where(attended, exp(x - base, TARGET), 0.0)
    factor = tl.full([1, 1, 1], 1.0, ACC)
    if seed is not None:
        factor = keep_factors(
            tl.load(seed), n, i, key_begin + key0, threshold, number(keep_bits).to(ACC),
            ROWS, BLOCK,
        )  # fmt: skip
        factor = tl.reshape(factor.to(ACC), [ROWS, BLOCK // 4, 4])
        g *= factor
    if grad_weights is not None:
        place = grad_weights + (key_begin + c).to(tl.int64) * gw_column
        g += tl.load(place, mask=attended, other=0.0).to(ACC)
    return p, tl.where(attended, g, 0.0), factor, attended


@triton.jit
def store_row_pairs(
    scores, gradient, p, g, factor, attended, inverse, delta, inside, j, key0,
    row_padded, key_padded, score_padded,
):  # fmt: skip
    # Masked pairs are excluded before the product: 0 * NaN is NaN.
    p *= tl.where(attended, inverse, 0.0)
    g = tl.where(attended, p * (g - delta), 0.0)
    c = key0 + j
    to = gradient + row_padded.to(tl.int64) * (key0 + j // 4 * 4) + j % 4
    tl.store(to, g, mask=c < key_padded)
    # Several threads may load the same score.
    tl.debug_barrier()
    tl.store(scores + c, p * factor, mask=inside & (c < score_padded))


@triton.jit
def row_sum(x):
    """Sums [ROWS, BLOCK / 4, 4] to [ROWS, 1, 1]."""
    return tl.sum(tl.sum(x, 2), 1)[:, None, None]


@kernel
def row_gradient_kernel(
    scores, products, gradient, lse, sums,
    grad_weights, gw_outer, gw_inner, gw_row, gw_column,
    grad_lse, gl_outer, gl_inner, gl_row,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    inner, entry_begin, rows, row_begin, row_count, row_padded, key_begin, key_count, key_padded,
    score_padded, product_row, splits, keys_per_split,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, PHASE: tl.constexpr,
    SPLITS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Stores G in ``gradient`` by fours of keys, [key_padded / 4][row_padded][4], with zeros up to
    its padded size, and P o D in ``scores``. ``products`` is dO V^T. P is divided by its sum,
    which removes the rounding of lse. WHOLE: BLOCK keys are all. PHASE 1 stores the sums of a
    range of keys in ``sums``, [2][split][row], which PHASE 2 loads; 0: both at once, of all
    keys."""
    ACC: tl.constexpr = scores.dtype.element_ty
    program = tl.program_id(0)
    split = program % splits
    tile_rows = row_padded // ROWS
    tile = program // splits
    r = tile % tile_rows * ROWS + tl.arange(0, ROWS)
    n, o, m = batch_entry(entry_begin + tile // tile_rows, inner)
    entry = n - entry_begin
    of_row = r < row_count
    i = row_begin + r
    row = r[:, None, None].to(tl.int64)
    inside = of_row[:, None, None]
    scores += entry * row_count * score_padded + row * score_padded
    products += entry * row_count * product_row + row * product_row
    gradient += entry * row_padded * key_padded + 4 * row
    j = 4 * tl.arange(0, BLOCK // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    if grad_weights is not None:
        grad_weights += o * gw_outer + m * gw_inner + (row_begin + row) * gw_row
    if seed is not None:
        seed += o * seed_outer + m * seed_inner
    # P of an attended pair is NaN where the lse of its row is infinite, as in a softmax.
    base = tl.load(lse + n * rows + i, mask=of_row, other=0.0)[:, None, None]
    base = tl.where(tl.abs(base) == float("inf"), float("nan"), base)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, key_padded)
    if WHOLE:
        p, g, factor, attended = row_pairs(
            scores, products, base, i, inside, j, score_padded, product_row,
            grad_weights, gw_column, seed, n, threshold, keep_bits, key_begin, 0, ACC, BLOCK,
            TARGET,
        )  # fmt: skip
        total = row_sum(p)
        delta = row_sum(p * g)
    elif PHASE < 2:
        totals = tl.zeros([ROWS, BLOCK // 4, 4], ACC)
        deltas = tl.zeros([ROWS, BLOCK // 4, 4], ACC)
        for key0 in range(begin, tl.minimum(end, key_count), BLOCK):
            p, g, factor, attended = row_pairs(
                scores, products, base, i, inside, j, score_padded, product_row,
                grad_weights, gw_column, seed, n, threshold, keep_bits, key_begin, key0,
                ACC, BLOCK, TARGET,
            )  # fmt: skip
            totals += p
            deltas += p * g
        total = row_sum(totals)
        delta = row_sum(deltas)
    place = sums
    if sums is not None:
        row_total = tl.num_programs(0) // splits * ROWS
        place += tile * ROWS + tl.arange(0, ROWS)[:, None, None]
    if PHASE == 1:
        tl.store(place + split * row_total, total)
        tl.store(place + (splits + split) * row_total, delta)
    else:
        if PHASE == 2:
            s = tl.arange(0, SPLITS)[None, :, None]
            total = tl.load(place + s * row_total, mask=s < splits, other=0.0)
            delta = tl.load(place + (splits + s) * row_total, mask=s < splits, other=0.0)
            total, delta = row_sum(total), row_sum(delta)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        delta *= inverse
        if grad_lse is not None:
            grad_lse += o * gl_outer + m * gl_inner + i.to(tl.int64) * gl_row
            delta -= tl.load(grad_lse, mask=of_row, other=0.0)[:, None, None]
        if WHOLE:
            store_row_pairs(
                scores, gradient, p, g, factor, attended, inverse, delta, inside, j, 0,
                row_padded, key_padded, score_padded,
            )  # fmt: skip
        else:
            for key0 in range(begin, end, BLOCK):
                p, g, factor, attended = row_pairs(
                    scores, products, base, i, inside, j, score_padded, product_row,
                    grad_weights, gw_column, seed, n, threshold, keep_bits, key_begin, key0,
                    ACC, BLOCK, TARGET,
                )  # fmt: skip
                store_row_pairs(
                    scores, gradient, p, g, factor, attended, inverse, delta, inside, j, key0,
                    row_padded, key_padded, score_padded,
                )  # fmt: skip


@kernel
def given_kernel(
    grad_scores, gs_outer, gs_inner, gs_row, gs_column,
    mask, mask_outer, mask_inner, mask_row, mask_column, tiles,
    lengths, length_outer, length_inner, length_row, gradient,
    inner, entry_begin, rows, row_begin, row_count, row_padded, keys, key_begin, key_padded,
    left, right, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies G as it is given to ``gradient``, laid out as above, with zeros where a pair is
    masked, whatever is given there, and up to its padded size."""
    program = tl.program_id(0)
    r = program % row_padded
    n, o, m = batch_entry(entry_begin + program // row_padded, inner)
    gradient += (n - entry_begin) * row_padded * key_padded + 4 * r
    if mask is not None:
        mask += o * mask_outer + m * mask_inner
    if lengths is not None:
        lengths += o * length_outer + m * length_inner
    # Rows beyond those of the piece attend to nothing.
    i = tl.where(r < row_count, row_begin + r, rows) + tl.zeros([1], tl.int32)
    low, high = interval(lengths, length_row, i, rows, keys, left, right)
    low, high, i = low[:, None], high[:, None], i[:, None]
    grad_scores += o * gs_outer + m * gs_inner + i.to(tl.int64) * gs_row
    for key0 in range(0, key_padded, BLOCK):
        c = key0 + tl.arange(0, BLOCK)
        j = (key_begin + c)[None, :]
        _bias, attended = attended_pairs(low, high, mask, mask_row, mask_column, tiles, i, j)
        place = grad_scores + j.to(tl.int64) * gs_column
        g = tl.load(place, mask=attended, other=0.0).to(gradient.dtype.element_ty)  # [1, BLOCK]
        to = gradient + (c // 4).to(tl.int64) * (4 * row_padded) + c % 4
        tl.store(to[None, :], g, mask=(c < key_padded)[None, :])


def row_gradients(
    p: Problem, piece: Piece, lse: Tensor, upstream: Upstream, scores: Tensor, products: Tensor,
    gradient: Tensor,
) -> None:  # fmt: skip
    """Fills G of a piece, padded, and replaces its scores by P o D."""
    key, end = p.key_range(piece)
    key_padded, row_padded = 4 * gradient.shape[1], gradient.shape[2]
    tile = tiles.row_tile(key_padded, p.wide)
    programs = piece.entries * row_padded // tile["ROWS"]
    ranges, per_range, sums = 1, key_padded, None
    if not tile["WHOLE"]:
        ranges, per_range = splits(programs, key_padded, tile["BLOCK"], p.processors)
    if ranges > 1:
        sums = torch.empty(
            2, ranges, piece.entries, row_padded, dtype=scores.dtype, device=scores.device
        )
    for phase in (1, 2) if ranges > 1 else (0,):
        launch(
            row_gradient_kernel, programs * ranges, scores,
            scores, products, gradient, lse, sums, *p.batched(upstream.weights, 2),
            *p.batched(upstream.lse, 1), *p.dropout_arguments(),
            p.batch.inner, piece.entry, p.rows, piece.row, piece.rows, row_padded,
            key, end - key, key_padded, scores.shape[-1], products.shape[-1], ranges, per_range,
            **tile, PHASE=phase, SPLITS=tiles.power_of_two(ranges), TARGET=target(),
        )  # fmt: skip
