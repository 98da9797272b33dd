"""A small layer call as one node of autograd: the projections of queries and keys, and attention.

On its own, each Linear adds two nodes to the graph. In a small call they cost more than its
arithmetic, forward and backward. On plain PyTorch the nodes are autograd's own, since one node in
Python would cost more. There the weight (1, H) is used as it is, so that no node reshapes it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from additive_attn.backends.plain import whole
from additive_attn.ops import dispatch
from additive_attn.ops.autograd import attend
from additive_attn.ops.key_projection import LEAST
from additive_attn.ops.memory import PLAIN_TYPES, alone
from additive_attn.ops.second_order import SingleLevelFunction, reduced
from additive_attn.spec.call import Call

# A call of fewer elements of queries and of keys becomes one node. What a larger call saves for
# its backward is better freed node by node.
_ELEMENTS = LEAST
_tuple: Any = tuple.__new__  # Call(...) binds its arguments by name first
_below_autograd = torch._C._AutoDispatchBelowAutograd
_autocasts = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active


class Sources(NamedTuple):
    """What query, key and weight are computed from, and a score bias, which cancels."""

    query: Tensor
    query_weight: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_weight: Tensor
    key_bias: Tensor | None
    weight: Tensor  # (1, H)
    score_bias: Tensor | None


def in_one_node(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> bool:
    """Whether autograd records a small call on the CPU, of plain tensors, and no transform or mode
    needs its parts. On plain PyTorch the call must also be one that is computed as a whole, as far
    as that is known before the projections."""
    return (
        _grad_enabled()
        and alone()
        and not _autocasts()
        and type(query) in PLAIN_TYPES
        and type(key) in PLAIN_TYPES
        and type(value) in PLAIN_TYPES
        and query.is_cpu
        and query.numel() < _ELEMENTS
        and key.numel() < _ELEMENTS
        and not getattr(attn_mask, "requires_grad", False)
        and (not dispatch.cpu_is_plain or _computes_whole(query, key))
    )


def _computes_whole(query: Tensor, key: Tensor) -> bool:
    """False for nested keys, which have no length; a later check raises for them."""
    return not key.is_nested and query.numel() * key.shape[-2] <= whole.ELEMENTS


def projections(sources: Sources) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and weight. Autograd records only query and key on plain PyTorch."""
    query, query_weight, query_bias, key, key_weight, key_bias, weight, _ = sources
    if dispatch.cpu_is_plain:
        q, k = linear(query, query_weight, query_bias), linear(key, key_weight, key_bias)
        return q, k, weight.detach().squeeze(0) if query.dim() == 2 else weight
    with _below_autograd():
        vector = weight.squeeze(0) if query.dim() == 2 else weight
        return linear(query, query_weight, query_bias), linear(key, key_weight, key_bias), vector


def attend_projected(
    sources: Sources, call: Call, need_weights: bool, _: None, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``attend`` for a call that ``projections`` prepared."""
    if dispatch.cpu_is_plain:
        weight, score_bias = sources[6:]
        if whole.prefers_formula(call):
            call = _tuple(Call, (*call[:3], weight, *call[4:]))
            return whole.attend(call, need_lse, score_bias)
        call = call._replace(weight=weight.squeeze(0) if call.query.dim() == 2 else weight)
        return attend(call, need_weights, score_bias, need_lse)
    outputs: tuple[Tensor, Tensor, Tensor] = ProjectedAttention.apply(
        call, need_weights, need_lse, call.value, *sources
    )
    return outputs


class ProjectedAttention(SingleLevelFunction):
    """``linear`` of queries and keys, then ``additive_attn::forward``. An output that is not
    needed is None, as in ``Attention``."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, need_weights: bool, need_lse: bool, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with _below_autograd():
            out, weights, lse = dispatch.forward_directly(*call, need_weights)
        query, key, _, weight, *masking = call[:9]
        ctx.save_for_backward(*inputs, query, key, weight, *masking, call[11], lse)
        ctx.numbers = call[9:11], call[12:]
        ctx.set_materialize_grads(False)
        return out, weights if need_weights else None, lse if need_lse else None

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_weights is None and grad_lse is None:
            return (None,) * 12
        value, *sources, q, k, w, m0, m1, m2, m3, m4, seed, lse = ctx.saved_tensors
        query, query_weight, query_bias, key, key_weight, key_bias, weight, score_bias = sources
        _, _, _, need_value, *needs, need_weight, need_bias = ctx.needs_input_grad
        operator = dispatch.backward_directly
        again = _grad_enabled() or _functorch_active()  # the gradients are differentiated
        if again:
            operator = dispatch.backward
            q, k = linear(query, query_weight, query_bias), linear(key, key_weight, key_bias)
            w = weight.view_as(w)
        window, options = ctx.numbers
        with nullcontext() if again else _below_autograd():
            grads = operator(
                grad_out, grad_weights, grad_lse, q, k, value, w, m0, m1, m2, m3, m4, *window,
                seed, *options, lse, True in needs[:3], True in needs[3:], need_value,
                need_weight, False,
            )  # fmt: skip
            return (
                None,
                None,
                None,
                reduced(grads[2], value) if need_value else None,
                *_of_linear(grads[0], q, query, query_weight, needs[:3]),
                *_of_linear(grads[1], k, key, key_weight, needs[3:]),
                reduced(grads[3], weight) if need_weight else None,
                torch.zeros_like(score_bias) if need_bias else None,
            )


def _of_linear(
    grad: Tensor, output: Tensor, given: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of a Linear's input, weight and bias."""
    need_given, need_weight, need_bias = needs
    grad_given = grad_weight = grad_bias = None
    if need_given or need_weight or need_bias:
        rows = reduced(grad, output)
        if need_given:
            grad_given = rows @ weight
        if rows.dim() > 2:
            rows, given = rows.reshape(-1, rows.shape[-1]), given.reshape(-1, given.shape[-1])
        if need_weight:
            grad_weight = rows.t().mm(given)
        if need_bias:
            grad_bias = rows.sum(0)
    return grad_given, grad_weight, grad_bias
