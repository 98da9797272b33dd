"""Attention over packed sequences, each row of which has a range of keys. Nested tensors of the
layout jagged are packed sequences too."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from additive_attn.ops.attend import masked_attention
from additive_attn.ops.checks import (
    checked_window,
    is_dense,
    is_readable,
    refuse_flags,
    refuse_layouts,
    refuse_types,
    require_one_device,
)
from additive_attn.spec.call import Inputs

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Ranges(NamedTuple):
    """The keys of each row, (rows,), int64."""

    starts: Tensor
    lengths: Tensor


def ranges(
    cu_seq_q: Tensor, cu_seq_k: Tensor, rows: int, keys: int, left: int, right: int, at_end: bool
) -> Ranges:
    """Returns the keys of each row. Row ``i`` of a sequence attends to its keys ``i - left ... i +
    right``; ``at_end`` counts both from the last. Rows and keys beyond the sequences belong to
    none. Whatever the numbers are, the ranges lie within the keys."""
    row = torch.arange(rows, device=cu_seq_q.device)
    cu_seq_q, cu_seq_k = cu_seq_q.long().contiguous(), cu_seq_k.long()
    sequences = cu_seq_q.shape[0] - 1
    after = torch.searchsorted(cu_seq_q, row, right=True)
    inside = (after > 0) & (after <= sequences)
    after = after.clamp(1, sequences)
    first, stop = cu_seq_k[after - 1], cu_seq_k[after]
    if left >= 0 or right >= 0:
        own = row - cu_seq_q[after - 1] + first
        if at_end:
            own = own + (stop - first) - (cu_seq_q[after] - cu_seq_q[after - 1])
        most = rows + keys  # beyond which a window has no effect, and sums may overflow
        if left >= 0:
            first = torch.maximum(first, own - min(left, most))
        if right >= 0:
            stop = torch.minimum(stop, own + min(right, most) + 1)
    stop = torch.where(inside, stop, 0).clamp(0, keys)
    return Ranges(first.clamp(0, keys), stop)


def checked_sequences(name: str, cu_seq: Any, total: int, longest: int, like: Tensor) -> Tensor:
    """Checks and returns ``cu_seq``: where each sequence begins, and where the last one ends."""
    most, name = f"max_{name}", f"cu_seq_{name}"
    if not isinstance(cu_seq, Tensor) or cu_seq.dtype not in (torch.int32, torch.int64):
        found = cu_seq.dtype if isinstance(cu_seq, Tensor) else f"a {type(cu_seq).__name__}"
        raise TypeError(
            f"{name} is {found}, but must be a tensor of int32 or int64: 0, then the end of each "
            "sequence. Make it of lengths with F.pad(lengths.cumsum(0), (1, 0))."
        )
    if not is_dense(cu_seq):
        refuse_layouts(**{name: cu_seq})
    if cu_seq.dim() != 1 or cu_seq.shape[0] < 2:
        raise ValueError(
            f"{name} has shape {tuple(cu_seq.shape)}, but must be (sequences + 1,): 0, then the "
            "end of each sequence, with at least one sequence."
        )
    if cu_seq.device != like.device:
        require_one_device(**{"query": like, name: cu_seq})
    if isinstance(longest, bool) or not isinstance(longest, (Integral, torch.SymInt)):
        raise TypeError(
            f"{most} is {longest!r:.60}, but must be an integer: the length of the longest "
            "sequence. Convert it with int()."
        )
    if is_readable(cu_seq):
        sizes = cu_seq.diff()
        least, most_found = (int(x) for x in sizes.aminmax())
        first, last = int(cu_seq[0]), int(cu_seq[-1])
        if first != 0 or last > total or least < 0:
            raise ValueError(
                f"{name} runs from {first} to {last}, in steps of {least} and more, but must "
                f"begin with 0, not decrease, and end within the {total} rows of the tensor. "
                "Make it of lengths with F.pad(lengths.cumsum(0), (1, 0))."
            )
        if most_found > longest:
            raise ValueError(
                f"{most} is {longest}, but a sequence of {name} has length {most_found}. Pass "
                "the length of the longest sequence, or more."
            )
    return cu_seq


def refuse_packed(query: Tensor, key: Tensor, value: Tensor) -> NoReturn:
    raise ValueError(
        f"varlen_additive_attention got query {tuple(query.shape)}, key {tuple(key.shape)} and "
        f"value {tuple(value.shape)}, but packed sequences are (total, H) or "
        "(total, heads, H), all three alike, with (total_k, Dv) or (total_k, heads, Dv) for the "
        "value. For padded sequences, take additive_attention."
    )


def packed_attention(
    inputs: _Inputs, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool,
    window: tuple[int, int] | None, scale: float, dropout_p: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attends within packed sequences, as one entry per head whose rows have ranges of keys."""
    if not all(isinstance(x, Tensor) for x in inputs):
        refuse_types(**Inputs(*inputs)._asdict())
    query, key, value, weight = inputs
    if not (is_dense(query) and is_dense(key) and is_dense(value)):
        refuse_layouts(query=query, key=key, value=value)
    dims = query.dim()
    if not dims == key.dim() == value.dim() or dims not in (2, 3):
        refuse_packed(query, key, value)
    rows, keys = query.shape[0], key.shape[0]
    cu_seq_q = checked_sequences("q", cu_seq_q, rows, max_q, query)
    cu_seq_k = checked_sequences("k", cu_seq_k, keys, max_k, query)
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            f"cu_seq_q has {cu_seq_q.shape[0] - 1} sequences and cu_seq_k {cu_seq_k.shape[0] - 1},"
            " but sequence n of queries attends to sequence n of keys."
        )
    left, right = (-1, -1) if window is None else checked_window(window)
    if type(is_causal) is not bool:
        refuse_flags(is_causal=is_causal)
    right = 0 if is_causal else right
    starts, lengths = ranges(cu_seq_q, cu_seq_k, rows, keys, left, right, at_end=True)
    if dims == 3:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        starts, lengths = starts.unsqueeze(0), lengths.unsqueeze(0)
    out, _, lse = masked_attention(
        (query, key, value, weight), None, lengths, False, None, dropout_p, scale, False, None,
        need_lse, starts=starts,
    )  # fmt: skip
    if dims == 3:
        return out.transpose(0, 1), lse.transpose(0, 1) if need_lse else lse
    return out, lse


