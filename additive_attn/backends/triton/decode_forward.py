"""Forward for one query per entry: a decoder step, with or without a location term, or pooling
over a whole sequence.

Every key is used once, so nothing is prepared: scores take the direct form, and the number of
kernels determines the time. Forward is one kernel. Where entries alone would not fill the GPU, the
keys are split over programs. Each stores the largest score, the sum of e^{score - largest} and the
weighted sum of the values over its keys, and a second kernel merges them (math.md, eq. 14)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import aligned, batch_entry
from additive_attn.backends.triton.dropout import keep_factors
from additive_attn.backends.triton.launch import kernel, launch, registers, target
from additive_attn.backends.triton.masks import interval, masked_bias, stored
from additive_attn.backends.triton.merging import merge, softmax_inverse, softmax_lse
from additive_attn.backends.triton.numerics import number, tanh
from additive_attn.backends.triton.parameters import (
    Dropout,
    Matrix,
    OfKeys,
    Row,
    Scalar,
    at_entry,
)
from additive_attn.backends.triton.plan import decode_splits


class Single(NamedTuple):
    """One query per entry, and what it attends to."""

    query: Row
    key: Matrix
    value: Matrix
    weight: Row
    mask: Row | None
    lengths: Scalar | None
    dropout: Dropout | None


class Location(NamedTuple):
    """A location term: its ``features`` are (outer, inner, filters, keys)."""

    features: OfKeys
    weight: Matrix


@triton.jit
def program_entry(tile_count, splits, inner, keys, keys_per_split):
    """Returns the entry, split and tile of this program, the indices of its entry into (outer,
    inner), and its keys [begin, end)."""
    program = tl.program_id(0)
    rest = program // tile_count
    split = rest % splits
    n, o, m = batch_entry(rest // splits, inner)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, keys)
    return n, split, program % tile_count, o, m, begin, end


@triton.jit
def entry_interval(lengths, o, m, keys, left, right):
    """Returns the ``interval`` of the only row of entry (o, m)."""
    place = None if lengths is None else at_entry(lengths, o, m)
    return interval(place, 0, tl.zeros([1], tl.int32), 1, keys, left, right)


@triton.jit
def block_attended(mask, o, m, j, low, high):
    """Returns the mask's bias of the keys j of an entry, 0 without a mask, and which are
    attended."""
    attended = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])  # [1, BLOCK]
    bias = 0.0
    if mask is not None:
        zero = tl.zeros([1], tl.int32)
        bias, attended = masked_bias(
            at_entry(mask, o, m), 0, mask.column, None, zero[:, None], j[None, :], attended
        )
        bias = tl.reshape(bias, j.shape)
    return bias, tl.reshape(attended, j.shape)


@triton.jit
def features(x, o, m, h, hidden, ACC: tl.constexpr):
    """Loads features h of the only row of an entry."""
    place = at_entry(x, o, m) + h.to(tl.int64) * x.column
    return tl.load(place, mask=h < hidden, other=0.0).to(ACC)


@triton.jit
def block_rows(x, o, m, j, attended, h, hidden, ALIGNED: tl.constexpr):
    """Loads features h of the keys, or values, j of an entry: [BLOCK, FEATURES]."""
    of_key = at_entry(x, o, m, ALIGNED) + j[:, None].to(tl.int64) * x.row
    return tl.load(
        of_key + h[None, :].to(tl.int64) * x.column,
        mask=attended[:, None] & (h < hidden)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def location_term(location, filters, o, m, j, attended, h, hidden, ACC: tl.constexpr):
    """Returns sum_f location_fj location_weight_fh of keys j and features h: [BLOCK, FEATURES]."""
    of_key = at_entry(location.features, o, m) + j.to(tl.int64) * location.features.column
    of_feature = at_entry(location.weight, o, m) + h.to(tl.int64) * location.weight.column
    term = tl.zeros([j.shape[0], h.shape[0]], ACC)
    for _ in range(0, filters):
        x = tl.load(of_key, mask=attended, other=0.0).to(ACC)
        w = tl.load(of_feature, mask=h < hidden, other=0.0).to(ACC)
        term += x[:, None] * w[None, :]
        of_key += location.features.row
        of_feature += location.weight.row
    return term


@triton.jit
def energies(
    single, location, filters, o, m, j, attended, h, hidden,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns w tanh(q + k) of keys j and features h: [BLOCK, FEATURES]."""
    k = block_rows(single.key, o, m, j, attended, h, hidden, ALIGNED).to(ACC)
    q = features(single.query, o, m, h, hidden, ACC)
    w = features(single.weight, o, m, h, hidden, ACC)
    if location is not None:
        k += location_term(location, filters, o, m, j, attended, h, hidden, ACC)
    # An infinite weight makes every score NaN, as a softmax of infinite scores is.
    return w[None, :] * tanh(q[None, :] + k, TARGET) + (w * 0.0)[None, :]


