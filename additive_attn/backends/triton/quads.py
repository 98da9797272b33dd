"""Sums of fractions over quads of features: the inner loop of every pass over pairs.

With as many registers as it takes few threads run at a time, and a load from another cache takes
longer than the arithmetic of a quad: so a quad is loaded while the one before is computed."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.numerics import exact_reciprocal, reciprocal, tile4


@triton.jit
def _pairs(x, y):
    """x + y of rows [RM, TM, TN] and keys [RN, TM, TN]: [RM, RN, TM, TN]."""
    return x[:, None, :, :] + y[None, :, :, :]


@triton.jit
def _load4(quads, u, step):
    """Quad u of features, [R, TM, TN, 4].

    Every thread loads what it multiplies, so that the loop needs no shared memory and no barrier.
    The loads' layout follows the contiguity of their addresses. That of the last dim is true, that
    of the others is an order, last dim first, since Triton 3.6 would have threads lie along R. The
    hint counts only where it meets the load."""
    at = quads + tl.cast(u, tl.int64) * step
    return tl.load(tl.multiple_of(tl.max_contiguous(at, [1, 2, 4, 8]), [1, 1, 1, 16]))


@triton.jit
def _loaded(a_rows, z_rows, b_rows, u, a_step, b_step, DIFFERENCE: tl.constexpr):
    """Quad u of a, z and b. The difference form makes its own z."""
    a4 = _load4(a_rows, u, a_step)
    if DIFFERENCE:
        z4 = a4
    else:
        z4 = _load4(z_rows, u, a_step)
    return a4, z4, _load4(b_rows, u, b_step)


@triton.jit
def _add_quad(
    acc, a4, z4, b4, w_at,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIFFERENCE: tl.constexpr, EXACT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + sum z/y over a quad of features (math.md, eq. 4), whose weights are at w_at."""
    a0, a1, a2, a3 = tile4(a4, RM, TM, TN)
    b0, b1, b2, b3 = tile4(b4, RN, TM, TN)
    y0 = _pairs(a0, b0)
    y1 = _pairs(a1, b1)
    y2 = _pairs(a2, b2)
    y3 = _pairs(a3, b3)
    if DIFFERENCE:
        z0 = _pairs(-a0, b0) * tl.load(w_at)
        z1 = _pairs(-a1, b1) * tl.load(w_at + 1)
        z2 = _pairs(-a2, b2) * tl.load(w_at + 2)
        z3 = _pairs(-a3, b3) * tl.load(w_at + 3)
    else:
        z0, z1, z2, z3 = tile4(z4, RM, TM, TN)
        z0 = z0[:, None, :, :]
        z1 = z1[:, None, :, :]
        z2 = z2[:, None, :, :]
        z3 = z3[:, None, :, :]
    z01 = z0 * y1 + z1 * y0
    z23 = z2 * y3 + z3 * y2
    y01 = y0 * y1
    y23 = y2 * y3
    if EXACT:
        acc += (z01 * y23 + z23 * y01) * exact_reciprocal(y01 * y23, TARGET)
    else:
        acc += (z01 * y23 + z23 * y01) * reciprocal(y01 * y23, TARGET)
    return acc


@triton.jit
def joined(
    a_rows, z_rows, b_rows, weight, centre, blocks, quads, a_step, b_step,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIFFERENCE: tl.constexpr, EXACT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Sum z/y over so many blocks of so many quads, less the centre of each block, if given.

    While a quad is computed the next is loaded. Two quads at a time take turns in two sets of
    registers, so that nothing is moved."""
    total = tl.zeros([RM, RN, TM, TN], tl.float32)
    last = blocks * quads - 1
    a4, z4, b4 = _loaded(a_rows, z_rows, b_rows, 0, a_step, b_step, DIFFERENCE)
    for block in range(0, blocks):
        middle = 0.0
        if centre is not None:
            middle = tl.load(centre + block)
        for u in range(block * quads, block * quads + quads - 1, 2):
            a5, z5, b5 = _loaded(a_rows, z_rows, b_rows, u + 1, a_step, b_step, DIFFERENCE)
            w_at = weight + 4 * u
            total = _add_quad(total, a4, z4, b4, w_at, RM, TM, RN, TN, DIFFERENCE, EXACT, TARGET)
            after = tl.minimum(u + 2, last)
            a4, z4, b4 = _loaded(a_rows, z_rows, b_rows, after, a_step, b_step, DIFFERENCE)
            total = _add_quad(
                total, a5, z5, b5, w_at + 4, RM, TM, RN, TN, DIFFERENCE, EXACT, TARGET
            )
        if centre is not None:
            total -= middle
    if quads % 2 != 0:  # of a single block
        w_at = weight + 4 * last
        total = _add_quad(total, a4, z4, b4, w_at, RM, TM, RN, TN, DIFFERENCE, EXACT, TARGET)
    return total
