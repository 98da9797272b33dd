"""Attention of some rows to a part of the keys, and its gradients given the results of all parts.

Given the lse and the gradient sums of all keys, each pair's gradient depends on that pair alone
(math.md, eq. 9): no part's forward is computed again. A backend's backward divides the weights of
a call by their sum, so it serves only rows without keys in other parts. The gradients of other
rows are computed from scores and their backward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from additive_attn.distributed.layout import Bounds, Masks, Ranges, cut, length
from additive_attn.ops import dispatch
from additive_attn.ops.second_order import reduced
from additive_attn.spec.call import Call, Inputs, Needs, lse_dtype
from additive_attn.spec.dropout import keep_mask

# Pairs whose random words plain PyTorch computes at a time.
_DROPOUT_PAIRS = 2**20
# Pairs whose scores are kept at a time in backward.
_PAIRS = 2**21
# Keys of a tile, whose gradients are held beside their sums.
_KEYS = 2**11


class Part(NamedTuple):
    """A call without dropout, and the positions of its rows and keys in the whole sequences."""

    call: Call
    rows: Ranges
    keys: Ranges
    masks: Masks
    seed: Tensor | None  # None: no dropout
    dropout_p: float


class Whole(NamedTuple):
    """Results of the rows over all keys, and their upstream gradients."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor | None
    grad_lse: Tensor | None
    base: Tensor  # the gradient of lse, minus the product of out and its gradient


class Sums:
    """Sums of gradients of inputs, in the dtype of the computation; None where not needed."""

    def __init__(self, inputs: Inputs, attn_mask: Tensor | None, needs: Needs) -> None:
        self.needs = needs
        self.query, self.key, self.value, self.weight = map(_zeros, inputs, needs[:4])
        self.mask = None if attn_mask is None else _zeros(attn_mask, needs.mask)

    def of_keys(self, key: Tensor, value: Tensor) -> Sums:
        """Returns the same sums, except that keys and values are others."""
        sums = copy.copy(self)
        sums.key, sums.value = _zeros(key, self.needs.key), _zeros(value, self.needs.value)
        return sums

    def add(
        self, gradients: tuple[Tensor, ...], rows: slice, keys: slice, positions: Ranges
    ) -> None:
        """Adds gradients of query, key, value, weight and, over all pairs or in its shape, of a
        mask: those of some rows, and of ``keys``, which are at ``positions`` in the whole
        sequence."""
        targets = (
            None if self.query is None else self.query[..., rows, :],
            None if self.key is None else self.key[..., keys, :],
            None if self.value is None else self.value[..., keys, :],
            self.weight,
        )
        for target, gradient in zip(targets, gradients[:4], strict=True):
            if target is not None and gradient.numel():
                target += reduced(gradient, target)
        if self.mask is not None:
            mask, gradient = self.mask, gradients[4]
            mask = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
            if mask.dim() == 0 or mask.shape[-1] == 1:
                mask += reduced(gradient, mask)
                return
            sizes = [length((x,)) for x in positions]
            for held, part in zip(positions, gradient.split(sizes, -1), strict=True):
                target = mask[..., slice(*held)]
                target += reduced(part, target)


def forward(part: Part) -> tuple[Tensor, Tensor]:
    """Returns out and lse, in the dtype of the computation."""
    outs, lses = [], []
    for _, kept, lse in _blocks(part):
        out, kept_lse = _forward(kept)
        out = out.to(kept_lse.dtype)
        if lse is None:
            return out, kept_lse
        outs.append((share(kept_lse, lse) * keep_scale(part)).unsqueeze(-1) * out)
        lses.append(lse)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def backward(part: Part, whole: Whole, sums: Sums, keys: slice, alone: bool) -> None:
    """Adds the gradients to ``sums``, in which the keys are at ``keys``. ``alone``: there is no
    other part, so ``whole`` holds the results of this one."""
    call, needs = part.call, sums.needs
    if alone and part.seed is None:
        gradients = dispatch.below_autograd(
            dispatch.backward_directly, whole.grad_out, None, whole.grad_lse, *call, whole.lse,
            *needs,
        )  # fmt: skip
        sums.add(gradients, slice(None), keys, part.keys)
        return
    # An empty row has no gradient, whatever its upstream gradient is, and its scores are -inf.
    lse = whole.lse.unsqueeze(-1)
    empty = lse == -torch.inf
    lse, base = lse.masked_fill(empty, 0.0), whole.base.unsqueeze(-1).masked_fill(empty, 0.0)
    grad_out = None
    if whole.grad_out is not None:
        grad_out = whole.grad_out.to(lse.dtype).masked_fill(empty, 0.0)
    for rows, columns, tile in _tiles(part):
        some = None if grad_out is None else grad_out[..., rows, :]
        gradients = _tile_gradients(tile, lse[..., rows, :], some, base[..., rows, :], needs)
        first = keys.start + columns.start
        sums.add(gradients, rows, slice(first, first + tile.call.key.shape[-2]), tile.keys)


