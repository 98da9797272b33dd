"""Gradients of one query per entry: two kernels, since G needs the sum of P dP over all keys;
notation of ``backward.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.decode_forward import (
    block_factors,
    block_scores,
    decode_inputs,
    key_range,
)
from additive_attn.backends.triton.launch import VARYING, launch
from additive_attn.backends.triton.masks import interval
from additive_attn.backends.triton.numerics import number, tanh
from additive_attn.backends.triton.tiles import power_of_two


@triton.jit(do_not_specialize=VARYING)
def probability_kernel(
    query, key, value, weight, query_outer, query_inner, query_h,
    key_outer, key_inner, key_row, key_h, value_outer, value_inner, value_row, value_column,
    weight_outer, weight_inner, weight_h, mask, mask_outer, mask_inner, mask_column,
    lengths, length_outer, length_inner, seed, seed_outer, seed_inner, threshold, keep_bits,
    lse, grad_out, go_outer, go_inner, go_column, grad_weights, gw_outer, gw_inner, gw_column,
    probabilities, products, totals, deltas,
    inner, entries, keys, hidden, values, left, right, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr, MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, GRAD_OUT: tl.constexpr,
    GRAD_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """P and dP of a range of keys of an entry, and the sums of P and of P dP over the range."""
    ACC: tl.constexpr = lse.dtype.element_ty
    n, split, _, o, m, begin = key_range(1, splits, inner, keys_per_split)
    last = tl.minimum(begin + keys_per_split, keys)
    low, high = interval(
        lengths + o * length_outer + m * length_inner, 0, tl.zeros([1], tl.int32), 1, keys,
        left, right, HAS_LENGTHS,
    )  # fmt: skip
    end = tl.minimum(last, tl.max(high, 0))
    query += o * query_outer + m * query_inner
    key += o * key_outer + m * key_inner
    value += o * value_outer + m * value_inner
    weight += o * weight_outer + m * weight_inner
    mask += o * mask_outer + m * mask_inner
    seed += o * seed_outer + m * seed_inner
    grad_out += o * go_outer + m * go_inner
    grad_weights += o * gw_outer + m * gw_inner
    probabilities += n * keys
    products += n * keys
    scale = number(scale_bits).to(ACC)
    base = tl.load(lse + n)
    base = tl.where(base == float("inf"), float("nan"), base)
    base = tl.where(base == float("-inf"), 0.0, base)
    total = tl.zeros([BLOCK], ACC)
    delta = tl.zeros([BLOCK], ACC)
    for k0 in range(begin, end, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        score, here = block_scores(
            query, key, weight, mask, query_h, key_row, key_h, weight_h, mask_column,
            j, low, high, hidden, scale, ACC, MASK, FEATURES,
        )  # fmt: skip
        p = tl.where(here, tl.exp(score - base), 0.0)
        g = tl.zeros([BLOCK], ACC)
        if GRAD_OUT:
            for d0 in range(0, values, VALUES):
                d = d0 + tl.arange(0, VALUES)
                inside = d < values
                d = d.to(tl.int64)
                v = tl.load(
                    value + j[:, None].to(tl.int64) * value_row + d[None, :] * value_column,
                    mask=here[:, None] & inside[None, :], other=0.0,
                ).to(ACC)  # fmt: skip
                upstream = tl.load(grad_out + d * go_column, mask=inside, other=0.0).to(ACC)
                g += tl.sum(v * upstream[None, :], 1)
            if DROPOUT:
                factor = block_factors(seed, n, k0, threshold, number(keep_bits), ACC, BLOCK)
                g = tl.where(factor == 0.0, 0.0, g * factor)
            # A row of NaN in the upstream gradient stays with the keys that are attended to.
            g = tl.where(here, g, 0.0)
        if GRAD_WEIGHTS:
            place = grad_weights + j.to(tl.int64) * gw_column
            g += tl.load(place, mask=here, other=0.0).to(ACC)
        total += p
        delta += p * g
        tl.store(probabilities + j, p, mask=j < last)
        tl.store(products + j, g, mask=j < last)
    for k0 in range(tl.maximum(begin, end), last, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        tl.store(probabilities + j, tl.zeros([BLOCK], ACC), mask=j < last)
        tl.store(products + j, tl.zeros([BLOCK], ACC), mask=j < last)
    tl.store(totals + n * splits + split, tl.sum(total, 0))
    tl.store(deltas + n * splits + split, tl.sum(delta, 0))


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    query, key, weight, query_outer, query_inner, query_h, key_outer, key_inner, key_row, key_h,
    weight_outer, weight_inner, weight_h,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    grad_out, go_outer, go_inner, go_column, grad_lse, gl_outer, gl_inner,
    probabilities, products, totals, deltas,
    grad_query, grad_key, grad_value, grad_weight,
    inner, entries, keys, hidden, values, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr, SPLITS: tl.constexpr,
    DROPOUT: tl.constexpr, GRAD_LSE: tl.constexpr, NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr, NEED_ROW: tl.constexpr,
):  # fmt: skip
    """All gradients of a range of keys of an entry; those of query and weight to
    [split][entry]. Leaves G in ``products``."""
    ACC: tl.constexpr = probabilities.dtype.element_ty
    n, split, _, o, m, begin = key_range(1, splits, inner, keys_per_split)
    last = tl.minimum(begin + keys_per_split, keys)
    query += o * query_outer + m * query_inner
    key += o * key_outer + m * key_inner
    weight += o * weight_outer + m * weight_inner
    seed += o * seed_outer + m * seed_inner
    grad_out += o * go_outer + m * go_inner
    probabilities += n * keys
    products += n * keys
    scale = number(scale_bits).to(ACC)
    s = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(totals + n * splits + s, mask=s < splits, other=0.0), 0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = tl.sum(tl.load(deltas + n * splits + s, mask=s < splits, other=0.0), 0) * inverse
    if GRAD_LSE:
        delta -= tl.load(grad_lse + o * gl_outer + m * gl_inner).to(ACC)
    for k0 in range(begin, last, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        p = tl.load(probabilities + j, mask=j < last, other=0.0) * inverse
        g = tl.load(products + j, mask=j < last, other=0.0)
        tl.store(products + j, tl.where(p == 0.0, 0.0, p * (g - delta)), mask=j < last)
        if NEED_VALUE:
            used = p != 0.0
            if DROPOUT:
                p *= block_factors(seed, n, k0, threshold, number(keep_bits), ACC, BLOCK)
            for d0 in range(0, values, VALUES):
                d = d0 + tl.arange(0, VALUES)
                inside = d < values
                upstream = tl.load(
                    grad_out + d.to(tl.int64) * go_column, mask=inside, other=0.0
                ).to(ACC)  # fmt: skip
                share = tl.where(used[:, None], p[:, None] * upstream[None, :], 0.0)
                place = (n * keys + j[:, None]) * values + d[None, :]
                tl.store(
                    grad_value + place, share.to(grad_value.dtype.element_ty),
                    mask=(j < last)[:, None] & inside[None, :],
                )  # fmt: skip
    # G comes from other threads of this program.
    tl.debug_barrier()
    if NEED_KEY or NEED_ROW:
        for h0 in range(0, hidden, FEATURES):
            h = h0 + tl.arange(0, FEATURES)
            inside = h < hidden
            h = h.to(tl.int64)
            q = tl.load(query + h * query_h, mask=inside, other=0.0).to(ACC)
            w = tl.load(weight + h * weight_h, mask=inside, other=0.0).to(ACC) * scale
            sum_q = tl.zeros([FEATURES], ACC)
            sum_w = tl.zeros([FEATURES], ACC)
            for k0 in range(begin, last, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                g = tl.load(products + j, mask=j < last, other=0.0)[:, None]
                used = g != 0.0
                k = tl.load(
                    key + j[:, None].to(tl.int64) * key_row + h[None, :] * key_h,
                    mask=used & inside[None, :], other=0.0,
                ).to(ACC)  # fmt: skip
                t = tanh(q[None, :] + k)
                slope = tl.where(used, g * (1.0 - t * t), 0.0)
                if NEED_ROW:
                    sum_q += tl.sum(slope, 0)
                    sum_w += tl.sum(tl.where(used, g * t, 0.0), 0)
                if NEED_KEY:
                    tl.store(
                        grad_key + (n * keys + j[:, None]) * hidden + h[None, :],
                        (slope * w[None, :]).to(grad_key.dtype.element_ty),
                        mask=(j < last)[:, None] & inside[None, :],
                    )
            if NEED_ROW:
                place = (split * entries + n) * hidden + h
                tl.store(grad_query + place, sum_q * w, mask=inside)
                tl.store(grad_weight + place, sum_w * scale, mask=inside)


def backward(
    p: Problem, lse: Tensor, grad_out: Tensor | None, grad_weights: Tensor | None,
    grad_lse: Tensor | None, need_query: bool, need_key: bool, need_value: bool, need_weight: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:  # fmt: skip
    """Gradients of query, key, value and weight; and G (entries, 1, keys), from which that of the
    mask is summed."""
    tile = tiles.decode_tile(p.hidden, p.values, p.wide, most_values=256)
    splits, keys_per_split = tiles.splits(p.entries, p.keys, tile["BLOCK"], p.processors)
    batch, dtype, device = p.batch.shape, p.dtype, p.device
    need_row = need_query or need_weight

    def empty(needed: bool, *shape: int) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=device)

    grad_key = empty(need_key, *batch, p.keys, p.hidden)
    grad_value = empty(need_value, *batch, p.keys, p.values)
    if grad_out is None:
        grad_value.zero_()
    probabilities = lse.new_empty(p.entries, 1, p.keys)
    products = torch.empty_like(probabilities)
    totals = lse.new_empty(p.entries, splits)
    deltas = torch.empty_like(totals)
    of_query = lse.new_empty(splits, p.entries, p.hidden if need_row else 0)
    of_weight = torch.empty_like(of_query)
    upstream = _strided(p, grad_out, 2, lse)
    launch(
        probability_kernel, p.entries * splits, lse, *decode_inputs(p), lse,
        *upstream, *_strided(p, grad_weights, 2, lse),
        probabilities, products, totals, deltas,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.left, p.right, p.scale_bits,
        splits, keys_per_split, **tile, **p.masking(), DROPOUT=p.seed is not None,
        GRAD_OUT=grad_out is not None, GRAD_WEIGHTS=grad_weights is not None,
    )  # fmt: skip
    query = p.query_strides
    launch(
        gradient_kernel, p.entries * splits, lse,
        p.query, p.key, p.raw_weight, query[0], query[1], query[3], *p.key_strides,
        *p.weight_strides, *p.dropout_arguments(), *upstream,
        *_strided(p, grad_lse, 1, lse),
        probabilities, products, totals, deltas, of_query, grad_key, grad_value, of_weight,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.scale_bits, splits, keys_per_split,
        **tile, SPLITS=power_of_two(splits), DROPOUT=p.seed is not None,
        GRAD_LSE=grad_lse is not None, NEED_KEY=need_key,
        NEED_VALUE=need_value and grad_out is not None, NEED_ROW=need_row,
    )  # fmt: skip
    grad_query, grad_weight = empty(False), lse.new_empty(0)
    if need_query:
        grad_query = _sum(of_query).to(dtype).view(*batch, 1, p.hidden)
    if need_weight:
        grad_weight = _sum(of_weight).view(*batch, p.hidden)
    return (grad_query, grad_key, grad_value, grad_weight), products


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _strided(p: Problem, x: Tensor | None, rank: int, stand_in: Tensor) -> tuple[object, ...]:
    """An upstream gradient, and its strides without that of the row; one that is missing is not
    read."""
    if x is None:
        return (stand_in, *(0,) * (rank + 1))
    x, (outer, inner, _, *columns) = p.batch.strided(x, rank)
    return (x, outer, inner, *columns)
