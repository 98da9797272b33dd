"""Shapes and dtypes of the operators, which every implementation of them shares."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
) -> torch.Size:
    """The batch dims that all arguments of an operator broadcast to."""
    shapes = [query.shape[:-2], key.shape[:-2], value.shape[:-2], weight.shape[:-1]]
    if attn_mask is not None:
        shapes.append(attn_mask.shape[:-2])
    if lengths is not None:
        shapes.append(lengths.shape[:-1])
    if seed is not None:
        shapes.append(seed.shape)
    batch: torch.Size = torch.broadcast_shapes(*shapes)
    return batch


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores are accumulated, and the log-sum-exp is returned, in this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
