# ruff: noqa: RUF005 (Triton has no starred expressions)
# mypy: disable-error-code="assignment, misc, var-annotated"
"""The loop of the pass over features where all pairs are in range. It has no barrier: each thread
loads what it needs."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from additive_attn.backends.triton.halves import (
    energies,
    fractions,
    prepared,
    repeated,
    rows_last,
    slope,
)
from additive_attn.backends.triton.numerics import slices

APART = tl.constexpr(2)  # so many of four keys take a reciprocal for each feature


@triton.jit
def store_sum(to, p, stored):
    """Stores the sums of both features over the rows of a tile, by the first lane of each
    (``stored``). A tensor without the dim of the rows would first be converted to another layout,
    through shared memory."""
    tl.store(to, tl.broadcast_to(tl.sum(p, 1, keep_dims=True), stored.shape), mask=stored)


@triton.jit
def _across(x, STEP: tl.constexpr):
    """Returns x of the lane that is STEP rows away."""
    pairs = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * STEP), 2, STEP, x.shape[2], 2])
    return tl.reshape(tl.flip(pairs, 2), x.shape)


@triton.jit
def _shared_out(x, y, STEP: tl.constexpr):
    """Adds up x and y over two lanes that are STEP rows apart, for both features. The first lane
    gets the sums of x, the second those of y."""
    first = tl.arange(0, x.shape[1])[None, :, None, None] & STEP == 0
    return tl.where(first, x, y) + _across(tl.where(first, y, x), STEP)


@triton.jit
def _shared_halves(x, y):
    """Takes the first step of ``store_sum`` for two keys: each half of the lanes gets one of
    them."""
    return _shared_out(x, y, x.shape[1] // 2)


@triton.jit
def first_key(TX: tl.constexpr):
    """Returns which of four keys each of TX lanes stores in ``_store_sums``, or the first of
    two."""
    return 4 * tl.arange(0, TX)[None, :, None, None] // TX


@triton.jit
def _store_sums(to, x, y, inside, padded: tl.constexpr):
    """Stores the sums of four keys, for which ``store_sum`` would take more exchanges: lanes share
    out the keys. x: keys 0 and 2, y: 1 and 3, by halves. ``to``: of the ``first_key``."""
    TX: tl.constexpr = x.shape[1]
    if TX == 2:
        tl.store(to, x, mask=inside)
        tl.store(to + padded, y, mask=inside)
    else:
        x = _shared_out(x, y, TX // 4)
        if TX == 8:
            x += _across(x, 1)
            inside &= tl.arange(0, TX)[None, :, None, None] % 2 == 0
        tl.store(to, x, mask=inside)


@triton.jit
def _four_keys(place, four, f, padded: tl.constexpr, TILE: tl.constexpr):
    """Loads the prepared rows of four keys, [TW, TX, TF, 4, 2]."""
    at = place + tl.cast(4 * four, tl.int64) * padded
    at = at[:, :, :, None, :] + (padded * tl.arange(0, 4))[:, None]
    # As in ``quads._load4``: chooses an order in which a thread has all keys.
    at = tl.multiple_of(tl.max_contiguous(at, [2, 2, 2, 1, 4]), [1, 1, 1, 1, 8])
    return prepared(at, f[:, :, :, None, :], padded, TILE)


@triton.jit
def _four_gradients(place, RX: tl.constexpr):
    """Loads G of RX rows and four keys. Returns for each key a tuple of rows, [TW, TX, TF, 2]."""
    x = 4 * tl.arange(0, RX)[:, None] + tl.arange(0, 4)
    g = tl.load(tl.max_contiguous(place[:, :, :, None, None] + x, [2, 2, 2, 1, 4]))
    g = tl.broadcast_to(g[:, :, :, None, :, :], place.shape + (2, RX, 4))
    g0, g1, g2, g3 = slices(g, 4)
    return slices(g0, RX), slices(g1, RX), slices(g2, RX), slices(g3, RX)


@triton.jit
def _add_pairs(
    Q, K, g, dq, dk, dw, ONE_EACH: tl.constexpr, SMALL: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DW: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Adds the share of a row and a key to the sums of the row, of the key and of dw."""
    s = fractions(Q, K, ONE_EACH, TARGET)
    # dw first: in another order the assembler of Triton 3.7 spills more numbers for sm_100.
    if DW:
        t = s
        if SMALL:
            t = energies(Q, K, s, TARGET)
        dw += g * t
    v = slope(s)
    if DQ:
        dq += g * v
    if DK:
        dk += g * v
    return dq, dk, dw


