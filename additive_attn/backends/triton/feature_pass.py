"""The kernel of a backward's pass over features. It computes tiles of ``feature_gradients`` and,
in a small backward, all that comes after them (``gradient_sums``), which saves launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import aligned, batch_entry, entry_offset
from additive_attn.backends.triton.feature_gradients import feature_tile
from additive_attn.backends.triton.gradient_sums import (
    Totals,
    add_up,
    ticket_count,
    value_gradient,
)
from additive_attn.backends.triton.launch import kernel, launch, registers, target
from additive_attn.backends.triton.numerics import number
from additive_attn.backends.triton.one_pass import product_precision
from additive_attn.backends.triton.opposite import Flags
from additive_attn.backends.triton.plan import Piece, pass_splits
from additive_attn.backends.triton.prepare import TICKETS


class FeaturePlan(NamedTuple):
    """How a pass is split: its tile, the numbers of tiles of rows and of features, and the number
    of ranges of whole blocks of keys, with ``per_range`` keys each."""

    tile: dict[str, int]
    block: int
    registers: int
    row_tiles: int
    feature_tiles: int
    ranges: int
    per_range: int


class Finish(NamedTuple):
    """What ``feature_kernel`` fills besides dq in a small backward, None where not needed; and
    what dV is computed from: P o D (``scores``), padded, and dO."""

    key: Tensor | None
    weight: Tensor | None
    value: Tensor | None
    scores: Tensor | None
    grad_out: Tensor | None


class FeatureSums(NamedTuple):
    """What the pass stores by tiles of rows and ranges of keys; ``query`` only by ranges."""

    query: Tensor | None
    key: Tensor | None
    weight: Tensor | None


@kernel
def feature_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, gradient, flags,
    grad_query, key_sums, weight_sums,
    totals, scores, grad_out, go_outer, go_inner, go_row, go_column, grad_value,
    inner, entries, entry_begin, rows, row_begin, row_count, row_padded, keys, key_begin,
    key_count, key_padded, hidden, left, right, scale_bits, splits, keys_per_split,
    value_programs, score_padded, values,
    RX: tl.constexpr, TX: tl.constexpr, TW: tl.constexpr, TF: tl.constexpr, BLOCK: tl.constexpr,
    padded: tl.constexpr, FLAG_ROWS: tl.constexpr, FLAG_KEYS: tl.constexpr, TILES: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    ROUNDED: tl.constexpr, PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The first programs compute dV, if there are ``scores``; the others run ``feature_tile``.
    With TILES these cover all rows and keys, and add up what they store to ``totals``, TILES tiles
    of rows at a time. Triton 3.6 cannot test whether a tuple that holds None is None."""
    program = tl.program_id(0)
    some = True
    if scores is not None:
        if program < value_programs:
            key_tiles = tl.cdiv(keys, KEYS)
            part = program // key_tiles
            n, o, m = batch_entry(part // tl.cdiv(values, VALUES), inner)
            value_gradient(
                scores, grad_out + entry_offset(o, go_outer, m, go_inner, ALIGNED), go_row,
                go_column, grad_value, n, program % key_tiles * KEYS,
                part % tl.cdiv(values, VALUES) * VALUES, rows, keys, score_padded, values,
                KEYS, VALUES, ROWS, ROUNDED, PRECISION, TARGET,
            )  # fmt: skip
        program -= value_programs
        some = program >= 0
    if gradient is not None:
        if some:
            end = feature_tile(
                program, query, key, query_outer, query_inner, query_row, query_h, key_outer,
                key_inner, key_row, key_h, query_rows, key_rows, query_exp_outer, query_exp_inner,
                key_exp_outer, key_exp_inner, weight, weight_outer, weight_inner, weight_h,
                gradient, flags, grad_query, key_sums, weight_sums, inner, entries, entry_begin,
                rows, row_begin, row_count, row_padded, keys, key_begin, key_count, key_padded,
                hidden, left, right, scale_bits, splits, keys_per_split,
                RX, TX, TW, TF, BLOCK, padded, FLAG_ROWS, FLAG_KEYS, 1 if TILES > 0 else 2, TARGET,
            )  # fmt: skip
            if TILES > 0:
                # As in ``_finish``: what is computed again takes no registers in the loops. On AMD
                # GPUs a larger block of keys would take memory of its own.
                add_up(
                    totals, key, key_outer, key_inner, key_row, key_h, key_rows, key_exp_outer,
                    key_exp_inner, weight, weight_outer, weight_inner, weight_h, grad_query,
                    key_sums, weight_sums, tl.maximum(program, -end), inner, entries, rows, keys,
                    hidden, padded, number(scale_bits).to(tl.float32), splits, keys_per_split,
                    RX * TX, 2 * TW * TF, 8 if TARGET == "hip" else 16, TILES,
                )  # fmt: skip


def small_plan(p: Problem) -> FeaturePlan | None:
    """Returns the plan of one piece of all rows and keys where launches cost more than what they
    run, else None."""
    # Without the bound on registers that lets more programs of large calls run at a time.
    plan = feature_plan(p, p.entries, p.rows, p.keys, 255)
    tickets = ticket_count(p.entries * plan.feature_tiles, plan.row_tiles, plan.ranges)
    small = tiles.is_small(p.entries, p.rows, p.keys, plan.row_tiles)
    return plan if small and tickets <= TICKETS.value else None


def feature_plan(p: Problem, entries: int, rows: int, keys: int, most: int) -> FeaturePlan:
    tile, block = tiles.gradient_tile(rows, p.padded, p.wide), tiles.gradient_block(keys)
    row_tiles = -(-rows // (tile["RX"] * tile["TX"]))
    feature_tiles = -(-p.padded // (2 * tile["TW"] * tile["TF"]))
    resident = tiles.resident(32 * tile["num_warps"], most) * p.processors
    ranges = pass_splits(entries * row_tiles * feature_tiles, keys, block, resident)
    return FeaturePlan(tile, block, most, row_tiles, feature_tiles, *ranges)


# The constants of a call without dV.
NO_VALUE = {
    "KEYS": 0, "VALUES": 0, "ROWS": 0, "ALIGNED": False, "ROUNDED": False, "PRECISION": "ieee",
}  # fmt: skip


def _value(p: Problem, finish: Finish | None) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Returns the number of programs of dV, parameters ``scores`` to ``grad_value``, and
    constants."""
    if finish is None or finish.value is None or finish.scores is None:
        return 0, (None, *p.batched(None, 2), None), NO_VALUE
    tile, grad_out = tiles.value_tile(p.values), p.batched(finish.grad_out, 2)
    programs = p.entries * -(-p.keys // tile["KEYS"]) * -(-p.values // tile["VALUES"])
    constants = {
        **tile, "ALIGNED": aligned(*grad_out[1:3]), "ROUNDED": p.dtype.itemsize == 2,
        "PRECISION": product_precision(p),
    }  # fmt: skip
    return programs, (finish.scores, *grad_out, finish.value), constants


def feature_pass(
    p: Problem, plan: FeaturePlan, piece: Piece, gradient: Tensor, flags: Flags | None,
    query: Tensor | None, need_key: bool, need_weight: bool, shares: int = 0,
    finish: Finish | None = None,
) -> FeatureSums:  # fmt: skip
    """Fills ``query``, dq of a piece, unless there are several ranges and no ``finish``. The sums
    of dw that it returns have room for ``shares`` more."""
    entry, entries, row, rows = piece
    key, end = p.key_range(piece)
    count = end - key
    tile, ranges, row_tiles = plan.tile, plan.ranges, plan.row_tiles
    of_query, key_sums, weight_sums = query, None, None
    if query is not None and ranges > 1:
        of_query = gradient.new_empty(ranges, entries, rows, p.hidden)
    if need_key:
        key_sums = gradient.new_empty(row_tiles, entries, -(-count // 8) * 8, p.padded)
    if need_weight:
        weight_sums = gradient.new_empty(ranges * row_tiles + shares, entries, p.hidden)
    programs = entries * row_tiles * plan.feature_tiles * ranges
    if query is None and not (need_key or need_weight):
        programs = 0
    value_programs, value, block = _value(p, finish)
    totals = None
    if finish is not None:
        weight_parts = None
        if need_weight and ranges > 1:
            weight_parts = gradient.new_empty(ranges, entries, p.hidden)
        totals = Totals(
            p.prepared.weight.tickets, query if ranges > 1 else None, finish.key, finish.weight,
            weight_parts,
        )  # fmt: skip
    launch(
        feature_kernel, programs + value_programs, gradient,
        *p.inputs(), *p.prepared_rows_arguments(), p.weight, *p.weight_strides,
        gradient if programs else None, None if flags is None else flags.tiles,
        of_query, key_sums, weight_sums, totals, *value,
        p.batch.inner, entries, entry, p.rows, row, rows, gradient.shape[2], p.keys, key, count,
        4 * gradient.shape[1], p.hidden, p.left, p.right, p.scale_bits, ranges, plan.per_range,
        value_programs, *((0, 0) if value[0] is None else (value[0].shape[-1], p.values)),
        **tile, BLOCK=plan.block, padded=p.padded, FLAG_ROWS=1 if flags is None else flags.rows,
        FLAG_KEYS=1 if flags is None else flags.keys,
        TILES=tiles.summed_tiles(tile, row_tiles) if finish else 0, **block,
        TARGET=target(), **registers(plan.registers),
    )  # fmt: skip
    return FeatureSums(of_query, key_sums, weight_sums)
