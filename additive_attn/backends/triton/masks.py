"""Which pairs are attended, what a mask adds to their scores, and how both are stored.

A stored score is -inf where the pair is masked. The score of an attended pair may overflow to -inf
too: it is stored as the lowest finite number, and a finite score that low as the next one above.
So a row whose attended scores all overflow is NaN, as the softmax of such scores is, and a row of
masking values like ``torch.finfo(dtype).min`` is not."""

from __future__ import annotations

import triton
import triton.language as tl

# The lowest finite number of a dtype, and the next one above.
LOWEST32 = tl.constexpr(-3.4028234663852886e38)
NEXT32 = tl.constexpr(-3.4028232635611926e38)
LOWEST64 = tl.constexpr(-1.7976931348623157e308)
NEXT64 = tl.constexpr(-1.7976931348623155e308)


@triton.jit
def interval(lengths, length_row, i, rows, keys, left, right):
    """Returns the keys [low, high) that rows i may attend to, by window, causality, lengths and
    starts. ``lengths`` of unsigned numbers hold both: starts in the upper half of a number."""
    low = tl.maximum(i - left, 0)
    high = tl.minimum(i + right + 1, keys)
    if lengths is not None:
        length = tl.load(lengths + i.to(tl.int64) * length_row, mask=i < rows, other=0)
        if lengths.dtype.element_ty == tl.uint64:
            low = tl.maximum(low, (length >> 32).to(tl.int32))
            high = tl.minimum(high, (length & 0x7FFFFFFF).to(tl.int32))
        else:
            high = tl.minimum(high.to(tl.int64), tl.maximum(length, 0)).to(tl.int32)
    return low, tl.where(i < rows, high, 0)


@triton.jit
def block_codes(table, table_row, table_column, tiles, i, j, attended):
    """Loads the numbers of a block table for the ``attended`` pairs (i, j); 0 for others."""
    row = (i // tiles.rows).to(tl.int64) * table_row
    place = table + row + (j // tiles.keys).to(tl.int64) * table_column
    return tl.load(place, mask=attended, other=0)


@triton.jit
def masked_bias(mask, mask_row, mask_column, tiles, i, j, attended):
    """Returns the float mask of pairs (i, j), or 0, and which of the ``attended`` pairs the mask
    keeps. With ``tiles``, ``mask`` is a block table."""
    if tiles is not None:
        code = block_codes(mask, mask_row, mask_column, tiles, i, j, attended)
        partial = (code > 1) & (code < tiles.number + 2)
        place = (code - 2).to(tl.int64) * tiles.rows + i % tiles.rows
        place = place * tiles.keys + j % tiles.keys
        inside = tl.load(tiles.pairs + place, mask=partial, other=0) != 0
        return tl.zeros(attended.shape, tl.float32), (code == 1) | inside
    place = mask + i.to(tl.int64) * mask_row + j.to(tl.int64) * mask_column
    if mask.dtype.element_ty == tl.uint8:
        attended = attended & (tl.load(place, mask=attended, other=0) != 0)
        return tl.zeros(attended.shape, tl.float32), attended
    else:
        bias = tl.load(place, mask=attended, other=float("-inf"))
        if bias.dtype != tl.float64:
            bias = bias.to(tl.float32)
        attended = attended & (bias != float("-inf"))
        return tl.where(attended, bias, 0.0), attended


@triton.jit
def attended_pairs(low, high, mask, mask_row, mask_column, tiles, i, j):
    """Returns the mask's bias, 0 without a mask, and which pairs are attended, of rows i with
    their interval and keys j. These broadcast together."""
    attended = (j >= low) & (j < high)
    bias = 0.0
    if mask is not None:
        bias, attended = masked_bias(mask, mask_row, mask_column, tiles, i, j, attended)
    return bias, attended


@triton.jit
def tile_rows(row0, RM: tl.constexpr, TM: tl.constexpr):
    """Returns the rows of a tile from row0, [RM, TM]: row0 + tm RM + rm."""
    return row0 + RM * tl.arange(0, TM)[None, :] + tl.arange(0, RM)[:, None]


@triton.jit
def tile_keys(key0, RN: tl.constexpr, TN: tl.constexpr):
    """Returns the keys of a tile from key0, [RN, TN]: key0 + rn TN + tn."""
    return key0 + TN * tl.arange(0, RN)[:, None] + tl.arange(0, TN)[None, :]


@triton.jit
def attending(
    empty, low, high, mask, mask_row, mask_column, block_tiles, row0, first, last,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Returns which of the rows [RM, TM] whose sum is 0 (``empty``) attend to a key in [first,
    last): all their scores have overflowed."""
    attends = tl.maximum(low, first) < tl.minimum(high, last)  # [RM, 1, TM, 1]
    attends = tl.reshape(attends, [RM, TM]) & empty
    if mask is not None:
        if tl.max(attends.to(tl.int32)) != 0:
            found = tl.zeros([RM, TM], tl.int32)
            i = tile_rows(row0, RM, TM)
            j = tile_keys(0, RN, TN)
            for key0 in range(first, last, RN * TN):
                _bias, attended = attended_pairs(
                    low, high, mask, mask_row, mask_column, block_tiles,
                    i[:, None, :, None], key0 + j[None, :, None, :],
                )  # fmt: skip
                found = tl.maximum(found, tl.max(tl.max(attended.to(tl.int32), 3), 1))
            attends &= found != 0
    return attends


@triton.jit
def stored(score, attended):
    """Returns scores as kernels store them: see the head of this file. NaN stays NaN."""
    finite = score != float("-inf")
    if score.dtype == tl.float64:
        score = tl.where(finite, tl.where(score < NEXT64, NEXT64, score), LOWEST64)
    else:
        score = tl.maximum(score, NEXT32, propagate_nan=tl.PropagateNan.ALL)
        score = tl.where(finite, score, LOWEST32)
    return tl.where(attended, score, float("-inf"))


@triton.jit
def stored_top(top, total, attends):
    """Returns the largest stored score of rows, from the largest score and the sum of e^{score -
    top}. Where the sum is 0, all scores of the rows that attend to a key have overflowed."""
    if top.dtype == tl.float64:
        none = tl.where(attends, LOWEST64, float("-inf"))
        return tl.where(total == 0.0, none, tl.maximum(top, NEXT64))
    else:
        none = tl.where(attends, LOWEST32, float("-inf"))
        return tl.where(total == 0.0, none, tl.maximum(top, NEXT32))


@triton.jit
def overflowed(top):
    """Whether all attended scores of a row overflowed, by its largest stored score."""
    if top.dtype == tl.float64:
        return top == LOWEST64
    else:
        return top == LOWEST32
