"""The tangents of the outputs and of the gradients (math.md, eq. 22 to 27), differentiable to any
order.

Every tangent and upstream gradient may be None, which counts as zeros. A result is None where it
is not needed, or zero.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from additive_attn.spec.call import Inputs, Needs, Tangents, Upstream
from additive_attn.spec.formula import add_bias, energies, scores, softmax, weighted_sum

_SHIELDED = 2**19  # elements of (..., rows, Lk, Dv)


class Masks(NamedTuple):
    """The float mask, the attended pairs, and the dropout factors. With ``shield``, which equals
    ``attended`` then, masked pairs are left out. Without it, they are multiplied by 0."""

    attn_mask: Tensor | None = None
    attended: Tensor | None = None
    factors: Tensor | None = None
    shield: Tensor | None = None

    def cleared(self, pairs: Tensor) -> Tensor:
        return pairs if self.attended is None else torch.where(self.attended, pairs, 0.0)

    def shielded(self, features: Tensor) -> Tensor:
        if self.shield is None:
            return features
        return torch.where(self.shield.unsqueeze(-1), features, 0.0)

    def kept(self, pairs: Tensor) -> Tensor:
        return pairs if self.factors is None else pairs * self.factors

    def weighted(self, pairs: Tensor, vectors: Tensor | None) -> Tensor | None:
        """``pairs @ vectors``. With a shield, a few rows at a time, without the masked pairs."""
        if vectors is None or self.shield is None:
            return None if vectors is None else pairs @ vectors
        batch = pairs.shape[:-2].numel()
        rows = max(1, _SHIELDED // max(1, batch * pairs.shape[-1] * vectors.shape[-1]))
        shield = self.shield.expand(*self.shield.shape[:-2], *pairs.shape[-2:])
        parts = zip(pairs.split(rows, -2), shield.split(rows, -2), strict=True)
        return torch.cat([weighted_sum(part, vectors, some) for part, some in parts], -2)


class Pairs(Protocol):
    """The sums over features: the scores, and the gradients that follow from theirs."""

    def scores(self) -> tuple[Tensor, Tensor]:
        """``w . energy`` and its tangent, equation 22 without scale and mask."""
        ...

    def gradients(
        self, grad: Tensor | None, grad_tangent: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Equations 26 and 27: the tangents of dq, dk and dw, from dS and its tangent."""
        ...


