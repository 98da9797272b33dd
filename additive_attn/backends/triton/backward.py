"""The operator ``additive_attn::backward`` on a GPU, in the notation of math.md, eq. 9 to 12.

G of a bounded number of rows is kept at a time: scores again, G of each row, and from G the
gradients of query, key and weight; those of the values and the mask are sums of torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from additive_attn.backends.triton import decode_backward, tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.feature_gradients import key_kernel, query_kernel
from additive_attn.backends.triton.launch import launch, target
from additive_attn.backends.triton.plan import Piece, splits
from additive_attn.backends.triton.row_gradient import row_gradient_kernel
from additive_attn.backends.triton.score_tiles import tile_scores
from additive_attn.spec.call import backward_arguments


@dataclass(frozen=True)
class Gradients:
    """What is added up over the pieces, of all entries; None where it is not wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    weight: Tensor | None
    mask: Tensor | None


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (grad_out, grad_weights, grad_lse), call, lse, needs = backward_arguments(arguments)
    query, value = call.inputs.query, call.inputs.value
    attn_mask = call.masking.attn_mask
    need_query, need_key, need_value, need_weight, need_mask = needs
    p = Problem(call)
    need_mask = need_mask and attn_mask is not None
    mask_dtype = p.dtype if attn_mask is None else attn_mask.dtype
    lse = lse.contiguous()

    def zeros(needed: bool, *shape: int) -> Tensor | None:
        if not needed:
            return None
        return torch.zeros(shape, dtype=p.accumulator, device=p.device)

    mask = zeros(need_mask, *(() if attn_mask is None else attn_mask.shape))
    some = p.entries > 0 and p.rows > 0 and p.keys > 0
    if some and p.rows == 1:
        gradients, gradient = decode_backward.decode_backward(
            p, lse, grad_out, grad_weights, grad_lse,
            need_query, need_key, need_value, need_weight, need_mask,
        )  # fmt: skip
        if mask is not None and gradient is not None:
            _add_mask(p, gradient, 0, 0, 0, mask)
        return (*gradients, query.new_empty(0) if mask is None else mask.to(mask_dtype))
    sums = Gradients(
        query=zeros(need_query, p.entries, p.rows, p.hidden),
        key=zeros(need_key, p.entries, p.keys, p.hidden),
        value=zeros(need_value, p.entries, p.keys, p.values),
        weight=zeros(need_weight, p.entries, p.hidden),
        mask=mask,
    )
    if some:
        upstream = None if grad_out is None else _entries(grad_out, p, 2)
        values = _entries(value, p, 2)
        for piece in p.pieces(tiles.gradient_block(p.rows)):
            _add_piece(p, piece, lse, values, upstream, grad_weights, grad_lse, sums)

    def result(x: Tensor | None, like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(0) if x is None else x.to(like.dtype).view(shape)

    batch = p.batch.shape
    return (
        result(sums.query, query, *batch, p.rows, p.hidden),
        result(sums.key, query, *batch, p.keys, p.hidden),
        result(sums.value, query, *batch, p.keys, p.values),
        result(sums.weight, lse, *batch, p.hidden),
        query.new_empty(0) if mask is None else mask.to(mask_dtype),
    )


def _entries(x: Tensor, p: Problem, rank: int) -> Tensor:
    """(entries, ...) in the computing dtype, and contiguous: how matmul rounds depends on that."""
    x = p.batch.view(x, rank)
    return x.to(p.accumulator).reshape(p.entries, *x.shape[2:]).contiguous()


def _add_piece(
    p: Problem, piece: Piece, lse: Tensor, values: Tensor, grad_out: Tensor | None,
    grad_weights: Tensor | None, grad_lse: Tensor | None, sums: Gradients,
) -> None:  # fmt: skip
    """Adds the share of some rows of some entries in all gradients."""
    entry, entries, row, rows = piece
    key, end = p.key_range(row, row + rows)
    count = end - key
    if count <= 0:
        return
    of_entries, of_rows = slice(entry, entry + entries), slice(row, row + rows)
    of_keys = slice(key, end)
    scores = tile_scores(p, entry, entries, row, rows, key, count)
    upstream = None if grad_out is None else grad_out[of_entries, of_rows]
    if upstream is None:
        products = scores.new_zeros(entries, rows, count)
    else:
        products = upstream @ values[of_entries, of_keys].mT
    row_block, key_block = tiles.gradient_block(rows), tiles.gradient_block(count)
    row_padded = -(-rows // row_block) * row_block
    key_padded = -(-count // key_block) * key_block
    gradient = scores.new_empty(entries, row_padded, key_padded)
    launch(
        row_gradient_kernel, entries * row_padded, scores,
        scores, products, gradient, lse, *p.upstream_arguments(grad_weights, 2),
        *p.upstream_arguments(grad_lse, 1), *p.dropout_arguments(),
        p.batch.inner, entry, p.rows, row, rows, row_padded, key, count, key_padded,
        scores.shape[-1], **tiles.row_block(count),
    )  # fmt: skip
    if sums.value is not None and upstream is not None:
        sums.value[of_entries, of_keys] += scores[..., :count].mT @ upstream
    if sums.mask is not None:
        _add_mask(p, gradient[:, :rows, :count], entry, row, key, sums.mask)
    if p.hidden == 0:
        return
    inputs = (
        *p.inputs(), *p.prepared_rows_arguments(), p.weight, *p.weight_strides, gradient,
    )  # fmt: skip
    sizes = (
        p.batch.inner, entries, entry, p.rows, row, rows, row_padded, p.keys, key, count,
        key_padded, p.hidden, p.left, p.right, p.scale_bits,
    )  # fmt: skip

    def features(kernel: object, length: int, reduced: int, block: int, total: Tensor) -> Tensor:
        """Runs a pass over the features: its sums to ``total``; returns its share of dw."""
        tile = tiles.gradient_tile(length)
        tile_count = -(-length // (tile["RX"] * tile["TX"]))
        programs = entries * tile_count * -(-p.padded // (2 * tile["RH"] * tile["TH"]))
        ranges, per_range = splits(programs, reduced, block, p.processors)
        parts = total[None] if ranges == 1 else total.new_empty(ranges, *total.shape)
        of_weight = total.new_empty(ranges, entries, tile_count, p.hidden)
        launch(
            kernel, programs * ranges, total,
            *inputs, parts, of_weight, *sizes, ranges, per_range,
            **tile, BLOCK=block, padded=p.padded, TARGET=target(),
        )  # fmt: skip
        if ranges > 1:
            torch.sum(parts, 0, out=total)
        return of_weight.sum((0, 2))

    if sums.query is not None or sums.weight is not None:
        if sums.query is None:
            total = gradient.new_empty(entries, rows, p.hidden)
        else:
            total = sums.query[of_entries, of_rows]
        of_weight = features(query_kernel, rows, count, key_block, total)
        if sums.weight is not None:
            sums.weight[of_entries] += of_weight
    if sums.key is not None or (sums.weight is not None and not p.wide):
        total = gradient.new_empty(entries, count, p.hidden)
        of_weight = features(key_kernel, count, rows, row_block, total)
        if sums.key is not None:
            sums.key[of_entries, of_keys] += total
        if sums.weight is not None and not p.wide:
            sums.weight[of_entries] += of_weight


def _add_mask(
    p: Problem, gradient: Tensor, entry: int, row: int, key: int, grad_mask: Tensor
) -> None:
    """Adds G to the mask's gradient, summed over what the mask broadcasts."""
    mask = torch.atleast_2d(grad_mask)
    rows, keys = gradient.shape[1:]
    target = mask[..., row : row + rows, :] if mask.shape[-2] > 1 else mask
    target = target[..., key : key + keys] if mask.shape[-1] > 1 else target
    leading = mask.shape[:-2]
    tail = tuple(target.shape[-2:])
    gradient = gradient.sum_to_size(gradient.shape[0], *tail)
    if all(size == 1 for size in leading):
        target += gradient.sum(0).view(target.shape)
        return
    # Entries of a piece are consecutive, not always whole batch dims.
    target = target.expand(*p.batch.shape, *tail)
    indices = itertools.product(*map(range, p.batch.shape))
    for index, share in zip(itertools.islice(indices, entry, None), gradient, strict=False):
        target[index] += share
