"""The layout of quads in memory, as passes over pairs load them (``quads.py``): [HP / 4][LP][4] of
keys, and [HP / 4][LP / 2][4][2] of queries, where the features of two rows, twins, alternate. For
the matched form, quads of c and g lie beside those of queries, [HP / 4][LP / 2][2][4][2], and
those of p behind those of keys, [HP / 4 + HP / 8][LP][4]: so each thread needs one address."""

from __future__ import annotations

import triton
import triton.language as tl

SPARE = tl.constexpr(128)  # rows that a tile may reach beyond the last of all quads


@triton.jit
def quad_numbers(padded, SIGN: tl.constexpr, MATCHED: tl.constexpr):
    """Returns how many numbers all quads of a row have."""
    return padded // 2 * ((3 if SIGN > 0 else 4) if MATCHED else 2)


@triton.jit
def _signed(x):
    """Returns quads of queries [..., ..., 4], the odd features negated."""
    return tl.where(tl.arange(0, 4)[None, None, :] % 2 != 0, -x, x)


@triton.jit
def _store(to, x, step, inside, SIGN: tl.constexpr, MATCHED: tl.constexpr):
    """Stores [rows, quads, 4], with the quads ``step`` apart."""
    if SIGN < 0:
        x = tl.permute(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1], 4]), (0, 2, 3, 1))
        x = tl.reshape(x, [x.shape[0], x.shape[1], 8])
    WIDTH: tl.constexpr = x.shape[2]
    APART: tl.constexpr = 2 * WIDTH if MATCHED and SIGN < 0 else WIDTH
    quad = tl.arange(0, x.shape[1])[None, :, None].to(tl.int64)
    at = APART * tl.arange(0, x.shape[0])[:, None, None] + tl.arange(0, WIDTH)[None, None, :]
    tl.store(to + quad * step + at, x, mask=quad < inside)


@triton.jit
def store_quads(
    to, x, h0, tile, n, length_padded, padded, SIGN: tl.constexpr, MATCHED: tl.constexpr
):  # fmt: skip
    """Stores features of a group of rows, [GROUP, BLOCK / 4, 4], from h0."""
    OF_ROW: tl.constexpr = 8 if MATCHED and SIGN < 0 else 4
    to += n * quad_numbers(padded, SIGN, MATCHED) * length_padded
    to += OF_ROW * (tl.cast(h0 // 4, tl.int64) * length_padded + x.shape[0] * tile)
    _store(to, x, OF_ROW * length_padded, (padded - h0) // 4, SIGN, MATCHED)


@triton.jit
def store_exponentials(
    quads, e, h0, tile, n, length_padded, padded, of_keys, MATCHED: tl.constexpr
):  # fmt: skip
    """Runs ``store_quads`` for keys or for queries."""
    if of_keys:
        store_quads(quads, e, h0, tile, n, length_padded, padded, 1, MATCHED)
    else:
        store_quads(quads, _signed(e), h0, tile, n, length_padded, padded, -1, MATCHED)


@triton.jit
def fill_spare(quads, groups, padded, of_keys, GROUP: tl.constexpr, MATCHED: tl.constexpr):
    """Stores 1 in the rows beyond the last of all quads, of ``groups`` groups."""
    rows = groups.to(tl.int64) * GROUP
    ones = tl.full([SPARE, 1, 4], 1.0, tl.float32)
    if of_keys:
        _store(quads + rows * quad_numbers(padded, 1, MATCHED), ones, 0, 1, 1, MATCHED)
    else:
        quads += rows * quad_numbers(padded, -1, MATCHED)
        _store(quads, _signed(ones), 0, 1, -1, MATCHED)
        if MATCHED:
            _store(quads + 8, ones, 0, 1, -1, MATCHED)
