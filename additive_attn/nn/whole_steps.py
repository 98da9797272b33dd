"""A decoder's small steps on plain PyTorch. The checks of an ordinary call would cost more than
its arithmetic, so a step skips what ``project`` has checked.

An unusual step returns None and becomes an ordinary call, which also raises the errors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from additive_attn.backends.plain import whole
from additive_attn.nn.linear import bare_parameters
from additive_attn.ops import dispatch
from additive_attn.ops.checks import check_range, is_dense
from additive_attn.ops.masking import mask_of_lengths
from additive_attn.ops.memory import PLAIN_TYPES, WHOLE_ELEMENTS, alone, computed_whole
from additive_attn.spec.call import Call
from additive_attn.spec.dropout import draw_seed

_TRUE = torch.tensor(True, device="cpu")
_autocasts = torch._C._is_any_autocast_enabled
_tuple: Any = tuple.__new__  # Call(...) takes its arguments by name first


class Whole(NamedTuple):
    """What ``project`` found out for the steps of a memory."""

    carried: Tensor | None  # the energy's bias, where the memory's keys pass on its zero gradient


def projected_with_bias(layer: Any, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Returns the projected keys of a small memory, and the energy's bias, to which they pass on
    its zero gradient: as an input of every step it would cost as much as the scores. Returns None
    twice where the keys cannot pass it on."""
    if not (
        torch.is_grad_enabled()
        and dispatch.cpu_is_plain
        and key.is_cpu
        and alone()
        and type(key) in PLAIN_TYPES
        and not _autocasts()
    ):
        return None, None
    modules: Any = layer._modules
    of_key = bare_parameters(modules["key_layer"])
    of_energy = bare_parameters(modules["energy_layer"])
    if of_key is None or of_energy is None:
        return None, None
    (weight, bias), (_, carried) = of_key, of_energy
    if bias is None or carried is None:
        return None, None
    small = key.numel() * weight.shape[0] <= WHOLE_ELEMENTS * weight.shape[1]
    # Frozen keys have no graph, which the first backward pass would free for all steps.
    if not (small and (key.requires_grad or weight.requires_grad)):
        return None, None
    if not (carried.requires_grad and carried.shape == (1,)):
        return None, None
    if not key.dtype == weight.dtype == bias.dtype == carried.dtype:
        return None, None
    try:
        # Not a sum with 0 times the bias, which may be infinite.
        return linear(key, weight, torch.where(_TRUE, bias, carried)), carried
    except RuntimeError:
        return None, None


def found_whole(memory: Any) -> bool:
    """Whether the steps of a new memory are such: small, of plain tensors, and with one batch for
    all of them."""
    key, value, lengths, attn_mask = memory
    batch = key.shape[:-2]
    return (
        computed_whole(key)
        and key.is_cpu
        and all(x is None or type(x) in PLAIN_TYPES for x in memory)
        and key.dtype == value.dtype
        and batch == value.shape[:-2]
        and (lengths is None or lengths.shape[:-1] == batch)
        and (attn_mask is None or attn_mask.shape[:-2] == batch)
    )


def whole_step(
    layer: Any, query: Any, memory: Any, state: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor] | None:
    """Returns context and weights, or None where the step needs an ordinary call. ``state`` holds
    the earlier weights, for a layer that adds a term of them."""
    if not (alone() and type(query) in PLAIN_TYPES and not _autocasts() and is_dense(query)):
        return None
    modules: Any = layer._modules
    of_query = bare_parameters(modules["query_layer"])
    of_energy = bare_parameters(modules["energy_layer"])
    if of_query is None or of_energy is None or layer.normalize:
        return None
    (query_weight, query_bias), (weight, score_bias) = of_query, of_energy
    if score_bias is memory.whole.carried:
        score_bias = None
    key, value, lengths, attn_mask = memory
    dtype, shape = key.dtype, key.shape
    if not (
        query.dtype == query_weight.dtype == weight.dtype == dtype
        and query.shape == (*shape[:-2], query_weight.shape[1])
        and query_weight.shape[0] == shape[-1]
        and weight.shape == (1, shape[-1])
        and query.is_cpu
    ):
        return None
    for x in state:
        if not (
            type(x) is Tensor
            and is_dense(x)
            and x.shape == shape[:-1]
            and x.dtype == dtype
            and x.is_cpu
        ):
            return None
    scale, dropout_p = layer.scale, layer.dropout if layer.training else 0.0
    if not (type(scale) is float and math.isfinite(scale) and type(dropout_p) is float):
        return None
    try:
        if lengths is not None:
            attended = None
            if attn_mask is None:
                attended = mask_of_lengths(lengths.flatten(), shape[-2])
            if attended is None:
                check_range("lengths", lengths, shape[-2])  # they may have been written to
            else:
                lengths, attn_mask = None, attended if key.dim() == 3 else attended[0]
        query = linear(query, query_weight, query_bias).unsqueeze(-2)
        if state:
            key = layer._with_term(key, state)
    except (RuntimeError, ValueError):
        return None
    if key is None or not 0.0 <= dropout_p <= 1.0:
        return None
    seed = draw_seed(key.device) if dropout_p > 0.0 else None
    call = _tuple(
        Call,
        (query, key, value, weight, attn_mask, lengths, None, None, None, -1, -1, seed, dropout_p,
         scale),
    )  # fmt: skip
    out, weights, _ = whole.attend(call, False, score_bias)
    return out.squeeze(-2), weights.squeeze(-2)
