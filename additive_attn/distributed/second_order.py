"""The gradients of a call as a graph, to be differentiated again. Every process then attends to
the keys of all, which are gathered first. The derivative of gathering is the sum over processes at
this one's positions, and the derivative of that sum is gathering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from additive_attn.distributed import parts
from additive_attn.distributed.exchange import gathered, packed, unpacked
from additive_attn.distributed.layout import Bounds, Ranges, in_order, length
from additive_attn.ops.autograd import attend
from additive_attn.spec.call import Call, Inputs


def gather(plan: Any, own: Sequence[Tensor], layout: Sequence[Ranges]) -> list[Any]:
    """Gathers tensors (..., L, n) of the whole sequence from those of all processes."""
    shards = gathered(packed(own), [length(x) for x in layout], plan.group)
    return unpacked(in_order(shards, layout), own)


def own_positions(plan: Any, whole: Tensor, layout: Sequence[Ranges]) -> Tensor:
    """Returns this process's positions (..., L, n) of the whole sequence."""
    return torch.cat([whole[..., slice(*x), :] for x in layout[plan.rank]], -2)


class _Gathered(torch.autograd.Function):
    """Keys and values of all processes."""

    @staticmethod
    def forward(ctx: Any, plan: Any, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        return tuple(x.contiguous() for x in gather(plan, own, plan.keys))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, *_Added.apply(ctx.plan, *grads))


class _Added(torch.autograd.Function):
    """The sum over all processes, at this process's positions."""

    @staticmethod
    def forward(ctx: Any, plan: Any, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        total = packed(given).clone()
        dist.all_reduce(total, group=plan.group)
        return tuple(own_positions(plan, x, plan.keys) for x in unpacked(total, given))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, *_Gathered.apply(ctx.plan, *grads))


class _Zeros(torch.autograd.Function):
    """Zeros that depend on their arguments, so that backward reaches the same exchanges as on the
    other processes."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *_: Tensor) -> Tensor:
        ctx.save_for_backward(like, *_)
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


@torch.enable_grad()
def gradients(
    plan: Any, tensors: Sequence[Tensor | None], needs: Sequence[bool],
    grad_out: Tensor | None, grad_lse: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the mask, query, key, value and weight, each if it is needed."""
    # Views, since an input may depend on another one.
    views: list[Any] = [None if x is None else x.view_as(x) for x in tensors]
    mask, query, key, value, weight = views
    with torch.autocast(query.device.type, enabled=False):
        keys, values = _Gathered.apply(plan, key, value)
        out, lse = _attend(plan._replace(attn_mask=mask), Inputs(query, keys, values, weight))
        upstream = [
            torch.zeros_like(x) if grad is None else grad.to(x.dtype)
            for x, grad in ((out, grad_out), (lse, grad_lse))
        ]
        sources = [mask, query, keys, values, weight]
        wanted = [i for i, need in enumerate(needs) if need]
        if needs[2] or needs[3]:  # one message holds both
            wanted = sorted({*wanted, 2, 3})
        leaves: Any = [sources[i] for i in wanted]
        found = torch.autograd.grad(
            [out, lse], leaves, upstream, create_graph=True, allow_unused=True
        )
        grads: list[Any] = [None] * 5
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = _Zeros.apply(sources[i], query, keys, values) if grad is None else grad
        if grads[2] is not None:
            grads[2:4] = _Added.apply(plan, *grads[2:4])
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _attend(plan: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Out and lse of this process's rows over the keys of all."""
    rows, total = plan.rows[plan.rank], inputs.key.shape[-2]
    keys: Ranges = ((0, total),)
    starts, lengths = plan.masks.intervals(rows, keys, Bounds(0, total), inputs.query.device)
    seed, dropout_p, scale = plan.options
    mask = plan.attn_mask
    call = Call(*inputs, mask, lengths, starts, scale=scale)
    out, _, lse = attend(call)
    if seed is None:
        return out, lse
    # The keys that dropout keeps are a set with a share of its own.
    part = parts.Part(call, rows, keys, plan.masks, seed, dropout_p)
    kept = parts.kept_pairs(part, call.batch())
    if mask is not None:
        kept = torch.where(kept, mask, -torch.inf) if mask.is_floating_point() else kept & mask
    out, _, kept_lse = attend(call._replace(attn_mask=kept))
    empty = kept_lse == -torch.inf
    shares = (kept_lse.masked_fill(empty, 0.0) - lse.masked_fill(empty, 0.0)).exp()
    shares = shares.masked_fill(empty, 0.0) * parts.keep_scale(part)
    return (shares.unsqueeze(-1) * out.to(shares.dtype)).to(out.dtype), lse
