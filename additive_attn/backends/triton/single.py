"""One query per entry: a decoder step, or pooling over a whole sequence.

Every key is used once, so nothing is prepared: scores take the direct form, and what counts is
how few kernels run. Forward is one kernel. Where entries alone would not fill the machine the keys
are split over programs, each with the largest score m, the sum l of e^{s - m} and the weighted sum
o of the values over its keys, and a second kernel merges them:

    M = max m    out = sum e^{m - M} o / sum e^{m - M} l    lse = M + log sum e^{m - M} l

Backward is two kernels, since G needs the sum of P dP over all keys; notation of ``backward.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import configs
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.launch import batch_entry, launch, power_of_two
from additive_attn.backends.triton.numerics import keep_factors, number, tanh
from additive_attn.backends.triton.scores import interval, masked_bias


@triton.jit
def _range(tiles, splits, inner, keys_per_split):
    """What a program takes: (entry, split, tile); the indices of its entry into (outer, inner);
    its first key."""
    program = tl.program_id(0)
    rest = program // tiles
    split = rest % splits
    n, o, m = batch_entry(rest // splits, inner)
    return n, split, program % tiles, o, m, split * keys_per_split


@triton.jit
def _block_scores(
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
def _factors(seed, n, k0, threshold, keep_scale, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The dropout factors of keys from k0 on."""
    row = tl.zeros([1], tl.int32)
    factor = keep_factors(tl.load(seed), n, row, k0, threshold, keep_scale, 1, BLOCK)
    return tl.reshape(factor, [BLOCK]).to(ACC)


@triton.jit(do_not_specialize=configs.VARYING)
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
    n, split, tile, o, m, begin = _range(value_tiles, splits, inner, keys_per_split)
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
        score, here = _block_scores(
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
            p *= _factors(seed, n, k0, threshold, number(keep_bits), ACC, BLOCK)
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


@triton.jit(do_not_specialize=configs.VARYING)
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


@triton.jit(do_not_specialize=configs.VARYING)
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
    n, split, _, o, m, begin = _range(1, splits, inner, keys_per_split)
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
        score, here = _block_scores(
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
                factor = _factors(seed, n, k0, threshold, number(keep_bits), ACC, BLOCK)
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


@triton.jit(do_not_specialize=configs.VARYING)
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
    n, split, _, o, m, begin = _range(1, splits, inner, keys_per_split)
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
                p *= _factors(seed, n, k0, threshold, number(keep_bits), ACC, BLOCK)
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


def _inputs(p: Problem) -> tuple[object, ...]:
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
    tile = configs.single_tile(p.hidden, p.values, p.wide, most_values=1024)
    value_tiles = max(1, -(-p.values // tile["VALUES"]))
    splits, keys_per_split = configs.splits(
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
        forward_kernel, p.entries * splits * value_tiles, lse, *_inputs(p),
        out if final else parts, weights, lse, scores, tops, totals,
        p.batch.inner, p.entries, p.keys, p.hidden, p.values, p.left, p.right, p.scale_bits,
        splits, keys_per_split, **tile, **p.masking(), DROPOUT=p.seed is not None,
        NEED_WEIGHTS=need_weights, FINAL=final,
    )  # fmt: skip
    if not final:
        values, keys = 256, 1024
        tiles = max(-(-p.values // values), -(-p.keys // keys) if need_weights else 1)
        launch(
            merge_kernel, p.entries * tiles, lse,
            parts, tops, totals, scores, out, weights, lse, p.entries, p.keys, p.values, splits,
            VALUES=values, KEYS=keys, SPLITS=power_of_two(splits),
            NEED_WEIGHTS=need_weights, num_warps=4,
        )  # fmt: skip
    return out, weights, lse


def backward(
    p: Problem, lse: Tensor, grad_out: Tensor | None, grad_weights: Tensor | None,
    grad_lse: Tensor | None, need_query: bool, need_key: bool, need_value: bool, need_weight: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:  # fmt: skip
    """Gradients of query, key, value and weight; and G (entries, 1, keys), from which that of the
    mask is summed."""
    tile = configs.single_tile(p.hidden, p.values, p.wide, most_values=256)
    splits, keys_per_split = configs.splits(p.entries, p.keys, tile["BLOCK"], p.processors)
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
        probability_kernel, p.entries * splits, lse, *_inputs(p), lse,
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
