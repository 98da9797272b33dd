"""One query per entry: a decoder step, with or without a location term, or pooling over a whole
sequence.

Every key is used once, so nothing is prepared: scores take the direct form, and what counts is
how few kernels run. Forward is one kernel. Where entries alone would not fill the machine the keys
are split over programs, each with the largest score, the sum of e^{score - largest} and the
weighted sum of the values over its keys, and a second kernel merges them (math.md, eq. 14).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import aligned, batch_entry, entry_offset
from additive_attn.backends.triton.dropout import keep_factors
from additive_attn.backends.triton.launch import kernel, launch, registers, target
from additive_attn.backends.triton.masks import interval, masked_bias, stored
from additive_attn.backends.triton.merging import merge, softmax_inverse, softmax_lse
from additive_attn.backends.triton.numerics import number, tanh
from additive_attn.backends.triton.plan import decode_splits


@triton.jit
def program_entry(tile_count, splits, inner, keys, keys_per_split):
    """What a program takes: (entry, split, tile); the indices of its entry into (outer, inner);
    its keys [begin, end)."""
    program = tl.program_id(0)
    rest = program // tile_count
    split = rest % splits
    n, o, m = batch_entry(rest // splits, inner)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, keys)
    return n, split, program % tile_count, o, m, begin, end


@triton.jit
def entry_interval(lengths, outer, inner, o, m, keys, left, right):
    """``interval`` of the one row of entry (o, m)."""
    if lengths is not None:
        lengths += o * outer + m * inner
    return interval(lengths, 0, tl.zeros([1], tl.int32), 1, keys, left, right)


@triton.jit
def block_attended(mask, mask_column, j, low, high):
    """The mask's bias of the keys j of an entry, 0 without one, and which are attended."""
    attended = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])  # [1, BLOCK]
    bias = 0.0
    if mask is not None:
        zero = tl.zeros([1], tl.int32)
        bias, attended = masked_bias(
            mask, 0, mask_column, None, zero[:, None], j[None, :], attended
        )
        bias = tl.reshape(bias, j.shape)
    return bias, tl.reshape(attended, j.shape)


@triton.jit
def location_term(
    location, location_row, location_column, location_weight, lw_row, lw_h, filters,
    j, attended, h, inside, ACC: tl.constexpr,
):  # fmt: skip
    """sum_f location_fj location_weight_fh of keys j and features h: [BLOCK, FEATURES]."""
    location += j.to(tl.int64) * location_column
    location_weight += h * lw_h
    term = tl.zeros([j.shape[0], h.shape[0]], ACC)
    for _ in range(0, filters):
        x = tl.load(location, mask=attended, other=0.0).to(ACC)
        w = tl.load(location_weight, mask=inside, other=0.0).to(ACC)
        term += x[:, None] * w[None, :]
        location += location_row
        location_weight += lw_row
    return term


