"""The derivatives of the operators. They are registered on the operators, so that eager calls,
``torch.func``, ``torch.compile``, export and traces all use the same ones.

First-order gradients run the fused kernels; ``second_order`` implements forward mode, and
differentiates the backward operator. All Functions are single-level: below ``torch.func`` the
dispatcher calls them once per transform, with that transform's tensors.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from additive_attn.backends.plain import whole
from additive_attn.ops import dispatch, vmap  # noqa: F401
from additive_attn.ops.schemas import registrations
from additive_attn.ops.second_order import (
    ATTENTION,
    AttentionBackward,
    AttentionTangent,
    Layout,
    SingleLevelFunction,
    forward_mode_alone,
    has_tangents,
    outputs_pushed_forward,
    reduced,
)
from additive_attn.spec.call import Call, lse_dtype
from additive_attn.spec.formula import plain_additive_attention
from additive_attn.spec.masks import allowed_pairs

_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_TENSORS = {Tensor, torch.nn.Parameter}


def attend(
    call: Call,
    need_weights: bool = False,
    score_bias: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``additive_attn::forward``, differentiable in query, key, value, weight and a float mask.

    ``score_bias`` shifts all scores of a row alike, so it cancels in the softmax. It is an
    argument only to receive the zero gradient that a plain layer gives it.
    """
    outputs: tuple[Tensor, Tensor, Tensor]
    if (
        _is_compiling()
        or _functorch_active()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        # A graph records the operator, on which the derivative is registered.
        if score_bias is not None:
            # Not 0, which the ONNX exporter of torch 2.10 cannot promote.
            weight = call.weight + 0.0 * score_bias
            call = call._replace(weight=weight.to(call.weight.dtype))
        if torch.onnx.is_in_onnx_export():
            return _formula(call)
        outputs = dispatch.forward(*call, need_weights)
        return outputs
    if type(call.query) is not Tensor and hasattr(call.query, "device_mesh"):
        call = importlib.import_module("additive_attn.ops.sharding").with_masks(call)
    # The cheap condition is first: it is false for most calls, on a CPU with a kernel.
    if (dispatch.cpu_is_plain or not call.query.is_cpu) and serves_whole(call):
        return whole.attend(call, need_lse, score_bias)
    # Bypasses the kernels of the dispatch key Autograd, whose cost shows in small decoder steps.
    if _grad_enabled() and (
        _requires_grad(call) or (score_bias is not None and score_bias.requires_grad)
    ):
        outputs = Attention.apply(call, (need_weights, need_lse), *call[:5], score_bias)
        return outputs
    with _below_autograd():
        if dispatch.repeated_forward is not None:
            repeated = dispatch.repeated_forward(call, need_weights)
            if repeated is not None:
                outputs = repeated
                return outputs
        outputs = dispatch.forward_directly(*call, need_weights)
    return outputs


def in_graph() -> bool:
    """Whether a graph is traced or a transform runs, for which the operator must be called."""
    return torch.compiler.is_compiling() or _functorch_active() or _tracing_state() is not None


def serves_whole(call: Call) -> bool:
    """Whether plain PyTorch computes the call without the operator, which costs more than the
    arithmetic of a small call. Dispatch modes and subclasses of Tensor need the operator."""
    query, key, value, weight = call[:4]
    on_plain_path = dispatch.cpu_is_plain if query.is_cpu else dispatch.on_plain_path(query.device)
    return (
        on_plain_path
        and _dispatch_modes() == 0
        and type(query) in _TENSORS
        and type(key) in _TENSORS
        and type(value) in _TENSORS
        and type(weight) in _TENSORS
        and whole.prefers_formula(call)
    )


def _requires_grad(call: Call) -> bool:
    return bool(
        call.query.requires_grad
        or call.key.requires_grad
        or call.value.requires_grad
        or call.weight.requires_grad
        or (call.attn_mask is not None and call.attn_mask.requires_grad)
    )


def _formula(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the call by the plain formula, for export to ONNX."""
    seed, dropout_p, scale = call.options
    query, key, value, weight = expanded(call)
    keep = None
    if seed is not None:
        shape = query.shape[-2], key.shape[-2]
        keep = torch.ops.additive_attn.keep_mask(seed, call.batch(), *shape, dropout_p)
    return plain_additive_attention(
        query, key, value, weight, call.attn_mask,
        attended=allowed(call), keep=keep, dropout_p=dropout_p, scale=scale,
    )  # fmt: skip


def allowed(call: Call) -> Tensor | None:
    rows, keys = (0, call.query.shape[-2]), (0, call.key.shape[-2])
    return allowed_pairs(call.masking, rows, keys, call.query.device)


def expanded(call: Call) -> tuple[Tensor, ...]:
    """Expands query, key, value and weight to the whole batch."""
    query, key, value, weight = call.inputs
    batch = call.batch()
    return (
        *(tensor.expand(*batch, *tensor.shape[-2:]) for tensor in (query, key, value)),
        weight.expand(*batch, weight.shape[-1]).to(lse_dtype(query.dtype)),
    )


class Attention(SingleLevelFunction):
    """``additive_attn::forward``. Takes the call, whether weights and lse are needed, those
    arguments of the call that have gradients, and a score bias. Every argument and every output of
    a Function costs time, so an output that is not needed is None."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, needs: tuple[bool, bool], *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, weights, lse = _computed(ctx, call, needs[0], inputs)
        return out, weights if needs[0] else None, lse if needs[1] else None

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, weight, attn_mask, bias, *masking, seed, lse = ctx.saved_tensors
        left, right, dropout_p, scale, need_weights = ctx.numbers
        *_, need_query, need_key, need_value, need_weight, need_mask, need_bias = (
            ctx.needs_input_grad
        )
        if not need_weights:
            grad_weights = None  # a compiled graph passes zeros for the empty tensor
        if grad_out is None and grad_weights is None and grad_lse is None:
            return (None,) * 8
        arguments = (
            grad_out, grad_weights, grad_lse, query, key, value, weight, attn_mask, *masking,
            left, right, seed, dropout_p, scale, lse,
            need_query, need_key, need_value, need_weight, need_mask,
        )  # fmt: skip
        again = _grad_enabled() or _functorch_active()  # the gradients are differentiated
        operator = dispatch.backward if again else dispatch.backward_directly
        with contextlib.nullcontext() if again else _below_autograd():
            grads = None
            if dispatch.repeated_backward is not None and not again:
                grads = dispatch.repeated_backward(*arguments)
            if grads is None:
                grads = operator(*arguments)
            return (
                None,
                None,
                reduced(grads[0], query) if need_query else None,
                reduced(grads[1], key) if need_key else None,
                reduced(grads[2], value) if need_value else None,
                reduced(grads[3], weight) if need_weight else None,
                grads[4] if need_mask else None,
                torch.zeros_like(bias) if need_bias else None,
            )


class DirectedAttention(Attention):
    """``Attention`` of inputs that may have tangents. Returns all outputs of the operator."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, needs: tuple[bool, bool], *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs = _computed(ctx, call, needs[0], inputs)
        ctx.save_for_forward(*ctx.to_save)
        return outputs

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, _, lengths, starts, table, tiles, seed, lse = ctx.saved_tensors
        left, right, dropout_p, scale, need_weights = ctx.numbers
        masking = lengths, starts, table, tiles, left, right
        call = *inputs, *masking, seed, dropout_p, scale, lse
        return outputs_pushed_forward(ATTENTION, call, directions[2:], (True, need_weights, True))


def _computed(
    ctx: Any, call: Call, need_weights: bool, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the outputs of the operator, and saves in ``ctx`` what backward needs."""
    outputs = None
    if dispatch.repeated_forward is not None and not _functorch_active():
        with _below_autograd():
            outputs = dispatch.repeated_forward(call, need_weights)
    if outputs is None:
        outputs = dispatch.below_autograd(dispatch.forward_directly, *call, need_weights)
    out, weights, lse = outputs
    ctx.save_for_backward(*inputs, *call[5:9], call[11], lse)
    ctx.numbers = *call[9:11], *call[12:], need_weights
    ctx.set_materialize_grads(False)
    return out, weights, lse


def register(operator: Any, function: Any, layout: Layout) -> None:
    """Registers the derivative of an operator: ``function`` in reverse mode, and forward mode."""

    def run(*arguments: Any) -> Any:
        directed = has_tangents(arguments)
        if directed and operator is layout.tangent:
            return layout.differentiable(*arguments, in_blocks=forward_mode_alone(arguments))
        if directed or (
            torch.is_grad_enabled()
            and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        ):
            with enable_single_level_autograd_function():
                return function(*arguments)
        return dispatch.below_autograd(operator, *arguments)

    registrations.impl(operator._schema.name.split("::")[1], run, "Autograd")


register(
    dispatch.forward,
    lambda *x: DirectedAttention.apply(Call(*x[:14]), (x[14], True), *x[:5], None),
    ATTENTION,
)
register(dispatch.backward, AttentionBackward.apply, ATTENTION)
register(dispatch.tangent, AttentionTangent.apply, ATTENTION)
