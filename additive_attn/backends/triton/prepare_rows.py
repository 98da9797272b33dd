"""Prepares a group of queries or of keys.

With a = e^{-2q} and b = e^{2k} a pair (i, j) costs one addition per feature and a share of one
reciprocal (math.md, eq. 3, 4). Both are rounded. To first order, with the relative roundings rho,

    tanh(q + k) = t + (1 - t^2) / 2 (rho_b - rho_a)

which matters where t is small: there 1 - t^2 is near 1, and one correction per row and one per key
remove it from the scores (math.md, eq. 8). From the gradient of the weight, where the roundings of
a row or a key accumulate over all its pairs, they are always removed.

All t of a tile are small where all |q|, |k| <= 1. They are small also for an opposite pair, whose
q is near -k in every feature that matters, but its q and k are not. A ``sketch`` of rows and keys
identifies such pairs without their features (``opposite.py``).

Exponentials are stored in ``quads`` of features for passes over pairs (``quad_layout.py``): there
neighbouring threads load neighbouring rows, 16 bytes each. Passes over features load rows. More
than DIFFERENCE_MAX_FEATURES are in another order in the quads (``matches.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.matches import quad_order, store_matches
from additive_attn.backends.triton.numerics import (
    exp_with_error,
    opposite_limit,
    power,
    weight_exponent,
)
from additive_attn.backends.triton.quad_layout import store_exponentials

SAFE = tl.constexpr(10.0)  # (e^{2 SAFE} + e^{2 SAFE})^4 < 2^120
STEP = tl.constexpr(4)  # the gradient's loops take so many rows at a time, and begin anywhere
SKETCH = tl.constexpr(32)  # numbers of a sketch
GROUP = tl.constexpr(8)  # rows that share flags; lengths are padded to whole groups
SMALL = tl.constexpr(1)  # in the flags of a group: one of its rows has no |x| > 1
UNSAFE = tl.constexpr(256)  # the same: not within SAFE; so far apart that flags may be added up
ROWS = tl.constexpr(1)  # bits of what is stored
QUADS = tl.constexpr(2)


@triton.jit
def padded_length(length):
    """Returns LP of ``length`` rows."""
    return (length + (STEP + GROUP - 2)) // GROUP * GROUP


@triton.jit
def largest_exponent(weight, stride_h, hidden, padded, BLOCK: tl.constexpr):
    """Returns the ``weight_exponent`` of the largest finite |w|."""
    most = tl.zeros([BLOCK], tl.float32)
    for h0 in range(0, padded, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        w = tl.load(weight + h.to(tl.int64) * stride_h, mask=h < hidden, other=0.0)
        w = tl.abs(w.to(tl.float32))
        most = tl.maximum(most, tl.where(w < float("inf"), w, 0.0))
    return weight_exponent(tl.max(most, 0))


@triton.jit
def _load_rows(source, stride_h, weight, weight_h, f, inside, hidden):
    """Loads x of a group of rows and w, features f, both [GROUP, BLOCK / 4, 4], lest x take the
    layout of w."""
    f = f.to(tl.int64)
    v = tl.load(source + f * stride_h, mask=inside & (f < hidden), other=0.0)
    w = tl.load(tl.broadcast_to(weight + f * weight_h, v.shape), mask=f < hidden, other=0.0)
    return v.to(tl.float32), w.to(tl.float32)


@triton.jit
def _row_sums(v, w, f, largest, sums, squares):
    """Returns the largest |x|, and the sums of a sketch and of w^2, with these features."""
    # A comparison with NaN is false: NaN counts as infinite.
    absolute = tl.abs(v)
    absolute = tl.where(absolute < float("inf"), absolute, float("inf"))
    signed = tl.where((f.to(tl.uint32) * 2654435769) >> 31 != 0, -w, w)
    return tl.maximum(largest, absolute), sums + signed * v, squares + w * w


@triton.jit
def _store_exponentials(
    v, w, h0, h, rows, at, of_keys, tile, n, length_padded, padded, stored,
    MATCHED: tl.constexpr,
):  # fmt: skip
    """Stores the exponentials of features h0 + h, of what is ``stored``, in quads unless MATCHED.
    Returns what their roundings add to the correction."""
    e, error = exp_with_error(v * tl.where(of_keys, 2.0, -2.0))
    f = h0 + h
    if stored & ROWS != 0:
        tl.store(rows.exponential + at * padded + f, e, mask=f < padded)
    if not MATCHED:
        if stored & QUADS != 0:
            store_exponentials(rows.quads, e, h0, tile, n, length_padded, padded, of_keys, False)
    return w * (error / e)


@triton.jit
def _prepare_rows(
    x, stride_row, stride_h, weight, weight_h, order, rows, of_keys, n, tile, length,
    length_padded, hidden, padded, stored,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, MATCHED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Prepares a group of rows, [GROUP, BLOCK / 4, 4] at a time: threads load and store four
    features of neighbouring rows, in every layout. WHOLE: BLOCK features are all, and ``order`` is
    their order in quads. Sums stay apart per thread until the loops end."""
    FOURS: tl.constexpr = BLOCK // 4
    row = tile * GROUP + tl.arange(0, GROUP)
    h = 4 * tl.arange(0, FOURS)[None, :, None] + tl.arange(0, 4)[None, None, :]
    inside = (row < length)[:, None, None]
    source = x + row[:, None, None].to(tl.int64) * stride_row
    largest = tl.zeros([GROUP, FOURS, 4], tl.float32)
    sums = tl.zeros([GROUP, FOURS, 4], tl.float32)
    squares = tl.zeros([GROUP, FOURS, 4], tl.float32)
    if WHOLE:
        v, w = _load_rows(source, stride_h, weight, weight_h, h, inside, hidden)
        factor = power(
            -weight_exponent(tl.max(tl.where(tl.abs(w) < float("inf"), tl.abs(w), 0.0)))
        )
        w *= factor
        largest, sums, squares = _row_sums(v, w, h, largest, sums, squares)
    else:
        factor = power(-largest_exponent(weight, weight_h, hidden, padded, BLOCK))
        for h0 in range(0, padded, BLOCK):
            v, w = _load_rows(source, stride_h, weight, weight_h, h0 + h, inside, hidden)
            largest, sums, squares = _row_sums(v, w * factor, h0 + h, largest, sums, squares)
    most = tl.max(tl.max(largest, 2), 1)
    at = n * length_padded + row
    tl.store(rows.size + at, most)
    if stored & QUADS != 0:
        small = tl.max(((row < length) & (most <= 1.0)).to(tl.int32), 0)
        unsafe = tl.max(((row < length) & (most > SAFE)).to(tl.int32), 0)
        to = rows.flags + n * length_padded // GROUP + tile
        tl.store(to, small * SMALL + unsafe * UNSAFE, mask=of_keys)
    of_row = tl.sum(tl.reshape(sums, [GROUP, BLOCK // SKETCH, SKETCH // 4, 4]), 1)
    of_row = (of_row / tl.sqrt(tl.sum(tl.sum(squares, 2), 1)[:, None, None])).to(tl.float16)
    lane = 4 * tl.arange(0, SKETCH // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(rows.sketch + SKETCH * at[:, None, None] + lane, of_row)
    square = tl.sum(tl.sum(of_row.to(tl.float32) * of_row.to(tl.float32), 2), 1)
    square = tl.where(of_keys, square, opposite_limit(square, hidden) - square)
    tl.store(rows.distance + at, square)

    safe = ((row < length) & (most <= SAFE))[:, None, None]
    to_rows = at[:, None, None]
    matched = tl.zeros([GROUP, FOURS, 2], tl.float32)
    total = tl.zeros([GROUP, FOURS, 4], tl.float32)
    # In the matched form, quads have exponentials and sums of their own.
    if (stored & ROWS != 0) if MATCHED else True:
        if WHOLE:
            total = _store_exponentials(
                tl.where(safe, v, 0.0), w, 0, h, rows, to_rows, of_keys, tile, n, length_padded,
                padded, stored, MATCHED,
            )  # fmt: skip
        else:
            for h0 in range(0, padded, BLOCK):
                v, w = _load_rows(source, stride_h, weight, weight_h, h0 + h, safe, hidden)
                total += _store_exponentials(
                    v, w * factor, h0, h, rows, to_rows, of_keys, tile, n, length_padded, padded,
                    stored, MATCHED,
                )  # fmt: skip
    if MATCHED:
        if stored & QUADS != 0:
            total = tl.zeros([GROUP, FOURS, 4], tl.float32)
            for h0 in range(0, BLOCK if WHOLE else padded, BLOCK):
                if not WHOLE:
                    order = quad_order(weight, weight_h, h0, hidden, BLOCK)
                f = tl.reshape(order, [1, FOURS, 4])
                v, w = _load_rows(source, stride_h, weight, weight_h, f, safe, hidden)
                sums, more = store_matches(
                    v, w * factor, h0, tile, rows.quads, n, length_padded, padded, of_keys, TARGET
                )
                total += sums
                matched += more
    sign = tl.where(of_keys, 0.5, -0.5)
    tl.store(rows.correction + 2 * at, tl.sum(tl.sum(total, 2), 1) * sign)
    tl.store(rows.correction + 2 * at + 1, tl.sum(tl.sum(matched, 2), 1))


@triton.jit
def prepare_groups(
    x, stride_row, stride_h, weight, weight_h, order, rows, of_keys, n, begin, groups, length,
    hidden, padded, stored,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, SEVERAL: tl.constexpr, MATCHED: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Prepares ``groups`` groups of rows from ``begin`` on: one, unless SEVERAL."""
    length_padded = padded_length(length)
    if SEVERAL:
        end = tl.minimum(begin + groups, length_padded // GROUP)
        for tile in tl.range(begin, end, disable_licm=True):
            # The maximum hides that the order is invariant: hoisted, it would take registers.
            _prepare_rows(
                x, stride_row, stride_h, weight, weight_h, tl.maximum(order, -tile), rows,
                of_keys, n, tile, length, length_padded, hidden, padded, stored,
                BLOCK, WHOLE, MATCHED, TARGET,
            )  # fmt: skip
    else:
        _prepare_rows(
            x, stride_row, stride_h, weight, weight_h, order, rows, of_keys, n, begin, length,
            length_padded, hidden, padded, stored, BLOCK, WHOLE, MATCHED, TARGET,
        )  # fmt: skip
