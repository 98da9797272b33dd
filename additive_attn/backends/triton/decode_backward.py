"""Gradients of one query per entry: two kernels, since G needs the sum of P dP over all keys
(math.md, eq. 9 to 12)."""

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
    entry_interval,
    program_entry,
)
from additive_attn.backends.triton.launch import kernel, launch, target
from additive_attn.backends.triton.numerics import number, tanh
from additive_attn.backends.triton.plan import decode_splits
from additive_attn.backends.triton.tiles import power_of_two

MASKED = tl.constexpr(-1.0)  # stands for the weight of a masked key


@kernel
def probability_kernel(
    query, key, value, weight, query_outer, query_inner, query_h,
    key_outer, key_inner, key_row, key_h, value_outer, value_inner, value_row, value_column,
    weight_outer, weight_inner, weight_h, mask, mask_outer, mask_inner, mask_column,
    lengths, length_outer, length_inner, seed, seed_outer, seed_inner, threshold, keep_bits,
    lse, grad_out, go_outer, go_inner, go_column, grad_weights, gw_outer, gw_inner, gw_column,
    probabilities, products, totals, deltas,
    inner, entries, keys, hidden, values, left, right, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """P, or MASKED, and dP of a range of keys of an entry, and the sums of P and of P dP."""
    ACC: tl.constexpr = lse.dtype.element_ty
    n, split, _tile, o, m, begin, last = program_entry(1, splits, inner, keys, keys_per_split)
    low, high = entry_interval(lengths, length_outer, length_inner, o, m, keys, left, right)
    end = tl.minimum(last, tl.max(high, 0))
    query += o * query_outer + m * query_inner
    key += o * key_outer + m * key_inner
    value += o * value_outer + m * value_inner
    weight += o * weight_outer + m * weight_inner
    if mask is not None:
        mask += o * mask_outer + m * mask_inner
    if seed is not None:
        seed += o * seed_outer + m * seed_inner
    if grad_out is not None:
        grad_out += o * go_outer + m * go_inner
    if grad_weights is not None:
        grad_weights += o * gw_outer + m * gw_inner
    probabilities += n * keys
    products += n * keys
    scale = number(scale_bits).to(ACC)
    # An attended key of an entry whose lse is infinite is NaN, as in a softmax.
    base = tl.load(lse + n)
    base = tl.where(tl.abs(base) == float("inf"), float("nan"), base)
    total = tl.zeros([BLOCK], ACC)
    delta = tl.zeros([BLOCK], ACC)
    for k0 in range(begin, end, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        score, attended = block_scores(
            query, key, weight, mask, query_h, key_row, key_h, weight_h, mask_column,
            j, low, high, hidden, scale, ACC, FEATURES, TARGET,
        )  # fmt: skip
        p = tl.where(attended, tl.exp(score - base), 0.0)
        g = tl.zeros([BLOCK], ACC)
        if grad_out is not None:
            for d0 in range(0, values, VALUES):
                d = d0 + tl.arange(0, VALUES)
                inside = d < values
                d = d.to(tl.int64)
                v = tl.load(  # [BLOCK, VALUES]
                    value + j[:, None].to(tl.int64) * value_row + d[None, :] * value_column,
                    mask=attended[:, None] & inside[None, :], other=0.0,
                ).to(ACC)  # fmt: skip
                upstream = tl.load(grad_out + d * go_column, mask=inside, other=0.0).to(ACC)
                g += tl.sum(v * upstream[None, :], 1)
            if seed is not None:
                g *= block_factors(seed, n, k0, threshold, keep_bits, ACC, BLOCK)
            # A row of NaN in the upstream gradient stays with the attended keys.
            g = tl.where(attended, g, 0.0)
        if grad_weights is not None:
            place = grad_weights + j.to(tl.int64) * gw_column
            g += tl.load(place, mask=attended, other=0.0).to(ACC)
        total += p
        delta += p * g
        tl.store(probabilities + j, tl.where(attended, p, MASKED), mask=j < last)
        tl.store(products + j, g, mask=j < last)
    for k0 in range(tl.maximum(begin, end), last, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        tl.store(probabilities + j, tl.full([BLOCK], MASKED, ACC), mask=j < last)
        tl.store(products + j, tl.zeros([BLOCK], ACC), mask=j < last)
    tl.store(totals + n * splits + split, tl.sum(total, 0))
    tl.store(deltas + n * splits + split, tl.sum(delta, 0))


@triton.jit
def _block_gradient(probabilities, products, j, last, inverse, delta):
    """P and G of the keys j, and which are attended."""
    p = tl.load(probabilities + j, mask=j < last, other=MASKED)
    attended = p != MASKED
    p = tl.where(attended, p * inverse, 0.0)
    g = tl.load(products + j, mask=j < last, other=0.0)
    return p, tl.where(attended, p * (g - delta), 0.0), attended


@kernel
def gradient_kernel(
    query, key, weight, query_outer, query_inner, query_h, key_outer, key_inner, key_row, key_h,
    weight_outer, weight_inner, weight_h,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    grad_out, go_outer, go_inner, go_column, grad_lse, gl_outer, gl_inner,
    probabilities, products, totals, deltas,
    gradient, grad_query, grad_key, grad_value, grad_weight,
    inner, entries, keys, hidden, values, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr, SPLITS: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Gradients of a range of keys of an entry, where they are not None: G; those of key and
    value; those of query and weight, both or none, to [split][entry]."""
    ACC: tl.constexpr = probabilities.dtype.element_ty
    n, split, _tile, o, m, begin, last = program_entry(1, splits, inner, keys, keys_per_split)
    probabilities += n * keys
    products += n * keys
    s = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(totals + n * splits + s, mask=s < splits, other=0.0), 0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = tl.sum(tl.load(deltas + n * splits + s, mask=s < splits, other=0.0), 0) * inverse
    if grad_lse is not None:
        delta -= tl.load(grad_lse + o * gl_outer + m * gl_inner).to(ACC)
    if gradient is not None:
        for k0 in range(begin, last, BLOCK):
            j = k0 + tl.arange(0, BLOCK)
            _p, g, _any = _block_gradient(probabilities, products, j, last, inverse, delta)
            tl.store(gradient + n * keys + j, g, mask=j < last)
    if grad_value is not None:
        grad_out += o * go_outer + m * go_inner
        if seed is not None:
            seed += o * seed_outer + m * seed_inner
        for k0 in range(begin, last, BLOCK):
            j = k0 + tl.arange(0, BLOCK)
            p, _g, attended = _block_gradient(probabilities, products, j, last, inverse, delta)
            if seed is not None:
                p *= block_factors(seed, n, k0, threshold, keep_bits, ACC, BLOCK)
            for d0 in range(0, values, VALUES):
                d = d0 + tl.arange(0, VALUES)
                inside = d < values
                upstream = tl.load(
                    grad_out + d.to(tl.int64) * go_column, mask=inside, other=0.0
                ).to(ACC)  # fmt: skip
                share = tl.where(attended[:, None], p[:, None] * upstream[None, :], 0.0)
                tl.store(  # [BLOCK, VALUES]
                    grad_value + (n * keys + j[:, None]) * values + d[None, :],
                    share.to(grad_value.dtype.element_ty),
                    mask=(j < last)[:, None] & inside[None, :],
                )
    if grad_key is not None or grad_query is not None:
        query += o * query_outer + m * query_inner
        key += o * key_outer + m * key_inner
        weight += o * weight_outer + m * weight_inner
        scale = number(scale_bits).to(ACC)
        for h0 in range(0, hidden, FEATURES):
            h = h0 + tl.arange(0, FEATURES)
            inside = h < hidden
            h = h.to(tl.int64)
            q = tl.load(query + h * query_h, mask=inside, other=0.0).to(ACC)
            w = tl.load(weight + h * weight_h, mask=inside, other=0.0).to(ACC)
            sum_q = tl.zeros([FEATURES], ACC)
            sum_w = tl.zeros([FEATURES], ACC)
            for k0 in range(begin, last, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                _p, g, _any = _block_gradient(probabilities, products, j, last, inverse, delta)
                g = (g * scale)[:, None]  # [BLOCK, 1]
                counts = g != 0.0
                k = tl.load(  # [BLOCK, FEATURES]
                    key + j[:, None].to(tl.int64) * key_row + h[None, :] * key_h,
                    mask=counts & inside[None, :], other=0.0,
                ).to(ACC)  # fmt: skip
                t = tanh(q[None, :] + k, TARGET)
                slope = tl.where(counts, g * (1.0 - t * t), 0.0)
                if grad_query is not None:
                    sum_q += tl.sum(slope, 0)
                    sum_w += tl.sum(tl.where(counts, g * t, 0.0), 0)
                if grad_key is not None:
                    share = tl.where(counts, slope * w[None, :], 0.0)
                    tl.store(
                        grad_key + (n * keys + j[:, None]) * hidden + h[None, :],
                        share.to(grad_key.dtype.element_ty),
                        mask=(j < last)[:, None] & inside[None, :],
                    )
            if grad_query is not None:
                place = (split * entries + n) * hidden + h
                tl.store(grad_query + place, tl.where(sum_q == 0.0, 0.0, sum_q * w), mask=inside)
                tl.store(grad_weight + place, sum_w, mask=inside)


def decode_backward(
    p: Problem,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_weight: bool,
    need_mask: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
    """Gradients of query, key, value and weight; and G (entries, 1, keys), from which that of the
    mask is summed."""
    tile = tiles.decode_tile(p.hidden, p.values, p.wide, most_values=256)
    splits, keys_per_split = decode_splits(p.entries, p.keys, p.processors)
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
    gradient = torch.empty_like(probabilities) if need_mask else None
    totals, deltas = lse.new_empty(2, p.entries, splits)
    of_query = lse.new_empty(splits, p.entries, p.hidden if need_row else 0)
    of_weight = torch.empty_like(of_query)

    def upstream(x: Tensor | None, rank: int) -> tuple[object, ...]:
        """Without the stride of the row."""
        given, outer, inner, _, *columns = p.upstream_arguments(x, rank)
        return (given, outer, inner, *columns)

    launch(
        probability_kernel, p.entries * splits, lse, *decode_inputs(p), lse,
        *upstream(grad_out, 2), *upstream(grad_weights, 2),
        probabilities, products, totals, deltas,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.left, p.right, p.scale_bits,
        splits, keys_per_split, **tile, TARGET=target(),
    )  # fmt: skip
    query = p.query_strides
    launch(
        gradient_kernel, p.entries * splits, lse,
        p.query, p.key, p.weight, query[0], query[1], query[3], *p.key_strides,
        *p.weight_strides, *p.dropout_arguments(), *upstream(grad_out, 2), *upstream(grad_lse, 1),
        probabilities, products, totals, deltas, gradient,
        of_query if need_row else None, grad_key if need_key else None,
        grad_value if need_value and grad_out is not None else None,
        of_weight if need_row else None,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.scale_bits, splits, keys_per_split,
        **tile, SPLITS=power_of_two(splits), TARGET=target(),
    )  # fmt: skip

    def summed(parts: Tensor) -> Tensor:
        return parts[0] if splits == 1 else parts.sum(0)

    grad_query, grad_weight = empty(False), lse.new_empty(0)
    if need_query:
        grad_query = summed(of_query).to(dtype).view(*batch, 1, p.hidden)
    if need_weight:
        grad_weight = summed(of_weight).view(*batch, p.hidden)
    return (grad_query, grad_key, grad_value, grad_weight), gradient
