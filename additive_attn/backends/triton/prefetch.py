"""Loads lines of memory before loops need them, on NVIDIA GPUs.

A thread of the loop over features keeps so many numbers that the compiler places loads shortly
before their use, and so few warps run at a time that each turn would wait for another cache. So
each line of the turn after the next is loaded by one thread, into the nearest cache. GPUs have an
instruction that prefetches into the next cache only. So a number is loaded, and the compiler is
made to believe that it is used."""

from __future__ import annotations

import triton
import triton.language as tl

LINE = tl.constexpr(32)  # numbers of float32 in a line


@triton.jit
def use(numbers, place):
    """Makes the compiler believe that ``numbers``, of int32, are used: if one equals a certain
    NaN, the line at ``place`` is prefetched, which changes nothing. Threads wait here for loads of
    the numbers."""
    tl.inline_asm_elementwise(
        "{ .reg .pred same; setp.eq.s32 same, $1, 0x7fc00123; @same prefetch.global.L2 [$2];"
        " mov.b32 $0, $1; }",
        "=r,r,l", [numbers, place.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def lines_of_quads(
    row_quads, key_quads, row_step, key_step, p_first, quads, next_keys,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, THREADS: tl.constexpr,
    MATCHED: tl.constexpr,
):  # fmt: skip
    """Returns where the lines of the first turn, two quads, begin for each thread, [THREADS]; half
    of how far those of the next turn are; how far those of the next tile are, 0 where that is none
    or not whole; and the number of turns. A last quad without a second is left out.
    ``quads``: of each of SPLIT groups of threads."""
    ROWS: tl.constexpr = max(1, (8 if MATCHED else 4) * BM // LINE)  # lines of a quad
    KEYS: tl.constexpr = max(1, 4 * BN // LINE)
    thread = tl.arange(0, THREADS)
    part = (thread // (THREADS // SPLIT)).to(tl.int64) * quads
    # Threads that are left over load the last line once more.
    row = tl.minimum(thread % (THREADS // SPLIT), 2 * ROWS + (3 if MATCHED else 2) * KEYS - 1)
    key = row - 2 * ROWS
    p = key - 2 * KEYS
    of_row = row_quads + (part + tl.minimum(row // ROWS, quads - 1)) * row_step
    of_key = key_quads + (part + tl.minimum(key // KEYS, quads - 1)) * key_step
    place = tl.where(key < 0, of_row + row % ROWS * LINE, of_key + key % KEYS * LINE)
    step = tl.where(key < 0, row_step, key_step)
    if MATCHED:
        of_p = key_quads + ((p_first + part // 2) * key_step + p * LINE)
        place = tl.where(p < 0, place, of_p)
        step = tl.where(p < 0, step, key_step // 2)
    place = place.to(tl.pointer_type(tl.int32))
    return place, step, tl.where(key < 0, 0, next_keys), tl.maximum(quads // 2, 1)


@triton.jit
def load_turn(lines, turn):
    """Loads the lines of a turn, or of the last one."""
    place, step, _to_next, turns = lines
    turn = tl.minimum(turn, turns - 1)
    # The product needs 64 bits, the step is kept in one register.
    return tl.load(place + 2 * (turn.to(tl.int64) * step.to(tl.int64)))


@triton.jit
def load_next_tile(lines):
    """Loads the lines of the first two turns of the next tile."""
    place, step, to_next, turns = lines
    of_next = place + to_next
    second = tl.minimum(turns - 1, 1).to(tl.int64) * step.to(tl.int64)
    return tl.load(of_next) | tl.load(of_next + 2 * second)


@triton.jit
def load_columns(
    value, value_row, value_column, key0, last, sums, row0, rows, started, d0, values,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Loads every LINEth of BD numbers from d0, of the values of a tile of keys and of the sums of
    its rows, ``values`` numbers each, once they are ``started``. Of dense values and sums these
    are all lines."""
    OF_ROW: tl.constexpr = max(1, BD // LINE)
    COUNT: tl.constexpr = OF_ROW * max(BM, BN)
    thread = tl.arange(0, COUNT)
    r = thread // OF_ROW
    d = d0 + thread % OF_ROW * LINE
    i, j = row0 + r, key0 + r
    of_value = tl.load(
        value + (j.to(tl.int64) * value_row + d.to(tl.int64) * value_column),
        mask=(r < BN) & (j < last) & (d < values), other=0.0,
    )  # fmt: skip
    of_sums = tl.load(
        sums + (i.to(tl.int64) * values + d),
        mask=(r < BM) & (i < rows) & (d < values * started), other=0.0,
    )  # fmt: skip
    if of_value.dtype.primitive_bitwidth == 16:
        of_value = of_value.to(tl.int16, bitcast=True).to(tl.int32)
    return of_value.to(tl.int32, bitcast=True) | of_sums.to(tl.int32, bitcast=True)
