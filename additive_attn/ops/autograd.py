"""Differentiation of the operators: first order through the fused kernels, second order through
the plain formula.

Plain eager calls use Functions in their combined form, which costs a third of the composable form
(``setup_context`` and ``vmap``) that ``torch.func`` needs. Forward mode takes the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from additive_attn.ops import dispatch
from additive_attn.spec.call import batch_shape, lse_dtype
from additive_attn.spec.dropout import keep_mask
from additive_attn.spec.formula import plain_additive_attention
from additive_attn.spec.masks import interval_mask

# left, right, dropout_p, scale, need_weights: as one argument, which a Function passes on faster.
Options = tuple[int, int, float, float, bool]

_functorch_active = torch._C._are_functorch_transforms_active


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    score_bias: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``additive_attn::forward``, differentiable in query, key, value, weight and a float mask.

    ``score_bias`` shifts all scores of a row alike, so it is not computed with: it takes part only
    to receive the zero gradient that a plain layer gives it.
    """
    arguments = (
        query, key, value, weight, attn_mask, lengths, seed, score_bias,
        (left, right, dropout_p, scale, need_weights),
    )  # fmt: skip
    if forward_ad._current_level >= 0:
        batch = batch_shape(query, key, value, weight, attn_mask, lengths, seed)
        formula, primals = _plain_form(
            query, key, value, weight, attn_mask, lengths, seed, batch,
            left, right, dropout_p, scale,
        )  # fmt: skip
        return formula(*primals)
    if _functorch_active():
        return ComposableAttention.apply(*arguments)
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or weight.requires_grad
        or (attn_mask is not None and attn_mask.requires_grad)
        or (score_bias is not None and score_bias.requires_grad)
    ):
        return EagerAttention.apply(*arguments)
    return dispatch.forward(
        query, key, value, weight, attn_mask, lengths, seed,
        left, right, dropout_p, scale, need_weights,
    )  # fmt: skip


def _pull_back(
    ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, weight, attn_mask, lengths, seed, score_bias, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if not ctx.need_weights:
        grad_weights = None  # a compiled graph passes zeros for the empty tensor
    if grad_out is None and grad_weights is None and grad_lse is None:
        return (None,) * len(needs)
    arguments = (
        grad_out, grad_weights, grad_lse, query, key, value, weight, attn_mask, lengths, seed, lse,
        *ctx.options, *needs[:5],
    )  # fmt: skip
    if torch.is_grad_enabled() or _functorch_active():
        grads = AttentionBackward.apply(*arguments)
    else:
        grads = dispatch.backward(*arguments)
    return (
        _reduced(grads[0], query) if needs[0] else None,
        _reduced(grads[1], key) if needs[1] else None,
        _reduced(grads[2], value) if needs[2] else None,
        _reduced(grads[3], weight) if needs[3] else None,
        grads[4] if needs[4] else None,
        None,
        None,
        torch.zeros_like(score_bias) if needs[7] else None,
        None,
    )


def _reduced(grad: Tensor, tensor: Tensor) -> Tensor:
    """The gradient over the whole batch, summed over the dims that ``tensor`` was broadcast
    along."""
    if grad.shape != tensor.shape:
        grad = grad.sum_to_size(tensor.shape)
    return grad if grad.dtype == tensor.dtype else grad.to(tensor.dtype)


class EagerAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, weight: Tensor,
        attn_mask: Tensor | None, lengths: Tensor | None, seed: Tensor | None,
        score_bias: Tensor | None, options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out, weights, lse = dispatch.forward(
            query, key, value, weight, attn_mask, lengths, seed, *options
        )
        ctx.save_for_backward(query, key, value, weight, attn_mask, lengths, seed, score_bias, lse)
        ctx.options, ctx.need_weights = options[:4], options[4]
        ctx.set_materialize_grads(False)
        return out, weights, lse

    backward = staticmethod(_pull_back)


class ComposableAttention(Function):
    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor,
        attn_mask: Tensor | None, lengths: Tensor | None, seed: Tensor | None,
        score_bias: Tensor | None, options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return dispatch.forward(query, key, value, weight, attn_mask, lengths, seed, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:8], output[2])
        ctx.options, ctx.need_weights = inputs[8][:4], inputs[8][4]
        ctx.set_materialize_grads(False)

    backward = staticmethod(_pull_back)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        seed, need_weights = arguments[6], arguments[8][4]
        if seed is not None and in_dims[6] is None:
            raise RuntimeError(
                "additive_attention drops weights by their position in the batch, so under "
                "torch.func.vmap its dropout cannot be the same for every sample "
                f"(randomness={info.randomness!r}). Call vmap with randomness='different', or "
                "set dropout_p=0."
            )
        tensors = _fold(arguments[:7], in_dims[:7], _INPUT_RANKS)
        outputs = ComposableAttention.apply(*tensors, *arguments[7:])
        return outputs, (0, 0 if need_weights else None, 0)


