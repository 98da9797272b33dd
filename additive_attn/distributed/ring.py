"""Forward and backward over the keys of all processes, block by block."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from additive_attn.distributed import parts, second_order
from additive_attn.distributed.exchange import Exchange, Ring, gathered, packed, unpacked
from additive_attn.distributed.layout import Masks, Ranges, cut, length
from additive_attn.distributed.second_order import gather, own_positions
from additive_attn.merge import merge_attention
from additive_attn.spec.call import Call, Inputs, Needs, Options, lse_dtype


class Plan(NamedTuple):
    """How a call is computed; equal on all processes except for masks and rank."""

    group: dist.ProcessGroup
    options: Options
    masks: Masks
    attn_mask: Tensor | None  # (..., Lq or 1, keys of all or 1), of this process's rows
    rows: tuple[Ranges, ...]  # of each process
    keys: tuple[Ranges, ...]
    exchange: str  # ring, keys or queries

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def ring(self) -> Ring:
        return Ring(self.group, self.needed, [length(x) for x in self.keys])

    def needed(self, a: int, b: int) -> bool:
        """Whether a row of process a may attend to a key of process b."""
        bounds = self.masks.bounds(self.rows[a], self.keys[b])
        return bounds.first < bounds.last

    def part(
        self, inputs: Inputs, keys: Ranges, rows: Ranges | None = None
    ) -> tuple[parts.Part, slice] | None:
        """Returns the call of rows, this process's unless given, and keys, and which keys are
        used; None where no row may attend to any."""
        rows, (seed, dropout_p, scale) = rows or self.rows[self.rank], self.options
        bounds = self.masks.bounds(rows, keys)
        if bounds.first >= bounds.last:
            return None
        query, key, value, weight = inputs
        used = slice(*bounds)
        starts, lengths = self.masks.intervals(rows, keys, bounds, query.device)
        call = Call(
            query, key[..., used, :], value[..., used, :], weight, lengths=lengths, starts=starts,
            attn_mask=self.mask_of(cut(keys, bounds)), scale=scale,
        )  # fmt: skip
        return parts.Part(call, rows, cut(keys, bounds), self.masks, seed, dropout_p), used

    def mask_of(self, keys: Ranges) -> Tensor | None:
        mask = self.attn_mask
        if mask is None or mask.dim() == 0 or mask.shape[-1] == 1:
            return mask
        return torch.cat([mask[..., slice(*x)] for x in keys], -1)


class ContextParallel(torch.autograd.Function):
    """Attention of this process's rows to the keys of all. Takes a plan without a mask, the mask
    and the inputs."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, attn_mask: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        query, key, value, weight = inputs
        ctx.plan, plan = plan, plan._replace(attn_mask=attn_mask)
        all_lse = None
        if plan.exchange == "queries":
            out, lse, all_lse = _by_queries(plan, Inputs(*inputs))
        else:
            merged = None
            for keys, block in _blocks(plan, key, value):
                found = block and plan.part(Inputs(query, block[0], block[1], weight), keys)
                if found:
                    result = parts.forward(found[0])
                    results = [result] if merged is None else [merged, result]
                    merged = merge_attention(*zip(*results, strict=True))
            out, lse = merged or _empty(plan, Inputs(*inputs))
        out = out.to(query.dtype)
        ctx.save_for_backward(attn_mask, *inputs, out, lse, all_lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            needs, tensors = ctx.needs_input_grad[1:6], ctx.saved_tensors[:5]
            return (None, *second_order.gradients(ctx.plan, tensors, needs, grad_out, grad_lse))
        with torch.no_grad():
            return (None, *_gradients(ctx, grad_out, grad_lse))


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> list[Tensor | None]:
    """Gradients of the mask, query, key, value and weight."""
    attn_mask, *inputs, out, lse, all_lse = ctx.saved_tensors
    plan: Plan = ctx.plan._replace(attn_mask=attn_mask)
    need_mask, *need_inputs = ctx.needs_input_grad[1:6]
    needs = Needs._make((*need_inputs, need_mask))
    base = torch.zeros_like(lse) if grad_lse is None else grad_lse
    if grad_out is not None:
        base = base - (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    whole = parts.Whole(out, lse, grad_out, grad_lse, base)
    sums = parts.Sums(Inputs(*inputs), attn_mask, needs)
    if plan.exchange == "queries":
        _query_gradients(plan, inputs, whole._replace(lse=all_lse), sums)
    else:
        made = _ring_gradients if plan.exchange == "ring" else _key_gradients
        made(plan, inputs, whole, sums)
    totals = sums.mask, sums.query, sums.key, sums.value, sums.weight
    return [
        None if total is None else total.to(x.dtype)
        for total, x in zip(totals, (attn_mask, *inputs), strict=True)
    ]


def _empty(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Out and lse of rows without keys to attend to."""
    query, masks = inputs.query, plan.masks
    batch = Call(*inputs, plan.attn_mask, masks.lengths, masks.starts).batch()
    shape, dtype = (*batch, query.shape[-2]), lse_dtype(query.dtype)
    out = query.new_zeros(*shape, inputs.value.shape[-1], dtype=dtype)
    return out, query.new_full(shape, -torch.inf, dtype=dtype)


Blocks = Iterator[tuple[Ranges, Any]]


def _blocks(plan: Plan, key: Tensor, value: Tensor) -> Blocks:
    """Yields the keys and values that this process receives, and their positions."""
    if plan.exchange == "keys":
        yield _whole(plan.keys), gather(plan, (key, value), plan.keys)
        return
    ring = plan.ring()
    for step, block in enumerate(ring.blocks((key, value))):
        yield plan.keys[ring.before(step)], block


def _whole(layout: Sequence[Ranges]) -> Ranges:
    return ((0, sum(length(x) for x in layout)),)


def _key_gradients(plan: Plan, inputs: list[Tensor], whole: parts.Whole, sums: parts.Sums) -> None:
    query, key, value, weight = inputs
    block: Any = gather(plan, (key, value), plan.keys)
    of_all = sums.of_keys(*block)
    found = plan.part(Inputs(query, block[0], block[1], weight), _whole(plan.keys))
    if found:
        parts.backward(found[0], whole, of_all, found[1], alone=True)
    for name in ("key", "value"):
        total = getattr(of_all, name)
        if total is not None:
            dist.all_reduce(total, group=plan.group)
            setattr(sums, name, own_positions(plan, total, plan.keys))


def _by_queries(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Out and lse of this process's rows, and the lse of all: every process attends with all
    queries to its own keys."""
    (query,) = gather(plan, (inputs.query,), plan.rows)
    inputs = inputs._replace(query=query)
    found = plan.part(inputs, plan.keys[plan.rank], _whole(plan.rows))
    out, lse = parts.forward(found[0]) if found else _empty(plan, inputs)
    of_parts = torch.cat(gathered(lse[None], [1] * len(plan.rows), plan.group))
    whole = of_parts.logsumexp(0)
    out = parts.share(lse, whole).unsqueeze(-1) * out
    dist.all_reduce(out, group=plan.group)
    own_lse = own_positions(plan, whole.unsqueeze(-1), plan.rows).squeeze(-1)
    return own_positions(plan, out, plan.rows), own_lse, whole


def _query_gradients(
    plan: Plan, inputs: list[Tensor], whole: parts.Whole, sums: parts.Sums
) -> None:
    """Each process computes the gradients of its keys. Those of queries are added up."""
    query, key, value, weight = inputs
    grad_out, base = whole.grad_out, whole.base
    if grad_out is None:
        grad_out = torch.zeros_like(whole.out)
    (query,) = gather(plan, (query,), plan.rows)
    grad_out, base = gather(plan, (grad_out.to(base.dtype), base.unsqueeze(-1)), plan.rows)
    given = parts.Whole(grad_out, whole.lse, grad_out, None, base.squeeze(-1))
    of_all = copy.copy(sums)
    of_all.query = None if sums.query is None else torch.zeros_like(query, dtype=base.dtype)
    found = plan.part(Inputs(query, key, value, weight), plan.keys[plan.rank], _whole(plan.rows))
    if found:
        parts.backward(found[0], given, of_all, found[1], alone=False)
    if of_all.query is not None:
        dist.all_reduce(of_all.query, group=plan.group)
        sums.query = own_positions(plan, of_all.query, plan.rows)


def _ring_gradients(
    plan: Plan, inputs: list[Tensor], whole: parts.Whole, sums: parts.Sums
) -> None:
    """Sends the gradients of a block of keys back to the process that it came from, while those of
    the next block are computed."""
    query, key, value, weight = inputs
    ring, returning = plan.ring(), None
    alone = sum(plan.needed(plan.rank, other) for other in range(ring.processes)) == 1
    own = [x if need else None for x, need in ((key, sums.needs.key), (value, sums.needs.value))]
    message = packed(own) if sums.needs.key or sums.needs.value else None

    def gradient_of(block: Any, step: int) -> Tensor | None:
        """A function, so that its tensors are freed before the next block arrives."""
        keys, totals = plan.keys[ring.before(step)], sums
        if step > 0:
            totals = sums.of_keys(*block)
        found: Any = plan.part(Inputs(query, block[0], block[1], weight), keys)
        parts.backward(found[0], whole, totals, found[1], alone)
        if step == 0 or message is None:
            return None
        return packed((totals.key, totals.value)).to(message.dtype)

    for step, block in enumerate(ring.blocks((key, value))):
        gradient = None if block is None else gradient_of(block, step)
        block = None
        if step > 0 and message is not None:
            _add_returned(sums, returning, own)
            returning = ring.give_back(step, gradient, message)
    _add_returned(sums, returning, own)


def _add_returned(sums: parts.Sums, returning: Exchange | None, own: Any) -> None:
    received = None if returning is None else returning.wait()
    if received is not None:
        for total, part in zip((sums.key, sums.value), unpacked(received, own), strict=True):
            if total is not None:
                total.add_(part)
