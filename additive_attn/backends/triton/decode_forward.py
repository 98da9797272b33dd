"""One query per entry: a decoder step, or pooling over a whole sequence.

Every key is used once, so nothing is prepared: scores take the direct form, and what counts is
how few kernels run. Forward is one kernel. Where entries alone would not fill the machine the keys
are split over programs, each with the largest score m, the sum l of e^{s - m} and the weighted sum
o of the values over its keys, and a second kernel merges them:

    M = max m    out = sum e^{m - M} o / sum e^{m - M} l    lse = M + log sum e^{m - M} l
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.dropout import keep_factors
from additive_attn.backends.triton.launch import VARYING, launch
from additive_attn.backends.triton.masks import interval, masked_bias
from additive_attn.backends.triton.numerics import number, tanh
from additive_attn.backends.triton.tiles import power_of_two


@triton.jit
def key_range(tile_count, splits, inner, keys_per_split):
    """What a program takes: (entry, split, tile); the indices of its entry into (outer, inner);
    its first key."""
    program = tl.program_id(0)
    rest = program // tile_count
    split = rest % splits
    n, o, m = batch_entry(rest // splits, inner)
    return n, split, program % tile_count, o, m, split * keys_per_split


@triton.jit
def block_scores(
    query, key, weight, mask, query_h, key_row, key_h, weight_h, mask_column,
    j, low, high, hidden, scale, ACC: tl.constexpr, MASK: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Scores of the keys j of an entry, -inf where it may not attend. Pointers are the entry's."""
    used = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
    if MASK != "none":
        zero = tl.zeros([1], tl.int32)
        bias, used = masked_bias(mask, 0, mask_column, zero, j, used, MASK)
    here = tl.reshape(used, j.shape)
    energy = tl.zeros(j.shape, ACC)
    for h0 in range(0, hidden, FEATURES):
        h = h0 + tl.arange(0, FEATURES)
        inside = h < hidden
        h = h.to(tl.int64)
        q = tl.load(query + h * query_h, mask=inside, other=0.0).to(ACC)
        w = tl.load(weight + h * weight_h, mask=inside, other=0.0).to(ACC)
        k = tl.load(
            key + j[:, None].to(tl.int64) * key_row + h[None, :] * key_h,
            mask=here[:, None] & inside[None, :], other=0.0,
        ).to(ACC)  # fmt: skip
        # An infinite weight makes every score NaN, as a softmax of infinite scores is.
        energy += tl.sum(w[None, :] * tanh(q[None, :] + k) + (w * 0.0)[None, :], 1)
    score = energy * scale
    if MASK == "float":
        score += tl.reshape(bias, j.shape).to(ACC)
    return tl.where(here, score, float("-inf")), here


