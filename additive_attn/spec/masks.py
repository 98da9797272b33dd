"""The one description of masking that every backend consumes.

Query row ``i`` may attend to the keys of one interval ``[start_i, stop_i)``:
``start_i = i - left`` and ``stop_i = min(i + right + 1, lengths_i)``, where a negative ``left`` or
``right`` is unbounded; causal attention is ``right = 0``. A dense ``attn_mask`` (bool, True =
attend; or float, added to the scores) narrows it further. Blocks of rows and keys are described
without the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interval_mask(
    lengths: Tensor | None,
    left: int,
    right: int,
    rows: tuple[int, int],
    keys: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """The intervals of a block as a bool tensor ``(..., rows, keys)``, rows or 1 where all are
    alike; None if every pair is allowed."""
    if lengths is None and left < 0 and right < 0:
        return None
    key = torch.arange(*keys, device=device)
    row = torch.arange(*rows, device=device)[:, None]
    allowed = torch.ones((), dtype=torch.bool, device=device)
    # Differences of positions: row + right would overflow for a huge right.
    if left >= 0:
        allowed = row - key <= left
    if right >= 0:
        allowed = allowed & (key - row <= right)
    if lengths is not None:
        lengths = torch.atleast_1d(lengths)
        if lengths.shape[-1] != 1:
            lengths = lengths[..., slice(*rows)]
        allowed = allowed & (key < lengths[..., None])
    return allowed


def interval_bounds(
    left: int, right: int, rows: tuple[int, int], num_keys: int, longest: int
) -> tuple[int, int]:
    """The smallest range of keys outside of which no row of the block may attend."""
    first, last = rows[0], rows[1] - 1
    start = max(first - left, 0) if left >= 0 else 0
    stop = min(last + right + 1, num_keys) if right >= 0 else num_keys
    stop = min(stop, longest)
    return min(start, stop), stop


def mask_block(attn_mask: Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """The view of ``attn_mask`` that belongs to a block; broadcast dims stay as they are."""
    if attn_mask.dim() > 0 and attn_mask.shape[-1] != 1:
        attn_mask = attn_mask[..., slice(*keys)]
    if attn_mask.dim() > 1 and attn_mask.shape[-2] != 1:
        attn_mask = attn_mask[..., slice(*rows), :]
    return attn_mask
