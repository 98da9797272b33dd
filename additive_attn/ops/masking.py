"""Joins padding, or a bias on the scores, with ``attn_mask``, and finds the keys that masks leave
to attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from additive_attn.ops.checks import (
    broadcasts,
    conversion,
    is_dense,
    is_readable,
    refuse_layouts,
    require_one_device,
)
from additive_attn.spec.call import lse_dtype
from additive_attn.spec.masks import interval_mask

# Lengths up to which reading them costs less than the operations that would check them; pairs of a
# mask that is kept, and how many are.
_FEW_LENGTHS, _KEPT_PAIRS, _KEPT_MASKS = 64, 2**14, 16
_kept: dict[tuple[tuple[int, ...], int], Tensor] = {}


def mask_of_lengths(lengths: Any, num_keys: int) -> Tensor | None:
    """Returns the bool mask ``(B, 1, Lk)`` of a few lengths ``(B,)`` on the CPU, which must not be
    written to. Returns None for other lengths, and for those out of range, for which an ordinary
    call raises. The steps of a decoder and the layers of a model pass the same lengths, so masks
    are kept by their numbers. No inference tensor is, since autograd could not save it."""
    if not (
        type(lengths) is Tensor
        and lengths.dtype is torch.int64
        and is_dense(lengths)
        and lengths.dim() == 1
        and 0 < lengths.numel() <= _FEW_LENGTHS
        and is_readable(lengths)
    ):
        return None
    numbers = tuple(lengths.tolist())
    mask = _kept.get((numbers, num_keys))
    if mask is not None:
        return mask
    if min(numbers) < 0 or max(numbers) > num_keys:
        return None
    rows, keys = (0, 1), (0, num_keys)
    mask = interval_mask(lengths.unsqueeze(-1), None, -1, -1, rows, keys, lengths.device, True)
    if type(mask) is Tensor and mask.numel() <= _KEPT_PAIRS and not mask.is_inference():
        if len(_kept) >= _KEPT_MASKS:
            _kept.clear()
        _kept[numbers, num_keys] = mask
    return mask


def with_padding(
    attn_mask: Tensor | None, key_padding_mask: Tensor, key: Tensor, batch: Sequence[int]
) -> Tensor:
    """Returns ``attn_mask`` narrowed to the keys that are not padding."""
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        found, hint = f"a {type(key_padding_mask).__name__}", conversion(key_padding_mask)
        if isinstance(key_padding_mask, Tensor):
            found, hint = str(key_padding_mask.dtype), "Convert a 0/1 mask with .bool()."
        raise TypeError(
            f"key_padding_mask is {found}, but must be a bool tensor (True = ignore). {hint} "
            "Pass scores to be added as attn_mask."
        )
    if not is_dense(key_padding_mask):
        refuse_layouts(key_padding_mask=key_padding_mask)
    shape, full = key_padding_mask.shape, (*batch[:1], key.shape[-2])
    if shape != full and not (
        len(shape) == len(full) and shape[-1] == full[-1] and broadcasts(shape, full)
    ):
        hint = " Transpose it with .t()." if tuple(shape)[::-1] == full else ""
        raise ValueError(
            f"key_padding_mask has shape {tuple(shape)}, but must have one entry per key, {full}; "
            f"its batch may also be 1.{hint}"
        )
    if key_padding_mask.device != key.device:
        require_one_device(key=key, key_padding_mask=key_padding_mask)
    attended = key_padding_mask.logical_not().unsqueeze(-2)  # (B, 1, Lk), or (1, Lk)
    return narrowed(attn_mask, _below_heads(attended, batch))


def with_bias(attn_mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``attn_mask`` with ``bias`` added to attended pairs. The gradient of a mask leaves
    out masked pairs, as that of a bias must."""
    added = bias.to(lse_dtype(dtype))
    if added.dim():
        added = added.reshape(-1, 1, 1) if added.numel() > 1 else added.reshape(1, 1)
    if attn_mask is None:
        return added
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, added, -torch.inf)
    return attn_mask + added


def checked_bias(bias: Tensor, query: Tensor) -> Tensor:
    """Returns a bias of one number unchanged, and one per head as ``(heads, 1)``, which broadcasts
    to the weight."""
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"bias is a {type(bias).__name__}, but must be a tensor of one number, or one per "
            "head, such as the bias of an nn.Linear. Convert it with torch.tensor."
        )
    if not bias.dtype.is_floating_point:
        raise TypeError(
            f"bias has dtype {bias.dtype}, but must be float. Convert it with .float()."
        )
    if bias.device != query.device:
        require_one_device(query=query, bias=bias)
    if not is_dense(bias):
        refuse_layouts(bias=bias)
    shape = bias.shape
    if shape in ((), (1,)):
        return bias
    if shape != query.shape[-3:-2]:
        raise ValueError(
            f"bias has shape {tuple(shape)}, but must be one number, () or (1,), or (heads,) "
            f"where dim -3 of query, of shape {tuple(query.shape)}, is heads. It shifts all "
            "scores of an entry: pass what differs from key to key as attn_mask."
        )
    return bias.unsqueeze(-1)


def _below_heads(mask: Tensor, batch: Sequence[int]) -> Tensor:
    """Gives a mask ``(B, rows, keys)`` dims of 1 for the batch dims after the first."""
    if len(batch) > 1:
        mask = mask.reshape(mask.shape[0], *(1,) * (len(batch) - 1), *mask.shape[1:])
    return mask


def narrowed(attn_mask: Tensor | None, attended: Tensor) -> Tensor:
    if attn_mask is None:
        return attended
    if attn_mask.dtype == torch.bool:
        return attended & attn_mask
    return torch.where(attended, attn_mask, -torch.inf)


def attended_keys(key: Tensor, lengths: Tensor | None, attn_mask: Tensor | None) -> Tensor:
    """Returns the keys to attend to: bool ``(B, Lk)`` or ``(1, Lk)``, or ``(Lk,)`` unbatched."""
    attended = torch.ones(key.shape[-2], dtype=torch.bool, device=key.device)
    if lengths is not None:
        if key.dim() == 3:
            lengths = lengths.reshape(-1, 1)
        attended = torch.arange(key.shape[-2], device=key.device) < lengths
    if attn_mask is not None:
        mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        attended = attended & mask.squeeze(-2)
    return attended
