"""What a decoder attends to, step after step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ProjectedMemory(NamedTuple):
    """Keys and values that are attended to again and again, prepared by
    :meth:`AdditiveAttention.project`."""

    key: Tensor
    """Projected keys ``(B, Lk, hidden_dim)``, or ``(Lk, hidden_dim)`` unbatched."""
    value: Tensor
    """Values ``(B, Lk, Dv)``, or ``(Lk, Dv)`` unbatched."""
    lengths: Tensor | None = None
    """Number of leading keys to attend to, int64 ``(B, 1)``, or ``()`` unbatched. Made by hand,
    also ``(B,)`` and of any integer dtype."""
    attn_mask: Tensor | None = None
    """Keys to attend to, bool ``(B, 1, Lk)``, or ``(1, Lk)`` unbatched; True = attend. Made by
    hand, also float, added to the scores."""
