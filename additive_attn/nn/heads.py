"""Attends with all heads in one call, under masks as nn.MultiheadAttention takes them."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from additive_attn.ops.attend import masked_attention
from additive_attn.ops.autograd import attend
from additive_attn.ops.block_mask import block_terms, is_block_mask
from additive_attn.ops.checks import is_readable
from additive_attn.ops.decoding import attend_apart
from additive_attn.ops.head_checks import check_blocks, check_pairs, refuse_hint
from additive_attn.ops.masking import narrowed
from additive_attn.spec.call import Call
from additive_attn.spec.formula import keep_factors


def split(packed: Tensor, heads: int) -> Tensor:
    """Returns ``(..., L, heads * n)`` as a view ``(..., heads, L, n)``."""
    *batch, size = packed.shape
    return packed.view(*batch, heads, size // heads).transpose(-3, -2)


def merged_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, heads: int
) -> Tensor | None:
    """Merges both masks, in which True = do not attend, to one that broadcasts to ``(N, heads, L,
    S)``: bool, True = attend; or float, to be added."""
    pairs = padding = None
    if attn_mask is not None:
        pairs = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
        pairs = ~pairs if pairs.dtype == torch.bool else pairs
    if key_padding_mask is not None:
        padding = key_padding_mask.reshape(batch, 1, 1, key_padding_mask.shape[-1])
        padding = ~padding if padding.dtype == torch.bool else padding
    if pairs is None or padding is None:
        return padding if pairs is None else pairs
    if pairs.dtype == padding.dtype == torch.bool:
        return pairs & padding
    if pairs.dtype == torch.bool:
        return torch.where(pairs, padding, -torch.inf)
    return (
        torch.where(padding, pairs, -torch.inf) if padding.dtype == torch.bool else pairs + padding
    )


def is_causal_mask(
    layer: Any, attn_mask: Tensor | None, key_padding_mask: Tensor | None, need_weights: bool
) -> bool:
    """Whether the hint ``is_causal`` may replace the mask. It is trusted where
    nn.MultiheadAttention trusts it; elsewhere the mask is read."""
    if attn_mask is None:
        refuse_hint()
    if layer.bias_k is not None or layer.add_zero_attn:
        return False  # the keys that are appended come after every query
    if key_padding_mask is None and not need_weights:
        return True
    if attn_mask.requires_grad or attn_mask.dim() != 2 or not is_readable(attn_mask):
        return False
    later = torch.ones_like(attn_mask, dtype=torch.bool).triu(1)
    if attn_mask.dtype != torch.bool:
        attn_mask = torch.where(later, attn_mask == -torch.inf, attn_mask != 0)
    return torch.equal(attn_mask, later)


def append_keys(
    layer: Any, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Appends the keys and values of add_bias_kv and add_zero_attn to those of all heads, ``(N, S,
    n)``. Every query may attend to them. Lengths, ``(N,)`` or ``(N, 1)``, become a mask, since
    they would leave the appended keys out."""
    if layer.bias_k is None and not layer.add_zero_attn:
        return key, value, mask, lengths
    size = key.shape[1]
    if lengths is not None:
        attended = torch.arange(size, device=key.device) < lengths.unsqueeze(-1)
        attended = attended if lengths.dim() == 2 else attended[:, None, None]
        mask = narrowed(mask, attended)
    if layer.bias_k is not None:
        shape = (key.shape[0], 1, -1)
        key = torch.cat([key, layer.bias_k.to(key.dtype).expand(shape)], dim=1)
        value = torch.cat([value, layer.bias_v.to(value.dtype).expand(shape)], dim=1)
    if layer.add_zero_attn:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    if mask is not None:
        added = (0, key.shape[1] - size)
        mask = F.pad(mask, added, value=True if mask.dtype == torch.bool else 0.0)
    return key, value, mask, None


