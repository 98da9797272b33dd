"""Merges the results of a row over ranges of keys (math.md, eq. 14): the largest score, the sum of
e^{score - largest} and the weighted sum of the values of each range.

A separate kernel merges them, or the last program of a row to finish. Programs of one kernel run
in any order. Each stores its results and then draws a ticket. The program that draws the last one
may load what all others have stored. It adds the parts in the order of the ranges, so results do
not depend on which program that is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.launch import kernel, launch
from additive_attn.backends.triton.masks import overflowed
from additive_attn.backends.triton.tiles import power_of_two


@triton.jit
def draw(ticket, count):
    """Returns whether this is the last of ``count`` programs to call it. ``ticket`` was 0. A
    barrier precedes the call, so that all threads have stored their results before one of them
    draws."""
    return tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == count - 1


@triton.jit
def is_last(ticket, count):
    """Runs that barrier, then ``draw``."""
    tl.debug_barrier()
    return draw(ticket, count)


@triton.jit
def softmax_inverse(top, total):
    """Returns 1 / the sum of a softmax: 1 for an empty row, NaN where all scores overflowed."""
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return tl.where(overflowed(top), float("nan"), inverse)


@triton.jit
def softmax_lse(top, total):
    return tl.where((total == 0.0) | overflowed(top), float("-inf"), top + tl.log(total))


@triton.jit
def merged_softmax(tops, totals, n, inside, entries, splits, SPLITS: tl.constexpr):
    """Returns the largest score and the sum of rows n, from SPLITS ranges at a time."""
    ACC: tl.constexpr = tops.dtype.element_ty
    largest = tl.full([n.shape[0]], float("-inf"), ACC)
    total = tl.zeros([n.shape[0]], ACC)
    for split0 in range(0, splits, SPLITS):
        s = split0 + tl.arange(0, SPLITS)[:, None]
        known = (s < splits) & inside[None, :]
        part = s.to(tl.int64) * entries + n[None, :]
        top = tl.load(tops + part, mask=known, other=float("-inf"))
        sums = tl.load(totals + part, mask=known, other=0.0)
        before = largest
        largest = tl.maximum(largest, tl.max(top, 0))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        # Rounded before it is added: else a lane's own share is rounded with the sum, lanes differ
        # by that, and which of them is stored to shared memory is not defined.
        share = tl.fma(sums, tl.exp(top - shift[None, :]), 0.0)
        total = total * tl.exp(before - shift) + tl.sum(share, 0)
    return largest, total


@triton.jit
def merged_values(
    parts, tops, n, inside, shift, d, entries, values, splits, CHUNK: tl.constexpr
):  # fmt: skip
    """Returns the weighted sums of numbers d of the values of rows n, [ROWS, VALUES], from CHUNK
    ranges at a time."""
    acc = tl.zeros([CHUNK, n.shape[0], d.shape[0]], parts.dtype.element_ty)
    for split0 in range(0, splits, CHUNK):
        split = split0 + tl.arange(0, CHUNK)[:, None]
        here = (split < splits) & inside[None, :]
        part = split.to(tl.int64) * entries + n[None, :]  # [CHUNK, ROWS]
        factor = tl.exp(tl.load(tops + part, mask=here, other=float("-inf")) - shift[None, :])
        x = tl.load(
            parts + part[:, :, None] * values + d[None, None, :],
            mask=here[:, :, None] & (d < values)[None, None, :], other=0.0,
        )  # fmt: skip
        acc += tl.where(here, factor, 0.0)[:, :, None] * x
    return tl.sum(acc, 0)


@kernel
def merge_kernel(
    parts, tops, totals, scores, out, weights, lse, entries, keys, values, splits,
    ROWS: tl.constexpr, VALUES: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Stores a tile of out of some entries, from CHUNK splits at a time, and one of their weights
    unless ``weights`` is None."""
    tile_rows = tl.cdiv(entries, ROWS)
    n = (tl.program_id(0) % tile_rows) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) // tile_rows
    inside = n < entries
    n = n.to(tl.int64)
    largest, total = merged_softmax(tops, totals, n, inside, entries, splits, SPLITS)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    inverse = softmax_inverse(largest, total)
    d = tile * VALUES + tl.arange(0, VALUES)
    result = merged_values(parts, tops, n, inside, shift, d, entries, values, splits, CHUNK)
    tl.store(
        out + n[:, None] * values + d[None, :],
        (result * inverse[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (d < values)[None, :],
    )
    tl.store(lse + n, softmax_lse(largest, total), mask=n < tl.where(tile == 0, entries, 0))
    if weights is not None:
        j = (tile * KEYS + tl.arange(0, KEYS))[None, :]
        here = inside[:, None] & (j < keys)
        x = tl.load(scores + n[:, None] * keys + j, mask=here, other=float("-inf"))
        p = tl.where(x == float("-inf"), 0.0, tl.exp(x - shift[:, None]) * inverse[:, None])
        tl.store(weights + n[:, None] * keys + j, p.to(weights.dtype.element_ty), mask=here)


@triton.jit
def merge_rows(
    ticket, parts, tops, totals, out, lse, entry, row0, entries, rows, values, splits,
    BM: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Draws a ticket; the last of ``splits`` programs stores out and lse of BM rows."""
    if is_last(ticket, splits):
        r = row0 + tl.arange(0, BM)
        n = entry * rows + r
        inside = r < rows
        count = tl.cast(entries, tl.int64) * rows
        largest, total = merged_softmax(tops, totals, n, inside, count, splits, 16)
        tl.store(lse + n, softmax_lse(largest, total), mask=inside)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        inverse = softmax_inverse(largest, total)
        for d0 in range(0, values, BD):
            d = d0 + tl.arange(0, BD)
            result = merged_values(parts, tops, n, inside, shift, d, count, values, splits, CHUNK)
            tl.store(
                out + n[:, None] * values + d[None, :],
                (result * inverse[:, None]).to(out.dtype.element_ty),
                mask=inside[:, None] & (d < values)[None, :],
            )


def merge(
    p: Problem, rows: int, splits: int, parts: Tensor, tops: Tensor, totals: Tensor,
    scores: Tensor | None, out: Tensor, weights: Tensor | None, lse: Tensor,
) -> None:  # fmt: skip
    """Merges the splits of all rows."""
    tile = tiles.merge_tile(p.values, splits, p.wide)
    tile_count = max(1, -(-p.values // tile["VALUES"]))
    if weights is not None:
        tile_count = max(tile_count, -(-p.keys // tile["KEYS"]))
    launch(
        merge_kernel, -(-rows // tile["ROWS"]) * tile_count, lse,
        parts, tops, totals, scores, out, weights, lse, rows, p.keys, p.values, splits,
        **tile, SPLITS=power_of_two(splits),
    )  # fmt: skip
