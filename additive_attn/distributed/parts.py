"""Attention of some rows to a part of the keys, and its gradients under what all parts give.

A backend divides the weights of a call by their sum, so the backward of a part is that of the part
alone, and the merge is differentiated around it (math.md, eq. 22).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from additive_attn.distributed.layout import Ranges
from additive_attn.ops import dispatch
from additive_attn.ops.second_order import reduced
from additive_attn.spec.call import Call, Inputs, Needs, lse_dtype
from additive_attn.spec.dropout import keep_mask

# Pairs whose random words are made at a time, by plain PyTorch.
_DROPOUT_PAIRS = 2**20


class Part(NamedTuple):
    """A call without dropout, and where its rows and keys stand in the whole sequences."""

    call: Call
    rows: Ranges
    keys: Ranges
    seed: Tensor | None  # None: no dropout
    dropout_p: float


class Whole(NamedTuple):
    """Results of the rows over all keys, and their upstream gradients."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor | None
    base: Tensor | None  # the gradient of lse, less the product of out and its gradient

    def of(self, rows: slice) -> Whole:
        grad_out, base = self.grad_out, self.base
        return Whole(
            self.out[..., rows, :],
            self.lse[..., rows],
            None if grad_out is None else grad_out[..., rows, :],
            None if base is None else base[..., rows],
        )


class Sums:
    """Gradients of inputs, added up in the dtype that is computed in; None where not needed."""

    def __init__(self, inputs: Inputs, needs: Needs) -> None:
        self.needs = needs
        self.query, self.key, self.value, self.weight = map(_zeros, inputs, needs[:4])

    def of_keys(self, key: Tensor, value: Tensor) -> Sums:
        """The same sums but for other keys and values."""
        sums = copy.copy(self)
        sums.key, sums.value = _zeros(key, self.needs.key), _zeros(value, self.needs.value)
        return sums

    def add(self, gradients: tuple[Tensor, ...], rows: slice, keys: slice) -> None:
        targets = (
            None if self.query is None else self.query[..., rows, :],
            None if self.key is None else self.key[..., keys, :],
            None if self.value is None else self.value[..., keys, :],
            self.weight,
        )
        for target, gradient in zip(targets, gradients[:4], strict=True):
            if target is not None and gradient.numel():
                target += reduced(gradient, target)


def forward(part: Part) -> tuple[Tensor, Tensor]:
    """Out and lse, in the dtype that is computed in."""
    outs, lses = [], []
    for _, kept, lse in _blocks(part):
        out, kept_lse = _forward(kept)
        out = out.to(kept_lse.dtype)
        if lse is None:
            return out, kept_lse
        outs.append((share(kept_lse, lse) * _keep_scale(part)).unsqueeze(-1) * out)
        lses.append(lse)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def backward(part: Part, whole: Whole, sums: Sums, keys: slice, alone: bool) -> None:
    """Adds the gradients to ``sums``, where the keys stand at ``keys``. ``alone``: there is no
    other part, so ``whole`` are the results of this one."""
    for rows, kept, lse in _blocks(part):
        some = whole.of(rows)
        dropped = lse is not None
        if some.grad_out is not None or not dropped:
            out, own_lse = (some.out, some.lse) if alone and not dropped else _forward(kept)
            worth = share(own_lse, some.lse) * (_keep_scale(part) if dropped else 1.0)
            grad_out, grad_lse = some.grad_out, None if dropped else some.base
            if grad_out is not None:
                product = products(grad_out, out)
                grad_lse = product if grad_lse is None else product + grad_lse
                grad_out = (worth.unsqueeze(-1) * grad_out).to(grad_out.dtype)
            if grad_lse is not None:
                grad_lse = worth * grad_lse
            sums.add(_backward(kept, grad_out, grad_lse, own_lse, sums.needs), rows, keys)
        if lse is not None and some.base is not None:
            # All keys take part in the softmax, also those that dropout leaves out of the sum.
            scored, needs = _scored(part.call, rows), sums.needs._replace(value=False)
            grad_lse = share(lse, some.lse) * some.base
            sums.add(_backward(scored, None, grad_lse, lse, needs), rows, keys)


def _zeros(like: Tensor, need: bool) -> Tensor | None:
    dtype = lse_dtype(like.dtype)
    return torch.zeros(like.shape, dtype=dtype, device=like.device) if need else None


def products(grad_out: Tensor, out: Tensor) -> Tensor:
    """``grad_out . out`` of each row, in the dtype that is computed in."""
    dtype = lse_dtype(out.dtype)
    return (grad_out.to(dtype) * out.to(dtype)).sum(-1)


def share(lse: Tensor, whole: Tensor) -> Tensor:
    """What a part's weights are worth in the whole; 0 where its row is empty."""
    return torch.where(lse == -torch.inf, 0.0, (lse - whole).exp())


def _keep_scale(part: Part) -> float:
    return 0.0 if part.dropout_p == 1 else 1 / (1 - part.dropout_p)


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    out, _, lse = dispatch.below_autograd(dispatch.forward_directly, *call, False)
    return out, lse


def _backward(
    call: Call, grad_out: Tensor | None, grad_lse: Tensor | None, lse: Tensor, needs: Needs
) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = dispatch.below_autograd(
        dispatch.backward_directly, grad_out, None, grad_lse, *call, lse, *needs
    )
    return gradients


def _blocks(part: Part) -> Iterator[tuple[slice, Call, Tensor | None]]:
    """The call; with dropout, for each block of rows, the call on the keys that are kept, and the
    lse over all keys: what is kept is a set of keys with a share of its own."""
    call, seed = part.call, part.seed
    if seed is None:
        yield slice(None), call, None
        return
    batch, row = call.batch(), 0
    at_once = max(_DROPOUT_PAIRS // max(batch.numel() * call.key.shape[-2], 1), 1)
    for first, last in part.rows:
        for start in range(first, last, at_once):
            stop = min(start + at_once, last)
            rows, row = slice(row, row + stop - start), row + stop - start
            kept = [
                keep_mask(seed, batch, (start, stop), keys, part.dropout_p)
                for keys in part.keys
                if keys[0] < keys[1]
            ]
            some = _of_rows(call, rows)._replace(attn_mask=torch.cat(kept, -1))
            yield rows, some, _forward(_scored(call, rows))[1]


def _scored(call: Call, rows: slice) -> Call:
    """The call of some rows without values: its lse."""
    return _of_rows(call, rows)._replace(value=call.value[..., :0])


def _of_rows(call: Call, rows: slice) -> Call:
    def of(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dim() == 0 or x.shape[-1] == 1 else x[..., rows]

    return call._replace(
        query=call.query[..., rows, :], lengths=of(call.lengths), starts=of(call.starts)
    )
