"""Forward mode and second derivatives in plain PyTorch, on any device, a block of rows at a time:
the tangents of the outputs and of the gradients (math.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from additive_attn.backends.plain.blocks import unnarrowed
from additive_attn.backends.plain.pairs import OperatorPairs, sum_of
from additive_attn.backends.plain.plan import Block, blocks_of
from additive_attn.backends.plain.whole import is_finite
from additive_attn.spec.call import Inputs, TangentCall, Tangents, Upstream, lse_dtype
from additive_attn.spec.formula import widened
from additive_attn.spec.tangents import (
    FormulaPairs,
    Masks,
    Pairs,
    attention_tangents,
    score_tangents,
)

# The pairs of a block, for each of which a dozen numbers are kept.
_PAIRS = 2**20

Results = tuple[Tensor | None, ...]
Compute = Callable[["Block", TangentCall, "Part"], Results]


@unnarrowed
def tangent(*arguments: Any) -> tuple[Tensor, ...]:
    return _in_blocks(TangentCall.of(arguments), _attention)


@unnarrowed
def scores_tangent(*arguments: Any) -> tuple[Tensor, ...]:
    return _without_value(_in_blocks(TangentCall.of_scores(arguments), _scores))


def differentiable_tangent(*arguments: Any, in_blocks: bool = False) -> tuple[Tensor, ...]:
    """Computes ``tangent`` by operations that have derivatives. In one block they have batching
    rules too; in blocks, forward mode keeps no tensor (..., Lq, Lk, H)."""
    made = TangentCall.of(arguments)
    return _in_blocks(made, _attention, True) if in_blocks else _in_one(made, _attention)


def differentiable_scores_tangent(*arguments: Any, in_blocks: bool = False) -> tuple[Tensor, ...]:
    """Computes ``scores_tangent`` in the same way."""
    made = TangentCall.of_scores(arguments)
    results = _in_blocks(made, _scores, True) if in_blocks else _in_one(made, _scores)
    return _without_value(results)


def _without_value(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    score, query, key, _, weight, mask = results
    return score, query, key, weight, mask


class Part(NamedTuple):
    """What a block reads, in the computing dtype."""

    pairs: Pairs
    value: Tensor
    tangents: Tangents
    masks: Masks


def _in_blocks(
    made: TangentCall, compute: Compute, differentiable: bool = False
) -> tuple[Tensor, ...]:
    batch = made.call.batch()
    results = _zeros(made, batch, lse_dtype(made.call.query.dtype))
    for block in blocks_of(made.call, batch, pairs=None if differentiable else _PAIRS):
        part = _part(block, made, batch, differentiable)
        found = compute(block, made, part)
        if part.masks.shield is not part.masks.attended and not is_finite(sum_of(found)):
            masks = part.masks._replace(shield=part.masks.attended)
            found = compute(block, made, part._replace(masks=masks))
        _add(block, made, found, results)
    dtypes = [x.dtype for x in _zeros(made, torch.Size((0,)))]
    return tuple(x.to(dtype) for x, dtype in zip(results, dtypes, strict=True))


def _in_one(made: TangentCall, compute: Compute) -> tuple[Tensor, ...]:
    call, batch = made.call, made.call.batch()
    rows, keys = (0, call.query.shape[-2]), (0, call.key.shape[-2])
    block = Block(len(batch) + 1, (0, 1), rows, (keys,))
    results: list[Tensor] = []
    found = compute(block, made, _part(block, made, batch, differentiable=True))
    for result, zeros in zip(found, _zeros(made, batch), strict=True):
        if result is None or zeros.shape == (0,):
            results.append(zeros)
        elif len(results) == len(found) - 1:
            results.append(result.sum_to_size(zeros.shape).to(zeros.dtype))  # of the mask
        else:
            results.append(result.expand(zeros.shape).to(zeros.dtype))
    return tuple(results)


def _zeros(
    made: TangentCall, batch: torch.Size, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Returns results of zeros, empty where not needed; gradients in ``dtype`` until they are
    complete."""
    (query, key, value, weight), mask = made.call.inputs, made.call.attn_mask
    needs, rows, keys = made.needs, query.shape[-2], key.shape[-2]
    computed = lse_dtype(query.dtype)

    def zeros(need: bool, shape: tuple[int, ...], dtype: torch.dtype = query.dtype) -> Tensor:
        return query.new_zeros(shape if need else (0,), dtype=dtype)

    pairs = (*batch, rows, keys)
    if len(made.need_outputs) == 1:
        outputs: tuple[Tensor, ...] = (zeros(made.need_outputs[0], pairs),)
    else:
        need_out, need_weights, need_lse = made.need_outputs
        outputs = (
            zeros(need_out, (*batch, rows, value.shape[-1])),
            zeros(need_weights, pairs),
            zeros(need_lse, (*batch, rows), computed),
        )
    grad_mask = zeros(False, ())
    if needs.mask and mask is not None and mask.is_floating_point():
        grad_mask = zeros(True, tuple(mask.shape), dtype or mask.dtype)
    return (
        *outputs,
        zeros(needs.query, (*batch, rows, query.shape[-1]), dtype or query.dtype),
        zeros(needs.key, (*batch, keys, key.shape[-1]), dtype or query.dtype),
        zeros(needs.value, (*batch, keys, value.shape[-1]), dtype or query.dtype),
        zeros(needs.weight, (*batch, weight.shape[-1]), computed),
        grad_mask,
    )


