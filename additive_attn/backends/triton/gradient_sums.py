"""The end of a small backward, in the same kernel as the pass over features: dV, and the sums of
dq, dk and dw over programs (math.md, eq. 9 to 13).

The last program of a sum to finish adds it up (``merging.draw``), in a fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.key_sums import key_block
from additive_attn.backends.triton.merging import draw, is_last
from additive_attn.backends.triton.row_pass import product


class Totals(NamedTuple):
    """Where sums over all programs are stored, None where not needed. ``query`` and
    ``weight_parts`` (ranges, entries, hidden) are None for one range of keys. ``tickets``: see
    ``ticket_count``."""

    tickets: Any
    query: Any
    key: Any
    weight: Any
    weight_parts: Any


def ticket_count(parts: int, row_tiles: int, ranges: int) -> int:
    """Returns the number of tickets for ``parts``, entries times tiles of features. Each part has
    one per range of keys, for dk and its share of dw. With several ranges it also has one per tile
    of rows, for dq, and one for dw."""
    return parts * (1 if ranges == 1 else ranges + row_tiles + 1)


@triton.jit
def task(program, row_tiles, feature_tiles, splits):
    """Returns the tile of rows, tile of features, range of keys and entry of a program."""
    of_rows = program // row_tiles
    of_features = of_rows // feature_tiles
    return (
        program % row_tiles,
        of_rows % feature_tiles,
        of_features % splits,
        of_features // splits,
    )


@triton.jit
def value_gradient(
    scores, grad_out, go_row, go_column, grad_value, n, c0, d0, rows, keys, score_padded, values,
    KEYS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Stores dV = (P o D)^T dO of some keys and numbers of their values. ROUNDED: P is converted
    to the dtype of dO, as weights in 16 bits are."""
    c = c0 + tl.arange(0, KEYS)[:, None]
    d = d0 + tl.arange(0, VALUES)[None, :]
    acc = tl.zeros([KEYS, VALUES], tl.float32)
    for r0 in tl.range(0, rows, ROWS, num_stages=2):
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


@triton.jit
def _query_sums(
    query_sums, grad_query, n, entries, row0, f, rows, hidden, splits, BX: tl.constexpr
):  # fmt: skip
    """Stores dq of a tile of rows and of features, summed over ranges of keys."""
    r = row0 + tl.arange(0, BX)[:, None]
    place = (n * rows + r) * hidden + f[None, :]
    inside = (r < rows) & (f < hidden)[None, :]
    total = tl.zeros([BX, f.shape[0]], tl.float32)
    for split in range(0, splits):
        at = query_sums + split * entries * rows * hidden + place
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(grad_query + place, total.to(grad_query.dtype.element_ty), mask=inside)


@triton.jit
def _weight_sums(shares, count, stride, f, hidden, BLOCK: tl.constexpr):
    """Returns the sum of ``count`` shares of dw, and loads BLOCK at a time."""
    b = tl.arange(0, BLOCK)[:, None]
    total = tl.zeros([BLOCK, f.shape[0]], tl.float32)
    for c in range(0, count, BLOCK):
        inside = (c + b < count) & (f < hidden)[None, :]
        at = shares + (c + b) * stride + f[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def add_up(
    totals, key, key_outer, key_inner, key_row, key_h, key_rows, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, query_sums, key_sums, weight_sums,
    program, inner, entries, rows, keys, hidden, padded, scale, splits, keys_per_split,
    BX: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Fills ``totals`` where this program of the pass over features is the last of a sum."""
    row_tiles, feature_tiles = tl.cdiv(rows, BX), tl.cdiv(padded, TILE)
    tile, part, split, n = task(program, row_tiles, feature_tiles, splits)
    tickets = totals.tickets
    tickets += (n * feature_tiles + part) * tl.where(splits == 1, 1, splits + row_tiles + 1)
    n, o, m = batch_entry(n, inner)
    entries = tl.cast(entries, tl.int64)
    f = part * TILE + tl.arange(0, TILE)
    tl.debug_barrier()
    if totals.query is not None:
        last_range = draw(tickets + splits + tile, splits)
    if key_sums is not None:
        last_tile = row_tiles == 1
        if row_tiles > 1:
            last_tile = draw(tickets + split, row_tiles)
    if totals.query is not None:
        if last_range:
            _query_sums(
                query_sums, totals.query, n, entries, tile * BX, f, rows, hidden, splits, BX
            )
    if key_sums is not None:
        if last_tile:
            share = tl.zeros([TILE], tl.float32)
            begin = split * keys_per_split
            end = tl.minimum(begin + keys_per_split, keys)
            for block in range(begin // BLOCK, tl.cdiv(end, BLOCK)):
                share += key_block(
                    key + o * key_outer + m * key_inner, key_row, key_h,
                    key_rows.size + o * key_exp_outer + m * key_exp_inner,
                    weight + o * weight_outer + m * weight_inner, weight_h, key_sums, totals.key,
                    n, entries, block, f, row_tiles, 0, keys, keys, hidden, padded, scale,
                    totals.weight is not None, BLOCK, TILES,
                )  # fmt: skip
            if totals.weight is not None:
                stride = entries * hidden
                share += _weight_sums(
                    weight_sums + split * row_tiles * stride + n * hidden, row_tiles, stride, f,
                    hidden, TILES,
                )  # fmt: skip
                to = totals.weight + n * hidden + f
                if totals.weight_parts is None:
                    tl.store(to, share, mask=f < hidden)
                else:
                    of_entry = totals.weight_parts + n * hidden
                    tl.store(of_entry + split * stride + f, share, mask=f < hidden)
                    if is_last(tickets + splits + row_tiles, splits):
                        share = _weight_sums(of_entry, splits, stride, f, hidden, 4)
                        tl.store(to, share, mask=f < hidden)