class AttentionBackward(Function):
    """``additive_attn::backward``, whose own derivative is that of the plain formula's
    derivative."""

    @staticmethod
    def forward(
        grad_out: Tensor | None, grad_weights: Tensor | None, grad_lse: Tensor | None,
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor, attn_mask: Tensor | None,
        lengths: Tensor | None, seed: Tensor | None, lse: Tensor,
        left: int, right: int, dropout_p: float, scale: float,
        need_query: bool, need_key: bool, need_value: bool, need_weight: bool, need_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return dispatch.backward(
            grad_out, grad_weights, grad_lse, query, key, value, weight, attn_mask, lengths, seed,
            lse, left, right, dropout_p, scale,
            need_query, need_key, need_value, need_weight, need_mask,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:11])
        ctx.options = inputs[11:15]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = ctx.saved_tensors[:3]
        query, key, value, weight, attn_mask, lengths, seed, lse = ctx.saved_tensors[3:]
        given = [i for i, grad in enumerate(upstream) if grad is not None]
        wanted = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        if not wanted:
            return (None,) * 20
        # The operator returns gradients over the whole batch, so it is differentiated as a
        # function of the whole batch.
        formula, primals = _plain_form(
            query, key, value, weight, attn_mask, lengths, seed, lse.shape[:-1], *ctx.options
        )

        def derivative(grads: tuple[Tensor, ...], primals: tuple[Tensor, ...]) -> list[Tensor]:
            def outputs(*primals: Tensor) -> tuple[Tensor, ...]:
                results = formula(*primals)
                return tuple(results[i] for i in given)

            pulled = torch.func.vjp(outputs, *primals)[1](grads)
            return [pulled[i] for i in wanted]

        pull_back = torch.func.vjp(derivative, tuple(upstream[i] for i in given), primals)[1]
        grad_upstream, grad_primals = pull_back([cotangents[i] for i in wanted])

        grads: list[Tensor | None] = [None] * 20
        for i, grad in zip(given, grad_upstream, strict=True):
            grads[i] = grad
        inputs = (query, key, value, weight, attn_mask)
        for i, (grad, tensor) in enumerate(zip(grad_primals, inputs, strict=False)):
            grads[3 + i] = _reduced(grad, tensor)
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        tensors, rest = list(arguments[:11]), arguments[11:]
        dims = list(in_dims[:11])
        needs = rest[-5:]
        out_dims = tuple(0 if need else None for need in needs)
        if tensors[9] is not None and dims[9] is None:
            # One dropout mask for all vmapped entries, as in a Jacobian: folding would give each
            # its own.
            entries = [
                AttentionBackward.apply(
                    *(
                        tensor if dim is None else tensor.select(dim, i)
                        for tensor, dim in zip(tensors, dims, strict=True)
                    ),
                    *rest,
                )
                for i in range(info.batch_size)
            ]
            stacked = zip(*entries, strict=True)
            outputs = [
                torch.stack(grads) if need else grads[0]
                for grads, need in zip(stacked, needs, strict=True)
            ]
            return tuple(outputs), out_dims
        attn_mask, mask_dim = tensors[7], dims[7]
        # These carry the whole batch; a mask's gradient comes in the shape of the mask.
        whole = [0, 1, 2, 3, 10] + ([7] if needs[4] else [])
        for i in whole:
            if tensors[i] is not None and dims[i] is None:
                tensors[i] = tensors[i].expand(info.batch_size, *tensors[i].shape)
                dims[i] = 0
        grads = list(AttentionBackward.apply(*_fold(tensors, dims, _BACKWARD_RANKS), *rest))
        if needs[4]:
            shape = list(attn_mask.shape)
            if mask_dim is not None:
                del shape[mask_dim]
            grads[4] = grads[4].reshape(info.batch_size, *shape)
        return tuple(grads), out_dims


