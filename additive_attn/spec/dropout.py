"""Dropout from a counter-based generator, so that every backend and every recomputation drops the
same weights.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The seed is the
key; the counter is the position: word ``j % 4`` of counter ``(j // 4, i, n mod 2^32, n div 2^32)``
decides about key ``j`` of query row ``i`` in batch entry ``n`` (row-major). A weight is kept iff
its word is at least ``dropout_p * 2^32``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw_seed(device: torch.device) -> Tensor:
    """A random 64-bit seed (0-dim int64) from the default generator of ``device``."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """The smallest random word that keeps a weight."""
    return min(int(dropout_p * 2**32), _WORD)


def keep_mask(
    seed: Tensor,
    batch_shape: Sequence[int],
    rows: tuple[int, int],
    keys: tuple[int, int],
    dropout_p: float,
    entries: Tensor | None = None,
) -> Tensor:
    """Which weights of a block are kept: bool ``(*batch_shape, rows, keys)``. ``seed`` broadcasts
    to ``batch_shape``, whose entries are numbered row-major unless ``entries`` numbers them."""
    device = seed.device
    if entries is None:
        entries = torch.arange(math.prod(batch_shape), device=device).reshape(tuple(batch_shape))
    first = keys[0] // 4
    words = philox(
        seed[..., None, None],
        torch.arange(first, (keys[1] + 3) // 4, device=device),
        torch.arange(*rows, device=device)[:, None],
        entries[..., None, None],
    )
    keep = torch.stack(torch.broadcast_tensors(*words), dim=-1) >= keep_threshold(dropout_p)
    return keep.flatten(-2)[..., keys[0] - 4 * first : keys[1] - 4 * first]


def philox(seed: Tensor, block: Tensor, row: Tensor, entry: Tensor) -> tuple[Tensor, ...]:
    """The four random words of each counter, as int64 tensors in [0, 2^32)."""
    # int64 products wrap modulo 2^64, which keeps both 32-bit halves right.
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = block, row, entry & _WORD, entry >> 32
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ key0
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ key1
        c1, c3 = product1 & _WORD, product0 & _WORD
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
