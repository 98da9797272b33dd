"""The last kernel of a small backward: dq, dk and dw from what ``feature_kernel`` leaves, and dV
(math.md, eq. 9 to 13). Each is a sum in a fixed order, of other programs."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import aligned, batch_entry, entry_offset
from additive_attn.backends.triton.key_sums import key_block
from additive_attn.backends.triton.launch import kernel, launch, target
from additive_attn.backends.triton.merging import is_last
from additive_attn.backends.triton.numerics import number
from additive_attn.backends.triton.one_pass import product_precision
from additive_attn.backends.triton.prepare import TICKETS
from additive_attn.backends.triton.row_pass import product


class FeatureSums(NamedTuple):
    """What ``feature_kernel`` leaves of tiles of rows and ranges of keys; ``query`` of several
    ranges."""

    row_tiles: int = 0
    ranges: int = 0
    query: Tensor | None = None
    key: Tensor | None = None
    weight: Tensor | None = None


@triton.jit
def _weight_gradient(
    key, key_row, key_h, sizes, key_sums, weight_sums, weight_parts, ticket, grad_weight,
    entry, entries, f, row_tiles, shares, split, splits, keys, hidden, padded, scale,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What a range of keys and of ``shares`` has of dw, of an entry and features f. Of several
    ranges it goes to ``weight_parts``, and who has the last ticket adds them up."""
    total = tl.zeros([f.shape[0]], tl.float32)
    per_split = tl.cdiv(tl.cdiv(keys, BLOCK), splits)
    last = tl.minimum((split + 1) * per_split, tl.cdiv(keys, BLOCK))
    for block in range(split * per_split, last):
        total += key_block(
            key, key_row, key_h, sizes, key, 0, key_sums, None, entry, entries, block, f,
            row_tiles, 0, keys, keys, hidden, padded, scale, True, BLOCK, TILES,
        )  # fmt: skip
    for part in range(split, shares, splits):
        of_part = weight_sums + (tl.cast(part, tl.int64) * entries + entry) * hidden
        total += tl.load(of_part + f, mask=f < hidden, other=0.0)
    if weight_parts is None:
        tl.store(grad_weight + entry * hidden + f, total, mask=f < hidden)
    else:
        parts = weight_parts + entry * hidden + f
        stride = tl.cast(entries, tl.int64) * hidden
        tl.store(parts + split * stride, total, mask=f < hidden)
        if is_last(ticket, splits):
            whole = tl.zeros([f.shape[0]], tl.float32)
            for other in range(0, splits):
                whole += tl.load(parts + other * stride, mask=f < hidden, other=0.0)
            tl.store(grad_weight + entry * hidden + f, whole, mask=f < hidden)


@triton.jit
def _query_gradient(query_sums, grad_query, program, count, ranges, BLOCK: tl.constexpr):
    """dq from the sums of ranges of keys, whatever the order of its numbers."""
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, ranges):
        total += tl.load(query_sums + part * count + place, mask=inside, other=0.0)
    tl.store(grad_query + place, total.to(grad_query.dtype.element_ty), mask=inside)


