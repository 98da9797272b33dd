"""Projects keys inside the call. Where keys and values come from one tensor, their gradients share
memory: the product with the projection is added to the values' gradient in place. Autograd would
write the product to a tensor of its own and then add it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from additive_attn.ops.autocast import autocast_dtype
from additive_attn.ops.checks import (
    DTYPES,
    is_dense,
    refuse_dtypes,
    refuse_layouts,
    refuse_rank,
    refuse_types,
    require_one_device,
)
from additive_attn.ops.memory import eager, is_batch
from additive_attn.ops.second_order import SingleLevelFunction

_is_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
LEAST = 1 << 16  # elements; the addition of fewer costs less than a Function
_BLOCK = 32  # rows


def project_keys(key: Tensor, value: Any, weight: Tensor) -> tuple[Tensor, Any]:
    """Returns ``linear(key, weight)`` and the values, as ``masked_attention`` takes them."""
    _check(key, weight)
    return projected_values(key, value, weight, None) or (linear(key, weight), value)


def worth_sharing(key: Tensor, value: Any) -> bool:
    """Whether one gradient for keys and values is faster than two."""
    return (
        value is key
        and not _is_compiling()
        and key.requires_grad
        and _grad_enabled()
        and key.is_cpu
        and key.numel() >= LEAST
    )


def projected_values(
    key: Tensor, value: Any, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Returns keys and values of one tensor, whose gradients are computed as one; None where that
    is not faster, or where not only eager autograd records the operations."""
    if (
        not worth_sharing(key, value)
        or key.shape[-1] != weight.shape[-1]
        or not eager((key, weight, bias), key)
        or autocast_dtype("cpu") is not None
    ):
        return None
    keys, values = _ProjectedValues.apply(key, weight, bias)
    return keys, values


class _ProjectedValues(SingleLevelFunction):
    """``linear(x, weight, bias)`` and x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return linear(x, weight, bias), x.detach()

    @staticmethod
    def backward(
        ctx: Any, grad_key: Tensor | None, grad_value: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_key is None:
            return grad_value, None, None
        need_x, need_weight, need_bias = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        rows = grad_key.reshape(-1, grad_key.shape[-1])
        return (
            _gradient(grad_key, rows, weight, grad_value) if need_x else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _gradient(grad_key: Tensor, rows: Tensor, weight: Tensor, grad_value: Tensor | None) -> Tensor:
    if grad_value is None:
        return linear(grad_key, weight.mT)
    if _grad_enabled() or is_batch(grad_key) or not grad_value.is_contiguous():
        return grad_value + linear(grad_key, weight.mT)
    # The attention's backward has just made grad_value, and nothing else uses the values.
    _add_product(grad_value.view(-1, grad_value.shape[-1]), rows, weight)
    return grad_value


def _add_product(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """``total += rows @ weight``. Where rows of float32 do not start at whole vectors, BLAS is up
    to twice as fast with a batch of few rows as with all rows at once."""
    blocks = len(rows) // _BLOCK if total.dtype == torch.float32 and total.shape[1] % 8 else 0
    if blocks:
        parts = [x[: blocks * _BLOCK].unflatten(0, (blocks, _BLOCK)) for x in (total, rows)]
        parts[0].baddbmm_(parts[1], weight.expand(blocks, -1, -1))
    total[blocks * _BLOCK :].addmm_(rows[blocks * _BLOCK :], weight)


def _check(key: Any, weight: Any) -> None:
    if not (isinstance(key, Tensor) and isinstance(weight, Tensor)):
        refuse_types(key=key, key_weight=weight)
    if not is_dense(weight):
        refuse_layouts(key_weight=weight)
    if key.layout is not torch.jagged:
        if not is_dense(key):
            refuse_layouts(key=key)
        if key.dim() < 2:
            refuse_rank("key", key.shape, "(..., Lk, Dk)")
    if weight.dim() != 2 or weight.shape[1] != key.shape[-1]:
        raise ValueError(
            f"key_weight has shape {tuple(weight.shape)}, but a key of {key.shape[-1]} features "
            f"needs one of shape (H, {key.shape[-1]}), as that of nn.Linear."
        )
    if key.device != weight.device:
        require_one_device(key=key, key_weight=weight)
    casts = autocast_dtype(key.device.type) is not None
    if not {key.dtype, weight.dtype} <= set(DTYPES) or (key.dtype != weight.dtype and not casts):
        refuse_dtypes(key=key, key_weight=weight)