@triton.jit
def block_scores(
    single, location, filters, o, m, bias, attended, j, hidden, scale,
    ACC: tl.constexpr, FEATURES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Returns the scores of the keys j of an entry as ``masks.stored`` does. WHOLE: FEATURES are
    all."""
    h = tl.arange(0, FEATURES)
    if WHOLE:
        terms = energies(
            single, location, filters, o, m, j, attended, h, hidden, ACC, ALIGNED, TARGET
        )
    else:
        terms = tl.zeros([j.shape[0], FEATURES], ACC)
        for h0 in range(0, hidden, FEATURES):
            terms += energies(
                single, location, filters, o, m, j, attended, h0 + h, hidden,
                ACC, ALIGNED, TARGET,
            )  # fmt: skip
    score = tl.sum(terms, 1) * scale
    if single.mask is not None:
        if single.mask.data.dtype.element_ty != tl.uint8:
            score += bias.to(ACC)
    return stored(score, attended)


@triton.jit
def block_factors(dropout, n, o, m, k0, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the dropout factors of BLOCK keys from k0."""
    row = tl.zeros([1], tl.int32)
    seed = tl.load(at_entry(dropout.seed, o, m))
    keep_scale = number(dropout.keep_bits)
    factor = keep_factors(seed, n, row, k0, dropout.threshold, keep_scale, 1, BLOCK)
    return tl.reshape(factor, [BLOCK]).to(ACC)


@kernel
def forward_kernel(
    single: Single, location: Location | None, filters,
    out, weights, lse, scores, tops, totals,
    inner, entries, keys, hidden, values, left, right, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, WHOLE: tl.constexpr, VALUES: tl.constexpr,
    ALIGNED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Attends to a range of keys of an entry, for a tile of the numbers of a value. Without
    ``tops`` the range is all keys, and the results are final. ``weights`` and ``scores`` are None
    where they are not needed, ``location`` where the energies have no such term."""
    ACC: tl.constexpr = lse.dtype.element_ty
    value_tiles = tl.maximum(tl.cdiv(values, VALUES), 1)
    n, split, tile, o, m, begin, last = program_entry(
        value_tiles, splits, inner, keys, keys_per_split
    )
    low, high = entry_interval(single.lengths, o, m, keys, left, right)
    end = tl.minimum(last, tl.max(high, 0))
    d = tile * VALUES + tl.arange(0, VALUES)
    if scores is not None:
        scores += n * keys
    # Only tile 0 stores results that every tile computes.
    stores = tl.where(tile == 0, 1, 0)
    scale = number(scale_bits).to(ACC)
    top = tl.full([1], float("-inf"), ACC)
    total = tl.zeros([1], ACC)
    acc = tl.zeros([VALUES], ACC)
    for k0 in range(begin, end, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        bias, attended = block_attended(single.mask, o, m, j, low, high)
        # The values are loaded before the scores are computed, which hides the latency.
        v = block_rows(single.value, o, m, j, attended, d, values, ALIGNED)
        score = block_scores(
            single, location, filters, o, m, bias, attended, j, hidden, scale,
            ACC, FEATURES, WHOLE, ALIGNED, TARGET,
        )  # fmt: skip
        if scores is not None:
            tl.store(scores + j, score, mask=j < keys * stores)
        before = top
        top = tl.maximum(top, tl.max(score, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp(before - shift)
        p = tl.where(attended, tl.exp(score - shift), 0.0)
        total = total * shrink + tl.sum(p, 0)
        if single.dropout is not None:
            p *= block_factors(single.dropout, n, o, m, k0, ACC, BLOCK)
        acc = acc * shrink + tl.sum(p[:, None] * v.to(ACC), 0)

    lane = tl.arange(0, 1)
    if tops is not None:
        part = split * entries + n
        tl.store(out + part * values + d, acc, mask=d < values)
        tl.store(tops + part + lane, top, mask=lane < stores)
        tl.store(totals + part + lane, total, mask=lane < stores)
        if scores is not None:
            # Stores -inf for keys beyond the last attended one.
            for k0 in range(tl.maximum(begin, end), last, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                minus = tl.full([BLOCK], float("-inf"), ACC)
                tl.store(scores + j, minus, mask=j < last * stores)
    else:
        inverse = softmax_inverse(top, total)
        tl.store(out + n * values + d, (acc * inverse).to(out.dtype.element_ty), mask=d < values)
        tl.store(lse + n + lane, softmax_lse(top, total), mask=lane < stores)
        if scores is not None:
            # Other threads of this program have stored scores that this one loads.
            tl.debug_barrier()
            shift = tl.where(top == float("-inf"), 0.0, top)
            for k0 in range(0, keys, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                x = tl.load(scores + j, mask=j < end * stores, other=float("-inf"))
                p = tl.where(x == float("-inf"), 0.0, tl.exp(x - shift) * inverse)
                p = p.to(weights.dtype.element_ty)
                tl.store(weights + n * keys + j, p, mask=j < keys * stores)


def decode_inputs(p: Problem) -> tuple[object, ...]:
    """Returns the arguments of ``Single``."""
    mask, *mask_strides, _ = p.mask_arguments()
    query_strides = p.query_strides
    return (
        p.query, query_strides[0], query_strides[1], query_strides[3], p.key, *p.key_strides,
        p.value, *p.value_strides, p.weight, *p.weight_strides,
        mask, mask_strides[0], mask_strides[1], mask_strides[3],
        *p.length_arguments()[:3], *p.dropout_arguments(),
    )  # fmt: skip


def key_splits(p: Problem, value_tiles: int = 1) -> tuple[int, int]:
    located = p.location is not None
    return decode_splits(p.entries * value_tiles, p.keys, p.processors, located)


def decode_options(p: Problem, tile: dict[str, int]) -> dict[str, Any]:
    """Returns the options that follow the tile, for kernels that compute scores."""
    most = 255 if p.location is not None else tiles.decode_registers(tile, p.key.element_size())
    return {
        "ALIGNED": aligned(*p.key_strides[:2], *p.value_strides[:2]),
        "TARGET": target(),
        **registers(most),
    }


def decode_forward(p: Problem, need_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    tile = tiles.decode_tile(p.hidden, p.values, p.wide, p.key.element_size())
    value_tiles = max(1, -(-p.values // tile["VALUES"]))
    splits, keys_per_split = key_splits(p, value_tiles)
    shape = (*p.batch.shape, 1)
    out = torch.empty(*shape, p.values, dtype=p.dtype, device=p.device)
    lse = torch.empty(shape, dtype=p.accumulator, device=p.device)
    weights = out.new_empty((*shape, p.keys) if need_weights else (0,))
    scores = torch.empty_like(weights, dtype=p.accumulator) if need_weights else None
    given = weights if need_weights else None
    parts, tops, totals = out, None, None
    if splits > 1:
        parts = lse.new_empty(splits, p.entries, p.values)
        tops, totals = lse.new_empty(2, splits, p.entries)
    launch(
        forward_kernel, p.entries * splits * value_tiles, lse, *decode_inputs(p),
        *p.location_arguments(), parts, given, lse, scores, tops, totals,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.left, p.right, p.scale_bits,
        splits, keys_per_split, **tile, **decode_options(p, tile),
    )  # fmt: skip
    if tops is not None and totals is not None:
        merge(p, p.entries, splits, parts, tops, totals, scores, out, given, lse)
    return out, weights, lse


def decode_scores(p: Problem) -> Tensor:
    """Returns scores (*batch, 1, keys) as ``masks.stored`` does; ``p`` has no values."""
    tile = tiles.decode_tile(p.hidden, 0, p.wide, p.key.element_size())
    splits, keys_per_split = key_splits(p)
    scores = torch.empty(*p.batch.shape, 1, p.keys, dtype=p.accumulator, device=p.device)
    tops, totals = scores.new_empty(2, splits, p.entries)
    launch(
        forward_kernel, p.entries * splits, scores, *decode_inputs(p), *p.location_arguments(),
        scores, None, totals, scores, tops, totals,
        p.batch.inner, p.entries, p.keys, p.hidden, 0, p.left, p.right, p.scale_bits,
        splits, keys_per_split, **tile, **decode_options(p, tile),
    )  # fmt: skip
    return scores
