"""A decoder's memory as a node of autograd, which computes the steps' shared gradients once.

A recurrent decoder attends T times to the same keys and values. Before the next step's backward
only the query's gradient is needed. So a step's backward records what the others are computed
from, and one pass over all records computes them at the end (math.md, eq. 16).

The engine runs the memory's node once, after all steps, even where none of them passed a gradient
to it. The node finds the records by the number of the running backward pass. Memory is
O(T B (Lk + H + Dv)). A small step on plain PyTorch is an ordinary call and keeps its energies:
computing them again would cost more than the record saves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Variable, forward_ad

from additive_attn.ops import dispatch
from additive_attn.ops.autocast import autocast, autocast_dtype
from additive_attn.ops.checks import is_wrapper
from additive_attn.ops.second_order import SingleLevelFunction, reduced
from additive_attn.ops.writes import version

_operators = torch.ops.additive_attn
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling, _tracing_state = torch.compiler.is_compiling, torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_pass_number = torch._C._current_graph_task_id
# Keys and values may be narrower than the queries: (dtype of the memory, of the queries).
NARROW_MEMORY = {(x, torch.float32) for x in (torch.bfloat16, torch.float16)}
# Plain PyTorch keeps the energies of every step for backward, up to so many elements per step.
WHOLE_ELEMENTS = 2**18
PLAIN_TYPES = {Tensor, torch.nn.Parameter}


class Shared(NamedTuple):
    """The tensors that all steps share. ``query_weight`` is None where queries are projected
    already; ``score_bias`` cancels in the softmax, and gets a zero gradient."""

    key: Tensor  # (..., Lk, H)
    value: Tensor  # (..., Lk, Dv)
    weight: Tensor  # (..., H)
    query_weight: Tensor | None = None  # (H, query_dim)
    query_bias: Tensor | None = None  # (H,)
    score_bias: Tensor | None = None


class Lent:
    """The result of :func:`lend`: the shared tensors as passed (``source``) and as steps use them
    (``shared``)."""

    __slots__ = (
        "__weakref__", "attn_mask", "key_version", "lengths", "node", "prepared", "scale",
        "shared", "source",
    )  # fmt: skip

    source: Shared
    shared: Shared
    lengths: Tensor | None  # (..., 1), int64
    attn_mask: Tensor | None  # (..., 1, Lk)
    scale: float
    prepared: Tensor | None  # None: every step is an ordinary call
    key_version: int  # of the keys that were prepared
    node: Any  # None: nothing shared needs a gradient


def lend(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float = 1.0,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    score_bias: Tensor | None = None,
    deferred: bool = True,
) -> Lent:
    """Prepares a memory for :func:`attend_step`.

    Args:
        key: projected, ``(..., Lk, H)``; also in 16 bits beside a float32 weight.
        value: ``(..., Lk, Dv)``, of key's dtype.
        weight: ``(H,)``, or ``(..., H)``.
        lengths, attn_mask: int64 ``(..., 1)``; bool or float ``(..., 1, Lk)``, True = attend.
        scale: factor on the scores.
        query_weight, query_bias: of the Linear that projects the queries, ``(H, query_dim)`` and
            ``(H,)``: their gradients are computed once for all steps too. With ``heads`` as the
            last leading dim of keys also ``(heads * H, query_dim)`` and ``(heads * H,)``.
        score_bias: passed only to receive a zero gradient.
        deferred: whether gradients are deferred, where that applies. If not, and where plain
            PyTorch computes small steps, every step is an ordinary call.
    """
    lent = Lent()
    lent.source = Shared(key, value, weight, query_weight, query_bias, score_bias)
    lent.lengths, lent.attn_mask, lent.scale = lengths, attn_mask, scale
    lent.prepared = lent.node = None
    lent.shared = shared = _autocasted(lent.source)
    kinds = shared.key.dtype, shared.weight.dtype
    fits = kinds[0] == kinds[1] or kinds in NARROW_MEMORY
    if not (
        deferred and fits and not computed_whole(shared.key)
        and eager(shared[:2], shared.key) and eager(shared[2:5], shared.weight)
        and shared.key.device == shared.weight.device
        and not any(is_wrapper(x) for x in (*shared, lengths, attn_mask) if x is not None)
        and (attn_mask is None or not attn_mask.requires_grad)
    ):  # fmt: skip
        return lent
    if torch.is_grad_enabled():
        lent.shared, lent.node = _through_node(lent)
    lent.key_version = version(lent.source.key)
    with torch.no_grad():
        lent.prepared = _operators.prepare_keys(shared.key.detach(), shared.weight.detach())
    return lent


def widened(memory: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns keys or values in the dtype of the queries, where they may be narrower. Other dtypes
    stay, and the call raises for them."""
    same = memory.dtype == dtype or (memory.dtype, dtype) not in NARROW_MEMORY
    return memory if same else memory.to(dtype)