@triton.jit
def block_factors(seed, n, k0, threshold, keep_scale, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The dropout factors of keys from k0 on."""
    row = tl.zeros([1], tl.int32)
    factor = keep_factors(tl.load(seed), n, row, k0, threshold, keep_scale, 1, BLOCK)
    return tl.reshape(factor, [BLOCK]).to(ACC)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    query, key, value, weight, query_outer, query_inner, query_h,
    key_outer, key_inner, key_row, key_h, value_outer, value_inner, value_row, value_column,
    weight_outer, weight_inner, weight_h, mask, mask_outer, mask_inner, mask_column,
    lengths, length_outer, length_inner, seed, seed_outer, seed_inner, threshold, keep_bits,
    out, weights, lse, scores, tops, totals,
    inner, entries, keys, hidden, values, left, right, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr, MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """A range of keys of an entry, and a tile of features of the value. With ``FINAL`` that is all
    keys, and the results are final."""
    ACC: tl.constexpr = lse.dtype.element_ty
    value_tiles = tl.maximum(tl.cdiv(values, VALUES), 1)
    n, split, tile, o, m, begin = key_range(value_tiles, splits, inner, keys_per_split)
    low, high = interval(
        lengths + o * length_outer + m * length_inner, 0, tl.zeros([1], tl.int32), 1, keys,
        left, right, HAS_LENGTHS,
    )  # fmt: skip
    end = tl.minimum(begin + keys_per_split, tl.max(high, 0))
    d = tile * VALUES + tl.arange(0, VALUES)
    query += o * query_outer + m * query_inner
    key += o * key_outer + m * key_inner
    value += o * value_outer + m * value_inner
    weight += o * weight_outer + m * weight_inner
    mask += o * mask_outer + m * mask_inner
    seed += o * seed_outer + m * seed_inner
    scores += n * keys
    # One of the tiles writes what they all compute.
    writes = tl.where(tile == 0, 1, 0)
    written = keys * writes
    scale = number(scale_bits).to(ACC)
    top = tl.full([1], float("-inf"), ACC)
    total = tl.zeros([1], ACC)
    acc = tl.zeros([VALUES], ACC)
    for k0 in range(begin, end, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        score, here = block_scores(
            query, key, weight, mask, query_h, key_row, key_h, weight_h, mask_column,
            j, low, high, hidden, scale, ACC, MASK, FEATURES,
        )  # fmt: skip
        if NEED_WEIGHTS:
            tl.store(scores + j, score, mask=j < written)
        before = top
        top = tl.maximum(top, tl.max(score, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp(before - shift)
        p = tl.where(here, tl.exp(score - shift), 0.0)
        total = total * shrink + tl.sum(p, 0)
        if DROPOUT:
            p *= block_factors(seed, n, k0, threshold, number(keep_bits), ACC, BLOCK)
        v = tl.load(
            value + j[:, None].to(tl.int64) * value_row + d[None, :].to(tl.int64) * value_column,
            mask=here[:, None] & (d < values)[None, :], other=0.0,
        ).to(ACC)  # fmt: skip
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)

    lane = tl.arange(0, 1)
    if FINAL:
        empty = total == 0.0
        inverse = 1.0 / tl.where(empty, 1.0, total)
        tl.store(out + n * values + d, (acc * inverse).to(out.dtype.element_ty), mask=d < values)
        result = tl.where(empty, float("-inf"), top + tl.log(total))
        tl.store(lse + n + lane, result, mask=lane < writes)
        if NEED_WEIGHTS:
            # The scores come from other threads of this program.
            tl.debug_barrier()
            shift = tl.where(top == float("-inf"), 0.0, top)
            for k0 in range(0, keys, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                x = tl.load(scores + j, mask=j < end, other=float("-inf"))
                p = tl.where(x == float("-inf"), 0.0, tl.exp(x - shift) * inverse)
                tl.store(
                    weights + n * keys + j, p.to(weights.dtype.element_ty),
                    mask=j < written,
                )  # fmt: skip
    else:
        part = split * entries + n
        tl.store(out + part * values + d, acc, mask=d < values)
        tl.store(tops + part + lane, top, mask=lane < writes)
        tl.store(totals + part + lane, total, mask=lane < writes)
        if NEED_WEIGHTS:
            # Keys beyond the last that is attended to.
            last = tl.minimum(begin + keys_per_split, keys)
            for k0 in range(tl.maximum(begin, end), last, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                tl.store(
                    scores + j,
                    tl.full([BLOCK], float("-inf"), ACC),
                    mask=j < tl.minimum(last, written),
                )


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    parts, tops, totals, scores, out, weights, lse, entries, keys, values, splits,
    VALUES: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """A tile of an entry's out, and of its weights."""
    n = (tl.program_id(0) % entries).to(tl.int64)
    tile = tl.program_id(0) // entries
    s = tl.arange(0, SPLITS)
    top = tl.load(tops + s * entries + n, mask=s < splits, other=float("-inf"))
    largest = tl.max(top, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    sums = tl.load(totals + s * entries + n, mask=s < splits, other=0.0)
    total = tl.sum(sums * tl.exp(top - shift), 0)
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    d = tile * VALUES + tl.arange(0, VALUES)
    acc = tl.zeros([VALUES], lse.dtype.element_ty)
    for split in range(0, splits):
        part = split * entries + n
        factor = tl.exp(tl.load(tops + part) - shift)
        acc += factor * tl.load(parts + part * values + d, mask=d < values, other=0.0)
    tl.store(out + n * values + d, (acc * inverse).to(out.dtype.element_ty), mask=d < values)
    lane = tl.arange(0, 1)
    writes = tl.where(tile == 0, 1, 0)
    result = tl.where(empty, float("-inf"), shift + tl.log(total))
    tl.store(lse + n + lane, result + tl.zeros([1], lse.dtype.element_ty), mask=lane < writes)
    if NEED_WEIGHTS:
        j = tile * KEYS + tl.arange(0, KEYS)
        x = tl.load(scores + n * keys + j, mask=j < keys, other=float("-inf"))
        p = tl.where(x == float("-inf"), 0.0, tl.exp(x - shift) * inverse)
        tl.store(weights + n * keys + j, p.to(weights.dtype.element_ty), mask=j < keys)


def decode_inputs(p: Problem) -> tuple[object, ...]:
    """Parameters ``query`` to ``keep_bits`` of the kernels that compute scores."""
    query = p.query_strides
    mask, *mask_strides = p.mask_arguments()
    lengths, *length_strides = p.length_arguments()
    return (
        p.query, p.key, p.value, p.raw_weight, query[0], query[1], query[3],
        *p.key_strides, *p.value_strides, *p.weight_strides,
        mask, mask_strides[0], mask_strides[1], mask_strides[3],
        lengths, length_strides[0], length_strides[1], *p.dropout_arguments(),
    )  # fmt: skip


def forward(p: Problem, need_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    tile = tiles.decode_tile(p.hidden, p.values, p.wide, most_values=1024)
    value_tiles = max(1, -(-p.values // tile["VALUES"]))
    splits, keys_per_split = tiles.splits(
        p.entries * value_tiles, p.keys, tile["BLOCK"], p.processors
    )
    shape, final = (*p.batch.shape, 1), splits == 1
    out = torch.empty(*shape, p.values, dtype=p.dtype, device=p.device)
    lse = torch.empty(shape, dtype=p.accumulator, device=p.device)
    weights = torch.empty(
        (*shape, p.keys) if need_weights else (0,), dtype=p.dtype, device=p.device
    )
    scores = torch.empty_like(weights, dtype=p.accumulator) if need_weights else lse
    parts = tops = totals = lse
    if not final:
        parts = lse.new_empty(splits, p.entries, p.values)
        tops, totals = lse.new_empty(2, splits, p.entries)
    launch(
        forward_kernel, p.entries * splits * value_tiles, lse, *decode_inputs(p),
        out if final else parts, weights, lse, scores, tops, totals,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.left, p.right, p.scale_bits,
        splits, keys_per_split, **tile, **p.masking(), DROPOUT=p.seed is not None,
        NEED_WEIGHTS=need_weights, FINAL=final,
    )  # fmt: skip
    if not final:
        values, keys = 256, 1024
        tile_count = max(-(-p.values // values), -(-p.keys // keys) if need_weights else 1)
        launch(
            merge_kernel, p.entries * tile_count, lse,
            parts, tops, totals, scores, out, weights, lse, p.entries, p.keys, p.values, splits,
            VALUES=values, KEYS=keys, SPLITS=power_of_two(splits),
            NEED_WEIGHTS=need_weights, num_warps=4,
        )  # fmt: skip
    return out, weights, lse
