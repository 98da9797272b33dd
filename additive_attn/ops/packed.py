"""Packed sequences, one after the other without padding."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

from additive_attn.ops.attend import masked_attention
from additive_attn.ops.checks import (
    checked_window,
    is_readable,
    refuse_flags,
    refuse_types,
    require_one_device,
)
from additive_attn.ops.jagged import ranges
from additive_attn.spec.call import Inputs

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def checked_sequences(name: str, cu_seq: Any, total: int, longest: int, like: Tensor) -> Tensor:
    """Where each sequence begins, and where the last one ends."""
    most, name = f"max_{name}", f"cu_seq_{name}"
    if not isinstance(cu_seq, Tensor) or cu_seq.dtype not in (torch.int32, torch.int64):
        found = getattr(cu_seq, "dtype", type(cu_seq).__name__)
        raise TypeError(
            f"{name} is {found}, but must be a tensor of int32 or int64: 0, then the end of each "
            "sequence. Make it of lengths with F.pad(lengths.cumsum(0), (1, 0))."
        )
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
                f"begin with 0, never fall, and end within the {total} rows of the packed tensor. "
                "Make it of lengths with F.pad(lengths.cumsum(0), (1, 0))."
            )
        if most_found > longest:
            raise ValueError(
                f"{most} is {longest}, but a sequence of {name} has length {most_found}. Pass "
                "the length of the longest sequence, or more."
            )
    return cu_seq


def refuse_packed(query: Tensor, key: Tensor, value: Tensor) -> NoReturn:
    shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
    raise ValueError(
        f"query, key and value have shapes {shapes}, but packed sequences are (total, H) or "
        "(total, heads, H), all three alike, with (total_k, Dv) or (total_k, heads, Dv) for the "
        "value. For padded sequences, take additive_attention."
    )


def packed_attention(
    inputs: _Inputs, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool,
    window: tuple[int, int] | None, scale: float, dropout_p: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of sequences one after the other: one entry per head, whose rows have ranges of keys."""
    if not all(isinstance(x, Tensor) for x in inputs):
        refuse_types(**Inputs(*inputs)._asdict())
    query, key, value, weight = inputs
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
