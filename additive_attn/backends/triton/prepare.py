"""What the score kernels read: exponentials, once per query and key, and weights scaled by a power
of two so that abs(w) < 2.

With a = e^{-2q} and b = e^{2k} a pair (i, j) costs one addition per feature and a share of one
reciprocal (math.md, eq. 3, 4). Both are rounded. To first order, with the relative roundings rho,

    tanh(q + k) = t + (1 - t^2) / 2 (rho_b - rho_a)

which shows where t is small: there 1 - t^2 is near 1, and one correction per row and one per key
take it out of the scores (math.md, eq. 8). From the gradient of the weight, where the roundings of
a row or a key add up over all its pairs, they are always taken out.

All t of a tile are small where all |q|, |k| <= 1. Of an opposite pair, q near -k in every feature
that matters, they are small too, but q and k are not. A ``sketch`` of rows and keys tells such
pairs without a look at the features (``opposite.py``).

Exponentials are kept in ``quads`` of features, [HP / 4][LP][4], for passes over pairs: there
neighbouring threads read neighbouring rows, 16 bytes each. Passes over features read rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.batch import BatchShape, aligned, batch_entry, entry_offset
from additive_attn.backends.triton.launch import bits, kernel, launch
from additive_attn.backends.triton.numerics import exp_with_error, number
from additive_attn.backends.triton.tiles import power_of_two

SAFE = tl.constexpr(10.0)  # (e^{2 SAFE} + e^{2 SAFE})^4 < 2^120
DIFFERENCE_MAX_FEATURES = 64  # up to so many the plain layer rounds so little that w (b - a) helps
FEATURES_PER_SUM = 32  # partial sums are centred after so many features, which keeps them small
STEP = tl.constexpr(4)  # the gradient's loops take so many rows at a time, and begin anywhere
SKETCH = tl.constexpr(32)  # numbers of a sketch
GROUP = tl.constexpr(8)  # rows that share flags; lengths are padded to whole groups
SMALL = tl.constexpr(1)  # in the flags of a group: one of its rows has no |x| > 1
WILD = tl.constexpr(256)  # the same: not within SAFE; so far apart that flags may be added up
SPARE = tl.constexpr(128)  # rows that a tile may reach beyond the last of all quads
TICKETS = tl.constexpr(1024)


class PreparedWeight(NamedTuple):
    """``weight`` (outer, inner, HP): w divided by a power of two, so that abs(w) < 2, and padded
    with zeros, in the computing dtype. ``score_scale`` (outer, inner, 2): two factors whose
    product is that power of two times the scale of the scores, NaN where a weight is not finite.
    One after the other they overflow only where the score does. ``centre`` (outer, inner,
    HP / 32): half the sums of 32 weights each. ``tickets`` (TICKETS,): zeros, for the programs of
    one kernel of the call (``merging.is_last``)."""

    weight: Tensor
    score_scale: Tensor
    centre: Tensor
    tickets: Tensor


class PreparedRows(NamedTuple):
    """Of queries (e^{-2q}) or keys (e^{2k}): ``exponential`` (outer, inner, LP, HP), 1 in rows
    that are not within SAFE and in the rows beyond the last, so that loops need no bounds;
    ``quads``, the same as (outer inner, HP / 4, LP, 4) and SPARE rows more, flat; ``weighted``,
    quads of w e^{-2q} (queries only); ``size`` (outer, inner, LP) = max |x|, Inf for NaN;
    ``correction`` (outer, inner, LP); ``flags`` (outer, inner, LP / GROUP), of keys beside
    ``quads``; ``sketch`` (outer, inner, LP, 32), in float16: sums of w x / |w| over every 32nd
    feature, with random signs; ``distance`` (outer, inner, LP): the square of a key's sketch, and
    what twice its product with a query's and this square must stay below for a pair to be
    opposite. What no pass will read has no elements."""

    exponential: Tensor
    quads: Tensor
    weighted: Tensor
    size: Tensor
    correction: Tensor
    flags: Tensor
    distance: Tensor
    sketch: Tensor


class Prepared(NamedTuple):
    """Queries and keys are None in float64, whose direct form needs no exponentials."""

    weight: PreparedWeight
    query: PreparedRows | None
    key: PreparedRows | None


@triton.jit
def padded_length(length):
    """LP of so many rows."""
    return (length + (STEP + GROUP - 2)) // GROUP * GROUP


@triton.jit
def _weight_exponent(weight, stride_h, hidden, padded, BLOCK: tl.constexpr):
    """``_exponent`` the largest finite |w|."""
    most = tl.zeros([BLOCK], tl.float32)
    for h0 in range(0, padded, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        w = tl.load(weight + h.to(tl.int64) * stride_h, mask=h < hidden, other=0.0)
        w = tl.abs(w.to(tl.float32))
        most = tl.maximum(most, tl.where(w < float("inf"), w, 0.0))
    return _exponent(tl.max(most, 0))


@triton.jit
def _exponent(largest):
    """The exponent of the largest |w|, so far as its reciprocal is a normal number."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.where(largest == 0.0, 0, tl.maximum(tl.minimum(exponent, 125), -125))


