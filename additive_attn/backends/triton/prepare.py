"""Prepares what the score kernels read: exponentials, once per query and key, and weights scaled
by a power of two so that abs(w) < 2.

With a = e^{-2q} and b = e^{2k} a pair (i, j) costs one addition per feature and a share of one
reciprocal (math.md, eq. 3, 4). Both are rounded. To first order, with the relative roundings rho,

    tanh(q + k) = t + (1 - t^2) / 2 (rho_b - rho_a)

which matters where t is small: there 1 - t^2 is near 1, and one correction per row and one per key
remove it from the scores (math.md, eq. 8). From the gradient of the weight, where the roundings of
a row or a key accumulate over all its pairs, they are always removed.

All t of a tile are small where all |q|, |k| <= 1. They are small also for an opposite pair, whose
q is near -k in every feature that matters, but its q and k are not. A ``sketch`` of rows and keys
identifies such pairs without their features (``opposite.py``).

Exponentials are stored in ``quads`` of features for passes over pairs (``quad_layout.py``): there
neighbouring threads load neighbouring rows, 16 bytes each. Passes over features load rows. More
than DIFFERENCE_MAX_FEATURES are in another order in the quads (``matches.py``)."""

from __future__ import annotations

import math
import operator

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.batch import BatchShape, aligned, batch_entry, entry_offset
from additive_attn.backends.triton.launch import (
    bits,
    kernel,
    launch,
    processors,
    registers,
    target,
)
from additive_attn.backends.triton.matches import quad_order, store_matches, store_quad_weight
from additive_attn.backends.triton.numerics import (
    exp_with_error,
    number,
    opposite_limit,
    power,
    weight_exponent,
)
from additive_attn.backends.triton.prepared import Prepared, PreparedRows, PreparedWeight
from additive_attn.backends.triton.quad_layout import SPARE, fill_spare, store_exponentials
from additive_attn.backends.triton.tiles import DIFFERENCE_MAX_FEATURES, power_of_two

SAFE = tl.constexpr(10.0)  # (e^{2 SAFE} + e^{2 SAFE})^4 < 2^120
BLOCK_OF_FEATURES = 32  # more are padded to whole blocks
STEP = tl.constexpr(4)  # the gradient's loops take so many rows at a time, and begin anywhere
SKETCH = tl.constexpr(32)  # numbers of a sketch
GROUP = tl.constexpr(8)  # rows that share flags; lengths are padded to whole groups
SMALL = tl.constexpr(1)  # in the flags of a group: one of its rows has no |x| > 1
UNSAFE = tl.constexpr(256)  # the same: not within SAFE; so far apart that flags may be added up
TICKETS = tl.constexpr(4096)
# What is stored, in bits whose sums are neither 1 nor multiples of 16: Triton would compile other
# kernels for these.
ROWS = tl.constexpr(2)
QUADS = tl.constexpr(4)


@triton.jit
def padded_length(length):
    """Returns LP of ``length`` rows."""
    return (length + (STEP + GROUP - 2)) // GROUP * GROUP


@triton.jit
def _weight_exponent(weight, stride_h, hidden, padded, BLOCK: tl.constexpr):
    """Returns the ``weight_exponent`` of the largest finite |w|."""
    most = tl.zeros([BLOCK], tl.float32)
    for h0 in range(0, padded, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        w = tl.load(weight + h.to(tl.int64) * stride_h, mask=h < hidden, other=0.0)
        w = tl.abs(w.to(tl.float32))
        most = tl.maximum(most, tl.where(w < float("inf"), w, 0.0))
    return weight_exponent(tl.max(most, 0))


@triton.jit
def _prepare_weight(
    weight, stride_h, order, prepared, n, hidden, padded, scale_bits, scale_exponent, stored,
    BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, MATCHED: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BLOCK)
    w = tl.load(weight + h.to(tl.int64) * stride_h, mask=h < hidden, other=0.0)
    finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32), 0)
    first = number(scale_bits)
    second = 1.0
    if w.dtype != tl.float64:
        exponent = _weight_exponent(weight, stride_h, hidden, padded, BLOCK)
        w = w.to(tl.float32) * power(-exponent)
        both = tl.maximum(tl.minimum(exponent + scale_exponent, 250), -250)
        half = both >> 1
        first = power(half) * first.to(tl.float32)
        second = power(both - half)
        if MATCHED:
            if stored & QUADS != 0:
                store_quad_weight(
                    weight, stride_h, order, prepared.quad_weight + n * padded, hidden, padded,
                    power(-exponent), ROW_BLOCK, ROW_BLOCK >= BLOCK,
                )  # fmt: skip
    ticket = tl.arange(0, TICKETS)
    tl.store(prepared.tickets + ticket, ticket * 0, mask=ticket < tl.where(n == 0, TICKETS, 0))
    tl.store(prepared.score_scale + 2 * n, tl.where(finite != 0, first, float("nan")))
    tl.store(prepared.score_scale + 2 * n + 1, second)
    tl.store(prepared.weight + n * padded + h, w, mask=h < padded)


