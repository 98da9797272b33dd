"""Dropout from a counter-based generator, so that every backend and every recomputation drops the
same weights.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The seed is the
key; the counter is the position: word ``j % 4`` of counter ``(j // 4, i, n mod 2^32, n div 2^32)``
decides about key ``j`` of query row ``i`` in batch entry ``n`` (row-major). A weight is kept iff
its word is at least ``dropout_p * 2^32``.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from additive_attn.spec.formula import keep_factors, keep_scale

_BIG_ENDIAN = sys.byteorder == "big"
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
    if entries is None and (few := _few_words(seed, batch_shape, rows, keys, dropout_p, 1)):
        return _block(few, torch.int32, batch_shape, rows, keys).bool()
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


def drawn_factors(
    seed: Tensor,
    batch_shape: Sequence[int],
    rows: tuple[int, int],
    keys: tuple[int, int],
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    """``keep_factors`` of a ``keep_mask``."""
    if dtype == torch.float32:
        (bits,) = struct.unpack("<I", struct.pack("<f", keep_scale(dropout_p)))
        if few := _few_words(seed, batch_shape, rows, keys, dropout_p, bits):
            return _block(few, dtype, batch_shape, rows, keys)
    return keep_factors(keep_mask(seed, batch_shape, rows, keys, dropout_p), dropout_p, dtype)


def _few_words(
    seed: Tensor, batch_shape: Sequence[int], rows: tuple[int, int], keys: tuple[int, int],
    dropout_p: float, kept: int,
) -> array[int] | None:  # fmt: skip
    """``_few`` of the blocks that hold ``keys``, where that is faster."""
    if not (type(seed) is Tensor and seed.is_cpu and seed.numel() == 1) or _BIG_ENDIAN:
        return None
    entries, blocks = math.prod(batch_shape), range(keys[0] // 4, (keys[1] + 3) // 4)
    if not 0 < entries * (rows[1] - rows[0]) * len(blocks) <= _FEW:
        return None
    return _few(int(seed), entries, range(*rows), blocks, dropout_p, kept)


def _block(
    words: array[int], dtype: torch.dtype, batch_shape: Sequence[int], rows: tuple[int, int],
    keys: tuple[int, int],
) -> Tensor:  # fmt: skip
    first, count, number = keys[0] % 4, keys[1] - keys[0], rows[1] - rows[0]
    if number == 1 and math.prod(batch_shape) == 1:  # a slice would cost as much as all words
        row = torch.frombuffer(words, dtype=dtype, count=count, offset=4 * first)
        return row.view(*batch_shape, 1, count)
    block = torch.frombuffer(words, dtype=dtype).view(*batch_shape, number, -1)
    return block[..., first : first + count]


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


def _few(
    seed: int, entries: int, rows: range, blocks: range, dropout_p: float, kept: int
) -> array[int]:
    """Of each word of entries x rows x blocks the 32 bits ``kept``, or 0 if it drops. An integer
    of Python holds a word of all counters, 64 bits apart, which no product crosses: c0 and c1 in
    its lower half, c2 and c3 in its upper one. What lies above 32 bits is masked once a round."""
    turned, others, ones, low, weyl, half = _counters(entries, rows, blocks)
    key = ones * (seed & _WORD) | ones * (seed >> 32 & _WORD) << half
    for _ in range(_ROUNDS):
        product = (turned * _MULTIPLIERS[1] << half) + (turned >> half) * _MULTIPLIERS[0]
        turned = (product >> 32 ^ others ^ key) & low
        others = product
        key += weyl
    # The sum of a word and this has bit 32 if the word keeps.
    both = ones | ones << half
    least = both * (_WORD + 1 - keep_threshold(dropout_p))
    keeps = (turned + least) >> 32 & both | ((others & low) + least) & both << 32
    halves = array("Q", (keeps * kept).to_bytes(half // 4, "little"))
    words, count = array("Q", halves), half // 64
    words[::2], words[1::2] = halves[:count], halves[count:]
    return words


@functools.lru_cache(maxsize=64)
def _counters(entries: int, rows: range, blocks: range) -> tuple[int, int, int, int, int, int]:
    count = entries * len(rows) * len(blocks)
    half = 64 * count
    c0, c1, c2, ones = (
        int.from_bytes(array("Q", words).tobytes(), "little")
        for words in (
            [*blocks] * (entries * len(rows)),
            [i for i in rows for _ in blocks] * entries,
            [n for n in range(entries) for _ in range(len(rows) * len(blocks))],
            [1] * count,
        )
    )
    low = (ones | ones << half) * _WORD
    return c0 | c2 << half, c1, ones, low, ones * _WEYL[0] | ones * _WEYL[1] << half, half
