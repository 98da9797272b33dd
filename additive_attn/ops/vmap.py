"""The operators under ``torch.func.vmap``: the mapped dim becomes the first batch dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from additive_attn.ops import dispatch
from additive_attn.ops.schemas import registrations

# Dims of each argument of a call that are not batch dims; None for what is no tensor.
_CALL_RANKS = (2, 2, 2, 1, 2, 1, 1, 2, 3, None, None, 0, None, None)
_BACKWARD_RANKS = (2, 2, 1, *_CALL_RANKS, 1)
_TANGENT_RANKS = (*_BACKWARD_RANKS, 2, 2, 1, 2, 2, 2, 1, 2)
_SEED, _LSE = 11, len(_BACKWARD_RANKS) - 1
_SCORES_RANKS = (2, 2, 1, *_CALL_RANKS[4:11], None)
_SCORES_BACKWARD_RANKS = (2, *_SCORES_RANKS)
_SCORES_TANGENT_RANKS = (*_SCORES_BACKWARD_RANKS, 2, 2, 2, 1, 2)


def _forward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    if arguments[_SEED] is not None and in_dims[_SEED] is None:
        raise RuntimeError(
            "additive_attn drops weights by their position in the batch, so under "
            "torch.func.vmap its dropout cannot be the same for every sample "
            f"(randomness={info.randomness!r}). Call vmap with randomness='different', or set "
            "dropout_p=0."
        )
    outputs = dispatch.forward(*_fold(arguments[:14], in_dims, _CALL_RANKS), *arguments[14:])
    return outputs, (0, 0 if arguments[14] else None, 0)


def _backward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    # Upstream gradients, query and lse have the whole batch.
    return _derivative(
        info, in_dims, arguments, dispatch.backward, _BACKWARD_RANKS, (0, 1, 2, 3, _LSE), mask=7
    )


def _tangent(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    whole = 0, 1, 2, 3, _LSE, _LSE + 1, _LSE + 2, _LSE + 3
    return _derivative(info, in_dims, arguments, dispatch.tangent, _TANGENT_RANKS, whole, mask=7)


def _scores(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    return dispatch.scores(*_fold(arguments, in_dims, _SCORES_RANKS)), 0


def _scores_backward(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    return _derivative(
        info, in_dims, arguments, dispatch.scores_backward, _SCORES_BACKWARD_RANKS, (0, 1), mask=4
    )


def _scores_tangent(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    whole = 0, 1, len(_SCORES_BACKWARD_RANKS)
    return _derivative(
        info, in_dims, arguments, dispatch.scores_tangent, _SCORES_TANGENT_RANKS, whole, mask=4
    )


def _derivative(
    info: Any, in_dims: Sequence[int | None], arguments: Sequence[Any], operator: Any,
    ranks: Sequence[int | None], whole: Sequence[int], mask: int,
) -> tuple[Any, Any]:  # fmt: skip
    """``whole`` lists the arguments that have the whole batch. The gradient of the mask, which is
    the last result, has the shape of the mask."""
    count = len(ranks)
    call, dims, needs = list(arguments[:count]), list(in_dims[:count]), arguments[count:]
    out_dims = tuple(0 if need else None for need in needs)
    seed = ranks.index(0) if 0 in ranks else None
    if seed is not None and call[seed] is not None and dims[seed] is None:
        # All mapped entries share one dropout mask, as in a Jacobian. Folding would give each its
        # own.
        entries = []
        for i in range(info.batch_size):
            entry = [x if d is None else x.select(d, i) for x, d in zip(call, dims, strict=True)]
            entries.append(operator(*entry, *needs))
        stacked = zip(zip(*entries, strict=True), needs, strict=True)
        return tuple(torch.stack(x) if need else x[0] for x, need in stacked), out_dims
    attn_mask, mask_dim = call[mask], dims[mask]
    for i in [*whole, *([mask] if needs[-1] else [])]:
        if call[i] is not None and dims[i] is None:
            call[i] = call[i].expand(info.batch_size, *call[i].shape)
            dims[i] = 0
    *results, grad_mask = operator(*_fold(call, dims, ranks), *needs)
    if needs[-1] and attn_mask is not None:
        shape = list(attn_mask.shape)
        if mask_dim is not None:
            del shape[mask_dim]
        grad_mask = grad_mask.reshape(info.batch_size, *shape)
    return (*results, grad_mask), out_dims


def _keep_mask(
    info: Any, in_dims: tuple[int | None, ...], seed: Tensor, batch: Sequence[int], *rest: Any
) -> tuple[Tensor, int]:
    """Entries are numbered as the folded operators number them."""
    seed = seed.movedim(in_dims[0] or 0, 0)
    ones = (1,) * (len(batch) + 1 - seed.dim())
    seed = seed.reshape(info.batch_size, *ones, *seed.shape[1:])
    return torch.ops.additive_attn.keep_mask(seed, (info.batch_size, *batch), *rest), 0


def _fold(
    arguments: Sequence[Any], in_dims: Sequence[int | None], ranks: Sequence[int | None]
) -> list[Any]:
    """Makes the mapped dim the first batch dim of every tensor that has it; the operators
    broadcast the rest."""
    arguments, in_dims = _one_set_of_tiles(arguments, in_dims, ranks)
    tensors = {i: x for i, x in enumerate(arguments) if isinstance(x, Tensor)}
    own = {i: ranks[i] or 0 for i in tensors}
    depth = max(x.dim() - (in_dims[i] is not None) - own[i] for i, x in tensors.items())
    folded = list(arguments)
    for i, x in tensors.items():
        dim = in_dims[i]
        if dim is not None:
            x = x.movedim(dim, 0)
            ones = (1,) * (depth + own[i] + 1 - x.dim())
            folded[i] = x.reshape(x.shape[:1] + ones + x.shape[1:])
    return folded


def _one_set_of_tiles(
    arguments: Sequence[Any], in_dims: Sequence[int | None], ranks: Sequence[int | None]
) -> tuple[Sequence[Any], Sequence[int | None]]:
    """Tiles have no batch dims: mapped ones are joined, and the tables' numbers are shifted."""
    at = ranks.index(3)
    tiles, dim = arguments[at], in_dims[at]
    if tiles is None or dim is None:
        return arguments, in_dims
    arguments, dims, tiles = list(arguments), list(in_dims), tiles.movedim(dim, 0)
    table, own = arguments[at - 1], dims[at - 1]
    table = table.movedim(own, 0) if own is not None else table.expand(len(tiles), *table.shape)
    added = torch.arange(len(tiles), dtype=table.dtype, device=table.device) * tiles.shape[1]
    added = added.reshape(-1, *(1,) * (table.dim() - 1))
    named = (table > 1) & (table < tiles.shape[1] + 2)  # higher numbers must not name a tile now
    arguments[at - 1] = torch.where(named, table + added, (table == 1).to(table.dtype))
    arguments[at], dims[at - 1], dims[at] = tiles.flatten(0, 1), 0, None
    return arguments, dims


for _rule in (
    _forward, _backward, _tangent, _scores, _scores_backward, _scores_tangent, _keep_mask,
):  # fmt: skip
    _name = _rule.__name__.removeprefix("_")
    torch.library.register_vmap(f"additive_attn::{_name}", _rule, lib=registrations)