@triton.jit
def _load_rows(source, stride_h, weight, weight_h, f, inside, hidden):
    """Loads x of a group of rows and w, features f, both [GROUP, BLOCK / 4, 4], lest x take the
    layout of w."""
    f = f.to(tl.int64)
    v = tl.load(source + f * stride_h, mask=inside & (f < hidden), other=0.0)
    w = tl.load(tl.broadcast_to(weight + f * weight_h, v.shape), mask=f < hidden, other=0.0)
    return v.to(tl.float32), w.to(tl.float32)


@triton.jit
def _row_sums(v, w, f, largest, sums, squares):
    """Returns the largest |x|, and the sums of a sketch and of w^2, with these features."""
    # A comparison with NaN is false: NaN counts as infinite.
    absolute = tl.abs(v)
    absolute = tl.where(absolute < float("inf"), absolute, float("inf"))
    signed = tl.where((f.to(tl.uint32) * 2654435769) >> 31 != 0, -w, w)
    return tl.maximum(largest, absolute), sums + signed * v, squares + w * w


@triton.jit
def _store_exponentials(
    v, w, h0, h, rows, at, of_keys, tile, n, length_padded, padded, stored,
    MATCHED: tl.constexpr,
):  # fmt: skip
    """Stores the exponentials of features h0 + h, in quads unless MATCHED. Returns what their
    roundings add to the correction."""
    e, error = exp_with_error(v * tl.where(of_keys, 2.0, -2.0))
    f = h0 + h
    if stored & ROWS != 0:
        tl.store(rows.exponential + at * padded + f, e, mask=f < padded)
    if not MATCHED:
        if stored & QUADS != 0:
            store_exponentials(rows.quads, e, h0, tile, n, length_padded, padded, of_keys, False)
    return w * (error / e)