@triton.jit
def energies(
    query, key, weight, query_h, key_row, key_h, weight_h,
    location, location_row, location_column, location_weight, lw_row, lw_h, filters,
    j, attended, h, hidden, ACC: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """w tanh(q + k) of keys j and features h: [BLOCK, FEATURES]."""
    inside = h < hidden
    h = h.to(tl.int64)
    k = tl.load(
        key + j[:, None].to(tl.int64) * key_row + h[None, :] * key_h,
        mask=attended[:, None] & inside[None, :], other=0.0,
    ).to(ACC)  # fmt: skip
    q = tl.load(query + h * query_h, mask=inside, other=0.0).to(ACC)
    w = tl.load(weight + h * weight_h, mask=inside, other=0.0).to(ACC)
    if location is not None:
        k += location_term(
            location, location_row, location_column, location_weight, lw_row, lw_h, filters,
            j, attended, h, inside, ACC,
        )  # fmt: skip
    # An infinite weight makes every score NaN, as a softmax of infinite scores is.
    return w[None, :] * tanh(q[None, :] + k, TARGET) + (w * 0.0)[None, :]


@triton.jit
def block_scores(
    query, key, weight, query_h, key_row, key_h, weight_h, mask, bias, attended,
    location, location_row, location_column, location_weight, lw_row, lw_h, filters,
    j, hidden, scale,
    ACC: tl.constexpr, FEATURES: tl.constexpr, WHOLE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Scores of the keys j of an entry, as ``masks.stored`` keeps them. Pointers are the entry's.
    WHOLE: FEATURES are all."""
    h = tl.arange(0, FEATURES)
    if WHOLE:
        terms = energies(
            query, key, weight, query_h, key_row, key_h, weight_h,
            location, location_row, location_column, location_weight, lw_row, lw_h, filters,
            j, attended, h, hidden, ACC, TARGET,
        )  # fmt: skip
    else:
        terms = tl.zeros([j.shape[0], FEATURES], ACC)
        for h0 in range(0, hidden, FEATURES):
            terms += energies(
                query, key, weight, query_h, key_row, key_h, weight_h,
                location, location_row, location_column, location_weight, lw_row, lw_h, filters,
                j, attended, h0 + h, hidden, ACC, TARGET,
            )  # fmt: skip
    score = tl.sum(terms, 1) * scale
    if mask is not None:
        if mask.dtype.element_ty != tl.uint8:
            score += bias.to(ACC)
    return stored(score, attended)


@triton.jit
def block_factors(seed, n, k0, threshold, keep_bits, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The dropout factors of keys from k0 on."""
    row = tl.zeros([1], tl.int32)
    factor = keep_factors(tl.load(seed), n, row, k0, threshold, number(keep_bits), 1, BLOCK)
    return tl.reshape(factor, [BLOCK]).to(ACC)


@kernel
def forward_kernel(
    query, key, value, weight, query_outer, query_inner, query_h,
    key_outer, key_inner, key_row, key_h, value_outer, value_inner, value_row, value_column,
    weight_outer, weight_inner, weight_h, mask, mask_outer, mask_inner, mask_column,
    lengths, length_outer, length_inner, seed, seed_outer, seed_inner, threshold, keep_bits,
    location, location_outer, location_inner, location_row, location_column,
    location_weight, lw_outer, lw_inner, lw_row, lw_h, filters,
    out, weights, lse, scores, tops, totals,
    inner, entries, keys, hidden, values, left, right, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, WHOLE: tl.constexpr, VALUES: tl.constexpr,
    ALIGNED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A range of keys of an entry, and a tile of features of the value. Without ``tops`` the range
    is all keys, and the results are final. ``weights`` and ``scores`` are None where no weights
    are wanted, ``location`` where the energies have no such term."""
    ACC: tl.constexpr = lse.dtype.element_ty
    value_tiles = tl.maximum(tl.cdiv(values, VALUES), 1)
    n, split, tile, o, m, begin, last = program_entry(
        value_tiles, splits, inner, keys, keys_per_split
    )
    low, high = entry_interval(lengths, length_outer, length_inner, o, m, keys, left, right)
    end = tl.minimum(last, tl.max(high, 0))
    d = tile * VALUES + tl.arange(0, VALUES)
    query += o * query_outer + m * query_inner
    key += entry_offset(o, key_outer, m, key_inner, ALIGNED)
    value += entry_offset(o, value_outer, m, value_inner, ALIGNED)
    weight += o * weight_outer + m * weight_inner
    if mask is not None:
        mask += o * mask_outer + m * mask_inner
    if seed is not None:
        seed += o * seed_outer + m * seed_inner
    if location is not None:
        location += o * location_outer + m * location_inner
        location_weight += o * lw_outer + m * lw_inner
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
        bias, attended = block_attended(mask, mask_column, j, low, high)
        # Both are on their way before either is waited for.
        v = tl.load(  # [BLOCK, VALUES]
            value + j[:, None].to(tl.int64) * value_row + d[None, :].to(tl.int64) * value_column,
            mask=attended[:, None] & (d < values)[None, :], other=0.0,
        )  # fmt: skip
        score = block_scores(
            query, key, weight, query_h, key_row, key_h, weight_h, mask, bias, attended,
            location, location_row, location_column, location_weight, lw_row, lw_h, filters,
            j, hidden, scale, ACC, FEATURES, WHOLE, TARGET,
        )  # fmt: skip
        if scores is not None:
            tl.store(scores + j, score, mask=j < keys * stores)
        before = top
        top = tl.maximum(top, tl.max(score, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp(before - shift)
        p = tl.where(attended, tl.exp(score - shift), 0.0)
        total = total * shrink + tl.sum(p, 0)
        if seed is not None:
            p *= block_factors(seed, n, k0, threshold, keep_bits, ACC, BLOCK)
        acc = acc * shrink + tl.sum(p[:, None] * v.to(ACC), 0)

    lane = tl.arange(0, 1)
    if tops is not None:
        part = split * entries + n
        tl.store(out + part * values + d, acc, mask=d < values)
        tl.store(tops + part + lane, top, mask=lane < stores)
        tl.store(totals + part + lane, total, mask=lane < stores)
        if scores is not None:
            # Keys beyond the last that is attended.
            for k0 in range(tl.maximum(begin, end), last, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                minus = tl.full([BLOCK], float("-inf"), ACC)
                tl.store(scores + j, minus, mask=j < last * stores)
    else:
        inverse = softmax_inverse(top, total)
        tl.store(out + n * values + d, (acc * inverse).to(out.dtype.element_ty), mask=d < values)
        tl.store(lse + n + lane, softmax_lse(top, total), mask=lane < stores)
        if scores is not None:
            # The scores come from other threads of this program.
            tl.debug_barrier()
            shift = tl.where(top == float("-inf"), 0.0, top)
            for k0 in range(0, keys, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                x = tl.load(scores + j, mask=j < end * stores, other=float("-inf"))
                p = tl.where(x == float("-inf"), 0.0, tl.exp(x - shift) * inverse)
                p = p.to(weights.dtype.element_ty)
                tl.store(weights + n * keys + j, p, mask=j < keys * stores)


def decode_inputs(p: Problem) -> tuple[object, ...]:
    """Parameters ``query`` to ``keep_bits`` of the kernels that compute scores."""
    query = p.query_strides
    mask, *mask_strides, _ = p.mask_arguments()
    lengths, *length_strides = p.length_arguments()
    return (
        p.query, p.key, p.value, p.weight, query[0], query[1], query[3],
        *p.key_strides, *p.value_strides, *p.weight_strides,
        mask, mask_strides[0], mask_strides[1], mask_strides[3],
        lengths, length_strides[0], length_strides[1], *p.dropout_arguments(),
    )  # fmt: skip


def key_splits(p: Problem, value_tiles: int = 1) -> tuple[int, int]:
    located = p.location is not None
    return decode_splits(p.entries * value_tiles, p.keys, p.processors, located)


def decode_options(p: Problem, tile: dict[str, int]) -> dict[str, Any]:
    """What follows the tile of the kernels that compute scores."""
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
    """(*batch, 1, keys): scores as ``masks.stored`` keeps them; ``p`` has no values."""
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
