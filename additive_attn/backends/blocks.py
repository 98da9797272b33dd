"""The operators in plain PyTorch, a block of query rows at a time, so that memory stays bounded.

Runs on any device. Each block is the plain formula of ``reference.py`` forward, and its derivative
written out backward; keys that no row of the block may attend to are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from additive_attn.spec.call import Call, backward_arguments, lse_dtype
from additive_attn.spec.dropout import keep_mask
from additive_attn.spec.formula import plain_additive_attention
from additive_attn.spec.masks import interval_bounds, interval_mask, mask_block

# Elements of the largest temporary of a block; one row is the least that a block can hold.
_BLOCK_ELEMENTS = 2**20


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, need_weights = Call.of(arguments), arguments[11]
    query, key, value, weight = call.inputs
    attn_mask, lengths, left, right = call.masking
    seed, dropout_p, scale = call.options
    batch = call.batch()
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    out = query.new_zeros(*batch, num_queries, value.shape[-1])
    weights = query.new_zeros((*batch, num_queries, num_keys) if need_weights else (0,))
    lse = query.new_full((*batch, num_queries), -torch.inf, dtype=lse_dtype(query.dtype))
    if out.numel() == 0 and lse.numel() == 0:
        return out, weights, lse

    for rows, keys in _blocks(query, key, value, batch, lengths, left, right):
        block = slice(*rows)
        out_block, weights_block, lse[..., block] = plain_additive_attention(
            query[..., block, :],
            key[..., slice(*keys), :],
            value[..., slice(*keys), :],
            weight,
            None if attn_mask is None else mask_block(attn_mask, rows, keys),
            allowed=interval_mask(lengths, left, right, rows, keys, query.device),
            keep=None if seed is None else keep_mask(seed, batch, rows, keys, dropout_p),
            dropout_p=dropout_p,
            scale=scale,
        )
        out[..., block, :] = out_block
        if need_weights:
            weights[..., block, slice(*keys)] = weights_block
    return out, weights, lse


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivative, with P recomputed from the saved log-sum-exp.

    ``dP = D o (dO V^T) + dWeights``; ``dMask = P o (dP - sum_j P dP + dlse)``;
    ``dS = scale * dMask``; ``dx_ijh = dS_ij w_h (1 - tanh^2)``, summed over keys for the query and
    over rows for the key; ``dw_h = sum_ij dS_ij tanh_ijh``; ``dV = (P o D)^T dO``. D is 0 or
    1/(1 - p).
    """
    (grad_out, grad_weights, grad_lse), call, lse, needs = backward_arguments(arguments)
    query, key, value, weight = call.inputs
    attn_mask, lengths, left, right = call.masking
    seed, dropout_p, scale = call.options
    need_query, need_key, need_value, need_weight, need_mask = needs
    batch = call.batch()
    dtype = lse.dtype
    # An infinite score makes its row NaN, as in softmax.
    lse = torch.where(lse == torch.inf, torch.nan, lse)

    def zeros(needed: bool, *shape: int) -> Tensor:
        return query.new_zeros(shape if needed else (0,), dtype=dtype)

    grad_query = zeros(need_query, *batch, *query.shape[-2:])
    grad_key = zeros(need_key, *batch, *key.shape[-2:])
    grad_value = zeros(need_value, *batch, *value.shape[-2:])
    grad_weight = zeros(need_weight, *batch, weight.shape[-1])
    has_mask_grad = need_mask and attn_mask is not None
    grad_mask = zeros(has_mask_grad, *(attn_mask.shape if attn_mask is not None else ()))
    need_score = need_query or need_key or need_weight or has_mask_grad

    wide_weight = weight.to(dtype)
    for rows, keys in _blocks(query, key, value, batch, lengths, left, right):
        block, span = slice(*rows), slice(*keys)
        allowed = interval_mask(lengths, left, right, rows, keys, query.device)
        mask = None if attn_mask is None else mask_block(attn_mask, rows, keys)
        if mask is not None:
            attended = torch.atleast_2d(mask if mask.dtype == torch.bool else mask != -torch.inf)
            allowed = attended if allowed is None else allowed & attended

        pair = query[..., block, None, :].to(dtype) + key[..., None, span, :].to(dtype)
        if allowed is not None:
            pair = torch.where(allowed[..., None], pair, 0.0)
        tanh = pair.tanh_()
        score = scale * (tanh @ wide_weight[..., None, :, None]).squeeze(-1)
        if mask is not None and mask.dtype != torch.bool:
            score = score + mask
        probability = torch.exp(score - lse[..., block, None])
        if allowed is not None:
            probability = torch.where(allowed, probability, 0.0)
        # They sum to 1: dividing takes out the rounding of lse, which all keys of a row share.
        total = probability.sum(-1, keepdim=True)
        probability = torch.where(total > 0, probability / total, probability)

        factor: Tensor | float = 1.0
        if seed is not None:
            rescale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
            factor = keep_mask(seed, batch, rows, keys, dropout_p).to(dtype) * rescale
        upstream = None if grad_out is None else grad_out[..., block, :].to(dtype)
        if upstream is not None and need_value:
            grad_value[..., span, :] += _shielded_matmul(
                (probability * factor).mT, upstream, None if allowed is None else allowed.mT
            )
        if not need_score:
            continue

        grad_probability = torch.zeros_like(probability)
        if upstream is not None:
            grad_probability = (upstream @ value[..., span, :].to(dtype).mT) * factor
        if grad_weights is not None:
            grad_probability = grad_probability + grad_weights[..., block, span]
        if allowed is not None:
            grad_probability = torch.where(allowed, grad_probability, 0.0)
        delta = (probability * grad_probability).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[..., block, None]
        grad_score = probability * (grad_probability - delta)
        if allowed is not None:
            grad_score = torch.where(allowed, grad_score, 0.0)

        if has_mask_grad:
            target = mask_block(grad_mask, rows, keys)
            target += grad_score.sum_to_size(target.shape)
        grad_score = scale * grad_score
        if need_weight:
            grad_weight += (grad_score[..., None, :] @ tanh).squeeze(-2).sum(-2)
        if need_query or need_key:
            # In place: tanh is the largest temporary, and this is its last use.
            grad_pair = tanh.square_().neg_().add_(1.0).mul_(wide_weight[..., None, None, :])
            grad_pair = grad_pair * grad_score[..., None]
            if allowed is not None:
                grad_pair = torch.where(allowed[..., None], grad_pair, 0.0)
            if need_query:
                grad_query[..., block, :] += grad_pair.sum(-2)
            if need_key:
                grad_key[..., span, :] += grad_pair.sum(-3)

    return (
        grad_query.to(query.dtype),
        grad_key.to(query.dtype),
        grad_value.to(query.dtype),
        grad_weight,
        grad_mask.to(query.dtype),
    )


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: torch.Size,
    lengths: Tensor | None,
    left: int,
    right: int,
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    longest = num_keys if lengths is None or lengths.numel() == 0 else int(lengths.max())
    longest = max(0, min(longest, num_keys))
    span = longest if left < 0 or right < 0 else min(longest, left + right + 1)
    per_row = batch.numel() * max(span, 1) * max(query.shape[-1], value.shape[-1], 1)
    step = max(1, _BLOCK_ELEMENTS // max(per_row, 1))
    for first in range(0, num_queries, step):
        rows = first, min(first + step, num_queries)
        keys = interval_bounds(left, right, rows, num_keys, longest)
        if keys[0] < keys[1]:
            yield rows, keys


def _shielded_matmul(weights: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """``weights @ values`` in which an excluded pair contributes 0 even where the value is NaN or
    Inf."""
    if allowed is None or bool(values.isfinite().all()):
        return weights @ values
    return (
        weights[..., None] * torch.where(allowed[..., None], values[..., None, :, :], 0.0)
    ).sum(-2)