def _part(block: Block, made: TangentCall, batch: torch.Size, differentiable: bool) -> Part:
    call, tangents = made.call, made.tangents
    query, key, value, weight = (widened(x) for x in block.inputs(call.inputs))
    query = query.expand(*block.of_batch(batch), *query.shape[-2:])
    attn_mask, attended = block.masks(call.masking, query.device)
    factors = block.factors(call.options, batch, query.dtype)

    def part(cut: Callable[..., Tensor], tensor: Tensor | None, *rank: int) -> Tensor | None:
        return None if tensor is None else widened(cut(tensor, *rank))

    inputs = Inputs(query, key, value, weight)
    tangents = Tangents(
        part(block.of_rows, tangents.query),
        part(block.of_keys, tangents.key),
        part(block.of_keys, tangents.value),
        part(block.of_entries, tangents.weight, 1),
        part(block.of_mask, tangents.mask),
    )
    masks = Masks(attn_mask, attended, factors, attended if differentiable else None)
    pairs: Pairs = (
        FormulaPairs(inputs, tangents, masks)
        if differentiable
        else OperatorPairs(inputs, tangents)
    )
    return Part(pairs, value, tangents, masks)


def _attention(block: Block, made: TangentCall, part: Part) -> Results:
    def grads(upstream: tuple[Tensor | None, ...]) -> Upstream:
        out, weights, lse = upstream
        return Upstream(
            None if out is None else widened(block.of_rows(out)),
            None if weights is None else widened(block.of_pairs(weights)),
            None if lse is None else block.of_rows(lse.unsqueeze(-1)).squeeze(-1),
        )

    return attention_tangents(
        part.pairs, part.value, part.tangents, grads(made.upstream),
        grads(made.upstream_tangents), part.masks, made.call.scale, made.need_outputs, made.needs,
    )  # fmt: skip


def _scores(block: Block, made: TangentCall, part: Part) -> Results:
    grad, grad_tangent = (
        None if x is None else widened(block.of_pairs(x))
        for x in (*made.upstream, *made.upstream_tangents)
    )
    return score_tangents(
        part.pairs, part.tangents.mask, grad, grad_tangent, part.masks, made.call.scale,
        made.need_outputs[0], made.needs,
    )  # fmt: skip


def _add(block: Block, made: TangentCall, found: Results, results: tuple[Tensor, ...]) -> None:
    """Adds the results of a block. Each row of an output belongs to one block alone."""
    rows, keys, pairs = block.of_rows, "of_keys", "of_pairs"

    def numbers(tensor: Tensor) -> Tensor:
        return rows(tensor.unsqueeze(-1)).squeeze(-1)

    def entries(tensor: Tensor) -> Tensor:
        return block.of_entries(tensor, 1)

    outputs: tuple[Any, ...] = (rows, pairs, numbers)
    parts = (
        *(outputs if len(made.need_outputs) > 1 else (pairs,)),
        rows,
        keys,
        keys,
        entries,
        "of_mask",
    )
    for part, tensor, result in zip(parts, results, found, strict=True):
        if isinstance(part, str) and result is not None:
            block.write(part, tensor, result)
        elif result is not None:
            place = part(tensor)
            place += result