def _tile_gradients(
    tile: Part, lse: Tensor, grad_out: Tensor | None, base: Tensor, needs: Needs
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, weight, and of a mask over all pairs."""
    query, key, value, weight, *masking = tile.call[:11]
    scored = query, key, weight, *masking, tile.call.scale
    scores = dispatch.below_autograd(dispatch.scores_directly, *scored)
    weights = (scores - lse).exp_()
    grad_value, grad_scores = query.new_empty(0), base
    if grad_out is not None:
        kept, grad_scores = weights, grad_out @ value.mT
        if tile.seed is not None:
            keep = kept_pairs(tile, tile.call.batch()).to(lse.dtype).mul_(keep_scale(tile))
            kept, grad_scores = weights * keep, grad_scores.mul_(keep)
        if needs.value:
            grad_value = kept.mT @ grad_out
        grad_scores = grad_scores.add_(base)
    # A masked pair has no gradient, whatever its value holds.
    grad_scores = weights.mul_(grad_scores).masked_fill_(scores == -torch.inf, 0.0)
    given = grad_scores.sum_to_size(scores.shape)
    grad_query, grad_key, grad_weight, _ = dispatch.below_autograd(
        dispatch.scores_backward_directly, given, *scored, needs.query, needs.key, needs.weight,
        False,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_weight, grad_scores


def _tiles(part: Part) -> Iterator[tuple[slice, slice, Part]]:
    """Yields some rows and some keys at a time, in the dtype of the computation, without keys that
    ``is_causal`` or ``window`` masks for all of the rows."""
    call = part.call
    num_rows, num_keys = call.query.shape[-2], call.key.shape[-2]
    pairs = max(_PAIRS // max(call.batch().numel(), 1), 1)
    most_keys = min(_KEYS, num_keys)
    most_rows = max(pairs // most_keys, 1)
    for first in range(0, num_keys, most_keys):
        positions = cut(part.keys, Bounds(first, first + most_keys))
        for start in range(0, num_rows, most_rows):
            rows = slice(start, start + most_rows)
            held = cut(part.rows, Bounds(start, start + most_rows))
            bounds = part.masks.bounds(held, positions)
            if bounds.first < bounds.last:
                columns = slice(first + bounds.first, first + bounds.last)
                tile = _widened(_of_keys(_of_rows(call, rows), columns))
                yield (
                    rows,
                    columns,
                    part._replace(call=tile, rows=held, keys=cut(positions, bounds)),
                )


def _zeros(like: Tensor, need: bool) -> Tensor | None:
    dtype = lse_dtype(like.dtype)
    return torch.zeros(like.shape, dtype=dtype, device=like.device) if need else None


def share(lse: Tensor, whole: Tensor) -> Tensor:
    """The share of a part's weights in the whole; 0 where its row is empty."""
    return torch.where(lse == -torch.inf, 0.0, (lse - whole).exp())


def keep_scale(part: Part) -> float:
    return 0.0 if part.dropout_p == 1 else 1 / (1 - part.dropout_p)


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    out, _, lse = dispatch.below_autograd(dispatch.forward_directly, *call, False)
    return out, lse


def kept_pairs(part: Part, batch: torch.Size) -> Tensor:
    """Returns which pairs dropout keeps, by position in the whole sequences."""
    rows = [
        torch.cat([keep_mask(part.seed, batch, x, y, part.dropout_p) for y in part.keys], -1)  # type: ignore[arg-type]
        for x in part.rows
        if x[0] < x[1]
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows, -2)


def _blocks(part: Part) -> Iterator[tuple[slice, Call, Tensor | None]]:
    """Yields the call. With dropout, yields for each block of rows the call on the keys that are
    kept, and the lse over all keys: the kept keys are a set with a share of its own."""
    call = part.call
    if part.seed is None:
        yield slice(None), call, None
        return
    batch, num_rows = call.batch(), call.query.shape[-2]
    at_once = max(_DROPOUT_PAIRS // max(batch.numel() * call.key.shape[-2], 1), 1)
    for start in range(0, num_rows, at_once):
        rows = slice(start, min(start + at_once, num_rows))
        held = part._replace(rows=cut(part.rows, Bounds(start, rows.stop)))
        some, kept = _of_rows(call, rows), kept_pairs(held, batch)
        scored = some._replace(value=some.value[..., :0])
        if (mask := some.attn_mask) is not None:
            floating = mask.dtype != torch.bool
            kept = torch.where(kept, mask, -torch.inf) if floating else kept & mask
        yield rows, some._replace(attn_mask=kept), _forward(scored)[1]


def _of_rows(call: Call, rows: slice) -> Call:
    def of(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dim() == 0 or x.shape[-1] == 1 else x[..., rows]

    mask = call.attn_mask
    if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return call._replace(
        query=call.query[..., rows, :], attn_mask=mask, lengths=of(call.lengths),
        starts=of(call.starts),
    )  # fmt: skip


def _of_keys(call: Call, keys: slice) -> Call:
    def of(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x - keys.start).clamp_(0, keys.stop - keys.start)

    mask = call.attn_mask
    if mask is not None and mask.dim() > 0 and mask.shape[-1] > 1:
        mask = mask[..., keys]
    return call._replace(
        key=call.key[..., keys, :], value=call.value[..., keys, :], attn_mask=mask,
        lengths=of(call.lengths), starts=of(call.starts),
    )  # fmt: skip


def _widened(call: Call) -> Call:
    """Casts a call to the dtype of the computation: scores of 16 bits would be too coarse."""
    dtype, mask = lse_dtype(call.query.dtype), call.attn_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    return call._replace(
        **{n: x.to(dtype) for n, x in call.inputs._asdict().items()}, attn_mask=mask
    )
