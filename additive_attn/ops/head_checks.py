"""Checks of what users pass to a layer of several heads, in the terms of nn.MultiheadAttention."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from additive_attn.ops.autocast import autocast_dtype
from additive_attn.ops.checks import (
    INTEGERS,
    conversion,
    is_dense,
    is_readable,
    refuse_ids,
    refuse_layouts,
    require_one_device,
)
from additive_attn.ops.layer_checks import check_memory as check_fields
from additive_attn.ops.layer_checks import explain_projection, warn_of_polarity
from additive_attn.spec.call import lse_dtype

_NAME = "MultiheadAdditiveAttention"


def check_division(name: str, features: int, num_heads: int) -> None:
    if features % num_heads:
        raise ValueError(
            f"{name} is {features} and num_heads is {num_heads}, but {name} must be a multiple of "
            "num_heads: every head has the same number of features."
        )


def check_heads(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks a forward call: ``(L, E)``, or three dims in the order of ``batch_first``."""
    q, k, v = query.shape, key.shape, value.shape
    rank = len(q)
    if not (2 <= rank <= 3 and len(k) == rank and len(v) == rank):
        refuse_ids(query=query, key=key, value=value)
        raise ValueError(
            f"{_got(query, key, value)}, but all three must have 3 dims, "
            f"{_order(layer)}, or all three 2, (L, E), unbatched."
        )
    if (q[-1], k[-1], v[-1]) != (layer.embed_dim, layer.kdim, layer.vdim):
        _check_features(layer, query=query, key=key, value=value)
    if k[:-1] != v[:-1]:
        raise ValueError(
            f"{_got(query, key, value)}, but each key belongs to one value: they may differ in "
            "the last dim only."
        )
    if rank == 3:
        at = 0 if layer.batch_first else 1
        if q[at] != k[at]:
            hint = f" If dim {1 - at} is the batch, pass batch_first={not layer.batch_first}."
            raise ValueError(
                f"{_got(query, key, value)}, but the batch (dim {at}, "
                f"batch_first={layer.batch_first}) must be the same."
                f"{hint if q[1 - at] == k[1 - at] else ''}"
            )


def _check_features(layer: Any, **tensors: Tensor) -> None:
    wanted = {"query": "embed_dim", "key": "kdim", "value": "vdim"}
    for name, tensor in tensors.items():
        features = getattr(layer, wanted[name])
        if tensor.shape[-1] != features:
            refuse_ids(**{name: tensor})
            raise ValueError(
                f"{name} has {tensor.shape[-1]} features, but this layer was made for "
                f"{wanted[name]}={features}."
            )


def check_memory(layer: Any, key: Tensor, value: Tensor) -> None:
    """Checks a call of ``project``."""
    if not (is_dense(key) and is_dense(value)):
        refuse_layouts(key=key, value=value)
    rank = key.dim()
    if not (2 <= rank <= 3 and value.dim() == rank):
        raise ValueError(
            f"{_NAME}.project got key {tuple(key.shape)} and value {tuple(value.shape)}, but both "
            f"must have 3 dims, {_order(layer)}, or both 2, (L, E), unbatched."
        )
    _check_features(layer, key=key, value=value)
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"{_NAME}.project got key {tuple(key.shape)} and value {tuple(value.shape)}, but each "
            "key belongs to one value: they may differ in the last dim only."
        )


def check_replaced(memory: Any) -> None:
    """Checks a memory whose fields the user may have replaced."""
    key, value, lengths, attn_mask = memory
    check_fields(f"{_NAME}.step", key, value, lengths, attn_mask)
    sequences = key.shape[0] if key.dim() == 3 else 1
    if attn_mask is not None and (
        attn_mask.dim() == 0
        or attn_mask.shape[-1] not in (1, key.shape[-2])
        or math.prod(attn_mask.shape[:-1]) not in (1, sequences)
    ):
        wanted = (sequences, 1, key.shape[-2])
        raise ValueError(
            f"{_NAME}.step got a memory whose attn_mask has shape {tuple(attn_mask.shape)}, and "
            f"keys of shape {tuple(key.shape)}, but a mask of {wanted} belongs to them."
        )


def check_step(layer: Any, query: Tensor, key: Tensor, value: Tensor, beams: int) -> None:
    """Checks a step's query beside keys ``(B, Lk, hidden_dim)`` and values ``(B, Lk, embed_dim)``
    of a memory, which hold all heads."""
    if query.is_nested:
        refuse_layouts(query=query)
    found = (
        f"{_NAME}.step got query {tuple(query.shape)} for a memory of keys {tuple(key.shape)} and "
        f"values {tuple(value.shape)}"
    )
    rank, wanted = key.dim(), (layer.hidden_dim, layer.embed_dim)
    if not 2 <= rank <= 3 or (key.shape[-1], value.shape[-1]) != wanted:
        raise ValueError(f"{found}, but it needs a memory that this layer projected.")
    if not rank - 1 <= query.dim() <= rank:
        raise ValueError(
            f"{found}, but it needs one query per sequence, (B, embed_dim), or several, (B, n, "
            "embed_dim); of an unbatched memory (embed_dim,) or (n, embed_dim)."
        )
    _check_features(layer, query=query)
    if rank == 3:
        sequences = key.shape[0] * (beams if query.dim() == 2 else 1)
        if query.shape[0] != sequences:
            raise ValueError(
                f"{found}, but it needs {sequences} queries: {beams} for each of the "
                f"{key.shape[0]} sequences."
            )