def jagged_attention(
    inputs: _Inputs, without: tuple[Any, ...], is_causal: bool,
    window: tuple[int, int] | None, dropout_p: float, scale: float, need_lse: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attends within nested tensors ``(B, L, n)`` or ``(B, heads, L, n)``. Some may be dense."""
    names = "attn_mask", "lengths", "key_padding_mask", "starts", "need_weights"
    if given := [name for name, x in zip(names, without, strict=True) if x is not None]:
        raise ValueError(
            f"{' and '.join(given)} was passed beside nested tensors, but their sequences have "
            "lengths already, and weights would be ragged in two dims. Leave it out "
            "(need_weights=False in a layer), or pad the tensors with .to_padded_tensor(0.0)."
        )
    query, key, value, weight = inputs
    if wrong := {
        name: x for name, x in Inputs(*inputs)._asdict().items()
        if x.layout is not torch.jagged and not is_dense(x)
    }:  # fmt: skip
        refuse_layouts(**wrong)
    if weight.dim() == 2 and weight.shape[0] == 1:
        weight = weight[0]
    (q, cu_seq_q), (k, cu_seq_k), (v, cu_seq_v) = _flat(query), _flat(key), _flat(value)
    if len({x.dim() for x in (q, k, v)}) > 1 or not (
        cu_seq_q.shape == cu_seq_k.shape == cu_seq_v.shape and k.shape[-2] == v.shape[-2]
    ):
        _refuse_jagged(query, key, value)
    if cu_seq_k is not cu_seq_v and is_readable(cu_seq_k) and not cu_seq_k.equal(cu_seq_v):
        raise ValueError(
            "key and value are nested tensors of different lengths, but each key belongs to one "
            "value."
        )
    left, right = (-1, -1) if window is None else checked_window(window)
    if type(is_causal) is not bool:
        refuse_flags(is_causal=is_causal)
    right = 0 if is_causal else right
    rows, keys = q.shape[-2], k.shape[-2]
    starts, lengths = ranges(cu_seq_q, cu_seq_k, rows, keys, left, right, at_end=False)
    if q.dim() == 3:
        starts, lengths = starts.unsqueeze(0), lengths.unsqueeze(0)
    out, weights, lse = masked_attention(
        (q, k, v, weight), None, lengths, False, None, dropout_p, scale, False, None, need_lse,
        starts=starts, bias=bias,
    )  # fmt: skip
    if query.layout is torch.jagged:
        dim, offsets = query.dim() - 2, cu_seq_q
        whole = torch.nested.nested_tensor_from_jagged
        lse = whole(lse, offsets, jagged_dim=dim) if need_lse else lse
        return whole(out, offsets, jagged_dim=dim), weights, lse
    shape = query.shape[0], query.shape[-2]
    if q.dim() == 2:
        return out.unflatten(0, shape), weights, lse.unflatten(0, shape) if need_lse else lse
    out = out.unflatten(1, shape).transpose(0, 1)
    return out, weights, lse.unflatten(1, shape).transpose(0, 1) if need_lse else lse


def _flat(x: Any) -> tuple[Tensor, Tensor]:
    """Packs sequences: returns (total, n) or (heads, total, n), and where each sequence begins and
    the last one ends."""
    if x.dim() not in (3, 4):
        _refuse_jagged(x)
    if x.layout is not torch.jagged:
        ends = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[-2]
        return (x if x.dim() == 3 else x.transpose(0, 1)).flatten(-3, -2), ends
    if x._ragged_idx != x.dim() - 2:
        _refuse_jagged(x)
    if x.lengths() is not None:
        x = x.contiguous()
    return x.values(), x.offsets()


def _refuse_jagged(*tensors: Tensor) -> NoReturn:
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
    raise ValueError(
        f"Beside nested tensors of the layout jagged, query, key and value are (B, L, n) or (B, "
        f"heads, L, n), each nested along L or dense, of equal B and heads, but found {shapes}. "
        "Heads come before the nested dim: .transpose(1, 2)."
    )
