"""Sequences without padding, one after the other: the range of keys that each row may attend to.
Nested tensors of the layout jagged are such sequences too."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from additive_attn.ops.checks import is_readable, require_one_device


class Ranges(NamedTuple):
    """The keys of each row, (rows,), int64."""

    starts: Tensor
    lengths: Tensor


def ranges(
    cu_seq_q: Tensor, cu_seq_k: Tensor, rows: int, keys: int, left: int, right: int, at_end: bool
) -> Ranges:
    """Row ``i`` of a sequence attends to its keys ``i - left ... i + right``; ``at_end`` counts
    both from the last. Rows and keys beyond the sequences belong to none. Whatever the numbers
    are, the ranges lie within the keys."""
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
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
        raise TypeError(
            f"{most} is {longest!r}, but must be an integer: the length of the longest sequence."
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
