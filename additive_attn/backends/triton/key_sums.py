"""dk from the sums that tiles of rows store, and what these sums add to dw (math.md, section
3.3)."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.halves import exponentials, weighted
from additive_attn.backends.triton.launch import kernel
from additive_attn.backends.triton.numerics import number
from additive_attn.backends.triton.prepare_rows import SAFE


@triton.jit
def key_block(
    key, key_row, key_h, sizes, weight, weight_h, key_sums, grad_key, entry, entries, block, f,
    row_tiles, key_begin, key_count, keys, hidden, padded, scale,
    CORRECTED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Adds up the tiles' sums of ``feature_kernel`` for a block of keys and features f, and stores
    dk. CORRECTED: returns what the rounding of the stored e^{2k} leaves out of dw."""
    ACC: tl.constexpr = key_sums.dtype.element_ty
    c = block * BLOCK + tl.arange(0, BLOCK)
    inside = (c < key_count)[:, None] & (f < hidden)[None, :]
    stored = tl.cdiv(key_count, 8) * 8
    place = (entry * stored + c)[:, None] * padded + f[None, :]
    # [TILES, BLOCK, FEATURES]: so many loads are issued before the first addition.
    tile = tl.arange(0, TILES)[:, None, None]
    stride = tl.cast(entries, tl.int64) * stored * padded
    from_tile = key_sums + tile * stride + place[None, :, :]
    total = tl.zeros([BLOCK, f.shape[0]], ACC)
    for first in range(0, row_tiles, TILES):
        some = inside[None, :, :] & (first + tile < row_tiles)
        # As in ``quads._load4``: chooses an order in which threads lie along features and keys.
        at = tl.max_contiguous(from_tile + first * stride, [1, 2, f.shape[0]])
        total += tl.sum(tl.load(at, mask=some, other=0.0), 0)
    h = tl.minimum(f, hidden - 1).to(tl.int64)
    if grad_key is not None:
        w = tl.load(weight + h * weight_h).to(ACC)
        to = grad_key + (entry * key_count + c)[:, None] * hidden + f[None, :]
        tl.store(to, weighted(total, w[None, :], scale), mask=inside)
    share = tl.zeros([f.shape[0]], ACC)
    if CORRECTED:
        j = tl.minimum(key_begin + c, keys - 1).to(tl.int64)
        k = tl.load(key + j[:, None] * key_row + h[None, :] * key_h).to(ACC)
        _K, error = exponentials(k, tl.load(sizes + j)[:, None] > SAFE)
        share = tl.sum(tl.where(inside, 2.0 * total * error, 0.0), 0) * scale
    return share


@kernel
def key_sum_kernel(
    key, key_outer, key_inner, key_row, key_h, key_rows, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, key_sums, weight_sums, grad_key, grad_weight,
    inner, entries, entry_begin, row_tiles, key_begin, key_count, keys, hidden, padded,
    scale_bits, splits,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Runs ``key_block`` for a block of keys and FEATURES features, and stores what it returns in
    ``grad_weight`` [key block][entry]. With ``weight_sums``, of ``splits`` shares, stores dw as a
    whole."""
    program = tl.program_id(0)
    blocks = tl.cdiv(key_count, BLOCK)
    block = program % blocks
    program = program // blocks
    feature_tiles = tl.cdiv(hidden, FEATURES)
    f = program % feature_tiles * FEATURES + tl.arange(0, FEATURES)
    n, o, m = batch_entry(entry_begin + program // feature_tiles, inner)
    entry = n - entry_begin
    sizes = key_rows
    if grad_weight is not None:
        sizes = key_rows.size + o * key_exp_outer + m * key_exp_inner
    share = key_block(
        key + o * key_outer + m * key_inner, key_row, key_h, sizes,
        weight + o * weight_outer + m * weight_inner, weight_h, key_sums, grad_key, entry, entries,
        block, f, row_tiles, key_begin, key_count, keys, hidden, padded,
        number(scale_bits).to(key_sums.dtype.element_ty),
        grad_weight is not None, BLOCK, TILES,
    )  # fmt: skip
    if grad_weight is not None:
        if weight_sums is not None:
            for part in range(0, splits):
                of_part = weight_sums + (tl.cast(part, tl.int64) * entries + entry) * hidden
                share += tl.load(of_part + f, mask=f < hidden, other=0.0)
        tl.store(grad_weight + (block * entries + entry) * hidden + f, share, mask=f < hidden)
