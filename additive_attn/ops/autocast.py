"""Casts tensors as torch.autocast does."""

from __future__ import annotations

import torch
from torch import Tensor

_autocasts = torch._C._is_any_autocast_enabled


def autocast_dtype(device: str) -> torch.dtype | None:
    """Returns the dtype of autocast on this type of device; None where autocast is off."""
    if not (
        _autocasts()
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        return None
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``x`` in ``dtype``. Tensors of float64, integers or bools are left unchanged."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)
