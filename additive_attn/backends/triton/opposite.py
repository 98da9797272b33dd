"""Finds opposite pairs: q is near -k in every feature that matters (math.md, section 2.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.launch import kernel, launch
from additive_attn.backends.triton.plan import Piece
from additive_attn.backends.triton.prepare_rows import SKETCH


@triton.jit
def tiles_with_opposite(
    query_rows, key_rows, at_query, at_key, row0, key0, rows, keys,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Returns which of TILES tiles from ``key0`` hold a pair that may be opposite, masked ones
    included: an approximate |q + k|^2 is too small. A product takes at least 16 rows."""
    LEAST: tl.constexpr = 16 if BM < 16 else BM
    # Each product has 16 keys, so that every warp computes some: several warps that share a
    # product would each compute it. It has a batch dim, since Triton 3.7 fails to compile what
    # follows a plain one on sm_100.
    PARTS: tl.constexpr = TILES * BN // 16
    f = tl.arange(0, SKETCH)
    i = at_query + tl.minimum(row0 + tl.arange(0, LEAST), rows - 1)
    j = key0 + 16 * tl.arange(0, PARTS)[:, None] + tl.arange(0, 16)[None, :]
    j = at_key + tl.minimum(j, keys - 1)  # [PARTS, 16]
    of_rows = tl.load(query_rows.sketch + i[:, None] * SKETCH + f[None, :])  # [LEAST, SKETCH]
    of_rows = tl.broadcast_to(of_rows[None], [PARTS, LEAST, SKETCH])
    of_keys = tl.load(key_rows.sketch + j[:, None, :] * SKETCH + f[None, :, None])
    square = tl.load(key_rows.distance + j)[:, None, :] + 2.0 * tl.dot(of_rows, of_keys)
    limit = tl.load(query_rows.distance + i)
    limit += 1e-4 * tl.abs(limit)  # sums in another order differ by rounding
    found = tl.max((tl.min(square, 2) < limit[None, :]).to(tl.int32), 1)  # [PARTS]
    return tl.max(tl.reshape(found, [TILES, BN // 16]), 1) != 0


@triton.jit
def opposite_pairs(query_rows, key_rows, i, j):
    """Returns which pairs (i, j), which broadcast together, are opposite."""
    square = tl.load(key_rows.distance + j) + 0.0 * i.to(tl.float32)
    for f in range(0, SKETCH):
        a = tl.load(query_rows.sketch + i * SKETCH + f).to(tl.float32)
        b = tl.load(key_rows.sketch + j * SKETCH + f).to(tl.float32)
        square += 2.0 * a * b
    return square < tl.load(query_rows.distance + i)


@kernel
def opposite_kernel(
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    flags, inner, entry_begin, rows, row_begin, row_tiles, keys, key_begin, key_tiles,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Stores the flags of ``score_kernel``, but for masked pairs too."""
    program = tl.program_id(0)
    row_tile = program // key_tiles % row_tiles
    _n, o, m = batch_entry(entry_begin + program // (key_tiles * row_tiles), inner)
    found = tiles_with_opposite(
        query_rows, key_rows, o * query_exp_outer + m * query_exp_inner,
        o * key_exp_outer + m * key_exp_inner, row_begin + row_tile * BM,
        key_begin + program % key_tiles * BN, rows, keys, BM, BN, 1,
    )  # fmt: skip
    tl.store(flags + program + tl.arange(0, 1), found.to(tl.int32))


class Flags(NamedTuple):
    """Which tiles of ``rows`` x ``keys`` pairs of a piece hold an opposite pair."""

    tiles: Tensor  # (entries, row tiles, key tiles)
    rows: int
    keys: int


def no_flags(p: Problem, piece: Piece, keys: int) -> Flags:
    """Allocates flags that a kernel will store."""
    tile = tiles.score_tile(piece.rows, p.wide)
    shape = piece.entries, -(-piece.rows // tile.rows), -(-keys // tile.keys)
    return Flags(torch.empty(shape, dtype=torch.int32, device=p.device), tile.rows, tile.keys)


def opposite_tiles(p: Problem, piece: Piece, key: int, keys: int) -> Flags:
    """Returns the flags of keys [key, key + keys), without their scores, for masked pairs too."""
    flags = no_flags(p, piece, keys)
    launch(
        opposite_kernel, flags.tiles.numel(), flags.tiles, *p.prepared_rows_arguments(),
        flags.tiles, p.batch.inner, piece.entry, p.rows, piece.row, flags.tiles.shape[1],
        p.keys, key, flags.tiles.shape[2], BM=flags.rows, BN=flags.keys,
    )  # fmt: skip
    return flags
