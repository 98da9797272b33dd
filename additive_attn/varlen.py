"""Attention over sequences of different lengths that are packed without padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from additive_attn.ops.packed import packed_attention

fx.wrap("packed_attention")


def varlen_additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    need_lse: bool = False,
) -> Any:
    """:func:`additive_attention` of packed sequences, one after the other, in the conventions of
    ``torch.nn.attention.varlen.varlen_attn``. No padding is computed or stored.

    Args:
        query: ``(total_q, H)``, or ``(total_q, heads, H)``.
        key: ``(total_k, H)``, or ``(total_k, heads, H)``.
        value: ``(total_k, Dv)``, or ``(total_k, heads, Dv)``.
        weight: ``(H,)``, or ``(heads, H)``.
        cu_seq_q: ``(sequences + 1,)``, int32 or int64: 0, then where each sequence of queries
            ends. Rows after the last sequence attend to nothing.
        cu_seq_k: the same for keys. On the CPU both are read and checked; elsewhere, rows of
            sequences that are not ordered attend to any keys, but never outside of the tensors.
        max_q, max_k: the length of the longest sequence, or more.
        is_causal: query i of a sequence attends to its keys up to i, **both counted from the
            end** (lower right aligned), as in varlen_attn. That differs from additive_attention
            where a sequence has more or fewer queries than keys.
        window: ``(left, right)``: keys i - left ... i + right, aligned likewise; -1 = unbounded.
        scale, dropout_p: as in :func:`additive_attention`.
        need_lse: also return the log-sum-exp of the scores.

    Returns:
        out ``(total_q, Dv)``, or ``(total_q, heads, Dv)``; then lse ``(total_q,)``, or
        ``(total_q, heads)``, if need_lse.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`additive_attention`.
    """
    out, lse = packed_attention(
        (query, key, value, weight), cu_seq_q, cu_seq_k, max_q, max_k, is_causal, window, scale,
        dropout_p, need_lse,
    )  # fmt: skip
    return (out, lse) if need_lse else out
