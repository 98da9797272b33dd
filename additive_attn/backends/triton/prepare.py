"""Prepares what the score kernels read, in one kernel: exponentials, once per query and key
(``prepare_rows.py``), and weights scaled by a power of two so that abs(w) < 2."""

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
from additive_attn.backends.triton.matches import quad_order, store_quad_weight
from additive_attn.backends.triton.numerics import number, power
from additive_attn.backends.triton.prepare_rows import (
    GROUP,
    QUADS,
    ROWS,
    SKETCH,
    STEP,
    largest_exponent,
    padded_length,
    prepare_groups,
)
from additive_attn.backends.triton.prepared import Prepared, PreparedRows, PreparedWeight
from additive_attn.backends.triton.quad_layout import SPARE, fill_spare
from additive_attn.backends.triton.tiles import DIFFERENCE_MAX_FEATURES, power_of_two

BLOCK_OF_FEATURES = 32  # more are padded to whole blocks
TICKETS = tl.constexpr(4096)


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
        exponent = largest_exponent(weight, stride_h, hidden, padded, BLOCK)
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

    Queries and keys of one dtype share the code, and sorting is there once: code takes seconds to
    compile, and a program waits for what it reads of it. Not so for AMD GPUs, where the compiler
    of Triton before 3.9 does not choose between a tensor of 2 GiB and a smaller one, and code of
    chosen tensors has no buffer instructions."""
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
        begin = program % tasks * groups
        spare = tl.where(
            (stored & QUADS != 0) & (program == 0),
            tl.where(of_keys, key_programs, row_programs) // tasks * of_entry,
            0,
        )
        if query.dtype == key.dtype and TARGET != "hip":
            chosen = _chosen(of_keys, query_rows, key_rows)
            if spare > 0:
                fill_spare(chosen.quads, spare, padded, of_keys, GROUP, MATCHED)
            prepare_groups(
                tl.where(of_keys, key, query) + at, stride_row, stride_h, weight, weight_h, order,
                chosen, of_keys, n, begin, groups, length, hidden, padded, stored,
                BLOCK, WHOLE, SEVERAL, MATCHED, TARGET,
            )  # fmt: skip
        elif of_keys:
            if spare > 0:
                fill_spare(key_rows.quads, spare, padded, of_keys, GROUP, MATCHED)
            prepare_groups(
                key + at, stride_row, stride_h, weight, weight_h, order,
                key_rows, of_keys, n, begin, groups, length, hidden, padded, stored,
                BLOCK, WHOLE, SEVERAL, MATCHED, TARGET,
            )  # fmt: skip
        else:
            if spare > 0:
                fill_spare(query_rows.quads, spare, padded, of_keys, GROUP, MATCHED)
            prepare_groups(
                query + at, stride_row, stride_h, weight, weight_h, order,
                query_rows, of_keys, n, begin, groups, length, hidden, padded, stored,
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