@triton.jit
def _prepare_rows(
    x, stride_row, stride_h, weight, weight_h, order, rows, of_keys, n, tile, length,
    length_padded, hidden, padded, stored,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, MATCHED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Prepares a group of rows, [GROUP, BLOCK / 4, 4] at a time: threads load and store four
    features of neighbouring rows, in every layout. WHOLE: BLOCK features are all, and ``order`` is
    their order in quads. Sums stay apart per thread until the loops end."""
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
        factor = power(
            -weight_exponent(tl.max(tl.where(tl.abs(w) < float("inf"), tl.abs(w), 0.0)))
        )
        w *= factor
        largest, sums, squares = _row_sums(v, w, h, largest, sums, squares)
    else:
        factor = power(-_weight_exponent(weight, weight_h, hidden, padded, BLOCK))
        for h0 in range(0, padded, BLOCK):
            v, w = _load_rows(source, stride_h, weight, weight_h, h0 + h, inside, hidden)
            largest, sums, squares = _row_sums(v, w * factor, h0 + h, largest, sums, squares)
    most = tl.max(tl.max(largest, 2), 1)
    at = n * length_padded + row
    tl.store(rows.size + at, most)
    if stored & QUADS != 0:
        small = tl.max(((row < length) & (most <= 1.0)).to(tl.int32), 0)
        unsafe = tl.max(((row < length) & (most > SAFE)).to(tl.int32), 0)
        to = rows.flags + n * length_padded // GROUP + tile
        tl.store(to, small * SMALL + unsafe * UNSAFE, mask=of_keys)
    of_row = tl.sum(tl.reshape(sums, [GROUP, BLOCK // SKETCH, SKETCH // 4, 4]), 1)
    of_row = (of_row / tl.sqrt(tl.sum(tl.sum(squares, 2), 1)[:, None, None])).to(tl.float16)
    lane = 4 * tl.arange(0, SKETCH // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(rows.sketch + SKETCH * at[:, None, None] + lane, of_row)
    square = tl.sum(tl.sum(of_row.to(tl.float32) * of_row.to(tl.float32), 2), 1)
    square = tl.where(of_keys, square, opposite_limit(square, hidden) - square)
    tl.store(rows.distance + at, square)

    safe = ((row < length) & (most <= SAFE))[:, None, None]
    to_rows = at[:, None, None]
    matched = tl.zeros([GROUP, FOURS, 2], tl.float32)
    if WHOLE:
        total = _store_exponentials(
            tl.where(safe, v, 0.0), w, 0, h, rows, to_rows, of_keys, tile, n, length_padded,
            padded, stored, MATCHED,
        )  # fmt: skip
    else:
        total = tl.zeros([GROUP, FOURS, 4], tl.float32)
        for h0 in range(0, padded, BLOCK):
            v, w = _load_rows(source, stride_h, weight, weight_h, h0 + h, safe, hidden)
            total += _store_exponentials(
                v, w * factor, h0, h, rows, to_rows, of_keys, tile, n, length_padded, padded,
                stored, MATCHED,
            )  # fmt: skip
    if MATCHED:
        if stored & QUADS != 0:
            total = tl.zeros([GROUP, FOURS, 4], tl.float32)
            for h0 in range(0, BLOCK if WHOLE else padded, BLOCK):
                if not WHOLE:
                    order = quad_order(weight, weight_h, h0, hidden, BLOCK)
                f = tl.reshape(order, [1, FOURS, 4])
                v, w = _load_rows(source, stride_h, weight, weight_h, f, safe, hidden)
                sums, more = store_matches(
                    v, w * factor, h0, tile, rows.quads, n, length_padded, padded, of_keys, TARGET
                )
                total += sums
                matched += more
    sign = tl.where(of_keys, 0.5, -0.5)
    tl.store(rows.correction + 2 * at, tl.sum(tl.sum(total, 2), 1) * sign)
    tl.store(rows.correction + 2 * at + 1, tl.sum(tl.sum(matched, 2), 1))


@triton.jit
def _prepare_groups(
    x, stride_row, stride_h, weight, weight_h, order, rows, of_keys, n, begin, groups, length,
    hidden, padded, stored,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, SEVERAL: tl.constexpr, MATCHED: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Prepares ``groups`` groups of rows from ``begin`` on: one, unless SEVERAL."""
    length_padded = padded_length(length)
    if SEVERAL:
        end = tl.minimum(begin + groups, length_padded // GROUP)
        for tile in tl.range(begin, end, disable_licm=True):
            # The maximum hides that the order is invariant: hoisted, it would take registers.
            _prepare_rows(
                x, stride_row, stride_h, weight, weight_h, tl.maximum(order, -tile), rows,
                of_keys, n, tile, length, length_padded, hidden, padded, stored,
                BLOCK, WHOLE, MATCHED, TARGET,
            )  # fmt: skip
    else:
        _prepare_rows(
            x, stride_row, stride_h, weight, weight_h, order, rows, of_keys, n, begin, length,
            length_padded, hidden, padded, stored, BLOCK, WHOLE, MATCHED, TARGET,
        )  # fmt: skip


@triton.jit
def _chosen(of_keys, queries, keys):
    """Returns the tensors of keys or those of queries."""
    return PreparedRows(
        tl.where(of_keys, keys.exponential, queries.exponential),
        tl.where(of_keys, keys.quads, queries.quads),
        tl.where(of_keys, keys.size, queries.size),
        tl.where(of_keys, keys.correction, queries.correction),
        keys.flags,
        tl.where(of_keys, keys.distance, queries.distance),
        tl.where(of_keys, keys.sketch, queries.sketch),
    )


@kernel
def prepare_kernel(
    query, key, weight, query_outer, query_inner, query_row, query_h,
    key_outer, key_inner, key_row, key_h, weight_outer, weight_inner, weight_h,
    prepared, query_rows, key_rows, row_programs, row_count, rows,
    key_programs, key_count, keys, groups, inner, hidden, padded, scale_bits, scale_exponent,
    stored,
    BLOCK: tl.constexpr, WEIGHT_BLOCK: tl.constexpr, WHOLE: tl.constexpr, SEVERAL: tl.constexpr,
    MATCHED: tl.constexpr, ALIGNED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The first programs prepare queries, then keys, then weights; weights alone without
    ``query_rows``. ``row_count``, ``key_count`` and ``inner`` are their inner batch dims. A
    program prepares ``groups`` groups of rows of an entry: one, unless SEVERAL. ``stored``: what
    passes will read, ROWS and QUADS; quads are those of the matched form if MATCHED.

    Queries and keys share the code, and sorting is there once: code takes seconds to compile, and
    a program waits for what it reads of it."""
    program = tl.program_id(0)
    of_rows = program < row_programs + key_programs
    of_keys = program >= row_programs
    count, tasks, first = inner, 1, row_programs + key_programs
    if query_rows is not None:
        padded = tl.multiple_of(padded, 4)
        length = tl.where(of_keys, keys, rows)
        length_padded = padded_length(length)
        of_entry = length_padded // GROUP
        tasks = tl.where(of_rows, tl.cdiv(of_entry, groups), 1)
        count = tl.where(of_rows, tl.where(of_keys, key_count, row_count), inner)
        first = tl.where(of_rows, tl.where(of_keys, row_programs, 0), first)
    program -= first
    n, o, m = batch_entry(program // tasks, count)
    weight += entry_offset(o, weight_outer, m, weight_inner, ALIGNED)
    order = tl.arange(0, BLOCK)
    if MATCHED and WHOLE:
        if stored & QUADS != 0:
            order = quad_order(weight, weight_h, 0, hidden, BLOCK)
    if not of_rows:
        _prepare_weight(
            weight, weight_h, order, prepared, n, hidden, padded, scale_bits, scale_exponent,
            stored, WEIGHT_BLOCK, BLOCK, MATCHED,
        )  # fmt: skip
    elif query_rows is not None:
        outer = tl.where(of_keys, key_outer, query_outer)
        at = entry_offset(o, outer, m, tl.where(of_keys, key_inner, query_inner), ALIGNED)
        stride_row = tl.where(of_keys, key_row, query_row)
        stride_h = tl.where(of_keys, key_h, query_h)
        chosen = _chosen(of_keys, query_rows, key_rows)
        if (stored & QUADS != 0) & (program == 0):
            programs = tl.where(of_keys, key_programs, row_programs)
            fill_spare(chosen.quads, programs // tasks * of_entry, padded, of_keys, GROUP, MATCHED)
        begin = program % tasks * groups
        if query.dtype == key.dtype:
            _prepare_groups(
                tl.where(of_keys, key, query) + at, stride_row, stride_h, weight, weight_h, order,
                chosen, of_keys, n, begin, groups, length, hidden, padded, stored,
                BLOCK, WHOLE, SEVERAL, MATCHED, TARGET,
            )  # fmt: skip
        elif of_keys:
            _prepare_groups(
                key + at, stride_row, stride_h, weight, weight_h, order,
                chosen, of_keys, n, begin, groups, length, hidden, padded, stored,
                BLOCK, WHOLE, SEVERAL, MATCHED, TARGET,
            )  # fmt: skip
        else:
            _prepare_groups(
                query + at, stride_row, stride_h, weight, weight_h, order,
                chosen, of_keys, n, begin, groups, length, hidden, padded, stored,
                BLOCK, WHOLE, SEVERAL, MATCHED, TARGET,
            )  # fmt: skip


def _empty_rows(
    view: Tensor, padded: int, exponential: bool, quads: bool, matched: bool, queries: bool
) -> PreparedRows:
    outer, inner, length = view.shape[:3]
    length_padded = (length + STEP.value + GROUP.value - 2) // GROUP.value * GROUP.value

    of_rows = outer, inner, length_padded

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=view.device)

    numbers = padded // 2 * ((4 if queries else 3) if matched else 2)
    spare = (8 if queries and matched else 4) * SPARE.value
    groups = 0 if queries or not quads else length_padded // GROUP.value
    return PreparedRows(
        exponential=empty(*of_rows, padded if exponential else 0),
        quads=empty(outer * inner * length_padded * numbers + spare if quads else 0),
        size=empty(*of_rows),
        correction=empty(*of_rows, 2),
        flags=empty(outer, inner, groups, dtype=torch.int32),
        distance=empty(*of_rows),
        sketch=empty(*of_rows, SKETCH.value, dtype=torch.float16),
    )


def prepare(
    query: Tensor, key: Tensor, weight: Tensor, batch: BatchShape, scale: float, *,
    exponential: bool, quads: bool,
) -> Prepared:  # fmt: skip
    """Prepares ``query`` (*b, Lq, H), ``key`` (*b, Lk, H) and ``weight`` (*b, H) of any strides,
    in the layouts of the exponentials that will be read."""
    w = batch.narrow(weight, 1)
    outer, inner, hidden = w.shape
    many = hidden > DIFFERENCE_MAX_FEATURES
    multiple = BLOCK_OF_FEATURES if many else 4
    padded = -(-max(hidden, 1) // multiple) * multiple
    wide = weight.dtype == torch.float64
    matched = many and not wide
    scaled = torch.empty(
        outer, inner, padded, dtype=torch.float64 if wide else torch.float32, device=weight.device
    )
    of_weight = PreparedWeight(
        scaled,
        scaled.new_empty(outer, inner, 2),
        scaled.new_empty(outer, inner, padded if quads and matched else 0),
        scaled.new_empty(TICKETS.value, dtype=torch.int32),
    )
    views: list[Tensor] = []
    rows: list[PreparedRows | None] = []
    for x, queries in ((query, True), (key, False)):
        x = batch.narrow(x, 2)
        # What is prepared depends on the weight, which may have more heads than x.
        x = x.expand(max(x.shape[0], outer), max(x.shape[1], inner), *x.shape[2:])
        views.append(x)
        rows.append(None if wide else _empty_rows(x, padded, exponential, quads, matched, queries))
    prepared = Prepared(of_weight, rows[0], rows[1])
    tile = tiles.prepare_tile(padded)
    counts = [0 if x is None else x.size.shape[2] // GROUP.value for x in rows]
    entries, groups = [x.shape[0] * x.shape[1] for x in views], 1
    if tile["SEVERAL"]:
        resident = tiles.resident(32 * tile["num_warps"], 128) * processors(weight.device)
        groups = max(1, -(-sum(map(operator.mul, entries, counts)) // resident))
    programs = [n * -(-count // groups) for n, count in zip(entries, counts, strict=True)]
    mantissa, exponent = (scale, 0) if wide else math.frexp(scale)
    launch(
        prepare_kernel, sum(programs) + outer * inner, weight,
        *views, w, *views[0].stride(), *views[1].stride(),
        *(0 if n == 1 else s for n, s in zip(w.shape[:2], w.stride(), strict=False)), w.stride(2),
        *prepared,
        *(y for x, n in zip(views, programs, strict=True) for y in (n, x.shape[1], x.shape[2])),
        groups, inner, hidden, padded, bits(mantissa), exponent,
        ROWS.value * exponential + QUADS.value * quads,
        **tile,
        ALIGNED=aligned(*(s for x in (*views, w) for s in x.stride()[:2])),
        WEIGHT_BLOCK=power_of_two(padded), MATCHED=matched,
        TARGET=target(), **(registers(128) if tile["SEVERAL"] else {}),
    )  # fmt: skip
    return prepared
