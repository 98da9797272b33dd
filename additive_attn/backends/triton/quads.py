"""Sums of fractions over quads of features: the inner loop of every pass over pairs.

The loop takes so many registers that few threads run at a time, and a load from another cache
takes longer than the arithmetic of a quad. So the next quad is loaded while one is computed. Two
sets of registers alternate, so that nothing is moved.

Two neighbouring rows are twins: their features alternate in memory and in registers, since some
GPUs compute both with one instruction. Tiles in here are [RN, RM, TM, TN], and the odd features of
rows are negated: where the factors of a denominator are a sum and a difference, compilers pair
twins, and do not pair a factor of one row with the other factor of the other."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.numerics import (
    exact_reciprocal,
    reciprocal,
    slices,
    unknown,
)
from additive_attn.backends.triton.prefetch import load_next_tile, load_turn, use


@triton.jit
def _sum(a, b):
    """Returns b + a of rows [RM, TM, TN] and keys [RN, TM, TN]."""
    return b[:, None, :, :] + a[None, :, :, :]


@triton.jit
def _difference(a, b):
    """Returns b - a of rows [RM, TM, TN] and keys [RN, TM, TN]."""
    return b[:, None, :, :] - a[None, :, :, :]


@triton.jit
def _load4(quads, at, BEYOND: tl.constexpr):
    """Loads four numbers of a quad in each thread, BEYOND numbers after ``at``.

    Every thread loads what it multiplies, so that the loop needs no shared memory and no barrier.
    The layout of a load follows the contiguity of its addresses. The hint is true for the last
    dim. For the others it gives an order, last dim first, since Triton 3.6 would lay threads along
    R. The hint must be beside the load. An addition of 0 that the compiler knows removes it: then
    the numbers are exchanged through shared memory."""
    place = quads + (at + BEYOND)
    return tl.load(tl.multiple_of(tl.max_contiguous(place, [1, 2, 4, 8]), [1, 1, 1, 16]))


@triton.jit
def _load_keys(quads, at):
    """Loads a quad of features, [RN, TM, TN, 4]."""
    return _load4(quads, at, 0)


@triton.jit
def _load_rows(quads, at):
    """Loads a quad of features of twins, two halves [RM / 2, TM, TN, 4]."""
    return _load4(quads, at, 0), _load4(quads, at, 4)


@triton.jit
def _load_matched(rows, at):
    """Loads a quad of a, and of c and g, of twins."""
    return _load_rows(rows, at), (_load4(rows, at, 8), _load4(rows, at, 12))


@triton.jit
def _two_features(half, RM: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr):
    """Returns the two features of half a quad of twins, [RM, TM, TN] each."""
    half = tl.permute(tl.reshape(half, [RM // 2, TM, TN, 2, 2]), (0, 4, 1, 2, 3))
    return tl.split(tl.reshape(half, [RM, TM, TN, 2]))


@triton.jit
def _rows4(halves, RM: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr):
    """Returns the four slices [RM, TM, TN] of a quad of twins."""
    x0, x1 = _two_features(halves[0], RM, TM, TN)
    x2, x3 = _two_features(halves[1], RM, TM, TN)
    return x0, x1, x2, x3


@triton.jit
def _join(z01, y01, z23, y23):
    """Returns z01/y01 + z23/y23 as one fraction (math.md, eq. 4)."""
    return z01 * y23 + z23 * y01, y01 * y23


@triton.jit
def _add_differences(
    acc, a4, b4, w_at,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    EXACT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns acc + sum w (b - a) / (b + a) over a quad of features, whose weights are at w_at."""
    a0, a1, a2, a3 = _rows4(a4, RM, TM, TN)
    b0, b1, b2, b3 = slices(b4, 4)
    z01, y01 = _join(
        _difference(a0, b0) * tl.load(w_at), _sum(a0, b0),
        _sum(a1, b1) * tl.load(w_at + 1), _difference(a1, b1),
    )  # fmt: skip
    z23, y23 = _join(
        _difference(a2, b2) * tl.load(w_at + 2), _sum(a2, b2),
        _sum(a3, b3) * tl.load(w_at + 3), _difference(a3, b3),
    )  # fmt: skip
    z, y = _join(z01, y01, z23, y23)
    if EXACT:
        acc += z * exact_reciprocal(y, TARGET)
    else:
        acc += z * reciprocal(y, TARGET)
    return acc


