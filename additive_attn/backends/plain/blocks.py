"""The operators in plain PyTorch, on any device, a block of rows at a time, so that memory stays
bounded.

Forward evaluates the formula for each block, backward its derivative (math.md, eq. 9 to 12), for
which a block computes its energies again. Keys that no row of a block may attend to are
skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from additive_attn.backends.plain.plan import Block, blocks_of
from additive_attn.backends.plain.whole import (
    formula,
    is_finite,
    product,
    scores_of,
    shielded,
    weight_gradient,
)
from additive_attn.spec.call import (
    Call,
    Upstream,
    backward_arguments,
    lse_dtype,
)
from additive_attn.spec.formula import (
    add_bias,
    energies,
    softmax,
    weighted_sum,
    widened,
)


def unnarrowed(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Disables autocast, under which compiled graphs and backward may run operators."""

    def run(*arguments: Any) -> Any:
        with torch._C._DisableAutocast():
            return operator(*arguments)

    return run


@unnarrowed
def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, need_weights = Call(*arguments[:14]), arguments[14]
    query, key, value, _ = call.inputs
    batch, num_queries, num_keys = call.batch(), query.shape[-2], key.shape[-2]
    out = query.new_zeros(*batch, num_queries, value.shape[-1])
    weights = query.new_zeros((*batch, num_queries, num_keys) if need_weights else (0,))
    lse = query.new_full((*batch, num_queries), -torch.inf, dtype=lse_dtype(query.dtype))
    for block in blocks_of(call, batch):
        out_block, weights_block, lse_block = formula(
            block.inputs(call.inputs),
            *block.masks(call.masking, query.device),
            block.factors(call.options, batch, lse.dtype),
            call.options.scale,
            need_lse=True,
        )
        block.of_rows(out).copy_(out_block)
        block.of_rows(lse[..., None]).squeeze(-1).copy_(lse_block)
        if need_weights:
            block.write("of_pairs", weights, weights_block, add=False)
    return out, weights, lse


class Gradients(NamedTuple):
    """The gradients of the whole batch, in the computing dtype; None where not needed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    weight: Tensor | None
    mask: Tensor | None


@unnarrowed
def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    upstream, call, lse, needs = backward_arguments(arguments)
    (query, key, value, weight), attn_mask = call.inputs, call.masking.attn_mask
    if attn_mask is not None and not (needs.mask and attn_mask.is_floating_point()):
        attn_mask = None  # needs or has no gradient
    batch, dtype = lse.shape[:-1], lse.dtype

    def zeros(need: bool, *shape: int) -> Tensor | None:
        return query.new_zeros(shape, dtype=dtype) if need else None

    gradients = Gradients(
        query=zeros(needs.query, *batch, *query.shape[-2:]),
        key=zeros(needs.key, *batch, *key.shape[-2:]),
        value=zeros(needs.value, *batch, *value.shape[-2:]),
        weight=zeros(needs.weight, *batch, weight.shape[-1]),
        mask=None if attn_mask is None else zeros(True, *attn_mask.shape),
    )
    for block in blocks_of(call, batch):
        _backward_block(block, call, batch, upstream, gradients)
    dtypes = [query.dtype] * 3 + [dtype, query.dtype if attn_mask is None else attn_mask.dtype]
    grad_query, grad_key, grad_value, grad_weight, grad_mask = (
        query.new_empty(0, dtype=target) if gradient is None else gradient.to(target)
        for gradient, target in zip(gradients, dtypes, strict=True)
    )
    return grad_query, grad_key, grad_value, grad_weight, grad_mask


def _backward_block(
    block: Block, call: Call, batch: torch.Size, upstream: Upstream, gradients: Gradients
) -> None:
    """Adds the share of the pairs of a block to the gradients."""
    query, key, value, weight = (widened(tensor) for tensor in block.inputs(call.inputs))
    attn_mask, attended = block.masks(call.masking, query.device)
    factors = block.factors(call.options, batch, query.dtype)
    query, scale = query.expand(*block.of_batch(batch), *query.shape[-2:]), call.options.scale

    energy = energies(query, key)
    score = scores_of(energy, weight)
    shield = None if attended is None or is_finite(score.sum()) else attended
    if shield is not None:
        energy = energies(query, key, shield)
        score = scores_of(energy, weight)
    weights = softmax(add_bias(score * scale, attn_mask), attended)

    grad_out = None if upstream.out is None else widened(block.of_rows(upstream.out))
    if gradients.value is not None and grad_out is not None:
        kept = weights if factors is None else weights * factors
        whole = len(block.spans) == 1
        part = block.of_keys(gradients.value)
        _add_value_gradient(part if whole else part.zero_(), kept, grad_out, attended)
        if not whole:
            block.write("of_keys", gradients.value, part)
    if all(gradient is None for gradient in gradients[:2] + gradients[3:]):
        return
    grad_score = score_gradient(
        weights, None if grad_out is None else (grad_out, value), factors, attended,
        None if upstream.weights is None else block.of_pairs(upstream.weights),
        None if upstream.lse is None else block.of_rows(upstream.lse.unsqueeze(-1)),
    )  # fmt: skip
    if gradients.mask is not None:
        block.write("of_mask", gradients.mask, grad_score)
    grad_score = grad_score * scale
    if gradients.weight is not None:
        block.of_entries(gradients.weight, 1).add_(weight_gradient(grad_score, energy))
    if gradients.query is not None or gradients.key is not None:
        add_feature_gradients(block, gradients, energy, grad_score, weight, shield)


def score_gradient(
    weights: Tensor,
    out_and_value: tuple[Tensor, Tensor] | None,
    factors: Tensor | None,
    attended: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
) -> Tensor:
    """Returns G of equation 9; ``out_and_value`` is the upstream gradient of out, and the
    values."""
    total = torch.zeros_like(weights)
    if out_and_value is not None:
        total = product(out_and_value[0], out_and_value[1].mT)
        if factors is not None:
            total = total * factors
    if grad_weights is not None:
        total = total + grad_weights
    if attended is not None:
        total = torch.where(attended, total, 0.0)
    delta = (weights * total).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_score = weights * (total - delta)
    return grad_score if attended is None else torch.where(attended, grad_score, 0.0)


def _add_value_gradient(
    target: Tensor, kept: Tensor, grad_out: Tensor, attended: Tensor | None
) -> None:
    """Adds dV of equation 12 to ``target``."""
    if attended is not None and not is_finite(grad_out.sum()):
        target += weighted_sum(kept.mT, grad_out, attended.mT)
    elif kept.shape[-2] == 1:
        target.addcmul_(kept.mT, grad_out)
    else:
        target += kept.mT @ grad_out


def add_feature_gradients(
    block: Block,
    gradients: Gradients,
    energy: Tensor,
    grad_score: Tensor,
    weight: Tensor,
    shield: Tensor | None,
) -> Tensor:
    """Adds the gradients of query and key (equation 10). Overwrites the energies, the largest
    temporary. Returns the gradients of the pairs, ``(..., Lq, Lk, H)``."""
    slope = torch.addcmul(energy.new_ones(()), energy, energy, value=-1, out=energy)
    slope.mul_(weight[..., None, None, :]).mul_(grad_score.unsqueeze(-1))
    if shield is not None:
        slope = shielded(slope, shield)
    if gradients.query is not None:
        torch.sum(slope, -2, out=block.of_rows(gradients.query))
    if gradients.key is not None:
        grad_key = slope.squeeze(-3) if slope.shape[-3] == 1 else slope.sum(-3)
        block.write("of_keys", gradients.key, grad_key)
    return slope
