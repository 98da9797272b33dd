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
# Up to so many counters, integers of Python cost less than some 100 operations of PyTorch.
_FEW = 1024


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
    """Returns which weights of a block are kept: bool ``(*batch_shape, rows, keys)``. ``seed``
    broadcasts to ``batch_shape``, whose entries are numbered row-major unless ``entries`` numbers
    them."""
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
        if few := _few_words(seed, batch_shape, rows, keys, dropout_p, _bits(dropout_p)):
            return _block(few, dtype, batch_shape, rows, keys)
    return keep_factors(keep_mask(seed, batch_shape, rows, keys, dropout_p), dropout_p, dtype)


@functools.lru_cache(maxsize=64)
def _bits(dropout_p: float) -> int:
    """Returns the bits of the float32 that a kept weight is multiplied by."""
    bits: int = struct.unpack("<I", struct.pack("<f", keep_scale(dropout_p)))[0]
    return bits


def _few_words(
    seed: Tensor, batch_shape: Sequence[int], rows: tuple[int, int], keys: tuple[int, int],
    dropout_p: float, kept: int,
) -> array[int] | None:  # fmt: skip
    """Calls ``_few`` for the blocks that hold ``keys``; None where that is not faster."""
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
    """Returns the four random words of each counter, as int64 tensors in [0, 2^32)."""
    # int64 products wrap modulo 2^64, which keeps both 32-bit halves right. Few operations on both
    # halves of the counter at once, since small calls pay for each. Bits above 32 are masked once
    # a round.
    c0, c1, c2, c3, like = torch.broadcast_tensors(block, row, entry & _WORD, entry >> 32, seed)
    ones = (1,) * like.dim()
    keys = torch.stack([seed, seed >> 32]).reshape(2, *ones[seed.dim() :], *seed.shape)
    steps = torch.arange(_ROUNDS, device=seed.device).reshape(-1, 1, *ones)
    weyl, multipliers = (
        torch.tensor(pair, device=seed.device).reshape(2, *ones) for pair in (_WEYL, _MULTIPLIERS)
    )
    # Tensors, since PyTorch converts a number to one in every operation.
    word, half = torch.tensor((_WORD, 32), device=seed.device).unbind()
    turned, others = torch.stack([c2, c0]), torch.stack([c1, c3])
    product, both = torch.empty_like(turned), torch.empty_like(turned)
    (c2, c0), (first, second) = turned.unbind(), both.unbind()
    for key in ((keys & _WORD) + steps * weyl).bitwise_and_(_WORD):
        torch.mul(turned, multipliers, out=product)
        torch.bitwise_right_shift(product, half, out=both)
        both.bitwise_xor_(others).bitwise_xor_(key)
        torch.bitwise_and(first, word, out=c0)
        torch.bitwise_and(second, word, out=c2)
        product, others = others, product
    c1, c3 = others.bitwise_and_(word).unbind()
    return c0, c1, c2, c3


def _few(
    seed: int, entries: int, rows: range, blocks: range, dropout_p: float, kept: int
) -> array[int]:
    """Returns, for each word of entries x rows x blocks, the 32 bits ``kept``, or 0 if the word
    drops. An integer of Python holds one word of all counters, 64 bits apart, which no product
    crosses. Bits above 32 are masked once a round."""
    c0, c1, c2, c3, ones, low, weyl0, weyl1 = _counters(entries, rows, blocks)
    of_c2, of_c0 = _MULTIPLIERS
    key0, key1 = ones * (seed & _WORD), ones * (seed >> 32 & _WORD)
    c0 ^= key0
    c2 ^= key1
    for _ in range(_ROUNDS - 1):
        key0 += weyl0
        key1 += weyl1
        c1, c3, left, right = c2 * of_c2, c0 * of_c0, c3, c1
        c0 = (c1 >> 32 ^ right ^ key0) & low
        c2 = (c3 >> 32 ^ left ^ key1) & low
    # The sum of a word and ``least`` has bit 32 set if the word keeps.
    least, above = ones * (_WORD + 1 - keep_threshold(dropout_p)), ones << 32
    size = 8 * entries * len(rows) * len(blocks)
    first = (c0 + least) >> 32 & ones | (c1 & low) + least & above
    second = (c2 + least) >> 32 & ones | (c3 & low) + least & above
    words = array("Q", bytes(2 * size))
    words[::2] = array("Q", (first * kept).to_bytes(size, "little"))
    words[1::2] = array("Q", (second * kept).to_bytes(size, "little"))
    return words


@functools.lru_cache(maxsize=64)
def _counters(entries: int, rows: range, blocks: range) -> tuple[int, ...]:
    """Returns the counters after the first round without its keys, which no seed changes."""
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
    low = ones * _WORD
    left, right = c0 * _MULTIPLIERS[1], c2 * _MULTIPLIERS[0]
    first = (right >> 32 ^ c1) & low, right, left >> 32 & low, left
    return *first, ones, low, *(ones * step for step in _WEYL)
