"""Dropout from a counter-based generator, so that every backend and every recomputation drops the
same weights.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The seed is the
key; the counter is the position: word ``j % 4`` of counter ``(j // 4, i, n mod 2^32, n div 2^32)``
decides about key ``j`` of query row ``i`` in batch entry ``n`` (row-major). A weight is kept iff
its word is at least ``dropout_p * 2^32``.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xCD9E8D57, 0xD2511F53)  # of the third and the first word
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Counters up to which integers of Python cost less than some 80 operations of PyTorch.
_FEW = 512


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
    if type(seed) is Tensor and entries is None and device.type == "cpu" and seed.numel() == 1:
        count, blocks = math.prod(batch_shape), range(keys[0] // 4, (keys[1] + 3) // 4)
        if 0 < count * len(range(*rows)) * len(blocks) <= _FEW and sys.byteorder == "little":
            few = _few_words(int(seed), count, range(*rows), blocks)
            keep = few >= keep_threshold(dropout_p) - 2**31
            keep = keep.view(*batch_shape, len(range(*rows)), -1)
            start = 4 * blocks.start
            return keep[..., keys[0] - start : keys[1] - start]
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
    # int64 products wrap modulo 2^64, which keeps both 32-bit halves right. Few operations on both
    # halves of the counter at once, since small calls pay for each.
    c0, c1, c2, c3, like = torch.broadcast_tensors(block, row, entry & _WORD, entry >> 32, seed)
    ones = (1,) * like.dim()
    keys = torch.stack([seed, seed >> 32]).reshape(2, *ones[seed.dim() :], *seed.shape)
    steps = torch.arange(_ROUNDS, device=seed.device).reshape(-1, 1, *ones)
    weyl, multipliers = (
        torch.tensor(pair, device=seed.device).reshape(2, *ones) for pair in (_WEYL, _MULTIPLIERS)
    )
    turned, others = torch.stack([c2, c0]), torch.stack([c1, c3])
    for key in ((keys & _WORD) + steps * weyl).bitwise_and_(_WORD):
        product = turned * multipliers
        low = product & _WORD
        both = product.bitwise_right_shift_(32).bitwise_and_(_WORD)
        both = both.bitwise_xor_(others).bitwise_xor_(key)  # c0 and c2
        turned, others = both.flip(0), low
    return both[0], others[0], both[1], others[1]


def _few_words(seed: int, entries: int, rows: range, blocks: range) -> Tensor:
    """The words of entries x rows x blocks, as int32: each less 2^31, so that their order is kept.
    An integer of Python holds a word of all counters, 64 bits apart, which no product crosses."""
    count = entries * len(rows) * len(blocks)
    c0, c1, c2, ones = (
        int.from_bytes(array("Q", words).tobytes(), "little")
        for words in (
            [*blocks] * (entries * len(rows)),
            [i for i in rows for _ in blocks] * entries,
            [n for n in range(entries) for _ in range(len(rows) * len(blocks))],
            [1] * count,
        )
    )
    c3, low = 0, ones * _WORD
    for step in range(_ROUNDS):
        key0 = ones * (seed + step * _WEYL[0] & _WORD)
        key1 = ones * ((seed >> 32) + step * _WEYL[1] & _WORD)
        product0, product2 = c0 * _MULTIPLIERS[1], c2 * _MULTIPLIERS[0]
        c0, c1 = product2 >> 32 & low ^ c1 ^ key0, product2 & low
        c2, c3 = product0 >> 32 & low ^ c3 ^ key1, product0 & low
    shift = ones * 0x8000000080000000
    halves = (
        ((a | b << 32) ^ shift).to_bytes(8 * count, "little") for a, b in ((c0, c1), (c2, c3))
    )
    words = array("Q", bytes(16 * count))
    words[::2], words[1::2] = (array("Q", half) for half in halves)
    return torch.frombuffer(words, dtype=torch.int32)
