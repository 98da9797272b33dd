"""Errors that say why a step could not use a memory. They are raised after it has failed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from additive_attn.ops.autocast import autocast_dtype
from additive_attn.ops.checks import is_dense
from additive_attn.ops.layer_checks import got
from additive_attn.ops.memory import NARROW_MEMORY


def explain_memory(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, hidden_dim: int, beams: int
) -> None:
    """Raises an error that says why a memory does not fit, where the reason is known."""
    caller = f"{type(layer).__name__}.step"
    if not (is_dense(query) and is_dense(key) and is_dense(value)):
        return  # the step's own error says so
    explain_conversion(caller, layer, key, value)
    found = got(caller, {"query": query, "keys": key, "values": value})
    if key.shape[-1] != hidden_dim:
        raise ValueError(
            f"{found}, but hidden_dim is {hidden_dim}. Take a memory that this layer projected."
        ) from None
    queries = query.shape[: key.dim() - 2] if beams == 1 else torch.Size()
    if len({*queries, *key.shape[:-2], *value.shape[:-2]} - {1}) > 1:
        raise ValueError(
            f"{found}, but the batch (dim 0) must be the same, or 1: one query per sequence."
        ) from None


def explain_conversion(caller: str, layer: nn.Module, key: Tensor, value: Tensor) -> None:
    """Raises where a layer was converted after it had projected a memory."""
    parameter = next(layer.parameters())
    if (key.dtype, key.device) != (value.dtype, value.device):
        return  # the user constructed the memory
    if key.device != parameter.device:
        raise RuntimeError(
            f"{caller} got a memory whose key is on {key.device}, but this layer is on "
            f"{parameter.device}. Call project again after the layer was moved."
        ) from None
    kinds = key.dtype, parameter.dtype
    fits = kinds[0] == kinds[1] or kinds in NARROW_MEMORY
    if not fits and autocast_dtype(key.device.type) is None:
        raise TypeError(
            f"{caller} got a memory whose key is {key.dtype}, but the parameters of this layer "
            f"are {parameter.dtype}. Call project again after the layer was converted."
        ) from None
