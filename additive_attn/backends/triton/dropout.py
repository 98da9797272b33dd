"""Dropout factors by Philox4x32-10, as in ``spec/dropout.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_factors(seed, entry, i, key0, threshold, keep_scale, BM: tl.constexpr, BN: tl.constexpr):
    """Returns the factors [BM, BN], 0 or keep_scale, of rows i and keys j from key0, a multiple of
    4: by word j % 4 of the Philox4x32-10 counter (j / 4, i, entry mod 2^32, entry / 2^32)."""
    c0 = (key0 // 4 + tl.arange(0, BN // 4))[None, :] + tl.zeros([BM, BN // 4], tl.int32)
    c1 = i[:, None] + tl.zeros([BM, BN // 4], tl.int32)
    w0, w1, w2, w3 = _words(seed, entry, c0, c1)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BM, BN])
    return tl.where(words.to(tl.uint64) < threshold, 0.0, keep_scale)


@triton.jit
def _words(seed, entry, c0, c1):
    c2 = (entry & 0xFFFFFFFF).to(tl.uint32) + tl.zeros(c0.shape, tl.uint32)
    c3 = (entry >> 32).to(tl.uint32) + tl.zeros(c0.shape, tl.uint32)
    return tl.philox(seed, c0.to(tl.uint32), c1.to(tl.uint32), c2, c3)
