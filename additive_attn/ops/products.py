"""A product with the same weight at every step of a decoder. The weight's gradient is computed
once for all steps, from records of their backward, as those of a memory are (memory.py)."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear

from additive_attn.ops.autocast import autocast_dtype
from additive_attn.ops.memory import eager, is_batch, running_pass, summed
from additive_attn.ops.second_order import SingleLevelFunction

_pass_number = torch._C._current_graph_task_id
_will_run = torch._C._will_engine_execute_node


class LentWeight(NamedTuple):
    source: Tensor  # (out, in), or (B, out, in)
    shared: Tensor  # as steps use it
    node: Any  # None: the weight needs no gradient


def lend_weight(weight: Tensor) -> LentWeight:
    """Prepares a weight ``(out, in)``, or one for each entry ``(B, out, in)``, for
    :func:`multiply`."""
    if not (weight.requires_grad and torch.is_grad_enabled() and eager((weight,), weight)):
        return LentWeight(weight, weight, None)
    shared: Tensor = _Weight.apply(weight)
    return LentWeight(weight, shared, shared.grad_fn)


def multiply(lent: LentWeight, x: Tensor) -> Tensor:
    """``linear(x, weight)``, x ``(..., in)``; with a weight for each entry, x ``(B, in)``."""
    if (
        lent.node is None
        or not torch.is_grad_enabled()
        or not eager((x,), lent.source)
        or autocast_dtype(x.device.type) is not None
    ):
        return _product(x, lent.source)
    out: Tensor = _Product.apply(lent.node, x, lent.shared)
    return out


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        return linear(x, weight)
    return torch.bmm(x.unsqueeze(1), weight.mT).squeeze(1)


class _Weight(SingleLevelFunction):
    """The identity. Its backward computes the gradient from the records of the steps."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.passes = WeakValueDictionary()
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None) -> Tensor | None:
        running = ctx.passes.get(_pass_number())
        if running is None or not running.records:
            return incoming
        grads, rows = zip(*running.records, strict=True)
        running.records.clear()
        return summed(incoming, torch.cat(grads, dim=-2).mT @ torch.cat(rows, dim=-2))


class _Product(SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, node: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.node = node
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        _, of_x, of_weight = ctx.needs_input_grad
        if grad is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.mT) if of_x else None
        if not of_weight:
            return None, grad_x, None
        if weight.dim() == 2:
            rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        else:
            rows = grad.unsqueeze(1), x.unsqueeze(1)
        if torch.is_grad_enabled() or is_batch(grad):
            return None, grad_x, rows[0].mT @ rows[1]
        if _will_run(ctx.node):
            running_pass(ctx.node).records.append(rows)
        return None, grad_x, None
