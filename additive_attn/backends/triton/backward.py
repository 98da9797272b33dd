"""The operator ``additive_attn::backward`` on a GPU.

With P = exp(S - lse), D the dropout factors, and the upstream gradients of out, weights and lse,

    dP = D o (dO V^T) + dWeights    delta_i = sum_j P_ij dP_ij      G = P o (dP - delta + dlse)
    dV = (P o D)^T dO               dMask = G                       dS = scale G
    dq_ih = w_h sum_j dS_ij (1 - t^2)               dk_jh = w_h sum_i dS_ij (1 - t^2)
    dw_h = sum_ij dS_ij t_ijh

With Q = e^{2q}, K = e^{2k} and s = 1 / (1 + Q K): t = 1 - 2 s and 1 - t^2 = 4 (s - s^2), which
costs six instructions per tanh for dq with dw and five for dk, two features sharing a reciprocal.
The same s - s^2 comes from 1 / (1 + 1/(Q K)), so that either pass streams what ``prepare.py`` has
stored, K or 1/Q, and keeps the other in registers. Loops run over the reduced index, j for dq and
i for dk: no sum crosses threads until its end, nothing is atomic, and results repeat bit for bit.

G of a bounded number of rows is kept at a time.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from additive_attn.backends.triton import decode_backward, tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.feature_gradients import key_kernel, query_kernel
from additive_attn.backends.triton.launch import launch
from additive_attn.backends.triton.row_gradient import row_gradient_kernel
from additive_attn.spec.call import backward_arguments


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (grad_out, grad_weights, grad_lse), call, lse, needs = backward_arguments(arguments)
    query, key, value, weight = call.inputs
    attn_mask, scale = call.masking.attn_mask, call.options.scale
    need_query, need_key, need_value, need_weight, need_mask = needs
    p = Problem(call)
    need_mask = need_mask and attn_mask is not None

    def zeros(needed: bool, *shape: int) -> Tensor:
        return torch.zeros(shape if needed else (0,), dtype=p.accumulator, device=p.device)

    grad_mask = zeros(need_mask, *(() if attn_mask is None else attn_mask.shape))
    lse = lse.contiguous()
    some = p.entries > 0 and p.rows > 0 and p.keys > 0
    if some and p.rows == 1:
        gradients, gradient = decode_backward.backward(
            p, lse, grad_out, grad_weights, grad_lse,
            need_query, need_key, need_value, need_weight,
        )  # fmt: skip
        if need_mask:
            _add_mask(p, gradient, 0, 0, 0, grad_mask)
        return (*gradients, grad_mask.to(p.dtype))
    grad_query = zeros(need_query or need_weight, p.entries, p.rows, p.hidden)
    grad_key = zeros(need_key, p.entries, p.keys, p.hidden)
    grad_value = zeros(need_value, p.entries, p.keys, p.values)
    grad_weight = zeros(need_weight, p.entries, p.hidden)
    if some:
        upstream = None if grad_out is None else _entries(grad_out, p, 2)
        values = _entries(value, p, 2)
        for chunk in p.chunks(tiles.gradient_block(p.rows)):
            _chunk(
                p, chunk, lse, values, upstream, grad_weights, grad_lse,
                grad_query, grad_key, grad_value, grad_weight, grad_mask,
                need_query, need_key, need_value, need_weight, need_mask,
            )  # fmt: skip
    # dS = scale G, and the weight, which no pair needed.
    factor = _entries(weight, p, 1)[:, None] * (4 * scale)
    batch = p.batch.shape
    if need_query:
        grad_query = (grad_query * factor).to(p.dtype).view(*batch, *query.shape[-2:])
    if need_key:
        grad_key = (grad_key * factor).to(p.dtype).view(*batch, *key.shape[-2:])
    if need_value:
        grad_value = grad_value.to(p.dtype).view(*batch, *value.shape[-2:])
    if need_weight:
        grad_weight = (grad_weight * scale).view(*batch, p.hidden)
    return (
        grad_query if need_query else query.new_empty(0),
        grad_key if need_key else query.new_empty(0),
        grad_value if need_value else query.new_empty(0),
        grad_weight if need_weight else lse.new_empty(0),
        grad_mask.to(p.dtype),
    )


def _entries(x: Tensor, p: Problem, rank: int) -> Tensor:
    """(entries, ...) in the computing dtype, and contiguous: how matmul rounds depends on that."""
    x = p.batch.view(x, rank)
    return x.to(p.accumulator).reshape(p.entries, *x.shape[2:]).contiguous()


def _chunk(
    p: Problem, chunk: tuple[int, int, int, int], lse: Tensor, values: Tensor,
    grad_out: Tensor | None, grad_weights: Tensor | None, grad_lse: Tensor | None,
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad_weight: Tensor,
    grad_mask: Tensor,
    need_query: bool, need_key: bool, need_value: bool, need_weight: bool, need_mask: bool,
) -> None:  # fmt: skip
    """The share of some rows of some entries in all gradients."""
    entry, entries, row, rows = chunk
    key, end = p.key_range(row, row + rows)
    count = end - key
    if count <= 0:
        return
    scores = p.scores(entry, entries, row, rows, key, count)
    upstream = None if grad_out is None else grad_out[entry : entry + entries, row : row + rows]
    if upstream is None:
        products = scores.new_zeros(entries, rows, count)
    else:
        products = upstream @ values[entry : entry + entries, key:end].mT
    row_block, key_block = tiles.gradient_block(rows), tiles.gradient_block(count)
    row_padded = -(-rows // row_block) * row_block
    key_padded = -(-count // key_block) * key_block
    gradient = torch.empty(entries, row_padded, key_padded, dtype=p.accumulator, device=p.device)
    launch(
        row_gradient_kernel, entries * row_padded, scores,
        scores, products, gradient, lse, *_strided(grad_weights, 2, p, lse),
        *_strided(grad_lse, 1, p, lse),
        *p.dropout_arguments(), p.batch.inner, entry, p.rows, row, rows, row_padded,
        key, count, key_padded, scores.shape[-1],
        **tiles.row_block(count), GRAD_WEIGHTS=grad_weights is not None,
        GRAD_LSE=grad_lse is not None, DROPOUT=p.seed is not None,
    )  # fmt: skip
    if need_value and upstream is not None:
        grad_value[entry : entry + entries, key:end] += scores[..., :count].mT @ upstream
    if need_mask:
        _add_mask(p, gradient[:, :rows, :count], entry, row, key, grad_mask)
    if p.hidden == 0:
        return

    prepared: tuple[object, ...]
    if p.wide:
        prepared = (p.weight.weight, p.weight.weight, p.weight.weight, 0, 0, 0, 0)
        query_exp = p.weight.weight
    else:
        of_query, of_key = p.prepared
        query_exp = of_query.exponential
        prepared = (
            of_key.exponential, of_query.size, of_key.size,
            *of_query.size.stride()[:2], *of_key.size.stride()[:2],
        )  # fmt: skip
    inputs = (p.query, p.key, *p.query_strides, *p.key_strides)
    sizes = (
        p.batch.inner, entries, entry, p.rows, row, rows, row_padded, p.keys, key, count,
        key_padded, p.hidden, p.left, p.right,
    )  # fmt: skip
    options = {"padded": p.weight.padded, "WIDE": p.wide, "TARGET": p.form()["TARGET"]}

    def parts(
        length: int, reduced: int, block: int, total: Tensor
    ) -> tuple[int, int, int, Tensor, Tensor, dict[str, int]]:
        tile = tiles.gradient_tile(length)
        tile_count = -(-length // (tile["RX"] * tile["TX"]))
        programs = entries * tile_count * -(-p.weight.padded // (2 * tile["RH"] * tile["TH"]))
        splits, per_split = tiles.splits(programs, reduced, block, p.processors)
        of_rows = total[None] if splits == 1 else total.new_empty(splits, *total.shape)
        of_weight = total.new_empty(splits, entries, tile_count, p.hidden)
        return programs, splits, per_split, of_rows, of_weight, tile

    if need_query or need_weight:
        total = grad_query[entry : entry + entries, row : row + rows]
        programs, splits, per_split, of_rows, of_weight, tile = parts(
            rows, count, key_block, total
        )
        launch(
            query_kernel, programs * splits, total,
            *inputs, *prepared, gradient, of_rows, of_weight, *sizes, splits, per_split,
            **tile, BLOCK=key_block, **options,
        )  # fmt: skip
        if splits > 1:
            torch.sum(of_rows, 0, out=total)
        if need_weight:
            grad_weight[entry : entry + entries] += of_weight.sum((0, 2))
    if need_key or (need_weight and not p.wide):
        total = gradient.new_empty(entries, count, p.hidden)
        programs, splits, per_split, of_rows, of_weight, tile = parts(
            count, rows, row_block, total
        )
        launch(
            key_kernel, programs * splits, total,
            *inputs, query_exp, *prepared[1:], gradient, of_rows, of_weight, *sizes, splits,
            per_split, **tile, BLOCK=row_block, **options,
        )  # fmt: skip
        if need_key:
            grad_key[entry : entry + entries, key:end] += of_rows.sum(0)
        if need_weight and not p.wide:
            grad_weight[entry : entry + entries] += of_weight.sum((0, 2))


def _strided(x: Tensor | None, rank: int, p: Problem, stand_in: Tensor) -> tuple[object, ...]:
    """A tensor and its strides as kernels take them; one that is missing is not read."""
    if x is None:
        return (stand_in, *(0,) * (rank + 2))
    view = p.batch.view(x, rank)
    return (view, *view.stride())


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
    # Entries of a chunk are consecutive, not always whole batch dims.
    target = target.expand(*p.batch.shape, *tail)
    indices = itertools.product(*map(range, p.batch.shape))
    for index, share in zip(itertools.islice(indices, entry, None), gradient, strict=False):
        target[index] += share
