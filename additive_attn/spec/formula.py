"""The plain formula: the definition of what every backend computes."""

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
    allowed: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle: ``softmax(scale * weight . tanh(query_i + key_j) + mask) @ value``,
    differentiable to any order.

    Shapes: query ``(..., Lq, H)``, key ``(..., Lk, H)``, value ``(..., Lk, Dv)``, weight ``(...,
    H)``. ``attn_mask`` (bool, True = attend; or float, added, ``-inf`` = do not attend) and
    ``allowed`` (bool) broadcast to ``(..., Lq, Lk)`` and are combined. ``keep`` is a bool dropout
    mask. 16-bit inputs are computed in float32.
    Returns out, weights (before dropout) and the log-sum-exp of the scores.
    A row without keys gives 0, 0 and ``-inf``; what excluded keys and values hold has no
    influence.
    """
    dtype = query.dtype
    if dtype.itemsize == 2:
        query, key, value, weight = query.float(), key.float(), value.float(), weight.float()
    if attn_mask is not None:
        attended = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        allowed = attended if allowed is None else allowed & attended

    pair = query[..., :, None, :] + key[..., None, :, :]
    if allowed is not None:
        pair = torch.where(allowed[..., None], pair, 0.0)
    score = scale * (torch.tanh(pair) @ weight[..., None, :, None]).squeeze(-1)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        score = score + attn_mask

    if allowed is None:
        weights, lse = torch.softmax(score, dim=-1), torch.logsumexp(score, dim=-1)
    else:
        occupied = allowed.any(dim=-1, keepdim=True)
        # An empty row is softmaxed as zeros, so that no NaN enters its gradient, and then cleared.
        score = torch.where(allowed, score, torch.where(occupied, -torch.inf, 0.0))
        weights = torch.where(allowed, torch.softmax(score, dim=-1), 0.0)
        lse = torch.where(occupied.squeeze(-1), torch.logsumexp(score, dim=-1), -torch.inf)

    kept = (
        weights
        if keep is None
        else weights * keep * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))
    )
    if allowed is None:
        out = kept @ value
    else:
        out = (kept[..., None] * torch.where(allowed[..., None], value[..., None, :, :], 0.0)).sum(
            -2
        )
    return out.to(dtype), weights.to(dtype), lse