class FormulaPairs:
    """``Pairs`` in tensors (..., Lq, Lk, H)."""

    def __init__(self, inputs: Inputs, tangents: Tangents, masks: Masks) -> None:
        query, key, _, self.weight = inputs
        self.weight_tangent, self.masks = tangents.weight, masks
        self.energy = energies(query, key, masks.shield)
        one = self.energy.new_ones(())
        self.slope = torch.addcmul(one, self.energy, self.energy, value=-1)
        shift = total(
            None if tangents.query is None else tangents.query.unsqueeze(-2),
            None if tangents.key is None else tangents.key.unsqueeze(-3),
        )
        self.tangent = None if shift is None else masks.shielded(shift * self.slope)

    def scores(self) -> tuple[Tensor, Tensor]:
        score = scores(self.energy, self.weight)
        tangent = total(
            None if self.weight_tangent is None else scores(self.energy, self.weight_tangent),
            None if self.tangent is None else scores(self.tangent, self.weight),
        )
        return score, torch.zeros_like(score) if tangent is None else tangent

    def gradients(
        self, grad: Tensor | None, grad_tangent: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_weight = slope = None
        if needs.weight:
            grad_weight = total(
                _over_pairs(grad_tangent, self.energy), _over_pairs(grad, self.tangent)
            )
        if needs.query or needs.key:
            slope = total(_outer(grad_tangent, self.weight), _outer(grad, self.weight_tangent))
            slope = None if slope is None else slope * self.slope
            if grad is not None and self.tangent is not None:
                curved = self.energy * self.tangent * self.weight[..., None, None, :]
                slope = total(slope, curved * (-2 * grad).unsqueeze(-1))
        if slope is None:
            return None, None, grad_weight
        slope = self.masks.shielded(slope)
        grad_query = slope.sum(-2) if needs.query else None
        return grad_query, slope.sum(-3) if needs.key else None, grad_weight


def score_tangents(
    pairs: Pairs, mask_tangent: Tensor | None, grad: Tensor | None, grad_tangent: Tensor | None,
    masks: Masks, scale: float, need_scores: bool, needs: Needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Tangents of the scores, then of the gradients that follow from ``grad``, that of the scores;
    None for the value."""
    score = None
    if need_scores:
        score = masks.cleared(add_bias(scale * pairs.scores()[1], mask_tangent))
    grad, grad_tangent = (None if x is None else masks.cleared(x) for x in (grad, grad_tangent))
    grad_query, grad_key, grad_weight = pairs.gradients(
        None if grad is None else scale * grad,
        None if grad_tangent is None else scale * grad_tangent,
        needs,
    )
    return score, grad_query, grad_key, None, grad_weight, grad_tangent if needs.mask else None


def attention_tangents(
    pairs: Pairs, value: Tensor, tangents: Tangents, upstream: Upstream,
    upstream_tangents: Upstream, masks: Masks, scale: float, need_outputs: tuple[bool, ...],
    needs: Needs,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Tangents of out, weights and lse (equation 23), then of the gradients of query, key, value
    and weight, and of the scores, which is that of the mask."""
    score, score_tangent = pairs.scores()
    weights = softmax(add_bias(scale * score, masks.attn_mask), masks.attended)
    score_tangent = masks.cleared(add_bias(scale * score_tangent, tangents.mask))
    lse_tangent = (weights * score_tangent).sum(-1, keepdim=True)
    weights_tangent = weights * (score_tangent - lse_tangent)
    kept, kept_tangent = masks.kept(weights), masks.kept(weights_tangent)
    outputs: list[Tensor | None] = [None] * 3
    if need_outputs[0]:
        outputs[0] = total(
            masks.weighted(kept_tangent, value), masks.weighted(kept, tangents.value)
        )
    if need_outputs[1]:
        outputs[1] = weights_tangent
    if need_outputs[2]:
        outputs[2] = lse_tangent.squeeze(-1)
    grad_value = None
    if needs.value:
        turned = masks._replace(shield=None if masks.shield is None else masks.shield.mT)
        grad_value = total(
            turned.weighted(kept_tangent.mT, upstream.out),
            turned.weighted(kept.mT, upstream_tangents.out),
        )
    if not (needs.query or needs.key or needs.weight or needs.mask):
        return *outputs, None, None, grad_value, None, None
    grad, grad_tangent = _score_gradients(
        (weights, weights_tangent), (value, tangents.value), (upstream, upstream_tangents), masks
    )
    grad_query, grad_key, grad_weight = pairs.gradients(
        None if grad is None else scale * grad,
        None if grad_tangent is None else scale * grad_tangent,
        needs,
    )
    grad_mask = grad_tangent if needs.mask else None
    return *outputs, grad_query, grad_key, grad_value, grad_weight, grad_mask


def _score_gradients(
    weights: tuple[Tensor, Tensor], value: tuple[Tensor, Tensor | None],
    upstream: tuple[Upstream, Upstream], masks: Masks,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """G of equation 9 and its tangent, equation 25. Each argument comes with its tangent."""
    dropped = total(_products(upstream[0].out, value[0]))
    dropped_tangent = total(
        _products(upstream[1].out, value[0]), _products(upstream[0].out, value[1])
    )
    grad_weights, grad_weights_tangent = (
        None if x is None else masks.cleared(x)
        for x in (
            total(None if x is None else masks.kept(x), grads.weights)
            for x, grads in zip((dropped, dropped_tangent), upstream, strict=True)
        )
    )
    delta = _over_keys(weights[0], grad_weights)
    delta_tangent = total(
        _over_keys(weights[1], grad_weights), _over_keys(weights[0], grad_weights_tangent)
    )
    centred, centred_tangent = (
        total(grad, None if mean is None else -mean, None if x.lse is None else x.lse[..., None])
        for grad, mean, x in (
            (grad_weights, delta, upstream[0]),
            (grad_weights_tangent, delta_tangent, upstream[1]),
        )
    )
    tangent = total(
        None if centred is None else weights[1] * centred,
        None if centred_tangent is None else weights[0] * centred_tangent,
    )
    return (
        None if centred is None else masks.cleared(weights[0] * centred),
        None if tangent is None else masks.cleared(tangent),
    )


def total(*terms: Tensor | None) -> Tensor | None:
    """Returns the sum of the terms that are not None."""
    found = None
    for term in terms:
        if term is not None:
            found = term if found is None else found + term
    return found


def _products(grad_out: Tensor | None, value: Tensor | None) -> Tensor | None:
    return None if grad_out is None or value is None else grad_out @ value.mT


def _outer(grad: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if grad is None or weight is None:
        return None
    return grad.unsqueeze(-1) * weight[..., None, None, :]


def _over_keys(weights: Tensor, grad: Tensor | None) -> Tensor | None:
    return None if grad is None else (weights * grad).sum(-1, keepdim=True)


def _over_pairs(grad: Tensor | None, features: Tensor | None) -> Tensor | None:
    """A sum per row, then a sum over rows, never one long sum."""
    if grad is None or features is None:
        return None
    return (grad.unsqueeze(-2) @ features).squeeze(-2).sum(-2)
