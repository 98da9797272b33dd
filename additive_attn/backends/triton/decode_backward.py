"""Gradients for one query per entry. They take two kernels, since G needs the sum of P dP over all
keys (math.md, eq. 9 to 12)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.decode_forward import (
    Single,
    block_attended,
    block_factors,
    block_rows,
    block_scores,
    decode_inputs,
    decode_options,
    entry_interval,
    features,
    key_splits,
    program_entry,
)
from additive_attn.backends.triton.launch import kernel, launch
from additive_attn.backends.triton.numerics import number, tanh
from additive_attn.backends.triton.parameters import Dropout, Matrix, Row, Scalar, at_entry
from additive_attn.backends.triton.tiles import power_of_two
from additive_attn.spec.call import Needs, Upstream

MASKED = tl.constexpr(-1.0)  # stands for the weight of a masked key


@triton.jit
def value_terms(
    value, grad_out, o, m, j, attended, d, values, ACC: tl.constexpr, ALIGNED: tl.constexpr
):
    """Loads numbers d of the values of keys j, [BLOCK, VALUES], and of dO."""
    v = block_rows(value, o, m, j, attended, d, values, ALIGNED)
    return v, features(grad_out, o, m, d, values, ACC)


@kernel
def probability_kernel(
    single: Single, weights, lse, grad_out: Row | None, grad_weights: Row | None,
    probabilities, products, totals, deltas, kept,
    inner, entries, keys, hidden, values, left, right, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, WHOLE: tl.constexpr, VALUES: tl.constexpr,
    ALIGNED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Stores P, or MASKED, and dP of a range of keys of an entry, and the sums of P and of P dP. P
    is loaded from ``weights``; where they are None, it is computed from the scores again. Stores P
    o D in ``kept``, if given."""
    ACC: tl.constexpr = lse.dtype.element_ty
    n, split, _tile, o, m, begin, last = program_entry(1, splits, inner, keys, keys_per_split)
    low, high = entry_interval(single.lengths, o, m, keys, left, right)
    end = tl.minimum(last, tl.max(high, 0))
    probabilities += n * keys
    products += n * keys
    if weights is not None:
        weights += n * keys
    if kept is not None:
        kept += n * keys
    scale = number(scale_bits).to(ACC)
    d = tl.arange(0, VALUES)
    # P of an attended key is NaN where the lse of its entry is infinite, as in a softmax.
    base = tl.load(lse + n)
    base = tl.where(tl.abs(base) == float("inf"), float("nan"), base)
    total = tl.zeros([BLOCK], ACC)
    delta = tl.zeros([BLOCK], ACC)
    for k0 in range(begin, end, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        bias, attended = block_attended(single.mask, o, m, j, low, high)
        g = tl.zeros([BLOCK], ACC)
        if grad_out is not None:
            # These loads are issued before the scores are computed, which hides their latency.
            v, upstream = value_terms(
                single.value, grad_out, o, m, j, attended, d, values, ACC, ALIGNED
            )
        if weights is not None:
            p = tl.load(weights + j, mask=attended, other=0.0).to(ACC)
        else:
            score = block_scores(
                single, None, 0, o, m, bias, attended, j, hidden, scale,
                ACC, FEATURES, WHOLE, ALIGNED, TARGET,
            )  # fmt: skip
            p = tl.where(attended, tl.exp(score - base), 0.0)
        if kept is not None:
            factors = block_factors(single.dropout, n, o, m, k0, ACC, BLOCK)
            tl.store(kept + j, p * factors, mask=j < last)
        if grad_out is not None:
            terms = v.to(ACC) * upstream[None, :]
            for d0 in range(VALUES, values, VALUES):
                v, upstream = value_terms(
                    single.value, grad_out, o, m, j, attended, d0 + d, values, ACC, ALIGNED
                )
                terms += v.to(ACC) * upstream[None, :]
            g = tl.sum(terms, 1)
            if single.dropout is not None:
                g *= block_factors(single.dropout, n, o, m, k0, ACC, BLOCK)
            # NaN in the upstream gradient reaches attended keys only.
            g = tl.where(attended, g, 0.0)
        if grad_weights is not None:
            place = at_entry(grad_weights, o, m) + j.to(tl.int64) * grad_weights.column
            g += tl.load(place, mask=attended, other=0.0).to(ACC)
        total += p
        delta += p * g
        tl.store(probabilities + j, tl.where(attended, p, MASKED), mask=j < last)
        tl.store(products + j, g, mask=j < last)
    for k0 in range(tl.maximum(begin, end), last, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        tl.store(probabilities + j, tl.full([BLOCK], MASKED, ACC), mask=j < last)
        tl.store(products + j, tl.zeros([BLOCK], ACC), mask=j < last)
        if kept is not None:
            tl.store(kept + j, tl.zeros([BLOCK], ACC), mask=j < last)
    if totals is not None:
        tl.store(totals + n * splits + split, tl.sum(total, 0))
    tl.store(deltas + n * splits + split, tl.sum(delta, 0))


@triton.jit
def row_sums(totals, deltas, grad_lse, n, o, m, splits, ACC: tl.constexpr, SPLITS: tl.constexpr):
    """Returns 1 / the sum of P of an entry, or 1 without ``totals``, and its delta - dlse."""
    s = n * splits + tl.arange(0, SPLITS)
    inside = tl.arange(0, SPLITS) < splits
    inverse = 1.0
    delta = 0.0
    if deltas is not None:
        delta = tl.sum(tl.load(deltas + s, mask=inside, other=0.0), 0)
    if totals is not None:
        total = tl.sum(tl.load(totals + s, mask=inside, other=0.0), 0)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        delta *= inverse
    if grad_lse is not None:
        delta -= tl.load(at_entry(grad_lse, o, m)).to(ACC)
    return inverse, delta


@triton.jit
def block_gradient(probabilities, products, j, last, inverse, delta):
    """Returns P and G of the keys j, and which are attended. Without ``products``,
    ``probabilities`` are G."""
    if products is None:
        p = tl.load(probabilities + j, mask=j < last, other=0.0)
        g = p
        attended = g != 0.0
    else:
        p = tl.load(probabilities + j, mask=j < last, other=MASKED)
        attended = p != MASKED
        p = tl.where(attended, p * inverse, 0.0)
        g = tl.load(products + j, mask=j < last, other=0.0)
        g = tl.where(attended, p * (g - delta), 0.0)
    return p, g, attended


@kernel
def gradient_kernel(
    query: Row, key: Matrix, weight: Row, dropout: Dropout | None,
    grad_out: Row | None, grad_lse: Scalar | None, probabilities, products, totals, deltas,
    gradient, grad_query, grad_key, grad_value, grad_weight,
    inner, entries, keys, hidden, values, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, WHOLE: tl.constexpr, VALUES: tl.constexpr,
    SPLITS: tl.constexpr, ALIGNED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Stores gradients of a range of keys of an entry, where they are not None: G; those of key
    and value; those of query and weight, [split][entry]. Without ``products``, ``probabilities``
    are G."""
    ACC: tl.constexpr = probabilities.dtype.element_ty
    n, split, _tile, o, m, begin, last = program_entry(1, splits, inner, keys, keys_per_split)
    probabilities += n * keys
    if products is not None:
        products += n * keys
    inverse, delta = row_sums(totals, deltas, grad_lse, n, o, m, splits, ACC, SPLITS)
    if gradient is not None:
        for k0 in range(begin, last, BLOCK):
            j = k0 + tl.arange(0, BLOCK)
            _p, g, _any = block_gradient(probabilities, products, j, last, inverse, delta)
            tl.store(gradient + n * keys + j, g, mask=j < last)
    if grad_value is not None:
        for k0 in range(begin, last, BLOCK):
            j = k0 + tl.arange(0, BLOCK)
            p, _g, attended = block_gradient(probabilities, products, j, last, inverse, delta)
            if dropout is not None:
                p *= block_factors(dropout, n, o, m, k0, ACC, BLOCK)
            for d0 in range(0, values, VALUES):
                d = d0 + tl.arange(0, VALUES)
                inside = d < values
                upstream = features(grad_out, o, m, d, values, ACC)
                share = tl.where(attended[:, None], p[:, None] * upstream[None, :], 0.0)
                tl.store(  # [BLOCK, VALUES]
                    grad_value + (n * keys + j[:, None]) * values + d[None, :],
                    share.to(grad_value.dtype.element_ty),
                    mask=(j < last)[:, None] & inside[None, :],
                )
    if grad_key is not None or grad_query is not None or grad_weight is not None:
        scale = number(scale_bits).to(ACC)
        for h0 in range(0, FEATURES if WHOLE else hidden, FEATURES):
            h = h0 + tl.arange(0, FEATURES)
            inside = h < hidden
            q = features(query, o, m, h, hidden, ACC)
            w = features(weight, o, m, h, hidden, ACC)
            sum_q = tl.zeros([FEATURES], ACC)
            sum_w = tl.zeros([FEATURES], ACC)
            for k0 in range(begin, last, BLOCK):
                j = k0 + tl.arange(0, BLOCK)
                _p, g, attended = block_gradient(probabilities, products, j, last, inverse, delta)
                k = block_rows(key, o, m, j, attended, h, hidden, ALIGNED).to(ACC)
                g = (g * scale)[:, None]  # [BLOCK, 1]
                counts = g != 0.0
                t = tanh(q[None, :] + k, TARGET)
                slope = tl.where(counts, g * (1.0 - t * t), 0.0)
                if grad_query is not None:
                    sum_q += tl.sum(slope, 0)
                if grad_weight is not None:
                    sum_w += tl.sum(tl.where(counts, g * t, 0.0), 0)
                if grad_key is not None:
                    share = tl.where(counts, slope * w[None, :], 0.0)
                    tl.store(
                        grad_key + (n * keys + j[:, None]) * hidden + h[None, :],
                        share.to(grad_key.dtype.element_ty),
                        mask=(j < last)[:, None] & inside[None, :],
                    )
            place = (split * entries + n) * hidden + h
            if grad_query is not None:
                sum_q = tl.where(sum_q == 0.0, 0.0, sum_q * w).to(grad_query.dtype.element_ty)
                tl.store(grad_query + place, sum_q, mask=inside)
            if grad_weight is not None:
                tl.store(grad_weight + place, sum_w, mask=inside)


@kernel
def split_sum_kernel(
    x_parts, x, y_parts, y, numbers, splits, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores the sums over splits of parts [splits][numbers]: a tile of ``x`` or of ``y``."""
    tile_count = tl.cdiv(numbers, BLOCK)
    program = tl.program_id(0)
    if x is None:
        program += tile_count
    if program < tile_count:
        if x is not None:
            _sum_splits(x_parts, x, program, numbers, splits, CHUNK, BLOCK)
    elif y is not None:
        _sum_splits(y_parts, y, program - tile_count, numbers, splits, CHUNK, BLOCK)


@triton.jit
def _sum_splits(parts, out, tile, numbers, splits, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    e = tile * BLOCK + tl.arange(0, BLOCK)
    inside = (e < numbers)[None, :]
    acc = tl.zeros([CHUNK, BLOCK], parts.dtype.element_ty)
    for split0 in range(0, splits, CHUNK):
        split = (split0 + tl.arange(0, CHUNK))[:, None]
        place = parts + split.to(tl.int64) * numbers + e[None, :]
        acc += tl.load(place, mask=(split < splits) & inside, other=0.0)
    tl.store(out + e, tl.sum(acc, 0).to(out.dtype.element_ty), mask=e < numbers)


class Rows(NamedTuple):
    """What ``probability_kernel`` stores for the kernels that compute G from it."""

    probabilities: Tensor  # (entries, 1, keys): P or MASKED; G where ``products`` is None
    products: Tensor | None = None  # the same shape: dP
    totals: Tensor | None = None  # (entries, splits): None where P adds up to 1
    deltas: Tensor | None = None  # (entries, splits)


def decode_tile(p: Problem) -> dict[str, int]:
    return tiles.decode_tile(p.hidden, p.values, p.wide, p.key.element_size(), summed=False)


def upstream_arguments(p: Problem, x: Tensor | None, rank: int) -> tuple[object, ...]:
    """Returns an upstream gradient and its strides without that of the row."""
    given, outer, inner, _, *columns = p.batched(x, rank)
    return (given, outer, inner, *columns)


def decode_rows(
    p: Problem, lse: Tensor, upstream: Upstream, weights: Tensor | None = None,
    kept: Tensor | None = None,
) -> Rows:  # fmt: skip
    tile = decode_tile(p)
    splits, keys_per_split = key_splits(p)
    probabilities = lse.new_empty(p.entries, 1, p.keys)
    products = torch.empty_like(probabilities)
    totals, deltas = lse.new_empty(2, p.entries, splits)
    rows = Rows(probabilities, products, totals if weights is None else None, deltas)
    launch(
        probability_kernel, p.entries * splits, lse, *decode_inputs(p), weights, lse,
        *upstream_arguments(p, upstream.out, 2), *upstream_arguments(p, upstream.weights, 2),
        *rows, kept if kept is not None and kept.numel() else None,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.left, p.right, p.scale_bits,
        splits, keys_per_split, **tile, **decode_options(p, tile),
    )  # fmt: skip
    return rows


def decode_gradients(
    p: Problem, rows: Rows, needs: Needs, upstream: Upstream, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value and weight. Stores G in ``gradient``, if
    given."""
    tile = decode_tile(p)
    splits, keys_per_split = key_splits(p)
    like, batch = rows.probabilities, p.batch.shape

    def empty(needed: bool, *shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return like.new_empty(shape if needed else (0,), dtype=dtype)

    grad_key = empty(needs.key, *batch, p.keys, p.hidden)
    grad_value = empty(needs.value, *batch, p.keys, p.values)
    if upstream.out is None:
        grad_value.zero_()
    some = splits > 1 and (needs.query or needs.weight) and p.hidden > 0

    def parts(needed: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        result = empty(needed, *batch, p.hidden, dtype=dtype)
        if not (needed and some):
            return result, result
        return like.new_empty(splits, p.entries, p.hidden), result

    of_query, grad_query = parts(needs.query, p.dtype)
    of_weight, grad_weight = parts(needs.weight, p.accumulator)
    query = p.query_strides
    launch(
        gradient_kernel, p.entries * splits, like,
        p.query, query[0], query[1], query[3], p.key, *p.key_strides, p.weight,
        *p.weight_strides, *p.dropout_arguments(), *upstream_arguments(p, upstream.out, 2),
        *upstream_arguments(p, upstream.lse, 1), *rows, gradient,
        of_query if needs.query else None, grad_key if needs.key else None,
        grad_value if needs.value and upstream.out is not None else None,
        of_weight if needs.weight else None,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.scale_bits, splits, keys_per_split,
        **tile, **decode_options(p, tile), SPLITS=power_of_two(splits),
    )  # fmt: skip
    if some:
        numbers, sizes = p.entries * p.hidden, tiles.sum_tile(splits)
        launch(
            split_sum_kernel, -(-numbers // sizes["BLOCK"]) * (needs.query + needs.weight), like,
            of_query if needs.query else None, grad_query if needs.query else None,
            of_weight if needs.weight else None, grad_weight if needs.weight else None,
            numbers, splits, **sizes,
        )  # fmt: skip
    if needs.query:
        grad_query = grad_query.view(*batch, 1, p.hidden)
    return grad_query, grad_key, grad_value, grad_weight


def over_parts(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
