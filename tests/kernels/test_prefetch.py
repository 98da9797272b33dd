"""Which lines are loaded ahead. Another line costs time alone: no test of results sees it. Here
each number in memory is its own place."""

from __future__ import annotations

import contextlib

import paths
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton
import triton.language as tl

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.prefetch import (
    LINE,
    lines_of_quads,
    load_columns,
    load_next_tile,
    load_turn,
)
from additive_attn.backends.triton.tiles import SPLIT, Tile

ROWS, KEYS = 128, 256  # of the padded quads
OF_KEYS = 2**20  # added to what is loaded of keys
TILES = [
    tiles.score_tile(100), tiles.score_tile(10), tiles.score_tile(5), Tile(4, 16, 8, 8),
    Tile(4, 2, 2, 16, SPLIT), Tile(4, 4, 4, 16, SPLIT),
]  # fmt: skip


@triton.jit
def turns_kernel(
    rows, keys, turns, next_tile, row_step, key_step, p_first, quads, next_keys,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, THREADS: tl.constexpr,
    MATCHED: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    lines = lines_of_quads(
        rows, keys, row_step, key_step, p_first, quads, next_keys, BM, BN, SPLIT, THREADS, MATCHED
    )
    i = tl.arange(0, THREADS)
    for turn in range(0, TURNS):
        tl.store(turns + turn * THREADS + i, load_turn(lines, turn))
    tl.store(next_tile + i, load_next_tile(lines))


@triton.jit
def columns_kernel(
    value, sums, loaded, row, column, started, d0, values, rows, keys,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    numbers = load_columns(
        value, row, column, 2, keys, sums, 1, rows, started, d0, values, BM, BN, BD
    )
    tl.store(loaded + tl.arange(0, COUNT), numbers)


def places(count, begin=0):
    """float32 whose bits are the integers from ``begin``."""
    return (begin + torch.arange(count, dtype=torch.int32)).view(torch.float32).to(paths.DEVICE)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32, device=paths.DEVICE)


def interpreted():
    return paths._interpreted() if paths.DEVICE == "cpu" else contextlib.nullcontext()


def lines(begin, numbers):
    return {begin + line for line in range(0, numbers, LINE.value)}


@pytest.mark.parametrize(
    ("matched", "features"),
    [*((False, features) for features in (4, 8, 12, 40)), (True, 96), (True, 256)],
)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_lines_of_a_turn(tile, matched, features):
    """Of each turn all lines that it reads, and no others, which may lie beyond the tensor."""
    parts = tile.SPLIT if features >= tiles.SHARED_FEATURES else 1
    quads, of_row = features // 4 // parts, 8 if matched else 4
    row_step, key_step, next_keys = of_row * ROWS, 4 * KEYS, 4 * tile.keys
    rows = places(features // 4 * row_step)
    keys = places((features // 4 + features // 8 * matched) * key_step, OF_KEYS)
    threads = parts * tile.TM * tile.TN
    count = max(quads // 2, 1)
    turns, next_tile = zeros(count + 1, threads), zeros(threads)
    with interpreted():
        turns_kernel[(1,)](
            rows, keys, turns, next_tile, row_step, key_step, features // 4, quads, next_keys,
            tile.rows, tile.keys, parts, threads, matched, count + 1,
        )  # fmt: skip

    def expected(turn, moved=0):
        found = set()
        for part in range(parts):
            for quad in range(2 * turn, min(2 * turn + 2, quads)):
                at = part * quads + quad
                found |= lines(at * row_step, of_row * tile.rows)
                found |= lines(OF_KEYS + moved + at * key_step, 4 * tile.keys)
            if matched:
                at = features // 4 + part * quads // 2 + turn
                found |= lines(OF_KEYS + moved + at * key_step, 4 * tile.keys)
        return found

    for turn in range(count + 1):
        assert set(turns[turn].tolist()) == expected(min(turn, count - 1))
    # The bits of two numbers of each thread: of the next tile's first two turns.
    moved = torch.where(turns[:2] >= OF_KEYS, turns[:2] + next_keys, turns[:2])
    assert torch.equal(next_tile, moved[0] | moved[1])


@pytest.mark.parametrize("started", [0, 1])
@pytest.mark.parametrize("d0", [0, 64, 128])
@pytest.mark.parametrize("dense", [True, False])
def test_lines_of_columns(dense, d0, started):
    """Numbers of rows 1 to 4 and keys 2 to 6, of 150 values."""
    values, BM, BN, BD = 150, 4, 8, 64
    row, column = (160, 1) if dense else (1, 16)
    value, sums = places(2600), places(1000, OF_KEYS)
    loaded = zeros(2 * max(BM, BN))
    with interpreted():
        columns_kernel[(1,)](
            value, sums, loaded, row, column, started, d0, values, 4, 7, BM, BN, BD, 16
        )
    for place, number in enumerate(loaded.tolist()):
        i, j, d = 1 + place // 2, 2 + place // 2, d0 + LINE.value * (place % 2)
        of_value = j * row + d * column if j < 7 and d < values else 0
        of_sums = OF_KEYS + i * values + d if started and i < 4 and d < values else 0
        assert number == of_value | of_sums
