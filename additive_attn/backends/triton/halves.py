# ruff: noqa: RUF005 (Triton has no starred expressions)
# mypy: disable-error-code="assignment"
"""What the pass over features computes with: pairs of features, an even and an odd one. They are
[TW, TX, TF, 2], or broadcast to that: features lie along warps and lanes, rows along the other
lanes, and a thread has both features of a pair. Two tensors would be twice as many operations for
the compiler, and the time of some of its passes grows with their square."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.numerics import (
    exp_with_error,
    fused,
    reciprocal,
    tanh,
    tanh_slope,
)


@triton.jit
def repeated(x, RX: tl.constexpr):
    """Returns a tuple that holds a tensor RX times."""
    copies = ()
    for _ in tl.static_range(RX):
        copies = copies + (x,)
    return copies


@triton.jit
def added(x, y, RX: tl.constexpr):
    """Returns the sums of two tuples of RX tensors."""
    sums = ()
    for n in tl.static_range(RX):
        sums = sums + (x[n] + y[n],)
    return sums


@triton.jit
def exponentials(x, direct):
    """Returns e^{2x}, 1 in rows that take the direct form, and their relative errors."""
    e, error = exp_with_error(tl.where(direct, 0.0, 2.0 * x))
    return e, error / e


@triton.jit
def fractions(x, y, APART: tl.constexpr, TARGET: tl.constexpr):
    """Returns s = 1 / (1 + x y) of both features. They share one reciprocal, which is of a single
    pair (i, j), so that pairs of rows and keys stay apart. APART: they take one each, which costs
    more special functions and fewer other instructions."""
    z = x * y + 1.0
    if APART:
        s = reciprocal(z, TARGET)
    else:
        za, zb = tl.split(z)
        joined = reciprocal(za * zb, TARGET)
        s = tl.join(joined * zb, joined * za)
    return s


@triton.jit
def slope(s):
    """Returns (1 - t^2) / 4."""
    return s - s * s


@triton.jit
def energies(x, y, s, TARGET: tl.constexpr):
    """Returns t, with the digits that 1 - 2 s loses where t is small."""
    return fused(x, y, -1.0, TARGET) * s


@triton.jit
def prepared(place, f, padded: tl.constexpr, TILE: tl.constexpr):
    """Loads features f of a prepared row; 1 beyond the last feature, where other rows lie. Every
    thread loads what it needs, without a conversion between layouts."""
    if padded % TILE == 0:
        x = tl.load(place)
    else:
        x = tl.load(place, mask=f < padded, other=1.0)
    return x


@triton.jit
def raw(row, h, hidden, stride, ACC: tl.constexpr):
    """Loads both features of a row of the input; the last feature again beyond it."""
    xa = tl.load(row + tl.minimum(h, hidden - 1).to(tl.int64) * stride)
    xb = tl.load(row + tl.minimum(h + 1, hidden - 1).to(tl.int64) * stride)
    return tl.join(xa, xb).to(ACC)


@triton.jit
def rows_last(x):
    """Permutes [TW, TX, TF, RX, 2] to [TW, TX, TF, 2, RX], or back."""
    return tl.permute(x, (0, 1, 2, 4, 3))


@triton.jit
def _joined(x, y):
    """Interleaves two [..., N] to [..., 2 N]."""
    return tl.reshape(tl.join(x, y), x.shape[:-1] + (2 * x.shape[-1],))


@triton.jit
def of_rows(x, RX: tl.constexpr):
    """Joins a tuple of slices [TW, TX, TF, 2] to [TW, TX, TF, 2, RX]."""
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
    """Returns g (1 - t^2) / 4 and g t, with t = tanh(x + y); a pair with G = 0 contributes exactly
    0."""
    z = x + y
    t = tanh(z, TARGET)
    counts = g != 0.0
    return tl.where(counts, g * tanh_slope(z, t) * 0.25, 0.0), tl.where(counts, g * t, 0.0)


@triton.jit
def weighted(x, weight, scale):
    """Returns 4 scale w_h x; 0 beside any weight where no pair has contributed."""
    return tl.where(x == 0.0, 0.0, x * 4.0 * scale * weight)
