"""Decoder steps with several heads: with gradients once for all steps, or as ordinary calls."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from additive_attn.nn.decoding import (
    Prepared,
    ProjectedMemory,
    counting_writes,
    flat_beams,
)
from additive_attn.nn.heads import append_keys, attend_heads, merged_masks, split
from additive_attn.nn.linear import projected
from additive_attn.ops.autocast import autocast_dtype
from additive_attn.ops.checks import Integers, aligned_lengths, as_integers
from additive_attn.ops.decoding import attend_step
from additive_attn.ops.head_checks import check_masks
from additive_attn.ops.layer_checks import check_memory_dtype, check_narrowed
from additive_attn.ops.masking import attended_keys
from additive_attn.ops.memory import computed_whole, lend, widened
from additive_attn.ops.writes import Watched, count_writes, parameter_state

# A step of prepared keys is faster than an ordinary call up to so many queries per sequence: the
# first with heads of MANY_FEATURES or more, the last with smaller heads.
MOST_ROWS, MANY_FEATURES, MOST_ROWS_OF_FEW = 8, 32, 2


@counting_writes
def project_heads(
    layer: Any, key: Tensor, value: Tensor, lengths: Integers | None,
    key_padding_mask: Tensor | None, dtype: torch.dtype | None,
) -> ProjectedMemory:  # fmt: skip
    """:meth:`MultiheadAdditiveAttention.project`, after the checks of shapes."""
    _, k, v = layer._projected(None, key, value)
    batched = k.dim() == 3
    if not batched:
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    elif not layer.batch_first:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    mask = counts = None
    if key_padding_mask is not None:
        check_masks(layer, None, key_padding_mask, k.shape[0], (1, k.shape[1]), batched)
        merged: Any = merged_masks(None, key_padding_mask, k.shape[0], 1)
        mask = merged.squeeze(1)
        if mask.dtype != torch.bool:
            mask = mask.clone()  # the caller may write to its own
    if lengths is not None:
        counts = as_integers("lengths", lengths, k.device, k.shape[1])
        counts = counts if batched else counts.unsqueeze(0)
        counts = aligned_lengths(counts, k, k.shape[:1], 1).reshape(-1, 1).clone()
    k, v, mask, counts = append_keys(layer, k, v, mask, counts)
    if dtype is not None:
        check_memory_dtype(dtype, k)
        attended = partial(attended_keys, k, counts, mask)
        for name, wide in (("The projected key", k), ("The projected value", v)):
            check_narrowed(name, wide, wide.to(dtype), attended)
        k, v = k.to(dtype), v.to(dtype)
    rows: Any = (k, v, counts, mask)
    if not batched:
        rows = (None if x is None else x.squeeze(0) for x in rows)
    memory = ProjectedMemory(*rows)
    if not torch.compiler.is_compiling():
        memory.prepared = prepare_heads(layer, memory)
    return memory


def prepare_heads(layer: Any, memory: ProjectedMemory) -> Prepared | None:
    """Lends a memory with the parameters of all heads; None where tools have replaced these, which
    every step must read anew, and where plain PyTorch computes small steps."""
    if computed_whole(memory.key):
        return None
    parameters = layer._lent_parameters()
    if parameters is None or hasattr(
        type(layer), "unshard"
    ):  # FSDP2 frees parameters between calls
        return None
    key, value, lengths, mask = memory
    bias: Any = layer.in_proj_bias
    weight: Any = layer.q_proj_weight
    if weight is None:
        weight = layer.in_proj_weight[: layer.hidden_dim]
    copied, watched = [key], None
    if autocast_dtype(key.device.type) is not None:
        weight = bias = None  # each query is projected under autocast
        copied.append(layer.energy_weight)
        watched = Watched([layer.energy_weight])
    if not count_writes(copied):
        return None  # writes to them could not be detected
    if key.dim() == 3:
        lengths = None if lengths is None else lengths.unsqueeze(1)
        mask = None if mask is None else mask.unsqueeze(1)
    lent = lend(
        split(key, layer.num_heads), split(value, layer.num_heads), layer.energy_weight,
        lengths=lengths, attn_mask=mask, query_weight=weight,
        query_bias=None if bias is None else bias[: layer.hidden_dim],
    )  # fmt: skip
    if lent.prepared is None:
        return None
    state = parameter_state(parameters)
    return Prepared(lent, parameters, state, torch.is_grad_enabled(), watched)


def step_heads(
    layer: Any, query: Tensor, memory: ProjectedMemory, need_weights: bool, averaged: bool
) -> tuple[Tensor, Tensor | None]:
    """:meth:`MultiheadAdditiveAttention.step`."""
    prepared, dropout_p = memory._prepared(), layer.dropout if layer.training else 0.0
    several, batched = query.dim() == memory.key.dim(), memory.key.dim() == 3
    beams = memory._beams()
    flat = beams > 1 and not several and batched
    # Rows of queries per sequence; 0 where it has one query, without a dim for it.
    number = beams if flat else query.shape[-2] if several else 0
    many = layer.energy_weight.shape[1] >= MANY_FEATURES
    most = MOST_ROWS if many else MOST_ROWS_OF_FEW
    if (
        prepared is None
        or not several <= number <= most
        or (beams > 1 and number == 0)
        # Only the ordinary call returns the weights after dropout.
        or (need_weights and dropout_p > 0.0)
        or not prepared.is_of(layer)
    ):
        # ``number`` is compared only under dropout, since a graph is then specialised to it.
        apart = dropout_p > 0.0 and 0 < number <= most
        return _rows(layer, query, memory, several, dropout_p, need_weights, averaged, apart)
    if flat:
        query = query.unflatten(0, (-1, beams))
    if prepared.lent.source.query_weight is None:
        query = layer._projected(query)[0].unflatten(-1, (layer.num_heads, -1))
        query = query.transpose(-2, -3) if number else query
    out, weights = attend_step(prepared.lent, query, dropout_p=dropout_p, several=number > 0)
    out = out.transpose(-2, -3) if number else out
    out = projected(layer._modules["out_proj"], out.flatten(-2))
    out = out.flatten(0, 1) if flat else out
    if not need_weights:
        return out, None
    if number:
        return out, _of_rows(weights, averaged, flat)
    return out, weights.mean(dim=-2) if averaged else weights


def _rows(
    layer: Any, query: Tensor, memory: ProjectedMemory, several: bool, dropout_p: float,
    need_weights: bool, averaged: bool, apart: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Computes a step as an ordinary call with a row per query."""
    key, value, lengths, mask = memory
    batched = key.dim() == 3
    q = layer._projected(query)[0]
    if not several:
        q = q.unflatten(0, (-1, memory._beams())) if batched else q.unsqueeze(0)
    if not batched:
        q, key, value = q.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    key, value = widened(key, q.dtype), widened(value, q.dtype)
    out, weights = attend_heads(
        q, key, value, layer.energy_weight,
        None if mask is None else mask.reshape(math.prod(mask.shape[:-1]), 1, 1, mask.shape[-1]),
        None if lengths is None else lengths.reshape(-1, 1), False, dropout_p, need_weights, apart,
    )  # fmt: skip
    out = projected(layer._modules["out_proj"], out.transpose(1, 2).flatten(-2))
    weights = None if weights is None else _of_rows(weights, averaged, flat=not several)
    out = out if several else flat_beams(out)
    if not batched:
        return out.squeeze(0), None if weights is None else weights.squeeze(0)
    return out, weights


def _of_rows(weights: Tensor, averaged: bool, flat: bool) -> Tensor:
    """Returns weights ``(N, heads, n, S)`` as ``(N, [heads,] n, S)``; or, if ``flat``, with one
    query per beam, as ``(N * n, [heads,] S)``."""
    if averaged:
        weights = weights.mean(dim=-3)
    elif flat:
        weights = weights.transpose(-2, -3)
    return flat_beams(weights) if flat else weights