def computed_whole(key: Tensor) -> bool:
    """Whether plain PyTorch computes a step as a whole and keeps its energies for backward: then a
    record would cost more than the gradients that it defers. Not in 16 bits, to which the
    gradients of each step would be rounded."""
    return (
        key.numel() <= WHOLE_ELEMENTS
        and key.dtype.itemsize > 2
        and dispatch.on_plain_path(key.device)
    )


def _autocasted(shared: Shared) -> Shared:
    """Casts keys, values and weight to autocast's dtype, once for all steps. Queries are projected
    under autocast."""
    dtype = autocast_dtype(shared.key.device.type)
    if dtype is None or torch.compiler.is_compiling():
        return shared
    cast = [autocast(x, dtype) for x in shared[:3]]
    return shared._replace(key=cast[0], value=cast[1], weight=cast[2])


def alone() -> bool:
    """Whether a call runs under eager autograd alone, with no trace, transform or mode."""
    return not (
        _is_compiling()
        or _functorch_active()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or _dispatch_modes() > 0
    )


def eager(tensors: Sequence[Tensor | None], like: Tensor) -> bool:
    """Whether a step may leave a record: it runs under eager autograd alone, on plain tensors of
    the dtype and device of ``like``."""
    dtype, device = like.dtype, like.device
    return (
        alone()
        and not like.is_meta
        and all(
            x is None or (type(x) in PLAIN_TYPES and x.dtype == dtype and x.device == device)
            for x in tensors
        )
    )


def is_batch(upstream: Tensor | None) -> bool:
    """Whether ``upstream`` is a batch of several gradients (``is_grads_batched=True``)."""
    return upstream is not None and torch._C._functorch.is_legacy_batchedtensor(upstream)


def _through_node(lent: Lent) -> tuple[Shared, Any]:
    needed = [x is not None and x.requires_grad for x in lent.shared]
    if not any(needed):
        return lent.shared, None
    outputs = _Memory.apply(lent, *lent.shared)
    shared: Any = [
        x if need else y for x, y, need in zip(outputs, lent.shared, needed, strict=True)
    ]
    return Shared(*shared), outputs[needed.index(True)].grad_fn


class Record(NamedTuple):
    """What the shared gradients need of one step. Dims are (..., r, n) for r rows, mostly 1."""

    query: Tensor  # projected
    grad_scores: Tensor | None  # G of equation 9; None where the keys' gradient is summed already
    kept: Tensor | None  # P o D; None without a gradient of out
    grad_out: Tensor | None
    raw_query: Tensor | None  # before its projection, and the projected one's gradient
    grad_query: Tensor | None


class _Pass:
    """The records of one backward pass, and the gradients that its steps sum up."""

    __slots__ = ("__weakref__", "grad_key", "grad_weight", "records")

    def __init__(self) -> None:
        self.records: list[Any] = []  # Record, or pairs of products.py
        self.grad_key: Tensor | None = None  # of steps with a location term
        self.grad_weight: Tensor | None = None

    def end(self) -> None:
        """Called when the pass is over. Only the engine holds the pass, through this method, so
        that the pass is freed after an exception too."""
        self.records.clear()


def running_pass(node: Any) -> _Pass:
    number = _pass_number()
    running: _Pass | None = node.passes.get(number)
    if running is None:
        running = _Pass()
        node.passes[number] = running
        Variable._execution_engine.queue_callback(running.end)
    return running


