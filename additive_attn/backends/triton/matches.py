"""Prepares what the matched form reads (math.md, eq. 29). Features are in the order of abs(w),
with the sign of w, so that two neighbours are a match: their weights differ little."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.numerics import exp_with_error, fused
from additive_attn.backends.triton.quad_layout import (
    quad_numbers,
    store_exponentials,
    store_quads,
)


@triton.jit
def quad_order(weight, stride_h, h0, hidden, BLOCK: tl.constexpr):
    """Returns a block of features in the order of the quads of the matched form, by abs(w), the
    largest first. Weights that differ only after 20 bits may have any order."""
    h = tl.arange(0, BLOCK)
    inside = h0 + h < hidden
    w = tl.load(weight + (h0 + h).to(tl.int64) * stride_h, mask=inside, other=0.0)
    bits = tl.abs(w.to(tl.float32)).to(tl.int32, bitcast=True)
    key = tl.where(inside, (bits & -BLOCK) | h, h - BLOCK)
    return h0 + (tl.sort(key, descending=True) & (BLOCK - 1))


@triton.jit
def store_quad_weight(
    weight, stride_h, order, to, hidden, padded, factor, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Stores abs(w) times ``factor`` in the order of the quads; WHOLE: in this ``order``."""
    for h0 in range(0, BLOCK if WHOLE else padded, BLOCK):
        if not WHOLE:
            order = quad_order(weight, stride_h, h0, hidden, BLOCK)
        u = tl.load(weight + order.to(tl.int64) * stride_h, mask=order < hidden, other=0.0)
        h = h0 + tl.arange(0, BLOCK)
        tl.store(to + h, tl.abs(u.to(tl.float32) * factor), mask=h < padded)


@triton.jit
def _halves(x):
    """Splits [GROUP, BLOCK / 4, 4] into even and odd features, [GROUP, BLOCK / 4, 2]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))


@triton.jit
def store_matches(v, w, h0, tile, quads, n, length_padded, padded, of_keys, TARGET: tl.constexpr):
    """Stores exponentials and products of features in the order of the quads, from h0. Returns
    what they add to both corrections. In a quad, features 0 and 1 match, and 3 and 2. The excess
    of the second match has the other sign, so that the sum of both is small."""
    v = tl.where(w < 0.0, -v, v)
    w = tl.abs(w)
    e, error = exp_with_error(v * tl.where(of_keys, 2.0, -2.0))
    store_exponentials(quads, e, h0, tile, n, length_padded, padded, of_keys, True)
    e_even, e_odd = _halves(e)
    error_even, error_odd = _halves(error)
    w_even, w_odd = _halves(w)
    first = (tl.arange(0, 2) == 0)[None, None, :]
    upper, lower = tl.where(first, w_even, w_odd), tl.where(first, w_odd, w_even)
    both = e_even * e_odd
    low = fused(e_even, e_odd, -both, TARGET) + (e_even * error_odd + e_odd * error_even)
    u = 2.0 * tl.where(of_keys, upper, lower)
    product = u * both
    lost = (fused(u, both, -product, TARGET) + u * low) / both
    if of_keys:
        quad = h0 // 4 + tl.arange(0, v.shape[1])[None, :, None]
        row = v.shape[0] * tile + tl.arange(0, v.shape[0])[:, None, None]
        after = tl.where(quad < padded // 4 - 1, quad + 1, 0)
        of_match = n * length_padded * quad_numbers(padded, 1, True) + 4 * row
        of_match += (padded // 4 + after // 2).to(tl.int64) * (4 * length_padded) + (
            quad + 1
        ) % 2 * 2
        of_match += tl.arange(0, 2)[None, None, :]
        tl.store(quads + of_match, product, mask=4 * quad < padded)
        matched = 0.25 * lost
    else:
        excess = upper - lower
        g = 2.0 * excess * tl.where(first, e_odd, e_even)
        products = tl.reshape(tl.join(product, g), e.shape)
        store_quads(quads + 8, products, h0, tile, n, length_padded, padded, -1, True)
        matched = -0.25 * lost - excess
    return w * (error / e), matched
