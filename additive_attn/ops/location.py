"""The features of a location, differentiable: a correlation of earlier weights with filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from additive_attn.backends.plain import steps as plain
from additive_attn.ops import dispatch
from additive_attn.ops.memory import eager

_operators = torch.ops.additive_attn
_below_autograd = torch._C._AutoDispatchBelowAutograd


def location_features(inputs: Tensor, filters: Tensor) -> Tensor:
    """Returns the features of the earlier weights around each key: ``F.conv1d(inputs, filters,
    padding="same")``.

    Args:
        inputs: ``(B, C, Lk)``.
        filters: ``(F, C, width)``, of an odd width.

    Returns:
        ``(B, F, Lk)``.
    """
    if not eager((inputs, filters), filters):
        return plain.location_features(inputs, filters)
    if dispatch.cpu_is_plain and inputs.is_cpu:
        return plain.convolved(inputs, filters)
    if torch.is_grad_enabled() and (inputs.requires_grad or filters.requires_grad):
        features: Tensor = _Features.apply(inputs, filters)
        return features
    with _below_autograd():
        features = _operators.location_features(inputs, filters)
    return features


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, filters)
        features: Tensor = _operators.location_features(inputs, filters)
        return features

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs, filters = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # A gradient that is differentiated again is computed by PyTorch's own operators.
        backward = (
            plain.differentiable_features_backward
            if torch.is_grad_enabled()
            else _operators.location_features_backward
        )
        grad_inputs, grad_filters = backward(grad, inputs, filters, *needs)
        return grad_inputs if needs[0] else None, grad_filters if needs[1] else None
