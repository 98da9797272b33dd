"""The operators as Triton kernels. Imported only where a GPU, or a test, asks for them."""

from __future__ import annotations

import torch

from additive_attn.backends.triton.backward import backward
from additive_attn.backends.triton.batch import BatchShape
from additive_attn.backends.triton.forward import forward
from additive_attn.backends.triton.launch import interpreted
from additive_attn.backends.triton.prepare import prepare_weight

__all__ = ["backward", "forward", "interpreted", "probe"]


def probe(device: torch.device) -> None:
    """Runs the smallest kernel, which raises where Triton, its compiler or the driver fails."""
    prepare_weight(torch.zeros(1, device=device), BatchShape(torch.Size()), 1.0)
