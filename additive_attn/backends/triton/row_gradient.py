"""G of a row: the gradient of its scores (math.md, eq. 9)."""

from __future__ import annotations

import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.dropout import keep_factors
from additive_attn.backends.triton.launch import kernel
from additive_attn.backends.triton.masks import attended_pairs, interval
from additive_attn.backends.triton.numerics import number


@kernel
def row_gradient_kernel(
    scores, products, gradient, lse,
    grad_weights, gw_outer, gw_inner, gw_row, gw_column,
    grad_lse, gl_outer, gl_inner, gl_row,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    inner, entry_begin, rows, row_begin, row_count, row_padded, key_begin, key_count, key_padded,
    score_padded, BLOCK: tl.constexpr,
):  # fmt: skip
    """``gradient`` becomes G in fours of keys, [key_padded / 4][row_padded][4], zeros up to its
    padded size, and ``scores`` P o D. ``products`` is dO V^T. P is divided by its sum, which takes
    out the rounding of lse."""
    ACC: tl.constexpr = scores.dtype.element_ty
    program = tl.program_id(0)
    r = program % row_padded
    n, o, m = batch_entry(entry_begin + program // row_padded, inner)
    entry = n - entry_begin
    i = row_begin + r
    inside = r < row_count
    scores += (entry * row_count + r) * score_padded
    products += (entry * row_count + r) * key_count
    gradient += entry * row_padded * key_padded + 4 * r
    b4 = 4 * tl.arange(0, BLOCK // 4)[:, None]
    fours = row_padded.to(tl.int64) * b4 + tl.arange(0, 4)[None, :]  # [BLOCK / 4, 4]
    if grad_weights is not None:
        grad_weights += o * gw_outer + m * gw_inner + i.to(tl.int64) * gw_row
    b = tl.arange(0, BLOCK)
    # An attended pair of a row whose lse is infinite is NaN, as in a softmax.
    base = tl.load(lse + n * rows + i, mask=inside, other=0.0)
    base = tl.where(tl.abs(base) == float("inf"), float("nan"), base)
    totals = tl.zeros([BLOCK], ACC)
    deltas = tl.zeros([BLOCK], ACC)
    inverse = 0.0
    delta = 0.0
    count = tl.where(inside, key_count, 0)
    for phase in tl.static_range(2):
        for key0 in range(0, count, BLOCK):
            j = key0 + b
            x = tl.load(scores + j, mask=j < key_count, other=float("-inf"))
            attended = x != float("-inf")
            p = tl.where(attended, tl.exp(x - base), 0.0)
            g = tl.load(products + j, mask=attended, other=0.0)
            factor = tl.full([BLOCK], 1.0, ACC)
            if seed is not None:
                word = tl.load(seed + o * seed_outer + m * seed_inner)
                row = i + tl.zeros([1], tl.int32)
                keep_scale = number(keep_bits).to(ACC)
                factor = keep_factors(
                    word, n, row, key_begin + key0, threshold, keep_scale, 1, BLOCK
                )
                factor = tl.reshape(factor, [BLOCK]).to(ACC)
                g *= factor
            if grad_weights is not None:
                place = grad_weights + (key_begin + j).to(tl.int64) * gw_column
                g += tl.load(place, mask=attended, other=0.0).to(ACC)
            if phase == 0:
                totals += p
                deltas += p * g
            else:
                p *= inverse
                g = tl.where(attended, p * (g - delta), 0.0)
                to = gradient + row_padded.to(tl.int64) * key0 + fours
                tl.store(to, tl.reshape(g, [BLOCK // 4, 4]), mask=key0 + b4 < key_padded)
                # A score may lie in several threads.
                tl.debug_barrier()
                tl.store(scores + j, p * factor, mask=j < key_count)
        if phase == 0:
            total = tl.sum(totals, 0)
            inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
            delta = tl.sum(deltas, 0) * inverse
            if grad_lse is not None:
                grad_lse += o * gl_outer + m * gl_inner + i.to(tl.int64) * gl_row
                delta -= tl.load(grad_lse, mask=inside, other=0.0)
    for key0 in range(tl.cdiv(count, BLOCK) * BLOCK, key_padded, BLOCK):
        to = gradient + row_padded.to(tl.int64) * key0 + fours
        tl.store(to, tl.zeros([BLOCK // 4, 4], ACC), mask=key0 + b4 < key_padded)


@kernel
def given_kernel(
    grad_scores, gs_outer, gs_inner, gs_row, gs_column,
    mask, mask_outer, mask_inner, mask_row, mask_column, tiles,
    lengths, length_outer, length_inner, length_row, gradient,
    inner, entry_begin, rows, row_begin, row_count, row_padded, keys, key_begin, key_padded,
    left, right, BLOCK: tl.constexpr,
):  # fmt: skip
    """``gradient`` becomes G as it is given, laid out as above, with zeros where a pair is masked,
    whatever lies there, and up to its padded size."""
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
