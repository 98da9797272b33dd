"""A decoder's steps in plain PyTorch: one query, all keys at one time.

Backward returns the gradients of the query and of the scores. Those of the values, and mostly
those of keys and weight, are computed once for all steps (math.md, eq. 16)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from additive_attn.backends.plain.blocks import (
    Gradients,
    add_feature_gradients,
    forward,
    score_gradient,
    unnarrowed,
)
from additive_attn.backends.plain.plan import Block, blocks_of
from additive_attn.backends.plain.whole import is_finite, scores_of, weight_gradient
from additive_attn.spec.call import Call, lse_dtype
from additive_attn.spec.dropout import drawn_factors, keep_mask
from additive_attn.spec.formula import attended_pairs, energies, widened
from additive_attn.spec.masks import interval_mask

# Up to such a width, a library's convolution costs less than a product with the windows.
_NARROW = 63
# Up to so many elements of windows of a location, a product costs less than a convolution.
_FEW_WINDOWS = 2**15
_convolve = torch.ops.aten.thnn_conv2d
_autocasts = torch._C._is_any_autocast_enabled


def prepare_keys(key: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns no numbers: plain PyTorch reads the keys themselves."""
    return key.new_empty(0)


@unnarrowed
def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    prepared: Tensor | None,
    location: Tensor | None,
    location_weight: Tensor | None,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes equations 1 and 2 for one query, with the location term added to the keys."""
    key, value = key.to(query.dtype), value.to(query.dtype)  # a memory may be narrower
    if location is not None:
        assert location_weight is not None
        with_location = with_term(widened(key), widened(location), widened(location_weight))
        key = with_location.to(key.dtype)
    call = Call(
        query, key, value, weight, attn_mask, lengths, seed=seed, dropout_p=dropout_p, scale=scale
    )
    outputs: tuple[Tensor, Tensor, Tensor] = forward(*call, True)
    return outputs


@unnarrowed
def step_backward(
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    prepared: Tensor | None,
    location: Tensor | None,
    location_weight: Tensor | None,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    weights: Tensor,
    lse: Tensor,
    grad_key: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes equations 9 and 10. ``weights`` are those that the step returned. Adds to
    ``grad_key``, here also without a location term: to compute the energies again for all steps
    would cost more. With ``grad_key`` or a location term no later pass computes the gradient of
    the weight, so it is returned too."""
    batch, dtype = weights.shape[:-2], lse_dtype(query.dtype)
    keys = (0, key.shape[-2])
    attended = attended_pairs(
        attn_mask, interval_mask(lengths, None, -1, -1, (0, 1), keys, query.device)
    )
    factors = None
    if seed is not None:
        factors = drawn_factors(seed, batch, (0, 1), keys, dropout_p, dtype)
    weights = weights.to(dtype)
    grad_scores = score_gradient(
        weights,
        None if grad_out is None else (widened(grad_out), widened(value)),
        factors, attended, grad_weights, None if grad_lse is None else grad_lse.unsqueeze(-1),
    )  # fmt: skip
    kept = query.new_empty(0, dtype=dtype) if factors is None else weights * factors

    def zeros(needed: bool, *shape: int) -> Tensor:
        return query.new_zeros(*batch, *shape, dtype=dtype) if needed else query.new_empty(0)

    located = location is not None and location_weight is not None
    gradients = Gradients(
        query=zeros(True, *query.shape[-2:]),
        key=grad_key,
        value=None,
        weight=zeros(True, weight.shape[-1]) if located or grad_key is not None else None,
        mask=None,
    )
    term = _Term(
        location,
        location_weight,
        zeros(located, *(location.shape[-2:] if location is not None else ())),
        zeros(located, *(location_weight.shape[-2:] if location_weight is not None else ())),
    )
    call = Call(query, key, value, weight, attn_mask, lengths)
    for block in blocks_of(call, batch):
        _backward_block(block, call, batch, scale * grad_scores, attended, gradients, term)
    grad_query, grad_weight = gradients.query, gradients.weight
    assert grad_query is not None
    return (
        grad_query.to(query.dtype), grad_scores, kept, term.grad_location,
        term.grad_location_weight, query.new_empty(0) if grad_weight is None else grad_weight,
    )  # fmt: skip


class _Term(NamedTuple):
    """What is added to the keys, and its gradients."""

    location: Tensor | None  # (..., F, Lk)
    location_weight: Tensor | None  # (..., F, H)
    grad_location: Tensor
    grad_location_weight: Tensor


def _backward_block(
    block: Block, call: Call, batch: torch.Size, grad_scores: Tensor, attended: Tensor | None,
    gradients: Gradients, term: _Term,
) -> None:  # fmt: skip
    """Adds the share of the pairs of a block to the gradients."""
    query, key, _, weight = (widened(tensor) for tensor in block.inputs(call.inputs))
    query = query.expand(*block.of_batch(batch), *query.shape[-2:])
    location = location_weight = None
    if term.location is not None and term.location_weight is not None:
        location = widened(block.of_features(term.location))
        location_weight = widened(block.of_entries(term.location_weight, 2))
        key = with_term(key, location, location_weight)
    energy, shield = energies(query, key), None
    if attended is not None and not is_finite(scores_of(energy, weight).sum()):
        shield = block.of_mask(attended)
        energy = energies(query, key, shield)
    grad_score = block.of_pairs(grad_scores)
    if gradients.weight is not None:
        block.of_entries(gradients.weight, 1).add_(weight_gradient(grad_score, energy))
    slope = add_feature_gradients(block, gradients, energy, grad_score, weight, shield)
    if location is not None and location_weight is not None:
        slope = slope.squeeze(-3)
        reached = location if shield is None else torch.where(shield, location, 0.0)
        block.write("of_features", term.grad_location, location_weight @ slope.mT)
        block.of_entries(term.grad_location_weight, 2).add_(reached @ slope)


