# ruff: noqa: RUF005 (Triton has no starred expressions)
# mypy: disable-error-code="assignment"
"""Pairs of tensors, of even and odd features: what the pass over features computes with. They are
[TW, TX, TF], or broadcast to that: features lie along warps and lanes, rows along the other lanes,
and a thread has one of each, and neighbours of its features in the other tensor."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.numerics import (
    exp_with_error,
    fused,
    reciprocal,
    tanh,
    tanh_slope,
    tile4,
)


@triton.jit
def repeated(x, RX: tl.constexpr):
    """A tensor RX times."""
    copies = ()
    for _ in tl.static_range(RX):
        copies = copies + (x,)
    return copies


@triton.jit
def added(x, y, RX: tl.constexpr):
    """The sums of two tuples of RX tensors."""
    sums = ()
    for n in tl.static_range(RX):
        sums = sums + (x[n] + y[n],)
    return sums


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1])


@triton.jit
def exponentials(x, direct):
    """e^{2x} of both, 1 in rows that take the direct form, and their relative errors."""
    ea, ra = exp_with_error(tl.where(direct, 0.0, 2.0 * x[0]))
    eb, rb = exp_with_error(tl.where(direct, 0.0, 2.0 * x[1]))
    return (ea, eb), (ra / ea, rb / eb)


@triton.jit
def fractions(x, y, APART: tl.constexpr, TARGET: tl.constexpr):
    """s = 1 / (1 + x y) of both: from one reciprocal, which is of a single pair (i, j), so that
    pairs of rows and keys stay apart; or from one each, which costs more special functions and
    fewer other instructions."""
    ya = x[0] * y[0] + 1.0
    yb = x[1] * y[1] + 1.0
    if APART:
        sa = reciprocal(ya, TARGET)
        sb = reciprocal(yb, TARGET)
    else:
        joined = reciprocal(ya * yb, TARGET)
        sa = joined * yb
        sb = joined * ya
    return sa, sb


@triton.jit
def slope(s):
    """(1 - t^2) / 4 of both."""
    return s[0] - s[0] * s[0], s[1] - s[1] * s[1]


@triton.jit
def energies(x, y, s, TARGET: tl.constexpr):
    """t of both, with the digits that 1 - 2 s loses where t is small."""
    ta = fused(x[0], y[0], -1.0, TARGET) * s[0]
    tb = fused(x[1], y[1], -1.0, TARGET) * s[1]
    return ta, tb


@triton.jit
def prepared(place, h, padded: tl.constexpr, TILE: tl.constexpr):
    """Both of a prepared row; 1 beyond the last feature, since what lies there belongs to other
    rows. Every thread loads what it needs, without a conversion between layouts."""
    if padded % TILE == 0:
        x = tl.load(place)
    else:
        x = tl.load(place, mask=h[:, :, :, None] + tl.arange(0, 2) < padded, other=1.0)
    return x


@triton.jit
def raw(row, h, hidden, stride, ACC: tl.constexpr):
    """Both of a row of the input; the last feature again beyond it."""
    xa = tl.load(row + tl.minimum(h, hidden - 1).to(tl.int64) * stride).to(ACC)
    xb = tl.load(row + tl.minimum(h + 1, hidden - 1).to(tl.int64) * stride).to(ACC)
    return xa, xb


@triton.jit
def rows_of(x, TW: tl.constexpr, TX: tl.constexpr, TF: tl.constexpr, RX: tl.constexpr):
    """The tuple of RX slices [TW, TX, TF] of [TW, TX, TF, RX]."""
    if RX == 2:
        return tl.split(x)
    elif RX == 4:
        return tile4(x, TW, TX, TF)
    else:
        even, odd = tl.split(tl.reshape(x, [TW, TX, TF, 4, 2]))
        x0, x2, x4, x6 = tile4(even, TW, TX, TF)
        x1, x3, x5, x7 = tile4(odd, TW, TX, TF)
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _joined(x, y):
    """[..., 2 N] of [..., N], one of each in turn."""
    z = tl.join(x, y)
    return tl.reshape(z, [z.shape[0], z.shape[1], z.shape[2], 2 * z.shape[3]])


@triton.jit
def of_rows(x, RX: tl.constexpr):
    """[TW, TX, TF, RX] of a tuple of slices [TW, TX, TF]."""
    if RX == 2:
        return tl.join(x[0], x[1])
    elif RX == 4:
        return _joined(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    else:
        even = _joined(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        odd = _joined(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
        return _joined(even, odd)


@triton.jit
def direct_pairs(x, y, g, TARGET: tl.constexpr):
    """g (1 - t^2) / 4 and g t of both, with t = tanh(x + y); a pair with G = 0 contributes
    exactly 0."""
    za = x[0] + y[0]
    zb = x[1] + y[1]
    ta = tanh(za, TARGET)
    tb = tanh(zb, TARGET)
    counts = g != 0.0
    slopes = g * tanh_slope(za, ta) * 0.25, g * tanh_slope(zb, tb) * 0.25
    return where(counts, slopes, (0.0, 0.0)), where(counts, (g * ta, g * tb), (0.0, 0.0))


@triton.jit
def weighted(x, weight, scale):
    """4 scale w_h x. Where no pair has contributed that is 0 beside any weight."""
    return tl.where(x == 0.0, 0.0, x * 4.0 * scale * weight)