class _Memory(SingleLevelFunction):
    """The identity of the shared tensors. Its backward computes gradients from steps' records."""

    @staticmethod
    def forward(ctx: Any, lent: Lent, *shared: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.passes = WeakValueDictionary()
        ctx.spent = False  # True after a backward pass, which may have freed the graph
        ctx.masking = lent.attn_mask, lent.lengths, lent.scale
        # Not saved for backward, which would free them: where nothing is saved before this node,
        # another backward pass may follow for other steps. The steps save the tensors, and raise
        # after changes in place.
        aliases: list[Any] = [None if x is None else x.detach() for x in shared]
        ctx.shared = Shared(*aliases)
        # No views, whose errors after a change in place would name this function.
        return tuple(None if x is None else x.detach() for x in shared)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.spent = True
        running = ctx.passes.get(_pass_number())
        if running is None or not (running.records or running.grad_key is not None):
            return (None, *incoming)
        shared, needs = ctx.shared, ctx.needs_input_grad[1:]
        made = _shared_gradients(shared, needs, running, *ctx.masking)
        running.records.clear()
        gradients = (
            a if b is None else b if a is None else a + b
            for a, b in zip(made, incoming, strict=True)
        )
        return (None, *gradients)


def _shared_gradients(
    shared: Shared,
    needs: tuple[bool, ...],
    running: _Pass,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    key, value, weight = shared[:3]
    grad_key, grad_weight = running.grad_key, running.grad_weight
    if grad_key is not None:
        grad_key = reduced(grad_key, key)
    grad_value = grad_query_weight = grad_query_bias = None
    records = running.records
    scored = [record for record in records if record.grad_scores is not None]
    if scored and (needs[0] or needs[2]):
        query = _rows([record.query for record in scored], key)
        grad_scores = _rows([record.grad_scores for record in scored], key)
        _, from_scores, weight_rows, _ = _operators.scores_backward(
            grad_scores, query, key, weight, *_masks(attn_mask, lengths, key, scored), None, None,
            None, -1, -1, scale, False, needs[0], needs[2], False,
        )  # fmt: skip
        if needs[0]:
            grad_key = summed(grad_key, reduced(from_scores, key))
        if needs[2]:
            grad_weight = summed(grad_weight, weight_rows.sum_to_size(weight.shape))
    weighed = [record for record in records if record.kept is not None]
    if weighed and needs[1]:
        kept = _value_rows([record.kept for record in weighed], value)
        grad_out = _value_rows([record.grad_out for record in weighed], value)
        grad_value = reduced(kept.mT @ grad_out.to(kept.dtype), value)
        if grad_out.device.type != "cpu" or not math.isfinite(grad_out.sum().item()):
            grad_value = _cleared(grad_value, attn_mask, lengths)
    if records and (needs[3] or needs[4]):
        grad_query = torch.cat([_flat(record.grad_query) for record in records])
        if needs[3]:
            raw_query = torch.cat([_flat(record.raw_query) for record in records])
            grad_query_weight = grad_query.mT @ raw_query
        if needs[4]:
            grad_query_bias = grad_query.sum(0)
    grad_bias = (
        torch.zeros_like(shared.score_bias) if needs[5] and shared.score_bias is not None else None
    )
    made = grad_key, grad_value, grad_weight, grad_query_weight, grad_query_bias, grad_bias
    return tuple(
        None if x is None or y is None else x.to(y.dtype)
        for x, y in zip(made, shared, strict=True)
    )


def _flat(rows: Any) -> Tensor:
    flat: Tensor = rows.reshape(-1, rows.shape[-1])
    return flat


def _rows(steps: list[Any], memory: Tensor) -> Tensor:
    """Joins the steps' rows (..., 1, n) to rows (..., T, n) of the memory's entries. Where a batch
    of queries shares one memory, the batch counts as rows, so that no gradient is per query."""
    rows = steps[0] if len(steps) == 1 else torch.cat(steps, dim=-2)
    if memory.shape[:-2].numel() == 1 and rows.shape[:-2].numel() != 1:
        rows = rows.movedim(-2, 0).reshape(*memory.shape[:-2], -1, rows.shape[-1])
    return rows


def _value_rows(steps: list[Any], value: Tensor) -> Tensor:
    """Like :func:`_rows`, but the last leading dims that share values, as heads, are rows too."""
    rows = steps[0] if len(steps) == 1 else torch.cat(steps, dim=-2)
    batch, own, shared = rows.shape[:-2], value.shape[:-2], 0
    while shared < len(batch) and (shared >= len(own) or own[-1 - shared] == 1):
        shared += 1
    left, ones = len(batch) - shared, (1,) * min(shared, len(own))
    count = batch[left:].numel() * rows.shape[-2]
    return rows.reshape(*batch[:left], *ones, count, rows.shape[-1])


def _masks(
    attn_mask: Tensor | None, lengths: Tensor | None, key: Tensor, records: list[Record]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the memory's masks for the rows that :func:`_rows` returns."""
    batch = records[0].query.shape[:-2]
    if key.shape[:-2].numel() == 1 and batch.numel() != 1:
        ones, times = key.shape[:-2], sum(record.query.shape[-2] for record in records)
        if lengths is not None and lengths.numel() != 1:
            lengths = lengths.expand(*batch, 1).reshape(*ones, -1).repeat(*ones, times)
        if attn_mask is not None and attn_mask.shape[:-2].numel() != 1:
            rows = attn_mask.expand(*batch, *attn_mask.shape[-2:])
            attn_mask = rows.reshape(*ones, -1, rows.shape[-1]).repeat(*ones, times, 1)
    return attn_mask, lengths


def _cleared(grad_value: Tensor, attn_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Sets the gradient to 0 at keys that no query may attend to, also where upstream has NaN."""
    shape, masks = grad_value.shape[:-1], []
    if lengths is not None:
        masks.append(torch.arange(shape[-1], device=lengths.device) < lengths)
    if attn_mask is not None:
        attended = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        masks.append(attended.squeeze(-2))
    for attended in masks:
        attended = attended.expand(torch.broadcast_shapes(attended.shape, shape))
        reached = attended.to(grad_value.dtype).sum_to_size(shape) > 0
        grad_value = torch.where(reached.unsqueeze(-1), grad_value, 0.0)
    return grad_value


def summed(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