def with_term(key: Tensor, location: Tensor, weight: Tensor) -> Tensor:
    """Adds the product of ``location (..., F, Lk)`` and ``weight (..., F, H)`` to ``key (..., Lk,
    H)``. One operation where there is one, since two make temporaries of the size of the keys."""
    alike = key.dtype == location.dtype == weight.dtype and key.shape[:-2] == location.shape[:-2]
    if alike and weight.dim() == 2 and not _autocasts():  # which would round the keys
        if weight.shape[0] == 1:
            return torch.addcmul(key, location.mT, weight)
        if key.dim() == 2:
            return torch.addmm(key, location.mT, weight)
        if key.dim() == 3:
            return torch.baddbmm(key, location.mT, weight.expand(key.shape[0], -1, -1))
    return key + location.mT @ weight


def _windows(inputs: Tensor, width: int) -> Tensor:
    """Returns the inputs that each key depends on: (B, C * width, Lk), zeros beyond the ends."""
    if inputs.shape[-1] == 0:
        return inputs.repeat(1, width, 1)
    padded = pad(inputs, (width // 2, width // 2))
    windows = padded.unfold(-1, width, 1).transpose(-1, -2)
    # Batches of upstream gradients have a rule for reshape, and none for flatten.
    *batch, channels, _, keys = windows.shape
    return windows.reshape(*batch, channels * width, keys)


def keep_entries(seed: Tensor, rows: int, keys: int, dropout_p: float) -> Tensor:
    return keep_mask(seed, seed.shape, (0, rows), (0, keys), dropout_p)


def location_features(inputs: Tensor, filters: Tensor) -> Tensor:
    """Correlates ``(B, C, Lk)`` with ``(F, C, width)`` along the keys. The convolutions of
    libraries are slow where inputs have one channel and filters are wide."""
    count, channels, width = filters.shape
    narrow = width <= _NARROW and inputs.numel() and count
    if narrow and inputs.is_cpu and inputs.dtype == torch.float32:
        return torch.conv1d(inputs, filters, padding=width // 2)
    return filters.reshape(count, channels * width) @ _windows(inputs, width)


def convolved(inputs: Tensor, filters: Tensor) -> Tensor:
    """Returns ``location_features`` on the CPU, differentiated by autograd."""
    (batch, _, keys), (count, _, width) = inputs.shape, filters.shape
    if not (inputs.numel() and count):
        return location_features(inputs, filters)
    half = width // 2
    if batch > 1 and torch.is_grad_enabled():
        # The library of conv1d, unused for a batch of 1, takes twice as long in backward.
        planes = inputs.unsqueeze(-2), filters.unsqueeze(-2)
        made: Tensor = _convolve(*planes, (1, width), None, (1, 1), (0, half)).squeeze(-2)
        return made
    if batch == 1 or inputs.numel() * width > _FEW_WINDOWS:
        return torch.conv1d(inputs, filters, padding=half)
    windows = pad(inputs, (half, half)).unfold(-1, width, 1).transpose(1, 2)
    rows = windows.reshape(batch * keys, -1).mm(filters.reshape(count, -1).t())
    return rows.view(batch, keys, count).mT


def location_features_backward(
    grad: Tensor, inputs: Tensor, filters: Tensor, need_inputs: bool, need_filters: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of inputs and filters, as the operator. A library's convolution does
    not store the windows of all features, and on a GPU it would round to TF32."""
    if not (need_inputs and grad.is_cpu and grad.numel() and inputs.numel()):
        return differentiable_features_backward(grad, inputs, filters, need_inputs, need_filters)
    grad_inputs = torch.ops.aten.convolution_backward(
        grad, inputs, filters, None, [1], [filters.shape[-1] // 2], [1], False, [0], 1,
        [True, False, False],
    )[0]  # fmt: skip
    return grad_inputs, _of_filters(grad, inputs, filters, need_filters)


def differentiable_features_backward(
    grad: Tensor, inputs: Tensor, filters: Tensor, need_inputs: bool, need_filters: bool
) -> tuple[Tensor, Tensor]:
    """Returns the same gradients by operations that have a rule for batches of gradients."""
    grad_inputs = grad.new_empty(0)
    if need_inputs:
        grad_inputs = location_features(grad, filters.transpose(0, 1).flip(-1))
    return grad_inputs, _of_filters(grad, inputs, filters, need_filters)


def _of_filters(grad: Tensor, inputs: Tensor, filters: Tensor, needed: bool) -> Tensor:
    if not needed:
        return grad.new_empty(0)
    pairs = grad @ _windows(inputs, filters.shape[-1]).mT
    return pairs.sum(0).view(filters.shape)