def attend_heads(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None,
    lengths: Tensor | None, is_causal: bool, dropout_p: float, need_weights: bool,
    apart: bool = False, blocks: Any = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attends with queries, keys and values ``(N, L, heads * n)``. Returns out ``(N, heads, L,
    n)``, and the weights ``(N, heads, L, S)`` after dropout, as nn.MultiheadAttention does.
    ``apart``: weights are dropped as in a step of prepared keys."""
    heads = weight.shape[0]
    inputs = split(query, heads), split(key, heads), split(value, heads), weight
    compute: Any = attend_dropped if need_weights and dropout_p > 0.0 else attend
    if blocks is not None:
        q, k = inputs[0].shape, inputs[1].shape
        table, tiles = block_terms(blocks, inputs[0], q[:-2], q[-2], k[-2])
        compute = partial(_with_blocks, compute, table, tiles)
    if apart and dropout_p > 0.0:
        compute = partial(attend_apart, compute=compute)
    out, weights, _ = masked_attention(
        inputs, mask, lengths, is_causal, None, dropout_p, 1.0, need_weights, compute=compute
    )
    return out, weights if need_weights else None


def split_blocks(layer: Any, attn_mask: Any, is_causal: bool) -> tuple[Any, Any, bool]:
    """Returns a BlockMask or a mask of another kind, and the hint, which no BlockMask needs."""
    if not is_block_mask(attn_mask):
        return None, attn_mask, is_causal
    check_blocks(layer)
    return attn_mask, None, False


def _with_blocks(
    compute: Any, table: Tensor, tiles: Tensor, call: Call, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls ``compute`` with a block table beside the mask."""
    results: tuple[Tensor, Tensor, Tensor] = compute(
        call._replace(block_table=table, block_tiles=tiles), *options
    )
    return results


def attend_dropped(call: Call, need_weights: bool, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Calls ``attend``, and returns the weights after dropout, which multiplied the values."""
    out, weights, lse = attend(call, need_weights, *options)
    keep = torch.ops.additive_attn.keep_mask(
        call.seed, weights.shape[:-2], *weights.shape[-2:], call.dropout_p
    )
    factors = keep_factors(keep, call.dropout_p, weights.dtype)
    if type(weights) is not Tensor and hasattr(weights, "device_mesh"):
        factors = importlib.import_module("additive_attn.ops.sharding").replicated(
            factors, weights
        )
    return out, weights * factors, lse


def padded(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Pads nested tensors ``(N, L*, E)`` with zeros after the end of each sequence. Returns them,
    and the lengths of queries and of keys. A tensor that is passed twice stays one."""
    query, key = (_lengths(tensors[name]) for name in ("query", "key"))
    if tensors["value"] is not tensors["key"]:
        check_pairs(key, _lengths(tensors["value"]))
    made = {id(x): x.to_padded_tensor(0.0) for x in tensors.values()}
    return {name: made[id(x)] for name, x in tensors.items()}, query, key


def _lengths(nested: Any) -> Tensor:
    if nested.layout is torch.jagged:
        lengths = nested.lengths()
        return nested.offsets().diff() if lengths is None else lengths
    sizes: Tensor = nested._nested_tensor_size()
    return sizes[:, 0].to(nested.device)


def nested_like(out: Tensor, nested: Any, lengths: Tensor) -> Tensor:
    """Returns ``out (N, L, E)`` without its padding, nested as the queries are."""
    made: Tensor
    if nested.layout is torch.jagged and nested.lengths() is None:
        # The same offsets, so that it can be added to the queries.
        kept = torch.arange(out.shape[1], device=out.device) < lengths.unsqueeze(-1)
        made = torch.nested.nested_tensor_from_jagged(out[kept], nested.offsets())
    else:
        rows = [row[:count] for row, count in zip(out, lengths.tolist(), strict=True)]
        made = torch.nested.as_nested_tensor(rows, layout=nested.layout)
    return made