def check_masks(
    layer: Any, attn_mask: Any, key_padding_mask: Any, batch: int, scores: tuple[int, int],
    batched: bool,
) -> None:  # fmt: skip
    """Checks masks as nn.MultiheadAttention takes them."""
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None and not (
            isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
        ):
            found, hint = f"a {type(mask).__name__}", conversion(mask)
            if isinstance(mask, Tensor):
                found, hint = str(mask.dtype), "Convert a 0/1 mask with .bool()."
            elif type(mask).__name__ == "BlockMask":
                hint = "A BlockMask is an attn_mask, and goes with and_masks into another one."
            raise TypeError(
                f"{name} is {found}, but must be None, a bool tensor (True = do not attend) or a "
                f"float one, which is added to the scores. {hint}"
            )
        own = layer.energy_weight.dtype
        if (
            mask is not None
            and mask.dtype not in (torch.bool, own, lse_dtype(own))
            and autocast_dtype(mask.device.type) is None
        ):
            raise TypeError(
                f"{name} is {mask.dtype}, but must be bool (True = do not attend), or float to be "
                f"added to the scores: of the layer's dtype, {own}, or of float32 beside 16 bits. "
                f"Convert it with .to({own})."
            )
        if mask is not None and not is_dense(mask):
            refuse_layouts(**{name: mask})
        if mask is not None and mask.device != layer.energy_weight.device:
            require_one_device(**{"the layer": layer.energy_weight, name: mask})
    each = (batch * layer.num_heads, *scores)
    if attn_mask is not None and attn_mask.shape != (scores if attn_mask.dim() == 2 else each):
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, but must be (L, S) = {scores} or (N * "
            f"num_heads, L, S) = {each}."
        )
    if key_padding_mask is not None:
        wanted = (batch, scores[1]) if batched else (scores[1],)
        if key_padding_mask.shape != wanted:
            raise ValueError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, but must be "
                f"{'(N, S)' if batched else '(S,), unbatched,'} = {wanted}."
            )
    # Once per layer, since it reads the masks.
    if not (torch.compiler.is_compiling() or layer.polarity_checked):
        warn_of_polarity(attn_mask, key_padding_mask, ignores=True)
        layer.polarity_checked = True


def check_blocks(layer: Any) -> None:
    """Raises where a layer that appends keys gets a BlockMask."""
    if layer.bias_k is not None or layer.add_zero_attn:
        raise ValueError(
            "attn_mask is a BlockMask, whose blocks do not cover the keys that add_bias_kv and "
            "add_zero_attn append. Pass a bool tensor (True = do not attend)."
        )


def refuse_hint() -> NoReturn:
    raise ValueError(
        "is_causal says what attn_mask is, as in nn.MultiheadAttention: it needs that mask too. "
        "Pass attn_mask=nn.Transformer.generate_square_subsequent_mask(L)."
    )


def explain_projections(layer: nn.Module, **tensors: Tensor) -> None:
    """Raises an error that says why tensors could not be projected, where the reason is known."""
    for name, tensor in tensors.items():
        if tensor.dtype in INTEGERS or tensor.shape:
            explain_projection(layer, name, tensor, tensor.shape[-1])


def check_nested(layer: Any, tensors: dict[str, Tensor], masked: bool) -> None:
    plain = [name for name, x in tensors.items() if not x.is_nested]
    if plain:
        raise TypeError(
            f"{_NAME} got nested tensors, but {', '.join(plain)} is not nested. Pass all three "
            "nested, or pad them with .to_padded_tensor(0.0) and pass key_padding_mask."
        )
    if masked or not layer.batch_first:
        what = "masks and is_causal" if masked else "batch_first=False"
        raise ValueError(
            f"{_NAME} got nested tensors with {what}, as nn.MultiheadAttention does not take "
            "either. Pad them with .to_padded_tensor(0.0), and pass key_padding_mask."
        )


def check_pairs(keys: Tensor, values: Tensor) -> None:
    """Raises where the lengths of nested keys and values differ."""
    if keys is not values and is_readable(keys) and not torch.equal(keys, values):
        raise ValueError(
            "key and value are nested tensors of different lengths, but each key belongs to one "
            "value."
        )


def _order(layer: Any) -> str:
    return "(N, L, E)" if layer.batch_first else "(L, N, E)"


def _got(query: Tensor, key: Tensor, value: Tensor) -> str:
    return (
        f"{_NAME} got query {tuple(query.shape)}, key {tuple(key.shape)}, "
        f"value {tuple(value.shape)}"
    )
