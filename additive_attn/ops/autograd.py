"""The derivative of the operators, registered on them: every way that reaches an operator (eager
calls, ``torch.func``, ``torch.compile``, export, traces) meets the same one.

First order runs the fused kernels; ``second_order`` differentiates the backward operator. Both
Functions are of one level: below ``torch.func`` the dispatcher calls them once per transform, with
that transform's tensors. Forward mode takes the plain formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from additive_attn.ops import dispatch, vmap  # noqa: F401
from additive_attn.ops.schemas import registrations
from additive_attn.ops.second_order import (
    AttentionBackward,
    Gradients,
    SingleLevelFunction,
    plain_form,
    reduced,
)
from additive_attn.spec.call import Call

_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def attend(
    call: Call, need_weights: bool = False, score_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``additive_attn::forward``, differentiable in query, key, value, weight and a float mask.

    ``score_bias`` shifts all scores of a row alike, so it cancels in the softmax. It takes part
    only to receive the zero gradient that a plain layer gives it.
    """
    arguments = call.flat()
    if torch.compiler.is_compiling() or _functorch_active() or _tracing_state() is not None:
        # A graph holds the operator, and the derivative comes with it.
        if score_bias is not None:
            weight = call.inputs.weight + 0 * score_bias
            arguments = (*arguments[:3], weight.to(call.inputs.weight.dtype), *arguments[4:])
        if forward_ad._current_level >= 0:
            return _formula(Call.of(arguments))
        outputs: tuple[Tensor, Tensor, Tensor] = dispatch.forward(*arguments, need_weights)
        return outputs
    if forward_ad._current_level >= 0:
        return _formula(call)
    # Bypasses the kernels at the key Autograd, whose cost shows in small decoder steps.
    if torch.is_grad_enabled() and (
        _requires_grad(arguments) or (score_bias is not None and score_bias.requires_grad)
    ):
        with enable_single_level_autograd_function():
            return Attention.apply(*arguments, need_weights, score_bias)
    outputs = dispatch.below_autograd(dispatch.forward, *arguments, need_weights)
    return outputs


def _requires_grad(arguments: tuple[Any, ...]) -> bool:
    query, key, value, weight, attn_mask, *_ = arguments
    return bool(
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or weight.requires_grad
        or (attn_mask is not None and attn_mask.requires_grad)
    )


def _formula(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    formula, primals = plain_form(call, call.batch())
    return formula(*primals)


class Attention(SingleLevelFunction):
    """``additive_attn::forward``; takes its arguments, and a score bias after them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, weights, lse = dispatch.below_autograd(dispatch.forward, *arguments[:12])
        tensors = (*arguments[:6], arguments[8], *arguments[12:])
        ctx.save_for_backward(lse, *tensors)
        ctx.numbers = arguments[6:8], arguments[9:11]
        ctx.need_weights = arguments[11]
        ctx.set_materialize_grads(False)
        return out, weights, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        lse, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not ctx.need_weights:
            grad_weights = None  # a compiled graph passes zeros for the empty tensor
        if grad_out is None and grad_weights is None and grad_lse is None:
            return (None,) * len(needs)
        arguments = (
            grad_out, grad_weights, grad_lse,
            *tensors[:6], *ctx.numbers[0], tensors[6], *ctx.numbers[1], lse, *needs[:5],
        )  # fmt: skip
        if torch.is_grad_enabled() or _functorch_active():
            grads = dispatch.backward(*arguments)
        else:
            grads = dispatch.below_autograd(dispatch.backward, *arguments)
        return (
            *(
                reduced(grad, tensor) if need else None
                for grad, tensor, need in zip(grads[:4], tensors, needs, strict=False)
            ),
            grads[4] if needs[4] else None,
            *(None,) * 7,
            *(torch.zeros_like(bias) if bias is not None else None for bias in tensors[7:]),
        )


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if forward_ad._current_level >= 0:
        return _formula(Call.of(arguments))
    if torch.is_grad_enabled() and _requires_grad(arguments):
        with enable_single_level_autograd_function():
            return Attention.apply(*arguments)
    outputs: tuple[Tensor, Tensor, Tensor]
    outputs = dispatch.below_autograd(dispatch.forward, *arguments)
    return outputs


def _backward(*arguments: Any) -> Gradients:
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in arguments
    ):
        with enable_single_level_autograd_function():
            return AttentionBackward.apply(*arguments)
    gradients: Gradients = dispatch.below_autograd(dispatch.backward, *arguments)
    return gradients


registrations.impl("forward", _forward, "Autograd")
registrations.impl("backward", _backward, "Autograd")
