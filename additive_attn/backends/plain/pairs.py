"""Sums over the features of pairs for the tangents (math.md, section 9): two operators, and a
class by which the equations call them. No tensor (..., Lq, Lk, H) is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from additive_attn.backends.plain.blocks import unnarrowed
from additive_attn.backends.plain.plan import Block, blocks_of
from additive_attn.backends.plain.whole import is_finite
from additive_attn.spec.call import Call, Inputs, Needs, Tangents
from additive_attn.spec.tangents import FormulaPairs, Masks


class OperatorPairs:
    """Computes the sums by operators that keep no number per pair and feature. Their tensors are
    (entries, ...)."""

    def __init__(self, inputs: Inputs, tangents: Tangents) -> None:
        query, key, _, weight = inputs
        self.batch = query.shape[:-2]
        self.arguments = (
            self.flat(query, 2), self.flat(key, 2), self.flat(weight, 1),
            self.flat(tangents.query, 2, query), self.flat(tangents.key, 2, key),
            self.flat(tangents.weight, 1, weight),
        )  # fmt: skip

    def flat(self, x: Tensor | None, rank: int, like: Tensor | None = None) -> Tensor:
        """Returns ``x`` contiguous over all entries; zeros like ``like`` in the place of None."""
        if x is None:
            assert like is not None
            return like.new_zeros(self.batch.numel(), *like.shape[-rank:])
        own = x.shape[-rank:]
        return x.expand(*self.batch, *own).reshape(self.batch.numel(), *own).contiguous()

    def scores(self) -> tuple[Tensor, Tensor]:
        found = torch.ops.additive_attn.pair_scores(*self.arguments)
        score, tangent = (x.reshape(*self.batch, *x.shape[-2:]) for x in found)
        return score, tangent

    def gradients(
        self, grad: Tensor | None, grad_tangent: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        wanted = needs.query, needs.key, needs.weight
        like = grad_tangent if grad is None else grad
        if like is None or not any(wanted):
            return None, None, None
        grads = (self.flat(x, 2, like) for x in (grad, grad_tangent))
        found = torch.ops.additive_attn.pair_gradients(*grads, *self.arguments, *wanted)
        query, key, weight = (
            x.reshape(*self.batch, *x.shape[1:]) if need else None
            for x, need in zip(found, wanted, strict=True)
        )
        return query, key, weight


@unnarrowed
def pair_scores(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums over features of equations 1 and 22."""
    query, key = arguments[:2]
    found = query.new_empty(2, query.shape[0], query.shape[-2], key.shape[-2])
    for block in blocks_of(Call(query, key, key[..., :0], arguments[2]), query.shape[:1]):
        for part, to in zip(_formula(block, arguments, Masks()).scores(), found, strict=True):
            block.of_pairs(to).copy_(part)
    return found[0], found[1]


@unnarrowed
def pair_gradients(
    grad: Tensor, grad_tangent: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sums of equations 26 and 27. Pairs whose gradients are both 0 contribute 0,
    whatever they hold."""
    tensors, wanted = arguments[:6], arguments[6:]
    query, key, weight = tensors[:3]
    needs = Needs(wanted[0], wanted[1], False, wanted[2], False)
    results = (
        query.new_zeros(query.shape if needs.query else (0,)),
        key.new_zeros(key.shape if needs.key else (0,)),
        weight.new_zeros(weight.shape if needs.weight else (0,)),
    )
    for block in blocks_of(Call(query, key, key[..., :0], weight), query.shape[:1]):
        grads = block.of_pairs(grad), block.of_pairs(grad_tangent)
        found = _formula(block, tensors, Masks()).gradients(*grads, needs)
        if not is_finite(sum_of(found)):
            shield = (grads[0] != 0) | (grads[1] != 0)
            found = _formula(block, tensors, Masks(shield=shield)).gradients(*grads, needs)
        for i, part in enumerate(found):
            if part is not None:
                to = block.of_rows(results[0]) if i == 0 else results[i]
                (to if i == 0 else block.of_entries(to, 3 - i)).add_(part)
    return results


def _formula(block: Block, arguments: Sequence[Tensor], masks: Masks) -> FormulaPairs:
    query, key, weight, query_tangent, key_tangent, weight_tangent = arguments
    return FormulaPairs(
        Inputs(block.of_rows(query), block.of_keys(key), key, block.of_entries(weight, 1)),
        Tangents(
            block.of_rows(query_tangent), block.of_keys(key_tangent), None,
            block.of_entries(weight_tangent, 1),
        ),
        masks,
    )  # fmt: skip


def sum_of(results: Sequence[Tensor | None]) -> Tensor:
    sums = [x.sum() for x in results if x is not None]
    return torch.stack(sums).sum() if sums else torch.zeros(())
