"""G of rows: the gradient of their scores before the scale."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.dropout import keep_factors
from additive_attn.backends.triton.launch import VARYING
from additive_attn.backends.triton.numerics import number


@triton.jit(do_not_specialize=VARYING)
def row_gradient_kernel(
    scores, products, gradient, lse,
    grad_weights, gw_outer, gw_inner, gw_row, gw_column,
    grad_lse, gl_outer, gl_inner, gl_row,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    inner, entry_begin, rows, row_begin, row_count, row_padded, key_begin, key_count, key_padded,
    score_padded,
    BLOCK: tl.constexpr, GRAD_WEIGHTS: tl.constexpr, GRAD_LSE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A row: scores become P o D, ``gradient`` G, with zeros up to its padded size. ``products``
    is dO V^T. P is divided by its sum, which takes out the rounding of lse."""
    program = tl.program_id(0)
    r = program % row_padded
    n, o, m = batch_entry(entry_begin + program // row_padded, inner)
    entry = n - entry_begin
    i = row_begin + r
    inside = r < row_count
    source = (entry * row_count + r) * score_padded
    product = (entry * row_count + r) * key_count
    j = tl.arange(0, BLOCK)
    base = tl.load(lse + n * rows + i, mask=inside, other=0.0)
    base = tl.where(base == float("inf"), float("nan"), base)
    base = tl.where(base == float("-inf"), 0.0, base)
    totals = tl.zeros([BLOCK], scores.dtype.element_ty)
    deltas = tl.zeros([BLOCK], scores.dtype.element_ty)
    count = tl.where(inside, key_count, 0)
    for key0 in range(0, count, BLOCK):
        p, g, factor = _probabilities(
            scores, products, grad_weights, gw_outer, gw_inner, gw_row, gw_column,
            seed, seed_outer, seed_inner, threshold, keep_bits,
            o, m, n, i, source, product, key_begin, key0, key_count, base,
            BLOCK, GRAD_WEIGHTS, DROPOUT,
        )  # fmt: skip
        totals += p
        deltas += p * g
    total = tl.sum(totals, 0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = tl.sum(deltas, 0) * inverse
    if GRAD_LSE:
        delta -= tl.load(
            grad_lse + o * gl_outer + m * gl_inner + i.to(tl.int64) * gl_row,
            mask=inside,
            other=0.0,
        )
    to = (entry * row_padded + r) * key_padded
    for key0 in range(0, count, BLOCK):
        p, g, factor = _probabilities(
            scores, products, grad_weights, gw_outer, gw_inner, gw_row, gw_column,
            seed, seed_outer, seed_inner, threshold, keep_bits,
            o, m, n, i, source, product, key_begin, key0, key_count, base,
            BLOCK, GRAD_WEIGHTS, DROPOUT,
        )  # fmt: skip
        p = p * inverse
        g = tl.where(p == 0.0, 0.0, p * (g - delta))
        tl.store(gradient + to + key0 + j, g, mask=key0 + j < key_padded)
        tl.store(
            scores + source + key0 + j,
            p * factor,
            mask=key0 + j < key_count,
        )
    for key0 in range(tl.cdiv(count, BLOCK) * BLOCK, key_padded, BLOCK):
        zeros = tl.zeros([BLOCK], scores.dtype.element_ty)
        tl.store(gradient + to + key0 + j, zeros, mask=key0 + j < key_padded)


@triton.jit
def _probabilities(
    scores, products, grad_weights, gw_outer, gw_inner, gw_row, gw_column,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    o, m, n, i, source, product, key_begin, key0, key_count, base,
    BLOCK: tl.constexpr, GRAD_WEIGHTS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """P, dP and D of some keys of a row; 0 where it does not attend."""
    j = key0 + tl.arange(0, BLOCK)
    here = j < key_count
    x = tl.load(scores + source + j, mask=here, other=float("-inf"))
    used = x != float("-inf")
    p = tl.where(used, tl.exp(x - base), 0.0)
    g = tl.load(products + product + j, mask=here & used, other=0.0)
    factor = tl.full([BLOCK], 1.0, p.dtype)
    if DROPOUT:
        word = tl.load(seed + o * seed_outer + m * seed_inner)
        factor = keep_factors(
            word,
            n,
            i + tl.zeros([1], tl.int32),
            key_begin + key0,
            threshold,
            number(keep_bits).to(p.dtype),
            1,
            BLOCK,
        )
        factor = tl.reshape(factor, [BLOCK]).to(p.dtype)
        g = tl.where(factor == 0.0, 0.0, g * factor)
    if GRAD_WEIGHTS:
        place = grad_weights + o * gw_outer + m * gw_inner + i.to(tl.int64) * gw_row
        upstream = tl.load(place + (key_begin + j).to(tl.int64) * gw_column, mask=here, other=0.0)
        g += tl.where(used, upstream.to(p.dtype), 0.0)
    return p, g, factor
