"""A Linear over many rows: products by oneDNN, on CPUs where MKL's are slower.

MKL takes its AVX2 kernels on CPUs of other makers than Intel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from additive_attn.ops.memory import eager
from additive_attn.ops.second_order import SingleLevelFunction

# Multiply-adds beyond which a product costs much more than to choose it.
_ENOUGH = 2**25
_below_autograd = torch._C._AutoDispatchBelowAutograd
_autocasts = torch._C._is_any_autocast_enabled
_functorch_active = torch._C._are_functorch_transforms_active


@functools.cache
def _prefers_onednn() -> bool:
    if not (torch._C._has_mkldnn and torch.backends.mkl.is_available()):
        return False
    try:
        with open("/proc/cpuinfo") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x ``(..., in)``, weight ``(out, in)``, bias ``(out,)``."""
    if not (
        weight.dim() == 2
        and x.dim() >= 2
        and x.numel() * weight.shape[0] >= _ENOUGH
        and x.is_cpu
        and x.dtype == torch.float32
        and x.shape[-1] == weight.shape[1]
        and _prefers_onednn()
        and eager((x, weight, bias), x)
        and not _autocasts()
        and torch.backends.mkldnn.enabled
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        output: Tensor = _Linear.apply(x, weight, bias)
        return output
    with _below_autograd():
        return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output


class _Linear(SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        if (
            torch.is_grad_enabled()
            or _functorch_active()
            or torch._C._functorch.is_legacy_batchedtensor(grad)
        ):
            return _differentiable(x, weight, ctx.needs_input_grad, grad)
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t(), None) if need_x else None,
            rows.t() @ x.flatten(0, -2) if need_weight else None,  # MKL is as fast here
            rows.sum(0) if need_bias else None,
        )


@torch.enable_grad()
def _differentiable(
    x: Tensor, weight: Tensor, needs: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    bias = x.new_zeros(weight.shape[0], requires_grad=True) if needs[2] else None
    given: Any = (x.view_as(x), weight.view_as(weight), bias)
    found = iter(
        torch.autograd.grad(
            F.linear(*given), [t for t, need in zip(given, needs, strict=True) if need], grad,
            create_graph=True,
        )
    )  # fmt: skip
    return tuple(next(found) if need else None for need in needs)