@triton.jit
def _power(exponent):
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _prepare_weight(
    weight, stride_h, prepared, n, hidden, padded, scale_bits, scale_exponent,
    BLOCK: tl.constexpr, FEATURES_PER_SUM: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BLOCK)
    w = tl.load(weight + h.to(tl.int64) * stride_h, mask=h < hidden, other=0.0)
    finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32), 0)
    first = number(scale_bits)
    second = 1.0
    if w.dtype != tl.float64:
        exponent = _weight_exponent(weight, stride_h, hidden, padded, BLOCK)
        w = w.to(tl.float32) * _power(-exponent)
        both = tl.maximum(tl.minimum(exponent + scale_exponent, 250), -250)
        half = both >> 1
        first = _power(half) * first.to(tl.float32)
        second = _power(both - half)
        sums = tl.sum(tl.reshape(w, [BLOCK // FEATURES_PER_SUM, FEATURES_PER_SUM]), 1)
        block = tl.arange(0, BLOCK // FEATURES_PER_SUM)
        blocks = padded // FEATURES_PER_SUM
        tl.store(prepared.centre + n * blocks + block, sums * 0.5, mask=block < blocks)
    ticket = tl.arange(0, TICKETS)
    tl.store(prepared.tickets + ticket, ticket * 0, mask=ticket < tl.where(n == 0, TICKETS, 0))
    tl.store(prepared.score_scale + 2 * n, tl.where(finite != 0, first, float("nan")))
    tl.store(prepared.score_scale + 2 * n + 1, second)
    tl.store(prepared.weight + n * padded + h, w, mask=h < padded)


@triton.jit
def _opposite_limit(square, hidden):
    """Below what squared distance from -k a query with this square is opposite to a key: so small
    that of ordinary rows and keys, which have only ``hidden`` ways to differ, hardly any are."""
    share = tl.where(hidden >= 16, 0.04, tl.where(hidden >= 8, 0.01, 0.0025))
    share = tl.where(hidden >= 4, share, tl.where(hidden >= 2, 1e-5, 0.0))
    return share * tl.minimum(2.0 * square, 1.0)


@triton.jit
def _load_rows(source, stride_h, weight, weight_h, f, inside, hidden):
    """x of a group of rows and w, features f, both [GROUP, BLOCK / 4, 4], lest x be laid out as w
    is."""
    f = f.to(tl.int64)
    v = tl.load(source + f * stride_h, mask=inside & (f < hidden), other=0.0)
    w = tl.load(tl.broadcast_to(weight + f * weight_h, v.shape), mask=f < hidden, other=0.0)
    return v.to(tl.float32), w.to(tl.float32)


@triton.jit
def _row_sums(v, w, f, largest, sums, squares):
    """The largest |x|, the sums of a sketch and of w^2 with these features."""
    # A comparison with NaN is false: NaN counts as infinite.
    absolute = tl.abs(v)
    absolute = tl.where(absolute < float("inf"), absolute, float("inf"))
    signed = tl.where((f.to(tl.uint32) * 2654435769) >> 31 != 0, -w, w)
    return tl.maximum(largest, absolute), sums + signed * v, squares + w * w


@triton.jit
def _store_exponentials(
    v, w, f, rows, at, quads, length_padded, padded,
    SIGN: tl.constexpr, EXPONENTIAL: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Stores the exponentials of features f; what their roundings add to the correction."""
    e, error = exp_with_error(v * (2.0 * SIGN))
    stored = f < padded
    if EXPONENTIAL:
        tl.store(rows.exponential + at * padded + f, e, mask=stored)
    if QUADS:
        to = quads + (f // 4).to(tl.int64) * (4 * length_padded) + f % 4
        tl.store(rows.quads + to, e, mask=stored)
        if SIGN < 0:
            tl.store(rows.weighted + to, w * e, mask=stored)
    return w * (error / e)


@triton.jit
def _prepare_rows(
    x, stride_row, stride_h, weight, weight_h, rows, n, tile, length, length_padded, hidden,
    padded, SIGN: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    EXPONENTIAL: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """A group of rows, [GROUP, BLOCK / 4, 4] at a time: threads read and write four features of
    neighbouring rows, in every layout. WHOLE: BLOCK features are all. Sums stay apart per thread
    until the loops end."""
    FOURS: tl.constexpr = BLOCK // 4
    row = tile * GROUP + tl.arange(0, GROUP)
    h = 4 * tl.arange(0, FOURS)[None, :, None] + tl.arange(0, 4)[None, None, :]
    inside = (row < length)[:, None, None]
    source = x + row[:, None, None].to(tl.int64) * stride_row
    largest = tl.zeros([GROUP, FOURS, 4], tl.float32)
    sums = tl.zeros([GROUP, FOURS, 4], tl.float32)
    squares = tl.zeros([GROUP, FOURS, 4], tl.float32)
    if WHOLE:
        v, w = _load_rows(source, stride_h, weight, weight_h, h, inside, hidden)
        w *= _power(-_exponent(tl.max(tl.where(tl.abs(w) < float("inf"), tl.abs(w), 0.0))))
        largest, sums, squares = _row_sums(v, w, h, largest, sums, squares)
    else:
        factor = _power(-_weight_exponent(weight, weight_h, hidden, padded, BLOCK))
        for h0 in range(0, padded, BLOCK):
            v, w = _load_rows(source, stride_h, weight, weight_h, h0 + h, inside, hidden)
            largest, sums, squares = _row_sums(v, w * factor, h0 + h, largest, sums, squares)
    most = tl.max(tl.max(largest, 2), 1)
    at = n * length_padded + row
    tl.store(rows.size + at, most)
    if QUADS and SIGN > 0:
        small = tl.max(((row < length) & (most <= 1.0)).to(tl.int32), 0)
        wild = tl.max(((row < length) & (most > SAFE)).to(tl.int32), 0)
        tl.store(rows.flags + n * length_padded // GROUP + tile, small * SMALL + wild * WILD)
    of_row = tl.sum(tl.reshape(sums, [GROUP, BLOCK // SKETCH, SKETCH // 4, 4]), 1)
    of_row = (of_row / tl.sqrt(tl.sum(tl.sum(squares, 2), 1)[:, None, None])).to(tl.float16)
    lane = 4 * tl.arange(0, SKETCH // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(rows.sketch + SKETCH * at[:, None, None] + lane, of_row)
    square = tl.sum(tl.sum(of_row.to(tl.float32) * of_row.to(tl.float32), 2), 1)
    if SIGN < 0:
        square = _opposite_limit(square, hidden) - square
    tl.store(rows.distance + at, square)

    safe = ((row < length) & (most <= SAFE))[:, None, None]
    quads = (n * length_padded * padded + 4 * row)[:, None, None]
    to_rows = at[:, None, None]
    if WHOLE:
        total = _store_exponentials(
            tl.where(safe, v, 0.0), w, h, rows, to_rows, quads, length_padded, padded,
            SIGN, EXPONENTIAL, QUADS,
        )  # fmt: skip
    else:
        total = tl.zeros([GROUP, FOURS, 4], tl.float32)
        for h0 in range(0, padded, BLOCK):
            v, w = _load_rows(source, stride_h, weight, weight_h, h0 + h, safe, hidden)
            total += _store_exponentials(
                v, w * factor, h0 + h, rows, to_rows, quads, length_padded, padded,
                SIGN, EXPONENTIAL, QUADS,
            )  # fmt: skip
    tl.store(rows.correction + at, tl.sum(tl.sum(total, 2), 1) * (0.5 * SIGN))


@triton.jit
def _fill_spare(quads, end):
    """1 in the rows beyond the last of all quads."""
    tl.store(quads + end + tl.arange(0, 4 * SPARE), tl.full([4 * SPARE], 1.0, tl.float32))


@kernel
def prepare_kernel(
    query, key, weight, query_outer, query_inner, query_row, query_h,
    key_outer, key_inner, key_row, key_h, weight_outer, weight_inner, weight_h,
    prepared, query_rows, key_rows, row_programs, row_count, rows, key_programs, key_count, keys,
    inner, hidden, padded, scale_bits, scale_exponent,
    BLOCK: tl.constexpr, WEIGHT_BLOCK: tl.constexpr, FEATURES_PER_SUM: tl.constexpr,
    WHOLE: tl.constexpr, EXPONENTIAL: tl.constexpr, QUADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Programs of queries, of keys and of weights, in this order; of weights alone without
    ``query_rows``. ``row_count``, ``key_count`` and ``inner`` are their inner batch dims."""
    program = tl.program_id(0)
    if program >= row_programs + key_programs:
        n, o, m = batch_entry(program - row_programs - key_programs, inner)
        _prepare_weight(
            weight + o * weight_outer + m * weight_inner, weight_h, prepared, n, hidden, padded,
            scale_bits, scale_exponent, WEIGHT_BLOCK, FEATURES_PER_SUM,
        )  # fmt: skip
    elif query_rows is not None:
        padded = tl.multiple_of(padded, 4)
        if program >= row_programs:
            program -= row_programs
            keys_padded = padded_length(keys)
            n, o, m = batch_entry(program // (keys_padded // GROUP), key_count)
            if QUADS and program == 0:
                end = key_programs.to(tl.int64) * GROUP * padded
                _fill_spare(key_rows.quads, end)
            _prepare_rows(
                key + entry_offset(o, key_outer, m, key_inner, ALIGNED), key_row, key_h,
                weight + entry_offset(o, weight_outer, m, weight_inner, ALIGNED), weight_h,
                key_rows, n,
                program % (keys_padded // GROUP), keys, keys_padded, hidden, padded, 1, BLOCK,
                WHOLE, EXPONENTIAL, QUADS,
            )  # fmt: skip
        else:
            rows_padded = padded_length(rows)
            n, o, m = batch_entry(program // (rows_padded // GROUP), row_count)
            if QUADS and program == 0:
                end = row_programs.to(tl.int64) * GROUP * padded
                _fill_spare(query_rows.quads, end)
                _fill_spare(query_rows.weighted, end)
            _prepare_rows(
                query + entry_offset(o, query_outer, m, query_inner, ALIGNED), query_row, query_h,
                weight + entry_offset(o, weight_outer, m, weight_inner, ALIGNED), weight_h,
                query_rows, n,
                program % (rows_padded // GROUP), rows, rows_padded, hidden, padded, -1, BLOCK,
                WHOLE, EXPONENTIAL, QUADS,
            )  # fmt: skip


def _empty_rows(
    view: Tensor, padded: int, exponential: bool, quads: bool, queries: bool
) -> PreparedRows:
    outer, inner, length = view.shape[:3]
    length_padded = (length + STEP.value + GROUP.value - 2) // GROUP.value * GROUP.value

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=view.device)

    of_rows = outer, inner, length_padded
    size = outer * inner * length_padded * padded + 4 * SPARE.value if quads else 0
    groups = 0 if queries or not quads else length_padded // GROUP.value
    return PreparedRows(
        exponential=empty(*of_rows, padded if exponential else 0),
        quads=empty(size),
        weighted=empty(size if queries else 0),
        size=empty(*of_rows),
        correction=empty(*of_rows),
        flags=empty(outer, inner, groups, dtype=torch.int32),
        distance=empty(*of_rows),
        sketch=empty(*of_rows, SKETCH.value, dtype=torch.float16),
    )


def batch_strides(x: Tensor, size: int = 1) -> tuple[int, int]:
    """Of a contiguous (outer, inner, ...) with so many numbers each; 0 where it broadcasts."""
    outer, inner = x.shape[:2]
    return (0 if outer == 1 else inner * size), (0 if inner == 1 else size)


def prepare(
    query: Tensor, key: Tensor, weight: Tensor, batch: BatchShape, scale: float, *,
    exponential: bool, quads: bool,
) -> Prepared:  # fmt: skip
    """``query`` (*b, Lq, H), ``key`` (*b, Lk, H) and ``weight`` (*b, H) of any strides, and which
    layouts of the exponentials will be read."""
    w = batch.narrow(weight, 1)
    outer, inner, hidden = w.shape
    multiple = 4 if hidden <= DIFFERENCE_MAX_FEATURES else FEATURES_PER_SUM
    padded = -(-max(hidden, 1) // multiple) * multiple
    wide = weight.dtype == torch.float64
    scaled = torch.empty(
        outer, inner, padded, dtype=torch.float64 if wide else torch.float32, device=weight.device
    )
    of_weight = PreparedWeight(
        scaled,
        scaled.new_empty(outer, inner, 2),
        scaled.new_empty(outer, inner, padded // FEATURES_PER_SUM),
        scaled.new_empty(TICKETS.value, dtype=torch.int32),
    )
    views: list[Tensor] = []
    rows: list[PreparedRows | None] = []
    for x, queries in ((query, True), (key, False)):
        x = batch.narrow(x, 2)
        # What is prepared depends on the weight, which may have more heads than x.
        x = x.expand(max(x.shape[0], outer), max(x.shape[1], inner), *x.shape[2:])
        views.append(x)
        rows.append(None if wide else _empty_rows(x, padded, exponential, quads, queries))
    prepared = Prepared(of_weight, rows[0], rows[1])
    programs = [0 if x is None else x.size.numel() // GROUP.value for x in rows]
    mantissa, exponent = (scale, 0) if wide else math.frexp(scale)
    launch(
        prepare_kernel, sum(programs) + outer * inner, weight,
        *views, w, *views[0].stride(), *views[1].stride(),
        *(0 if n == 1 else s for n, s in zip(w.shape[:2], w.stride(), strict=False)), w.stride(2),
        *prepared,
        *(y for x, n in zip(views, programs, strict=True) for y in (n, x.shape[1], x.shape[2])),
        inner, hidden, padded, bits(mantissa), exponent,
        **tiles.prepare_tile(padded),
        ALIGNED=aligned(*(s for x in (*views, w) for s in x.stride()[:2])),
        WEIGHT_BLOCK=max(FEATURES_PER_SUM, power_of_two(padded)),
        FEATURES_PER_SUM=FEATURES_PER_SUM, EXPONENTIAL=exponential, QUADS=quads,
    )  # fmt: skip
    return prepared
