"""Pairs of tensors, of two halves of the features: what the passes over features compute with."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.numerics import exp_with_error, reciprocal, tanh, tanh_slope


@triton.jit
def add(x, y):
    return x[0] + y[0], x[1] + y[1]


@triton.jit
def scaled(g, x):
    return g * x[0], g * x[1]


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1])


@triton.jit
def exponentials(x, direct, factor):
    """e^{factor x} of both halves, 1 in rows that take the direct form, and their errors."""
    direct = direct[:, None, :, None]
    ea, ra = exp_with_error(tl.where(direct, 0.0, factor * x[0]))
    eb, rb = exp_with_error(tl.where(direct, 0.0, factor * x[1]))
    return (ea, eb), (ra / ea, rb / eb)


@triton.jit
def fractions(x, y, TARGET: tl.constexpr):
    """s = 1 / (1 + x y) of both halves from one reciprocal: of a single pair (i, j), so that pairs
    of rows and keys stay apart."""
    ya = x[0] * y[0] + 1.0
    yb = x[1] * y[1] + 1.0
    both = reciprocal(ya * yb, TARGET)
    return both * yb, both * ya


@triton.jit
def slope(s):
    """(1 - t^2) / 4 of both halves."""
    return s[0] - s[0] * s[0], s[1] - s[1] * s[1]


@triton.jit
def prepared(row, h, padded: tl.constexpr, TILE: tl.constexpr):
    """Both halves of a prepared row, [1, RH, 1, TH]; 1 beyond the last feature, since what lies
    there belongs to other rows."""
    if padded % TILE == 0:
        xa = tl.load(row + h[0])
        xb = tl.load(row + h[1])
    else:
        xa = tl.load(row + h[0], mask=h[0] < padded, other=1.0)
        xb = tl.load(row + h[1], mask=h[1] < padded, other=1.0)
    return xa[None, :, None, :], xb[None, :, None, :]


@triton.jit
def raw(row, h, hidden, stride, ACC: tl.constexpr):
    """Both halves of a row of the input, [1, RH, 1, TH]; the last feature again beyond it."""
    xa = tl.load(row + tl.minimum(h[0], hidden - 1).to(tl.int64) * stride).to(ACC)
    xb = tl.load(row + tl.minimum(h[1], hidden - 1).to(tl.int64) * stride).to(ACC)
    return xa[None, :, None, :], xb[None, :, None, :]


@triton.jit
def kept(rows, h, hidden, stride, ACC: tl.constexpr, again=None):
    """The same of a tile of rows, [RX, RH, TX, TH], to stay in registers. A loop's layout follows
    that of such loads, which follows the contiguity of their addresses. Here it is not the true
    one but an order, last dim first, so that threads lie along TX and TH, registers along RX and
    RH, which Triton 3.6 does not choose by itself. A multiple of 1: never a vector.

    ``again``, a number >= 0: reads what the program has read before, which costs less than
    registers through its loop. The addresses depend on it, since the compiler keeps those that
    do not change in registers."""
    if again is not None:
        hidden = tl.maximum(hidden, -again)
    a = rows + tl.minimum(h[0], hidden - 1).to(tl.int64)[None, :, None, :] * stride
    b = rows + tl.minimum(h[1], hidden - 1).to(tl.int64)[None, :, None, :] * stride
    a = tl.multiple_of(tl.max_contiguous(a, [1, 2, 4, 8]), [1, 1, 1, 1])
    b = tl.multiple_of(tl.max_contiguous(b, [1, 2, 4, 8]), [1, 1, 1, 1])
    VOLATILE: tl.constexpr = again is not None
    return tl.load(a, volatile=VOLATILE).to(ACC), tl.load(b, volatile=VOLATILE).to(ACC)


@triton.jit
def direct(x, y, g, TARGET: tl.constexpr):
    """g (1 - t^2) / 4 and g t with t = tanh(x + y); a pair with G = 0 contributes exactly 0."""
    z = x + y
    t = tanh(z, TARGET)
    counts = g != 0.0
    return (
        tl.where(counts, g * tanh_slope(z, t) * 0.25, 0.0),
        tl.where(counts, g * t, 0.0),
    )


@triton.jit
def direct_pairs(x, y, g, TARGET: tl.constexpr):
    """``direct`` of both halves: the slopes, and the terms of dw."""
    da, ta = direct(x[0], y[0], g, TARGET)
    db, tb = direct(x[1], y[1], g, TARGET)
    return (da, db), (ta, tb)


@triton.jit
def over_rows(x):
    """The sums over a thread's rows, [RH, TX, TH]."""
    return tl.sum(x[0], 0), tl.sum(x[1], 0)
