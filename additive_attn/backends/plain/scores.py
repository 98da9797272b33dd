"""Scores alone, and the gradients of query, key and weight from those of scores, in plain PyTorch,
a block of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from additive_attn.backends.plain.blocks import (
    Gradients,
    add_feature_gradients,
    unnarrowed,
)
from additive_attn.backends.plain.plan import Block, blocks_of
from additive_attn.backends.plain.whole import is_finite, scores_of, weight_gradient
from additive_attn.spec.call import Call, call_of_scores, lse_dtype
from additive_attn.spec.formula import add_bias, energies, mask_scores, widened


@unnarrowed
def scores(*arguments: Any) -> Tensor:
    """Returns the scores of equation 1: -inf where a pair is masked."""
    call = call_of_scores(*arguments)
    query, key, batch = call.query, call.key, call.batch()
    result = query.new_full((*batch, query.shape[-2], key.shape[-2]), -torch.inf)
    for block in blocks_of(call, batch):
        query, key, _, weight = (widened(tensor) for tensor in block.inputs(call.inputs))
        attn_mask, attended = block.masks(call.masking, query.device)
        score = add_bias(call.scale * scores_of(energies(query, key), weight), attn_mask)
        block.write("of_pairs", result, mask_scores(score, attended), add=False)
    return result


@unnarrowed
def scores_backward(grad_scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of equations 10 and 11. The gradient of a mask is that of the
    scores."""
    call, needs = call_of_scores(*arguments[:11]), arguments[11:]
    (query, key, _, weight), attn_mask = call.inputs, call.attn_mask
    if attn_mask is not None and not (needs[3] and attn_mask.is_floating_point()):
        attn_mask = None  # needs or has no gradient
    batch, dtype = grad_scores.shape[:-2], lse_dtype(query.dtype)

    def zeros(need: bool, *shape: int) -> Tensor | None:
        return query.new_zeros(shape, dtype=dtype) if need else None

    gradients = Gradients(
        query=zeros(needs[0], *batch, *query.shape[-2:]),
        key=zeros(needs[1], *batch, *key.shape[-2:]),
        value=None,
        weight=zeros(needs[2], *batch, weight.shape[-1]),
        mask=None if attn_mask is None else zeros(True, *attn_mask.shape),
    )
    for block in blocks_of(call, batch):
        _backward_block(block, call, batch, grad_scores, gradients)
    dtypes = [
        query.dtype,
        query.dtype,
        dtype,
        query.dtype if attn_mask is None else attn_mask.dtype,
    ]
    grad_query, grad_key, grad_weight, grad_mask = (
        query.new_empty(0, dtype=target) if gradient is None else gradient.to(target)
        for gradient, target in zip(gradients[:2] + gradients[3:], dtypes, strict=True)
    )
    return grad_query, grad_key, grad_weight, grad_mask


def _backward_block(
    block: Block, call: Call, batch: torch.Size, grad_scores: Tensor, gradients: Gradients
) -> None:
    query, key, _, weight = (widened(tensor) for tensor in block.inputs(call.inputs))
    attended = block.masks(call.masking, query.device)[1]
    query = query.expand(*block.of_batch(batch), *query.shape[-2:])
    grad_score = block.of_pairs(grad_scores).to(query.dtype)
    if attended is not None:
        grad_score = torch.where(attended, grad_score, 0.0)
    if gradients.mask is not None:
        block.write("of_mask", gradients.mask, grad_score)
    energy = energies(query, key)
    shield = None if attended is None or is_finite(scores_of(energy, weight).sum()) else attended
    if shield is not None:
        energy = energies(query, key, shield)
    grad_score = grad_score * call.scale
    if gradients.weight is not None:
        block.of_entries(gradients.weight, 1).add_(weight_gradient(grad_score, energy))
    if gradients.query is not None or gradients.key is not None:
        add_feature_gradients(block, gradients, energy, grad_score, weight, shield)
