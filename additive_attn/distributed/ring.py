"""Forward and backward over the keys of all processes, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from additive_attn.distributed import parts
from additive_attn.distributed.exchange import Exchange, Ring, gathered, packed, unpacked
from additive_attn.distributed.layout import Masks, Ranges, cut, in_order, length
from additive_attn.merge import merge_attention
from additive_attn.spec.call import Call, Inputs, Needs, Options, lse_dtype


class Plan(NamedTuple):
    """How a call is computed; equal on all processes but for masks and rank."""

    group: dist.ProcessGroup
    options: Options
    masks: Masks
    rows: tuple[Ranges, ...]  # of each process
    keys: tuple[Ranges, ...]
    gathers: bool

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def whole_keys(self) -> Ranges:
        return ((0, sum(length(x) for x in self.keys)),)

    def ring(self) -> Ring:
        return Ring(self.group, self.needed, [length(x) for x in self.keys])

    def needed(self, a: int, b: int) -> bool:
        """Whether a row of process a may attend to a key of process b."""
        bounds = self.masks.bounds(self.rows[a], self.keys[b])
        return bounds.first < bounds.last

    def part(self, inputs: Inputs, keys: Ranges) -> tuple[parts.Part, slice] | None:
        """The call of this process's rows and these keys, and which of them are used."""
        rows, (seed, dropout_p, scale) = self.rows[self.rank], self.options
        bounds = self.masks.bounds(rows, keys)
        if bounds.first >= bounds.last:
            return None
        query, key, value, weight = inputs
        used = slice(*bounds)
        starts, lengths = self.masks.intervals(rows, keys, bounds, query.device)
        call = Call(
            query, key[..., used, :], value[..., used, :], weight, lengths=lengths, starts=starts,
            scale=scale,
        )  # fmt: skip
        return parts.Part(call, rows, cut(keys, bounds), seed, dropout_p), used


class ContextParallel(torch.autograd.Function):
    """Attention of this process's rows to the keys of all; takes a plan and the inputs."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value, weight = inputs
        out = lse = None
        for keys, block in _blocks(plan, key, value):
            found = block and plan.part(Inputs(query, block[0], block[1], weight), keys)
            if found:
                result = parts.forward(found[0])
                results = [result] if out is None else [(out, lse), result]
                out, lse = merge_attention(*zip(*results, strict=True))
        if out is None or lse is None:
            batch = Call(
                query, key, value, weight, None, plan.masks.lengths, plan.masks.starts
            ).batch()
            shape = (*batch, query.shape[-2])
            out = query.new_zeros(*shape, value.shape[-1])
            lse = query.new_full(shape, -torch.inf, dtype=lse_dtype(query.dtype))
        out = out.to(query.dtype)
        ctx.plan = plan
        ctx.save_for_backward(*inputs, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        plan: Plan = ctx.plan
        *inputs, out, lse = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[1:5])._replace(mask=False)
        base = grad_lse
        if grad_out is not None:
            product = parts.products(grad_out, out)
            base = -product if grad_lse is None else grad_lse - product
        whole = parts.Whole(out, lse, grad_out, base)
        sums = parts.Sums(Inputs(*inputs), needs)
        (_gathered_gradients if plan.gathers else _ring_gradients)(plan, inputs, whole, sums)
        totals = sums.query, sums.key, sums.value, sums.weight
        gradients = (
            None if total is None else total.to(x.dtype)
            for total, x in zip(totals, inputs, strict=True)
        )
        return (None, *gradients)


Blocks = Iterator[tuple[Ranges, Any]]


def _blocks(plan: Plan, key: Tensor, value: Tensor) -> Blocks:
    """Keys and values that this process gets one after another, and their positions."""
    if plan.gathers:
        yield plan.whole_keys, _gather(plan, key, value)
        return
    ring = plan.ring()
    for step, block in enumerate(ring.blocks((key, value))):
        yield plan.keys[ring.before(step)], block


def _gather(plan: Plan, key: Tensor, value: Tensor) -> list[Any]:
    sizes = [length(x) for x in plan.keys]
    shards = gathered(packed((key, value)), sizes, plan.group)
    return unpacked(in_order(shards, plan.keys), (key, value))


def _gathered_gradients(
    plan: Plan, inputs: list[Tensor], whole: parts.Whole, sums: parts.Sums
) -> None:
    query, key, value, weight = inputs
    block: Any = _gather(plan, key, value)
    of_all = sums.of_keys(*block)
    found = plan.part(Inputs(query, block[0], block[1], weight), plan.whole_keys)
    if found:
        parts.backward(found[0], whole, of_all, found[1], alone=True)
    if sums.needs.key or sums.needs.value:
        total = packed((of_all.key, of_all.value))
        dist.all_reduce(total, group=plan.group)
        own = torch.cat([total[slice(*x)] for x in plan.keys[plan.rank]])
        sums.key, sums.value = unpacked(own, (sums.key, sums.value))


def _ring_gradients(
    plan: Plan, inputs: list[Tensor], whole: parts.Whole, sums: parts.Sums
) -> None:
    """Gradients of a block of keys go back to the process that it came from, while the next block
    is computed with."""
    query, key, value, weight = inputs
    ring, returning = plan.ring(), None
    alone = sum(plan.needed(plan.rank, other) for other in range(ring.processes)) == 1
    own = [x if need else None for x, need in ((key, sums.needs.key), (value, sums.needs.value))]
    message = packed(own) if sums.needs.key or sums.needs.value else None

    def gradient_of(block: Any, step: int) -> Tensor | None:
        """In a function, which frees what it needs before the next block arrives."""
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