@triton.jit
def _value_gradient(
    scores, grad_out, go_row, go_column, grad_value, n, c0, d0, rows, keys, score_padded, values,
    KEYS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """dV = (P o D)^T dO of some keys and numbers of their values. ROUNDED: P takes the dtype of
    dO, as weights in 16 bits do."""
    c = c0 + tl.arange(0, KEYS)[:, None]
    d = d0 + tl.arange(0, VALUES)[None, :]
    acc = tl.zeros([KEYS, VALUES], tl.float32)
    for r0 in range(0, rows, ROWS):
        r = r0 + tl.arange(0, ROWS)
        x = tl.load(  # [KEYS, ROWS]
            scores + (n * rows + r[None, :]) * score_padded + c,
            mask=(r < rows)[None, :] & (c < score_padded),
            other=0.0,
        )
        y = tl.load(  # [ROWS, VALUES]
            grad_out + r[:, None].to(tl.int64) * go_row + d.to(tl.int64) * go_column,
            mask=(r < rows)[:, None] & (d < values),
            other=0.0,
        )
        if ROUNDED:
            x = x.to(y.dtype)
        acc = product(acc, x, y, PRECISION, TARGET)
    to = grad_value + (n * keys + c) * values + d
    tl.store(to, acc.to(grad_value.dtype.element_ty), mask=(c < keys) & (d < values))


@kernel
def gradient_sum_kernel(
    key, key_outer, key_inner, key_row, key_h, key_rows, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, key_sums, weight_sums, query_sums,
    weight_parts, tickets, scores, grad_out, go_outer, go_inner, go_row, go_column,
    grad_query, grad_key, grad_value, grad_weight,
    inner, entries, value_programs, weight_programs, key_programs, row_tiles, shares, splits,
    ranges, rows, keys, score_padded, hidden, padded, values, length, scale_bits,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, TILES: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    ROUNDED: tl.constexpr, PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Programs of dV, dw, dk and dq, in this order: those that take longest begin
    first."""
    program = tl.program_id(0)
    if program < value_programs:
        if grad_value is not None:
            key_tiles = tl.cdiv(keys, KEYS)
            part = program // key_tiles
            n, o, m = batch_entry(part // tl.cdiv(values, VALUES), inner)
            _value_gradient(
                scores, grad_out + entry_offset(o, go_outer, m, go_inner, ALIGNED), go_row,
                go_column, grad_value, n, program % key_tiles * KEYS,
                part % tl.cdiv(values, VALUES) * VALUES, rows, keys, score_padded, values,
                KEYS, VALUES, ROWS, ROUNDED, PRECISION, TARGET,
            )  # fmt: skip
    elif program < value_programs + weight_programs + key_programs:
        if key_sums is not None:
            program -= value_programs
            scale = number(scale_bits).to(tl.float32)
            feature_tiles = tl.cdiv(hidden, FEATURES)
            blocks = tl.where(program < weight_programs, splits, tl.cdiv(keys, BLOCK))
            of_keys = tl.where(program < weight_programs, program, program - weight_programs)
            part = of_keys // blocks
            f = part % feature_tiles * FEATURES + tl.arange(0, FEATURES)
            n, o, m = batch_entry(part // feature_tiles, inner)
            if program < weight_programs:
                if grad_weight is not None:
                    _weight_gradient(
                        key + o * key_outer + m * key_inner, key_row, key_h,
                        key_rows.size + o * key_exp_outer + m * key_exp_inner, key_sums,
                        weight_sums, weight_parts, tickets + part, grad_weight, n, entries, f,
                        row_tiles, shares, of_keys % blocks, splits, keys, hidden, padded, scale,
                        BLOCK, TILES,
                    )  # fmt: skip
            elif grad_key is not None:
                key_block(
                    key, key_row, key_h, key_rows, weight + o * weight_outer + m * weight_inner,
                    weight_h, key_sums, grad_key, n, entries, of_keys % blocks, f, row_tiles,
                    0, keys, keys, hidden, padded, scale, False, BLOCK, TILES,
                )  # fmt: skip
    elif query_sums is not None:
        program -= value_programs + weight_programs + key_programs
        _query_gradient(query_sums, grad_query, program, length, ranges, 1024)


def gradient_sums(
    p: Problem, parts: FeatureSums, of_value: tuple[Tensor, Tensor] | None, query: Tensor | None,
    key: Tensor | None, value: Tensor | None, weight: Tensor | None,
) -> None:  # fmt: skip
    """Fills the gradients that are given and not yet there: dV where ``of_value`` has P o D,
    padded, and dO."""
    scores, grad_out = of_value or (None, None)
    value = None if of_value is None else value
    row_tiles = parts.row_tiles
    tile = tiles.key_sum_tile(p.keys, max(row_tiles, 1), p.padded)
    block = tiles.value_tile(p.values)
    feature_tiles = p.entries * -(-p.hidden // tile["FEATURES"])
    prepared, splits, weight_parts = p.prepared.weight, 1, None
    if weight is not None and feature_tiles <= TICKETS.value:  # more are enough as they are
        splits = max(1, -(-row_tiles * p.keys // tiles.SUMMED_KEYS))
    if splits > 1:
        weight_parts = prepared.weight.new_empty(splits, p.entries, p.hidden)
    value_tiles = p.entries * -(-p.keys // block["KEYS"]) * -(-p.values // block["VALUES"])
    counts = (
        0 if value is None else value_tiles,
        0 if weight is None else feature_tiles * splits,
        0 if key is None else feature_tiles * -(-p.keys // tile["BLOCK"]),
    )
    length = 0 if query is None or parts.query is None else query.numel()
    given = p.batched(grad_out, 2)
    _, key_rows, _, _, *key_strides = p.prepared_rows_arguments()
    launch(
        gradient_sum_kernel, sum(counts) + -(-length // 1024), prepared.weight,
        p.key, *p.key_strides, key_rows, *key_strides, p.weight, *p.weight_strides,
        parts.key, parts.weight, parts.query, weight_parts, prepared.tickets, scores, *given,
        query, key, value, weight,
        p.batch.inner, p.entries, *counts, row_tiles, parts.ranges * row_tiles, splits,
        parts.ranges, p.rows, p.keys, 0 if scores is None else scores.shape[-1], p.hidden,
        p.padded, p.values, length, p.scale_bits, **tile, **block,
        ALIGNED=aligned(*given[1:3]),
        ROUNDED=p.dtype.itemsize == 2, PRECISION=product_precision(p), TARGET=target(),
        num_stages=2,
    )  # fmt: skip
