"""One step of a decoder: forward, and the gradients that its backward returns immediately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from additive_attn.backends.plain.steps import with_term
from additive_attn.ops import dispatch
from additive_attn.ops.attend import masked_attention
from additive_attn.ops.autograd import attend
from additive_attn.ops.checks import checked_probability
from additive_attn.ops.location import location_features
from additive_attn.ops.memory import (
    Lent,
    Record,
    Shared,
    eager,
    is_batch,
    running_pass,
    summed,
    widened,
)
from additive_attn.ops.second_order import SingleLevelFunction, reduced
from additive_attn.ops.writes import version
from additive_attn.spec.call import Call, Inputs
from additive_attn.spec.dropout import draw_seed

_operators = torch.ops.additive_attn
_below_autograd = torch._C._AutoDispatchBelowAutograd
_will_run = torch._C._will_engine_execute_node
_autocasts = torch._C._is_any_autocast_enabled


def attend_step(
    lent: Lent,
    query: Tensor,
    *,
    location: Tensor | None = None,
    location_weight: Tensor | None = None,
    filters: Tensor | None = None,
    dropout_p: float = 0.0,
    several: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attends with one query per entry, or with several.

    Args:
        query: ``(..., H)``, or ``(..., query_dim)`` where :func:`lend` got query_weight; it has no
            dim of heads where query_weight projects to all of them.
        location: ``(..., F, Lk)``, with location_weight ``(F, H)`` or ``(..., F, H)``: the sum
            over F of their products is added inside the tanh.
        filters: ``(F, C, width)``; location ``(..., C, Lk)`` holds their inputs then. The features
            are computed here, and again in backward, so that no ``(..., F, Lk)`` is kept.
        dropout_p: probability of dropping a weight.
        several: query is ``(..., n, H)`` or ``(..., n, query_dim)``, n queries per entry, which
            share its keys and values. Not with a location.

    Returns:
        out ``(..., Dv)``, weights ``(..., Lk)`` before dropout; with several ``(..., n, Dv)`` and
        ``(..., n, Lk)``.
    """
    given = (query, location, location_weight)
    if not _records(lent, (*given, filters)):
        if location is not None and filters is not None:
            location = _each(location_features, location, filters)
        return _ordinary(lent, query, location, location_weight, dropout_p, several)
    if type(dropout_p) is not float or not 0.0 <= dropout_p <= 1.0:
        dropout_p = checked_probability("dropout_p", dropout_p)
    seed = draw_seed(query.device) if dropout_p > 0.0 else None
    if torch.is_grad_enabled() and (
        lent.node is not None or any(x is not None and x.requires_grad for x in (*given, filters))
    ):
        outputs: tuple[Tensor, Tensor] = _Step.apply(
            lent, seed, (dropout_p, several), *given, *lent.shared, filters
        )
        return outputs
    projected = _projected(query, lent.shared, several)
    with _below_autograd():
        location = _features(location, filters)
        out, weights, _ = _operators.step(
            *_arguments(
                lent, projected, lent.shared, location, location_weight, seed, dropout_p, several
            )
        )
    return out.squeeze(-2), weights.squeeze(-2)


def _records(lent: Lent, given: tuple[Tensor | None, ...]) -> bool:
    """Whether the step reads the prepared keys and may leave a record; if not, it is an ordinary
    call. Under autocast, a projection of queries that was lent without it would not be cast."""
    return (
        lent.prepared is not None
        and eager(given, lent.shared.weight)
        and version(lent.source.key) == lent.key_version
        and not (
            lent.shared.query_weight is not None
            and _autocasts()
            and torch.is_autocast_enabled(lent.shared.weight.device.type)
        )
    )


def _entries(location: Tensor) -> Tensor:
    """Reshapes ``(..., C, Lk)`` to ``(N, C, Lk)``, also with no keys, where a reshape could not
    infer N."""
    return location.unsqueeze(0) if location.dim() == 2 else location.flatten(0, -3)


def _each(function: Any, location: Tensor, *others: Any) -> Any:
    """Calls ``function`` with location inputs of any leading dims."""
    if location.dim() == 3:
        return function(location, *others)
    batch = location.shape[:-2]
    made: Tensor = function(_entries(location), *others)
    return made.view(*batch, *made.shape[1:])


def _features(location: Tensor | None, filters: Tensor | None) -> Tensor | None:
    if location is None or filters is None:
        return location
    made: Tensor = _each(_operators.location_features, location, filters)
    return made


def _projected(query: Tensor, shared: Shared, several: bool) -> Tensor:
    if shared.query_weight is None:
        return query
    projected = linear(query, shared.query_weight, shared.query_bias)
    key = shared.key
    hidden = key.shape[-1]
    if projected.shape[-1] == hidden and (
        query.dim() - several > key.dim() - 2 or key.shape[-3] != 1
    ):
        return projected
    heads = projected.unflatten(-1, (-1, hidden))
    return heads.transpose(-2, -3) if several else heads