@triton.jit
def _add_by_keys(
    Q, K_four, g, to, inside, dq, dw, padded: tl.constexpr, SMALL: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DW: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Stores dk of four keys and returns dq and dw with their share, one key after the other."""
    zeros = tl.zeros_like(dw)
    of_keys = ()
    for u in tl.static_range(4):
        K = K_four[u]
        dk = zeros
        sums = ()
        for x in tl.static_range(len(Q)):
            of_row, dk, dw = _add_pairs(
                Q[x], K, g[u][x], dq[x], dk, dw, u < APART, SMALL, DQ, DK, DW, TARGET
            )
            sums = sums + (of_row,)
        dq = sums
        # Exchanged at once: sums that are kept for later take registers.
        of_keys = of_keys + (dk if u < 2 else _shared_halves(of_keys[u - 2], dk),)
    if DK:
        _store_sums(to, of_keys[2], of_keys[3], inside, padded)
    return dq, dw


@triton.jit
def _add_by_rows(
    Q, K_four, g, to, inside, dq, dw, padded: tl.constexpr, SMALL: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DW: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """``_add_by_keys``, but one row after the other."""
    zeros = tl.zeros_like(dw)
    dk = repeated(zeros, 4)
    sums = ()
    for x in tl.static_range(len(Q)):
        of_row = dq[x]
        of_keys = ()
        for u in tl.static_range(4):
            of_row, of_key, dw = _add_pairs(
                Q[x], K_four[u], g[u][x], of_row, dk[u], dw, u < APART, SMALL,
                DQ, DK, DW, TARGET,
            )  # fmt: skip
            of_keys = of_keys + (of_key,)
        sums = sums + (of_row,)
        dk = of_keys
    if DK:
        x, y = _shared_halves(dk[0], dk[2]), _shared_halves(dk[1], dk[3])
        _store_sums(to, x, y, inside, padded)
    return sums, dw


@triton.jit
def _loop(
    Q, K_place, g_place, dk_place, f, inside, begin, end, row_padded,
    RX: tl.constexpr, padded: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
    SMALL: tl.constexpr, DQ: tl.constexpr, DK: tl.constexpr, DW: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Computes keys [begin, end), all pairs in range. Stores the tile's dk; returns dq, and the
    sums of G t where ``SMALL``, of G s otherwise."""
    zeros = tl.zeros(f.shape, tl.float32)
    dq, dw = repeated(zeros, RX), zeros
    # Prefetches four keys while it computes the four before: between the stores of dk, each load
    # would stall. Two fours per iteration need no moves between registers, but the assembler may
    # hoist so many loads that it spills: MOST fours. What spills fewest numbers depends on the
    # assembler.
    BLACKWELL: tl.constexpr = cuda_capability_geq(10)
    FOURS: tl.constexpr = 1 if SMALL or BLACKWELL else MOST
    last = tl.cdiv(end, 4) - 1
    K_next = _four_keys(K_place, begin // 4, f, padded, TILE)
    for turn in range(begin // (4 * FOURS), tl.cdiv(end, 4 * FOURS)):
        for n in tl.static_range(FOURS):
            share = zeros  # of dw: sums of few terms are rounded less
            four = FOURS * turn + n
            c = 4 * four  # provably a multiple of four
            g = _four_gradients(g_place + tl.cast(c, tl.int64) * row_padded, RX)
            K_four = slices(rows_last(K_next), 4)
            K_next = _four_keys(K_place, tl.minimum(four + 1, last), f, padded, TILE)
            to = dk_place
            if DK:
                to += tl.cast(c, tl.int64) * padded
            if SMALL and not BLACKWELL:
                dq, share = _add_by_rows(
                    Q, K_four, g, to, inside, dq, share, padded, SMALL, DQ, DK, DW, TARGET
                )
            else:
                dq, share = _add_by_keys(
                    Q, K_four, g, to, inside, dq, share, padded, SMALL, DQ, DK, DW, TARGET
                )
            dw += share
    return dq, dw


@triton.jit
def quick_loop(
    Q, K_place, g_place, dk_place, f, inside, begin, end, row_padded, total, small,
    RX: tl.constexpr, padded: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DW: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Runs ``_loop``, but returns the sums of G t in any case; ``total`` are those of G."""
    if small:
        dq, dw = _loop(
            Q, K_place, g_place, dk_place, f, inside, begin, end, row_padded,
            RX, padded, TILE, MOST, True, DQ, DK, DW, TARGET,
        )  # fmt: skip
    else:
        dq, dw = _loop(
            Q, K_place, g_place, dk_place, f, inside, begin, end, row_padded,
            RX, padded, TILE, MOST, False, DQ, DK, DW, TARGET,
        )  # fmt: skip
        dw = total - 2.0 * dw
    return dq, dw
