"""What torch.autocast makes of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_autocasts = torch._C._is_any_autocast_enabled


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that is computed with on this type of device; None where autocast is off."""
    if not (
        _autocasts()
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        return None
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``; float64, and what is no float, stays."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)