def _arguments(
    lent: Lent, query: Tensor, shared: Shared, location: Tensor | None,
    location_weight: Tensor | None, seed: Tensor | None, dropout_p: float, several: bool,
) -> tuple[Any, ...]:  # fmt: skip
    memory = shared.key, shared.value, shared.weight, lent.prepared, lent.attn_mask, lent.lengths
    if several:
        memory = _for_several(*memory)
    key, value, weight, prepared, attn_mask, lengths = memory
    return (
        query.unsqueeze(-2), key, value, weight, prepared, location, location_weight, attn_mask,
        lengths, seed, dropout_p, lent.scale,
    )  # fmt: skip


def _for_several(
    key: Tensor, value: Tensor, weight: Tensor, prepared: Tensor | None,
    attn_mask: Tensor | None, lengths: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gives a memory a dim of size 1 for n queries per entry, each an entry of its own."""
    if prepared is not None and prepared.dim() > 1:
        prepared = prepared.unsqueeze(-3)
    if attn_mask is not None and attn_mask.dim() > 1:
        attn_mask = attn_mask.unsqueeze(-2)  # (..., n or 1, 1, Lk)
    if lengths is not None and lengths.dim() > 0:
        lengths = lengths.unsqueeze(-1)
    weight = weight if weight.dim() == 1 else weight.unsqueeze(-2)
    return key.unsqueeze(-3), value.unsqueeze(-3), weight, prepared, attn_mask, lengths


def _ordinary(
    lent: Lent, query: Tensor, location: Tensor | None, location_weight: Tensor | None,
    dropout_p: float, several: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes the step as one differentiable call."""
    compute = attend_apart if several and dropout_p > 0.0 else attend
    projected = _projected(query, lent.source, several)
    rows = projected if several else projected.unsqueeze(-2)
    inputs, lengths = _inputs(lent.source, rows, location, location_weight), lent.lengths
    if lengths is not None:
        if lengths.dim() > 2:
            lengths = lengths.flatten(1)  # (B, 1, 1), for beams or heads
        elif lengths.dim() == 0 and rows.dim() > 2 and lent.source.key.dim() == 2:
            lengths = lengths.reshape(1)  # for the beams of one sequence
    out, weights, _ = masked_attention(
        inputs, lent.attn_mask, lengths, False, None, dropout_p, lent.scale, True,
        lent.source.score_bias, compute=compute,
    )  # fmt: skip
    return (out, weights) if several else (out.squeeze(-2), weights.squeeze(-2))


def attend_apart(
    call: Call,
    need_weights: bool = False,
    score_bias: Tensor | None = None,
    need_lse: bool = True,
    compute: Any = attend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls ``compute`` with each row as an entry of its own, as in a step of prepared keys.
    Dropout numbers entries and rows, and must drop the same weights in both."""
    key, value, weight, _, attn_mask, lengths = _for_several(*call[1:4], None, *call[4:6])
    if score_bias is not None and score_bias.dim() > 1:
        score_bias = score_bias.unsqueeze(-2)
    rows = call._replace(
        query=call.query.unsqueeze(-2), key=key, value=value, weight=weight,
        attn_mask=attn_mask, lengths=lengths,
    )  # fmt: skip
    out, weights, lse = compute(rows, need_weights, score_bias, need_lse)
    weights = weights.squeeze(-2) if need_weights else weights
    return out.squeeze(-2), weights, lse.squeeze(-1) if need_lse else lse


def _inputs(
    shared: Shared, query: Tensor, location: Tensor | None, location_weight: Tensor | None
) -> Inputs:
    key, value = widened(shared.key, query.dtype), widened(shared.value, query.dtype)
    if location is not None and location_weight is not None:
        key = with_term(key, location, location_weight)
    return Inputs(query, key, value, shared.weight)


class _Step(SingleLevelFunction):
    """One step. Its backward returns the gradients that the decoder needs at once, and records
    what the others are computed from."""

    @staticmethod
    def forward(
        ctx: Any, lent: Lent, seed: Tensor | None, options: tuple[float, bool], query: Tensor,
        location: Tensor | None, location_weight: Tensor | None, *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        shared = Shared(*tensors[:6])  # type: ignore[arg-type]
        projected, features = (
            _projected(query, shared, options[1]),
            _features(location, tensors[6]),
        )
        out, weights, lse = _operators.step(
            *_arguments(lent, projected, shared, features, location_weight, seed, *options)
        )
        ctx.lent, ctx.options = lent, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            seed, query, location, location_weight, *tensors, projected, weights, lse,
            lent.lengths, lent.attn_mask,  # saved so that writing to them raises
        )  # fmt: skip
        # No views: a caller may write to the results.
        return out.squeeze(-2).detach(), weights.squeeze(-2).detach()

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad_out is None and grad_weights is None:
            return (None,) * len(needs)
        seed, query, location, location_weight, *tensors = ctx.saved_tensors
        shared, (filters, projected, weights, lse) = Shared(*tensors[:6]), tensors[6:10]
        if torch.is_grad_enabled() or any(map(is_batch, (grad_out, grad_weights))):
            upstream = (grad_out, grad_weights)
            given = (query, location, location_weight, *tensors)
            return _differentiable(ctx, upstream, seed, given)
        lent, (_, several), batch = ctx.lent, ctx.options, weights.shape[:-2]
        running = grad_key = None
        if lent.node is not None and _will_run(lent.node):
            running = running_pass(lent.node)
            if needs[6]:
                grad_key = _grad_key(running, shared.key, lse, location is not None, several)
        grad_out = None if grad_out is None else grad_out.unsqueeze(-2)
        features = _features(location, filters)
        grad_query, grad_scores, kept, grad_location, grad_location_weight, grad_weight = (
            _operators.step_backward(
                grad_out,
                None if grad_weights is None else grad_weights.unsqueeze(-2),
                None,
                *_arguments(
                    lent, projected, shared, features, location_weight, seed, *ctx.options
                ),
                weights, lse, grad_key,
            )
        )  # fmt: skip
        grad_query = reduced(grad_query.squeeze(-2), projected)
        rows = projected.expand(*batch, -1)
        if several:
            grad_scores, weights = grad_scores.squeeze(-2), weights.squeeze(-2)
            kept = kept if seed is None else kept.squeeze(-2)
            grad_out = None if grad_out is None else grad_out.squeeze(-2)
        else:
            rows = rows.unsqueeze(-2)
        if shared.query_weight is not None and grad_query.dim() > query.dim():
            # The projection returns all heads side by side.
            grad_query = (grad_query.transpose(-2, -3) if several else grad_query).flatten(-2)
        if running is not None:
            content = location is None and grad_key is None
            weighs = needs[7] and grad_out is not None
            running.records.append(
                Record(
                    query=rows,
                    grad_scores=grad_scores if content and (needs[6] or needs[8]) else None,
                    kept=None if not weighs else weights if seed is None else kept,
                    grad_out=grad_out if weighs else None,
                    raw_query=query if needs[9] or needs[10] else None,
                    grad_query=grad_query if needs[9] or needs[10] else None,
                )
            )
            if not content and needs[8]:
                running.grad_weight = summed(
                    running.grad_weight, grad_weight.sum_to_size(shared.weight.shape)
                )
        if needs[3] and shared.query_weight is not None:
            grad_query = grad_query @ shared.query_weight
        grad_filters = None
        if features is not None and (needs[4] or needs[12]):
            grad_location = reduced(grad_location, features)
            if filters is not None:
                grad_location, grad_filters = _operators.location_features_backward(
                    _entries(grad_location), _entries(location), filters, needs[4], needs[12],
                )  # fmt: skip
        return (
            None, None, None,
            grad_query if needs[3] else None,
            grad_location.view(location.shape) if needs[4] else None,
            reduced(grad_location_weight, location_weight) if needs[5] else None,
            None, None, None, None, None, None,
            grad_filters if needs[12] else None,
        )  # fmt: skip


def _grad_key(
    running: Any, key: Tensor, lse: Tensor, located: bool, several: bool
) -> Tensor | None:
    """What a step adds its gradient of the keys to; None where that is made for all steps. Plain
    PyTorch makes the gradients of all pairs in any case."""
    batch = lse.shape[:-1]
    at_once = located or (
        not several and batch == key.shape[:-2] and dispatch.on_plain_path(key.device)
    )
    if at_once and running.grad_key is None:
        running.grad_key = key.new_zeros((*batch, *key.shape[-2:]), dtype=lse.dtype)
    return running.grad_key if at_once else None


@torch.enable_grad()
def _differentiable(
    ctx: Any, upstream: Sequence[Tensor | None], seed: Tensor | None,
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns all gradients at once, as those of an ordinary call that is differentiated again."""
    # Views, since a query depends on the shared tensors through the steps before this one.
    views: list[Any] = [None if x is None else x.view_as(x) for x in tensors[:10]]
    query, location, location_weight = views[:3]
    lent, shared, filters = ctx.lent, Shared(*views[3:9]), views[9]
    features = location if filters is None else _each(location_features, location, filters)
    dropout_p, several = ctx.options
    memory = (*shared[:3], None, lent.attn_mask, lent.lengths)
    if several:
        memory = _for_several(*memory)
    rows = _projected(query, shared, several).unsqueeze(-2)
    inputs = _inputs(Shared(*memory[:3]), rows, features, location_weight)
    call = Call(
        *inputs, *memory[4:], seed=seed, dropout_p=dropout_p, scale=lent.scale
    )  # fmt: skip
    out, weights, _ = attend(call, True, shared.score_bias, need_lse=False)
    outputs = (out.squeeze(-2), weights.squeeze(-2))
    given = [i for i, grad in enumerate(upstream) if grad is not None]
    sources = (None, None, None, query, location, location_weight, *shared, filters)
    wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    leaves: Any = [sources[i] for i in wanted]
    found = torch.autograd.grad(
        [outputs[i] for i in given], leaves, [upstream[i] for i in given],
        create_graph=True, allow_unused=True,
    )  # fmt: skip
    grads: list[Tensor | None] = [None] * len(sources)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)
