"""The plain formula: the definition of what every backend computes (math.md, eq. 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    *,
    attended: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle: ``softmax(scale * weight . tanh(query_i + key_j) + mask) @ value``,
    differentiable to any order.

    Shapes: query ``(..., Lq, H)``, key ``(..., Lk, H)``, value ``(..., Lk, Dv)``, weight ``(...,
    H)``. ``attn_mask`` (bool, True = attend; or float, added, ``-inf`` = do not attend) and
    ``attended`` (bool) broadcast to ``(..., Lq, Lk)`` and are combined. ``keep`` is a bool dropout
    mask. 16-bit inputs are computed in float32.
    Returns out, weights (before dropout) and the log-sum-exp of the scores.
    A row without keys gives 0, 0 and ``-inf``. Masked keys and values have no effect, even NaN.
    """
    dtype = query.dtype
    query, key, value, weight = (widened(x) for x in (query, key, value, weight))
    attended = attended_pairs(attn_mask, attended)
    score = add_bias(scale * scores(energies(query, key, attended), weight), attn_mask)
    weights = softmax(score, attended)
    kept = weights if keep is None else weights * keep_factors(keep, dropout_p, weights.dtype)
    out = weighted_sum(kept, value, attended)
    return out.to(dtype), weights.to(dtype), log_sum_exp(score, attended)


def plain_additive_scores(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None = None,
    *,
    attended: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The scores of ``plain_additive_attention``, ``-inf`` where a pair is masked."""
    dtype = query.dtype
    query, key, weight = (widened(x) for x in (query, key, weight))
    attended = attended_pairs(attn_mask, attended)
    score = add_bias(scale * scores(energies(query, key, attended), weight), attn_mask)
    return mask_scores(score, attended).to(dtype)


def mask_scores(score: Tensor, attended: Tensor | None) -> Tensor:
    return score if attended is None else torch.where(attended, score, -torch.inf)


def widened(tensor: Tensor) -> Tensor:
    """Returns ``tensor`` in the dtype of the computation: float32 for 16 bits."""
    return tensor.float() if tensor.itemsize == 2 else tensor


def attended_pairs(attn_mask: Tensor | None, intervals: Tensor | None) -> Tensor | None:
    """Returns the pairs that a dense mask and the intervals both allow; None if both are None."""
    if attn_mask is None:
        return intervals
    attended = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
    return attended if intervals is None else intervals & attended


def energies(query: Tensor, key: Tensor, attended: Tensor | None = None) -> Tensor:
    """``tanh(q_i + k_j)``, (..., Lq, Lk, H); 0 where a pair is not ``attended``."""
    pair = query.unsqueeze(-2) + key.unsqueeze(-3)
    if attended is not None:
        pair = torch.where(attended.unsqueeze(-1), pair, 0.0)
    return pair.tanh_()


def scores(energy: Tensor, weight: Tensor) -> Tensor:
    """``w . energy``, (..., Lq, Lk)."""
    if weight.dim() == 2 and weight.shape[0] == 1:
        weight = weight.squeeze(0)
    if weight.dim() == 1:
        return energy @ weight
    score = energy.flatten(-3, -2) @ weight.unsqueeze(-1)
    return score.squeeze(-1).unflatten(-1, energy.shape[-3:-1])


def add_bias(score: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Adds a float mask of any dtype, in the dtype of the scores."""
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return score
    return score + attn_mask.to(score.dtype)


def softmax(score: Tensor, attended: Tensor | None) -> Tensor:
    """The weights: 0 where a pair is masked, so all 0 in an empty row."""
    if attended is None:
        return torch.softmax(score, dim=-1)
    # An empty row is softmaxed as zeros, so that no NaN enters its gradient, and then cleared.
    masked = torch.where(attended.any(dim=-1, keepdim=True), -torch.inf, 0.0).to(score.dtype)
    return torch.where(attended, torch.softmax(torch.where(attended, score, masked), dim=-1), 0.0)


def log_sum_exp(score: Tensor, attended: Tensor | None) -> Tensor:
    """The log-sum-exp of each row's attended scores: -inf for an empty row, and NaN like the
    row's weights where a score is infinite."""
    if attended is None:
        lse = torch.logsumexp(score, dim=-1)
    else:
        occupied = attended.any(dim=-1, keepdim=True)
        masked = torch.where(occupied, -torch.inf, 0.0).to(score.dtype)
        lse = torch.logsumexp(torch.where(attended, score, masked), dim=-1)
        lse = torch.where(occupied.squeeze(-1), lse, -torch.inf)
    return lse * torch.where(lse == torch.inf, torch.nan, 1.0).to(lse.dtype)


def keep_factors(keep: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """The dropout factors D (math.md, eq. 15)."""
    return keep.to(dtype) * keep_scale(dropout_p)


def keep_scale(dropout_p: float) -> float:
    return 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)


def weighted_sum(weights: Tensor, value: Tensor, attended: Tensor | None) -> Tensor:
    """``weights @ value``, to which masked pairs contribute 0 even where the value is not finite.
    Values that are not finite change no bit of the other sums."""
    if attended is None:
        return weights @ value
    finite = value.isfinite()
    reached = attended.unsqueeze(-1) & ~finite.unsqueeze(-3)
    rest = weights.unsqueeze(-1) * torch.where(reached, value.unsqueeze(-3), 0.0)
    return weights @ torch.where(finite, value, 0.0) + rest.sum(-2)