def _plain_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    batch: Sequence[int],
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], tuple[Tensor, ...]]:
    """The forward operator as a plain differentiable function, and its arguments: query, key,
    value and weight over the whole batch, and the mask if it is float."""
    rows, keys = (0, query.shape[-2]), (0, key.shape[-2])
    allowed = interval_mask(lengths, left, right, rows, keys, query.device)
    keep = None if seed is None else KeepMask.apply(seed, tuple(batch), rows, keys, dropout_p)

    def formula(
        query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *float_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = float_mask[0] if float_mask else attn_mask
        return plain_additive_attention(
            query, key, value, weight, mask,
            allowed=allowed, keep=keep, dropout_p=dropout_p, scale=scale,
        )  # fmt: skip

    primals = (
        *(tensor.expand(*batch, *tensor.shape[-2:]) for tensor in (query, key, value)),
        weight.expand(*batch, weight.shape[-1]).to(lse_dtype(query.dtype)),
        *(() if attn_mask is None or attn_mask.dtype == torch.bool else (attn_mask,)),
    )
    return formula, primals


class KeepMask(Function):
    """``dropout.keep_mask`` for the plain formula under vmap: entries are numbered as the folded
    operators number them."""

    @staticmethod
    def forward(
        seed: Tensor,
        batch: tuple[int, ...],
        rows: tuple[int, int],
        keys: tuple[int, int],
        dropout_p: float,
    ) -> Tensor:
        return keep_mask(seed, batch, rows, keys, dropout_p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * 5

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        seed: Tensor,
        batch: tuple[int, ...],
        *block: Any,
    ) -> tuple[Tensor, int]:
        seed = seed.movedim(in_dims[0] or 0, 0)
        seed = seed.reshape(
            info.batch_size, *(1,) * (len(batch) + 1 - seed.dim()), *seed.shape[1:]
        )
        return KeepMask.apply(seed, (info.batch_size, *batch), *block), 0


# Dims of each tensor that are not batch dims: query, key, value, weight, attn_mask, lengths, seed.
_INPUT_RANKS = (2, 2, 2, 1, 2, 1, 0)
_BACKWARD_RANKS = (2, 2, 1, *_INPUT_RANKS, 1)


def _fold(
    tensors: Sequence[Tensor | None], in_dims: Sequence[int | None], ranks: tuple[int, ...]
) -> list[Tensor | None]:
    """Makes the vmapped dim the first batch dim of every tensor that has it; the operators
    broadcast the rest."""
    depth = max(
        tensor.dim() - (dim is not None) - rank
        for tensor, dim, rank in zip(tensors, in_dims, ranks, strict=True)
        if tensor is not None
    )
    folded: list[Tensor | None] = []
    for tensor, dim, rank in zip(tensors, in_dims, ranks, strict=True):
        if tensor is not None and dim is not None:
            tensor = tensor.movedim(dim, 0)
            missing = depth + rank + 1 - tensor.dim()
            tensor = tensor.reshape(tensor.shape[:1] + (1,) * missing + tensor.shape[1:])
        folded.append(tensor)
    return folded
