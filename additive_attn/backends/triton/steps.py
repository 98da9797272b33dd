"""The operators ``additive_attn::step`` and ``step_backward``, a decoder's steps, on a GPU.

A step is one query per entry (``decode_forward.py``), perhaps with a location term in its
energies. Its backward returns the gradients of the query, the scores and the location term. Those
of keys, values and weight are computed once for all steps (math.md, eq. 16). Only with a location
term, each step adds the keys' gradient to the caller's sum, and returns that of the weight."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.decode_backward import (
    Rows,
    block_gradient,
    decode_gradients,
    decode_rows,
    over_parts,
    row_sums,
    upstream_arguments,
)
from additive_attn.backends.triton.decode_forward import (
    Location,
    block_rows,
    decode_forward,
    features,
    key_splits,
    location_term,
    program_entry,
)
from additive_attn.backends.triton.forward import empty_rows, precision
from additive_attn.backends.triton.launch import kernel, launch, registers, target
from additive_attn.backends.triton.numerics import number, tanh
from additive_attn.backends.triton.parameters import Matrix, Row, Scalar, at_entry
from additive_attn.backends.triton.tiles import power_of_two
from additive_attn.spec.call import Call, Needs, Upstream


@kernel
def location_kernel(
    query: Row, key: Matrix, weight: Row, location: Location, filters,
    grad_lse: Scalar | None, probabilities, products, totals, deltas,
    gradient, grad_query, grad_key, grad_location, grad_location_weight, grad_weight,
    inner, entries, keys, hidden, scale_bits, splits, keys_per_split,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, FILTERS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a range of keys of an entry, and a tile of features: G; those of
    query, weight and location weight, [split][entry]; that of the location, [tile][entry]. Adds
    the key's to ``grad_key``, unless that is None."""
    ACC: tl.constexpr = probabilities.dtype.element_ty
    tile_count = tl.maximum(tl.cdiv(hidden, FEATURES), 1)
    n, split, tile, o, m, begin, last = program_entry(
        tile_count, splits, inner, keys, keys_per_split
    )
    if grad_key is not None:
        grad_key += n * keys * hidden
    probabilities += n * keys
    products += n * keys
    grad_location += (tile.to(tl.int64) * entries + n) * filters * keys
    grad_location_weight += (split * entries + n) * filters * hidden
    inverse, delta = row_sums(totals, deltas, grad_lse, n, o, m, splits, ACC, SPLITS)
    scale = number(scale_bits).to(ACC)
    h = tile * FEATURES + tl.arange(0, FEATURES)
    f = tl.arange(0, FILTERS).to(tl.int64)
    inside = h < hidden
    both = (f < filters)[:, None] & inside[None, :]  # [FILTERS, FEATURES]
    q = features(query, o, m, h, hidden, ACC)
    w = features(weight, o, m, h, hidden, ACC)
    h = h.to(tl.int64)
    weights = at_entry(location.weight, o, m) + f[:, None] * location.weight.row
    weights = tl.load(weights + h[None, :] * location.weight.column, mask=both, other=0.0).to(ACC)
    sum_q = tl.zeros([FEATURES], ACC)
    sum_w = tl.zeros([FEATURES], ACC)
    sum_weights = tl.zeros([FILTERS, FEATURES], ACC)
    for k0 in range(begin, last, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        _p, g, _any = block_gradient(probabilities, products, j, last, inverse, delta)
        tl.store(gradient + n * keys + j, g, mask=j < tl.where(tile == 0, last, 0))
        g *= scale
        counts = g != 0.0
        k = block_rows(key, o, m, j, counts, h, hidden, False).to(ACC)
        k += location_term(location, filters, o, m, j, counts, h, hidden, ACC)
        t = tanh(q[None, :] + k, TARGET)
        slope = tl.where(counts[:, None], g[:, None] * (1.0 - t * t), 0.0)
        sum_q += tl.sum(slope, 0)
        sum_w += tl.sum(tl.where(counts[:, None], g[:, None] * t, 0.0), 0)
        share = tl.where(counts[:, None], slope * w[None, :], 0.0)
        if grad_key is not None:
            to = grad_key + j[:, None].to(tl.int64) * hidden + h[None, :]
            stored = (j < last)[:, None] & inside[None, :]
            total = tl.load(to, mask=stored, other=0.0) + share
            # Several threads may load the same gradient.
            tl.debug_barrier()
            tl.store(to, total, mask=stored)
        of_key = at_entry(location.features, o, m) + f[None, :] * location.features.row
        x = tl.load(  # [BLOCK, FILTERS]
            of_key + j[:, None].to(tl.int64) * location.features.column,
            mask=counts[:, None] & (f < filters)[None, :], other=0.0,
        ).to(ACC)  # fmt: skip
        sum_weights = tl.dot(
            tl.trans(x), share, sum_weights, input_precision=PRECISION, out_dtype=ACC
        )
        of_location = tl.dot(share, tl.trans(weights), input_precision=PRECISION, out_dtype=ACC)
        tl.store(
            grad_location + f[None, :] * keys + j[:, None],
            tl.where(counts[:, None], of_location, 0.0),
            mask=(j < last)[:, None] & (f < filters)[None, :],
        )
    sum_q = tl.where(sum_q == 0.0, 0.0, sum_q * w)
    tl.store(grad_query + (split * entries + n) * hidden + h, sum_q, mask=inside)
    tl.store(grad_weight + (split * entries + n) * hidden + h, sum_w, mask=inside)
    tl.store(grad_location_weight + f[:, None] * hidden + h[None, :], sum_weights, mask=both)


def prepare_keys(key: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns no numbers: an exponential per pair costs a GPU less than loading twice as much."""
    return key.new_empty(0)


def _problem(*arguments: Any) -> Problem:
    query, key, value, weight, _, location, location_weight, attn_mask, lengths, *rest = arguments
    if query.shape[-2] != 1:
        raise RuntimeError("query must be (..., 1, H): a step has one query.")
    masking = attn_mask, lengths, None, None, None, -1, -1
    call = Call(query, key, value, weight, *masking, *rest)
    return Problem(call, location, location_weight)


def step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = _problem(*arguments)
    return decode_forward(p, True) if p.entries and p.keys else empty_rows(p, True)


def step_backward(
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    upstream, p = Upstream(*arguments[:3]), _problem(*arguments[3:15])
    weights, lse, grad_key = arguments[15:]
    p.check_outputs(**upstream.named(), weights=weights, lse=lse)
    batch = p.batch.shape
    if grad_key is not None and grad_key.shape[-2:] != (p.keys, p.hidden):
        raise RuntimeError(
            f"grad_key has shape {tuple(grad_key.shape)}; it must be (..., {p.keys}, {p.hidden})."
        )
    some = p.entries > 0 and p.keys > 0

    def result(wanted: bool, *shape: int) -> Tensor:
        make = torch.empty if some else torch.zeros
        return make(shape if wanted else (0,), dtype=p.accumulator, device=p.device)

    located = p.location is not None
    gradient = result(True, *batch, 1, p.keys)
    kept = result(p.seed is not None, *batch, 1, p.keys)
    results = (
        result(True, *batch, 1, p.hidden), result(located, *batch, p.filters, p.keys),
        result(located, *batch, p.filters, p.hidden), result(located, *batch, p.hidden),
    )  # fmt: skip
    if some:
        rows = decode_rows(p, gradient, upstream, weights.contiguous(), kept)
        if located:
            results = _location_gradients(p, rows, upstream, gradient, grad_key)
        else:
            needs = Needs(True, False, False, False, False)
            query = decode_gradients(p, rows, needs, upstream, gradient)[0]
            results = (query, *results[1:])
    return results[0].to(p.dtype), gradient, kept, *results[1:]


def _location_gradients(
    p: Problem, rows: Rows, upstream: Upstream, gradient: Tensor, grad_key: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, location, location weight and weight. Stores G in
    ``gradient``."""
    batch, n = p.batch.shape, p.entries
    own = grad_key
    if grad_key is not None and (grad_key.shape[:-2] != batch or not grad_key.is_contiguous()):
        own = gradient.new_zeros(*batch, p.keys, p.hidden)  # entries may share keys
    splits, keys_per_split = key_splits(p)
    tile = tiles.location_tile(p.hidden, p.filters)
    tile_count = max(1, -(-p.hidden // tile["FEATURES"]))
    of_query = gradient.new_empty(splits, *batch, p.hidden)
    of_weight = torch.empty_like(of_query)
    of_location = gradient.new_empty(tile_count, *batch, p.filters, p.keys)
    of_location_weight = gradient.new_empty(splits, *batch, p.filters, p.hidden)
    query = p.query_strides
    launch(
        location_kernel, n * splits * tile_count, gradient,
        p.query, query[0], query[1], query[3], p.key, *p.key_strides, p.weight,
        *p.weight_strides, *p.location_arguments(), *upstream_arguments(p, upstream.lse, 1),
        *rows, gradient, of_query, own, of_location, of_location_weight, of_weight,
        p.batch.inner, n, p.keys, p.hidden, p.scale_bits, splits, keys_per_split,
        **tile, SPLITS=power_of_two(splits), PRECISION=precision(p), TARGET=target(),
        **registers(255),
    )  # fmt: skip
    if grad_key is not None and own is not None and own is not grad_key:
        grad_key += own.sum_to_size(grad_key.shape)
    return (
        over_parts(of_query).unsqueeze(-2), over_parts(of_location),
        over_parts(of_location_weight), over_parts(of_weight),
    )  # fmt: skip