@triton.jit
def difference_sums(
    a_rows, b_rows, weight, quads, a_step, b_step, lines,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    EXACT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns sum w (b - a) / (b + a) over ``quads`` quads (math.md, eq. 6), [RM, RN, TM, TN], and
    numbers to ``use``. ``lines``: what to load ahead (``prefetch.lines_of_quads``), or None."""
    total = tl.zeros([RN, RM, TM, TN], tl.float32)
    last = quads - 1
    first = tl.minimum(quads, 0).to(tl.int64)
    a4 = _load_rows(a_rows, first * a_step)
    b4 = _load_keys(b_rows, first * b_step)
    ahead = lines[1] if lines is not None else 0
    for u in range(0, last, 2):
        if lines is not None:
            use(ahead, lines[0])
            ahead = load_turn(lines, u // 2 + 2)
        after = tl.cast(u + 1, tl.int64)
        a5 = _load_rows(a_rows, after * a_step)
        b5 = _load_keys(b_rows, after * b_step)
        w_at = weight + 4 * u
        total = _add_differences(total, a4, b4, w_at, RM, TM, RN, TN, EXACT, TARGET)
        after = tl.minimum(u + 2, last).to(tl.int64)
        a4 = _load_rows(a_rows, after * a_step)
        b4 = _load_keys(b_rows, after * b_step)
        total = _add_differences(total, a5, b5, w_at + 4, RM, TM, RN, TN, EXACT, TARGET)
    if quads % 2 != 0:
        total = _add_differences(total, a4, b4, weight + 4 * last, RM, TM, RN, TN, EXACT, TARGET)
    if lines is not None:
        use(ahead, lines[0])
        ahead = load_next_tile(lines)
    return tl.permute(total, (1, 0, 2, 3)), ahead


@triton.jit
def _numerator(b, p, c, g):
    """Returns the numerator of a match (math.md, eq. 29)."""
    return _difference(c, p) + b[:, None, :, :] * g[None, :, :, :]


@triton.jit
def _add_matches(
    acc, a4, c4, b4, p01, p23,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns acc + the fractions of the two matches of a quad, of features 0 and 1, and of 3 and
    2."""
    a0, a1, a2, a3 = _rows4(a4, RM, TM, TN)
    b0, b1, b2, b3 = slices(b4, 4)
    c01, g01, c23, g23 = _rows4(c4, RM, TM, TN)
    z, y = _join(
        _numerator(b0, p01, c01, g01), _sum(a0, b0) * _difference(a1, b1),
        _numerator(b3, p23, c23, g23), _sum(a2, b2) * _difference(a3, b3),
    )  # fmt: skip
    return acc + z * reciprocal(y, TARGET)


@triton.jit
def matched_sums(
    a_rows, b_rows, features, p_first, p_last, a_step, b_step, lines,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns the fractions of the matches of ``features`` features, a multiple of 8 (math.md, eq.
    29), added up, [RM, RN, TM, TN], and numbers to ``use``. ``p_first`` and ``p_last``: where p of
    the first quad and of the last are; None: at the same place. ``lines``: as in
    ``difference_sums``.

    One load of p serves a quad and the next one, with which the next turn begins: so no more of p
    has to stay in registers. The last quad's p is beside the first's.

    The compiler must not infer that the quads begin again where the loop ends: it would carry
    addresses that do and others that do not. Features are counted, not quads, since their number
    is an argument of the kernel, which takes no register."""
    total = tl.zeros([RN, RM, TM, TN], tl.float32)
    first = tl.minimum(features, 0).to(tl.int64)
    a4, c4 = _load_matched(a_rows, first * a_step)
    b4 = _load_keys(b_rows, first * b_step)
    _p0, _p1, p2, p3 = slices(_load_keys(b_rows, p_first * b_step), 4)
    a_at = tl.zeros([], tl.int64)
    b_at = tl.zeros([], tl.int64)
    ahead = lines[1] if lines is not None else 0
    for f in range(0, features, 8):
        if lines is not None:
            use(ahead, lines[0])
            ahead = load_turn(lines, f // 8 + 2)
        a_at += a_step
        b_at += b_step
        a5, c5 = _load_matched(a_rows, a_at)
        b5 = _load_keys(b_rows, b_at)
        more = unknown(f + 8, TARGET) < features
        a_at = tl.where(more, a_at + a_step, 0)
        b_at = tl.where(more, b_at + b_step, 0)
        p_at = p_first * b_step + (b_at >> 1)
        if p_last is not None:
            p_at = tl.where(more, p_at, p_last * b_step)
        p4 = _load_keys(b_rows, p_at)
        total = _add_matches(total, a4, c4, b4, p2, p3, RM, TM, RN, TN, TARGET)
        a4, c4 = _load_matched(a_rows, a_at)
        b4 = _load_keys(b_rows, b_at)
        p0, p1, p2, p3 = slices(p4, 4)
        total = _add_matches(total, a5, c5, b5, p0, p1, RM, TM, RN, TN, TARGET)
    if lines is not None:
        use(ahead, lines[0])
        ahead = load_next_tile(lines)
    return tl.permute(total, (1, 0, 2, 3)), ahead
