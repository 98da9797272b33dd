"""The derivatives of ``additive_attn::backward`` and ``scores_backward``: those of the plain
formula's derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from additive_attn.ops import dispatch
from additive_attn.spec.call import Call, backward_arguments, call_of_scores, lse_dtype
from additive_attn.spec.formula import plain_additive_attention, plain_additive_scores
from additive_attn.spec.masks import allowed_pairs

# Its metaclass makes `apply`, which type checkers do not see.
SingleLevelFunction: Any = _SingleLevelFunction

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Formula = Callable[..., tuple[Tensor, ...]]


class AttentionBackward(SingleLevelFunction):
    """``additive_attn::backward``; its own derivative builds tensors (..., Lq, Lk, H)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Gradients:
        gradients: Gradients = _computed(ctx, dispatch.backward, arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = _arguments(ctx)
        upstream, call, lse, _ = backward_arguments(arguments)
        return _pulled_back(arguments, upstream, plain_form(call, lse.shape[:-1]), cotangents)


class ScoresBackward(SingleLevelFunction):
    """``additive_attn::scores_backward``, likewise."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor, Tensor] = _computed(
            ctx, dispatch.scores_backward, arguments
        )
        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = _arguments(ctx)
        upstream, call = arguments[:1], call_of_scores(*arguments[1:12])
        form = plain_scores_form(call, upstream[0].shape[:-2])
        return _pulled_back(arguments, upstream, form, cotangents)


def _computed(ctx: Any, operator: Any, arguments: tuple[Any, ...]) -> Any:
    gradients = dispatch.below_autograd(operator, *arguments)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in arguments]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in arguments))
    ctx.set_materialize_grads(False)
    return gradients


def _arguments(ctx: Any) -> tuple[Any, ...]:
    return tuple(
        number if tensor is None else tensor
        for tensor, number in zip(ctx.saved_tensors, ctx.numbers, strict=True)
    )


def _pulled_back(
    arguments: tuple[Any, ...],
    upstream: tuple[Tensor | None, ...],
    form: tuple[Formula, tuple[Tensor, ...]],
    cotangents: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The derivative of an operator whose arguments start with the upstream gradients of a
    formula, and go on with its primals."""
    given = [i for i, grad in enumerate(upstream) if grad is not None]
    wanted = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    grads: list[Tensor | None] = [None] * len(arguments)
    if not wanted:
        return tuple(grads)
    # The operator returns gradients over the whole batch, so it is differentiated as a function
    # of the whole batch.
    formula, primals = form

    def derivative(grads: tuple[Tensor, ...], primals: tuple[Tensor, ...]) -> list[Tensor]:
        def outputs(*primals: Tensor) -> tuple[Tensor, ...]:
            results = formula(*primals)
            return tuple(results[i] for i in given)

        pulled = torch.func.vjp(outputs, *primals)[1](grads)
        return [pulled[i] for i in wanted]

    pull_back = torch.func.vjp(derivative, tuple(upstream[i] for i in given), primals)[1]
    grad_upstream, grad_primals = pull_back([cotangents[i] for i in wanted])
    for i, grad in zip(given, grad_upstream, strict=True):
        grads[i] = grad
    for i, grad in enumerate(grad_primals, len(upstream)):
        grads[i] = reduced(grad, arguments[i])
    return tuple(grads)


def reduced(grad: Tensor, tensor: Tensor) -> Tensor:
    """The gradient over the whole batch, summed over the dims that ``tensor`` was broadcast
    along."""
    # Ranks first: a trace that compared unequal ranks would guard on sizes that happen to agree.
    if grad.dim() != tensor.dim() or grad.shape != tensor.shape:
        grad = grad.sum_to_size(tensor.shape)
    return grad if grad.dtype == tensor.dtype else grad.to(tensor.dtype)


def plain_form(call: Call, batch: Sequence[int]) -> tuple[Formula, tuple[Tensor, ...]]:
    """The forward operator as a plain differentiable function, and its arguments: query, key,
    value and weight over the whole batch, and the mask if it is float."""
    seed, dropout_p, scale = call.options
    attended, keep = _allowed(call), None
    if seed is not None:
        shape = call.query.shape[-2], call.key.shape[-2]
        keep = torch.ops.additive_attn.keep_mask(seed, batch, *shape, dropout_p)

    def formula(
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *float_mask: Tensor
    ) -> tuple[Tensor, ...]:
        mask = float_mask[0] if float_mask else call.attn_mask
        return plain_additive_attention(
            query, key, value, weight, mask,
            attended=attended, keep=keep, dropout_p=dropout_p, scale=scale,
        )  # fmt: skip

    return formula, _primals(call, batch)


def plain_scores_form(call: Call, batch: Sequence[int]) -> tuple[Formula, tuple[Tensor, ...]]:
    """The same of ``scores``, whose arguments have no value."""
    attended = _allowed(call)

    def formula(
        query: Tensor, key: Tensor, weight: Tensor, *float_mask: Tensor
    ) -> tuple[Tensor, ...]:
        mask = float_mask[0] if float_mask else call.attn_mask
        score = plain_additive_scores(
            query, key, weight, mask, attended=attended, scale=call.scale
        )
        return (score,)

    query, key, _, *rest = _primals(call, batch)
    return formula, (query, key, *rest)


def _allowed(call: Call) -> Tensor | None:
    rows, keys = (0, call.query.shape[-2]), (0, call.key.shape[-2])
    return allowed_pairs(call.masking, rows, keys, call.query.device)


def _primals(call: Call, batch: Sequence[int]) -> tuple[Tensor, ...]:
    (query, key, value, weight), attn_mask = call.inputs, call.attn_mask
    return (
        *(tensor.expand(*batch, *tensor.shape[-2:]) for tensor in (query, key, value)),
        weight.expand(*batch, weight.shape[-1]).to(lse_dtype(query.dtype)),
        *(() if attn_mask is None or attn_mask.dtype == torch.bool else (attn_mask,)),
    )
