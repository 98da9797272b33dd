"""One call: autocast, checks, the seed of dropout, then the differentiable operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from additive_attn.ops.autograd import attend
from additive_attn.ops.checks import (
    DTYPES,
    aligned_lengths,
    batch_of,
    check_mask,
    checked_probability,
    checked_scale,
    checked_window,
    refuse_dtypes,
    refuse_flags,
    refuse_layouts,
    refuse_types,
    require_one_device,
)
from additive_attn.spec.call import Call, Inputs, Masking, Options
from additive_attn.spec.dropout import draw_seed


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    score_bias: Tensor | None,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    dropout_p: float,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, casts under autocast, attends; returns out, weights (empty unless needed), lse."""
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and isinstance(weight, Tensor)
    ):
        refuse_types(query=query, key=key, value=value, weight=weight)
    if not (query.layout is key.layout is value.layout is weight.layout is torch.strided):
        refuse_layouts(query=query, key=key, value=value, weight=weight)
    query, key, value, weight, attn_mask = autocasted(query, key, value, weight, attn_mask)

    device = query.device
    try:
        query_shape, key_shape, value_shape, weight_shape = (
            query.shape, key.shape, value.shape, weight.shape,
        )  # fmt: skip
    except RuntimeError:  # a nested tensor may call itself strided, and has no shape
        refuse_layouts(query=query, key=key, value=value, weight=weight)
    batch = query_shape[:-2]
    # A correct call passes these few comparisons; the rest is found out, or worded, apart.
    if not (
        len(query_shape) >= 2
        and key_shape[:-2] == batch
        and value_shape[:-2] == batch
        and key_shape[-2:-1] == value_shape[-2:-1]
        and key_shape[-1:] == query_shape[-1:] == weight_shape[-1:]
        and (len(weight_shape) == 1 or (len(weight_shape) == 2 and weight_shape[0] == 1 and batch))
    ):
        batch = batch_of(query_shape, key_shape, value_shape, weight_shape)
    dtype = query.dtype
    if not (dtype == key.dtype == value.dtype == weight.dtype and dtype in DTYPES):
        refuse_dtypes(query=query, key=key, value=value, weight=weight)
    if not (device == key.device == value.device == weight.device):
        require_one_device(query=query, key=key, value=value, weight=weight)

    if attn_mask is not None:
        check_mask(attn_mask, query, batch, (query_shape[-2], key_shape[-2]))
    if lengths is not None:
        lengths = aligned_lengths(lengths, key, batch, query_shape[-2])
    left = right = -1
    if window is not None:
        left, right = checked_window(window)
    if is_causal:
        right = 0
    if not (isinstance(is_causal, bool) and isinstance(need_weights, bool)):
        refuse_flags(is_causal=is_causal, need_weights=need_weights)
    if type(scale) is not float or not -math.inf < scale < math.inf:
        scale = checked_scale(scale)
    if type(dropout_p) is not float or not 0.0 <= dropout_p <= 1.0:
        dropout_p = checked_probability("dropout_p", dropout_p)
    seed = draw_seed(device) if dropout_p > 0.0 else None
    call = Call(
        Inputs(query, key, value, weight),
        Masking(attn_mask, lengths, left, right),
        Options(seed, dropout_p, scale),
    )
    return attend(call, need_weights, score_bias)


def autocasted(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype where it is on, except float64 and bool."""
    # Says in a fifth of the time that autocast is on for no device, which is the usual case.
    if torch._C._is_any_autocast_enabled():
        device = query.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key = _cast(query, dtype), _cast(key, dtype)
            value, weight = _cast(value, dtype), _cast(weight, dtype)
            if isinstance(attn_mask, Tensor):
                attn_mask = _cast(attn_mask, dtype)
    return query, key, value, weight, attn_mask


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    keeps = tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return tensor if keeps else tensor.to(dtype)
