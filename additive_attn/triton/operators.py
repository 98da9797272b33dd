"""What ``additive_attn.gpu`` calls."""

from __future__ import annotations

import torch

from additive_attn.triton.backward import backward
from additive_attn.triton.forward import forward
from additive_attn.triton.launch import BatchShape, interpreted
from additive_attn.triton.prepare import prepare_weight

__all__ = ["backward", "forward", "interpreted", "probe"]


def probe(device: torch.device) -> None:
    """Runs the smallest kernel, which raises where Triton, its compiler or the driver fails."""
    prepare_weight(torch.zeros(1, device=device), BatchShape(torch.Size()), 1.0)
