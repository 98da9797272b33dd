"""Which pairs are attended, and what a mask adds to their scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interval(lengths, length_row, i, rows, keys, left, right, HAS_LENGTHS: tl.constexpr):
    """The keys [low, high) that rows i may attend to, by window, causality and lengths."""
    low = tl.maximum(i - left, 0)
    high = tl.minimum(i + right + 1, keys)
    if HAS_LENGTHS:
        here = tl.load(lengths + i.to(tl.int64) * length_row, mask=i < rows, other=0)
        high = tl.minimum(high.to(tl.int64), tl.maximum(here, 0)).to(tl.int32)
    return low, tl.where(i < rows, high, 0)


@triton.jit
def masked_bias(mask, mask_row, mask_column, i, j, used, MASK: tl.constexpr):
    """The float mask of pairs (i, j), or 0; and which of the ``used`` pairs it lets attend."""
    place = mask + i[:, None].to(tl.int64) * mask_row + j[None, :].to(tl.int64) * mask_column
    if MASK == "bool":
        used = used & (tl.load(place, mask=used, other=0) != 0)
        return tl.zeros(used.shape, tl.float32), used
    else:
        bias = tl.load(place, mask=used, other=float("-inf"))
        if bias.dtype != tl.float64:
            bias = bias.to(tl.float32)
        used = used & (bias != float("-inf"))
        return tl.where(used, bias, 0.0), used
