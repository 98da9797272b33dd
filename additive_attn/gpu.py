"""The operators on a GPU: the Triton kernels where they can run, plain PyTorch elsewhere.

Triton is imported, and a first kernel compiled, when the first tensor on a GPU arrives.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from additive_attn import chunked

_PATHS = ("triton", "pytorch")


def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels, _ = path()
    if kernels is None:
        return chunked.forward(*arguments)
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = kernels.forward(*arguments)
    return outputs


def backward(
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels, _ = path()
    if kernels is None:
        return chunked.backward(*arguments)
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    gradients = kernels.backward(*arguments)
    return gradients


@functools.cache
def path() -> tuple[ModuleType | None, str]:
    """The module of the Triton kernels, or None, and the reason in words; decided once."""
    forced = os.environ.get("ADDITIVE_ATTN_GPU")
    if forced is not None and forced not in _PATHS:
        raise ImportError(
            f"ADDITIVE_ATTN_GPU is {forced!r}, which names no GPU path. Set it to one of "
            f"{', '.join(_PATHS)}, or unset it to let the package choose."
        )
    if forced == "pytorch":
        return None, "ADDITIVE_ATTN_GPU=pytorch asks for plain PyTorch"
    try:
        kernels = importlib.import_module("additive_attn.triton.operators")
        kernels.probe(torch.device("cuda"))
    # Whatever Triton, the driver or the host compiler may raise, plain PyTorch still computes.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if forced is not None:
            raise ImportError(
                f"ADDITIVE_ATTN_GPU=triton cannot be served: {problem}. Triton >= 3.6 and a C "
                "compiler are needed: pip install triton"
            ) from error
        warnings.warn(
            "additive_attn computes on this GPU with plain PyTorch, which is many times slower: "
            f"{problem}. Triton >= 3.6 and a C compiler are needed: pip install triton; or set "
            "ADDITIVE_ATTN_GPU=pytorch to silence this warning.",
            stacklevel=3,
        )
        return None, problem
    return kernels, "Triton kernels" if forced is None else "chosen by ADDITIVE_ATTN_GPU"


def described() -> str:
    """For ``show_config``: what tensors on a GPU are computed with, and why."""
    if not torch.cuda.is_available():
        return "none (torch sees no GPU)"
    kernels, reason = path()
    return f"{'pytorch' if kernels is None else 'triton'} ({reason})"
