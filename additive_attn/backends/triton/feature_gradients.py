"""dq, dk and dw from G: passes over the features (math.md, eq. 10, 11, 13).

With Q = e^{2q}, K = e^{2k} and s = 1 / (1 + Q K): t = 1 - 2 s and 1 - t^2 = 4 (s - s^2), which
costs six instructions per tanh for dq with dw and five for dk, two features sharing a reciprocal.
The same s - s^2 comes from 1 / (1 + 1/(Q K)), so that either pass streams what ``prepare.py`` has
stored, K or 1/Q, and keeps the other in registers. Loops run over the reduced index, j for dq and
i for dk: no sum crosses threads until its end, nothing is atomic, and results repeat bit for bit.

A program takes two halves of features, TH RH each, whose tensors travel as pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import feature_tile
from additive_attn.backends.triton.halves import (
    add,
    direct_pairs,
    exponentials,
    fractions,
    kept,
    over_rows,
    prepared,
    raw,
    scaled,
    slope,
    where,
)
from additive_attn.backends.triton.launch import kernel
from additive_attn.backends.triton.numerics import number, reciprocal, split4
from additive_attn.backends.triton.prepare import SAFE


@triton.jit
def _store(to, h, hidden, inside, x):
    tl.store(to + h[0][None, :, None, :], x[0], mask=inside & (h[0] < hidden)[None, :, None, :])
    tl.store(to + h[1][None, :, None, :], x[1], mask=inside & (h[1] < hidden)[None, :, None, :])


@triton.jit
def _store_weight(to, h, hidden, scale, x):
    """The sums over all rows, times the scale."""
    tl.store(to + h[0], tl.sum(x[0], 1) * scale, mask=h[0] < hidden)
    tl.store(to + h[1], tl.sum(x[1], 1) * scale, mask=h[1] < hidden)


@triton.jit
def _weighted(x, weight, h, hidden, stride, scale):
    """4 scale w_h x of both halves. Where no pair has contributed that is 0 beside any weight."""
    wa, wb = raw(weight, h, hidden, stride, x[0].dtype)
    return (
        tl.where(x[0] == 0.0, 0.0, x[0] * 4.0 * scale * wa),
        tl.where(x[1] == 0.0, 0.0, x[1] * 4.0 * scale * wb),
    )


@triton.jit
def _difference(
    q, direct_i, g_rows, K_first, key_begin, keys, begin, end, h, sums, weights,
    padded: tl.constexpr, TILE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """``sums`` and ``weights`` of ``query_kernel`` with keys [begin, end) by the difference form,
    t = (K - 1/Q) / (K + 1/Q). 1/Q has its own rounding, which takes the place of that of Q."""
    A, A_error = exponentials(q, direct_i, -2.0)
    _Q, Q_error = exponentials(q, direct_i, 2.0)
    half = (0.5 * (A_error[0] + Q_error[0]), 0.5 * (A_error[1] + Q_error[1]))
    for c in range(begin, end):
        j1 = tl.minimum(key_begin + c, keys - 1).to(tl.int64)
        g = tl.load(g_rows + c)[:, None, :, None]
        K = prepared(K_first + j1 * padded, h, padded, TILE)
        ya = A[0] + K[0]
        yb = A[1] + K[1]
        both = reciprocal(ya * yb, TARGET)
        t = ((K[0] - A[0]) * (both * yb), (K[1] - A[1]) * (both * ya))
        d = (g * (1.0 - t[0] * t[0]), g * (1.0 - t[1] * t[1]))
        sums = add(sums, scaled(0.25, d))
        terms = (g * t[0] - d[0] * half[0], g * t[1] - d[1] * half[1])
        weights = add(weights, over_rows(terms))
    return sums, weights


@triton.jit
def _rounding(q, direct_i, sums):
    """dw by the roundings of Q, which all keys of a row share: + (1 - t^2) / 2 per unit."""
    _Q, error = exponentials(q, direct_i, 2.0)
    return 2.0 * sums[0] * error[0], 2.0 * sums[1] * error[1]


@triton.jit
def _is_flagged(flags, begin, end, flag_rows, flag_columns):
    """Whether a tile of ``flag_rows`` rows in which rows [begin, end) lie is flagged."""
    tile = begin // flag_rows + tl.arange(0, 16)
    return tl.max(tl.load(flags + tile * flag_columns, mask=tile * flag_rows < end, other=0)) != 0


@triton.jit
def _forms(
    sizes, counts, any_direct_i, largest_i, opposite, begin, end, SPARSE: tl.constexpr
):  # fmt: skip
    """Whether a row or key takes the direct form, and whether no |q|, |k| of the others is above
    1, unless a pair is opposite; and where the loop over the block's keys ends."""
    key_counts = tl.max(counts.to(tl.int32), 0)
    if SPARSE:
        end = tl.where(tl.max(key_counts, 0) != 0, end, begin)
    size_j = tl.where(key_counts != 0, tl.load(sizes), 0.0)
    take_direct = any_direct_i | (tl.max(size_j) > SAFE)
    largest_j = tl.max(tl.where(size_j > SAFE, 0.0, size_j))
    small = tl.maximum(largest_i, largest_j) <= 1.0
    return take_direct & (opposite == 0), small & (opposite == 0), end


@triton.jit
def _small_tanh(
    q, direct_i, g_rows, k_rows, size, key_begin, keys, key_row, key_h, begin, end, h, hidden,
    sums, weights, TARGET: tl.constexpr,
):  # fmt: skip
    """The same with keys some of which are opposite to rows of the tile, by the direct form. What
    roundings of Q and K leave out of dw, and both kernels add at their end, is not left out here:
    it is taken away."""
    _Q, Q_error = exponentials(q, direct_i, 2.0)
    for c in range(begin, end):
        j1 = tl.minimum(key_begin + c, keys - 1).to(tl.int64)
        direct_j = tl.load(size + j1 + tl.zeros([1, 1], tl.int32)) > SAFE
        g = tl.load(g_rows + c)[:, None, :, None]
        k = raw(k_rows + j1 * key_row, h, hidden, key_h, sums[0].dtype)
        slopes, terms = direct_pairs(q, k, g, TARGET)
        _K, K_error = exponentials(k, direct_j, 2.0)
        sums = add(sums, slopes)
        terms = (
            terms[0] - 2.0 * slopes[0] * (K_error[0] + Q_error[0]),
            terms[1] - 2.0 * slopes[1] * (K_error[1] + Q_error[1]),
        )
        weights = add(weights, over_rows(terms))
    return sums, weights


@kernel
def query_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, gradient, flags, flag_rows, flag_keys,
    grad_query, grad_weight, inner, entries, entry_begin, rows, row_begin, row_count, row_padded,
    keys, key_begin, key_count, key_padded, hidden, left, right, scale_bits, splits,
    keys_per_split,
    RX: tl.constexpr, TX: tl.constexpr, RH: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    padded: tl.constexpr, SPARSE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of rows and 2 RH TH features, a range of keys: dq to [split][entry][row] and, summed
    over the rows too, dw to [split][row tile][entry]. ``flags``, of tiles of ``flag_rows`` x
    ``flag_keys`` pairs, are those of ``opposite.py``."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    BX: tl.constexpr = RX * TX
    TILE: tl.constexpr = 2 * RH * TH
    entry, split, tile, tile_count, r, i, h, o, m = feature_tile(
        row_count, row_begin, rows, padded, inner, splits, entry_begin, RX, TX, RH, TH
    )
    q_rows = query + o * query_outer + m * query_inner + i[:, None, :, None] * query_row
    g_rows = gradient + (entry * row_padded + r.to(tl.int64)) * key_padded  # [RX, TX]
    zeros = tl.zeros([RX, RH, TX, TH], ACC)
    sums = (zeros, zeros)  # of G (1 - t^2) / 4
    weights = (tl.zeros([RH, TX, TH], ACC), tl.zeros([RH, TX, TH], ACC))  # of G t
    k_rows = key + o * key_outer + m * key_inner
    first = tl.maximum(row_begin + tile * BX - left, key_begin)
    last = tl.minimum(row_begin + tile * BX + BX + right, key_begin + key_count)
    begin = split * keys_per_split
    first = tl.maximum((first - key_begin) // BLOCK * BLOCK, begin)
    last = tl.minimum(last - key_begin, begin + keys_per_split)
    if query_rows is not None:
        at_query = o * query_exp_outer + m * query_exp_inner
        at_key = o * key_exp_outer + m * key_exp_inner
        size_i = tl.load(query_rows.size + at_query + i)
        direct_i = size_i > SAFE
        Q, _error = exponentials(kept(q_rows, h, hidden, query_h, ACC), direct_i, 2.0)
        any_direct_i = tl.max(direct_i.to(tl.int32)) != 0
        largest_i = tl.max(tl.where(direct_i, 0.0, size_i))
        K_first = key_rows.exponential + at_key * padded
        flat = tl.arange(0, BX)[:, None].to(tl.int64) + tile * BX
        flat_rows = gradient + entry * row_padded * key_padded
        flags += entry * tl.cdiv(row_count, flag_rows) * tl.cdiv(key_count, flag_keys)

    for k0 in range(first, last, BLOCK):
        end = tl.minimum(k0 + BLOCK, last)
        if query_rows is not None:
            # A key decides something only where G, [BX, BLOCK], is not 0.
            block = k0 + tl.arange(0, BLOCK)
            j = at_key + tl.minimum(key_begin + block, keys - 1)
            counts = tl.load(flat_rows + flat * tl.maximum(key_padded, k0) + block[None, :]) != 0.0
            opposite = _is_flagged(
                flags + k0 // flag_keys, tile * BX, tl.minimum(tile * BX + BX, row_count),
                flag_rows, tl.cdiv(key_count, flag_keys),
            )  # fmt: skip
            take_direct, small, end = _forms(
                key_rows.size + j, counts, any_direct_i, largest_i, opposite, k0, end, SPARSE
            )
        if query_rows is None or take_direct:
            q = kept(q_rows, h, hidden, query_h, ACC, k0)
            parts = (zeros, zeros)
            total = tl.zeros([RX, 1, TX, 1], ACC)
            for c in range(k0, end):
                j1 = tl.minimum(key_begin + c, keys - 1).to(tl.int64)
                g = tl.load(g_rows + c)[:, None, :, None]
                k = raw(k_rows + j1 * key_row, h, hidden, key_h, ACC)
                slopes, terms = direct_pairs(q, k, g, TARGET)
                if query_rows is not None:
                    # Pairs in range give the same bits as without such a row or key.
                    direct = tl.maximum(size_i, tl.load(key_rows.size + at_key + j1)) > SAFE
                    direct = direct[:, None, :, None]
                    s = fractions(Q, prepared(K_first + j1 * padded, h, padded, TILE), TARGET)
                    g = tl.where(direct, 0.0, g)
                    sums = add(sums, scaled(g, slope(s)))
                    parts = add(parts, scaled(g, s))
                    total += g
                    slopes = where(direct, slopes, (0.0, 0.0))
                    terms = where(direct, terms, (0.0, 0.0))
                sums = add(sums, slopes)
                weights = add(weights, over_rows(terms))
            weights = add(weights, over_rows((total - 2.0 * parts[0], total - 2.0 * parts[1])))
        elif small:
            q = kept(q_rows, h, hidden, query_h, ACC, k0)
            sums, weights = _difference(
                q, direct_i, g_rows, K_first, key_begin, keys, k0, end, h, sums, weights,
                padded, TILE, TARGET,
            )  # fmt: skip
        elif opposite:
            q = kept(q_rows, h, hidden, query_h, ACC, k0)
            sums, weights = _small_tanh(
                q, direct_i, g_rows, k_rows, key_rows.size + at_key, key_begin, keys, key_row,
                key_h, k0, end, h, hidden, sums, weights, TARGET,
            )  # fmt: skip
        else:
            parts = (zeros, zeros)
            total = tl.zeros([RX, TX], tl.float32)
            g_four = g_rows[:, :, None] + tl.arange(0, 4)[None, None, :]  # [RX, TX, 4]
            K_rows = K_first + tl.cast(key_begin + k0, tl.int64) * padded
            for c in range(k0, end, 4):
                g4 = split4(tl.load(g_four + c), RX, TX)
                for u in tl.static_range(4):
                    K = prepared(K_rows + u * padded, h, padded, TILE)
                    total += g4[u]
                    g = g4[u][:, None, :, None]
                    s = fractions(Q, K, TARGET)
                    sums = add(sums, scaled(g, slope(s)))
                    parts = add(parts, scaled(g, s))
                K_rows += 4 * padded
            total = total[:, None, :, None]
            weights = add(weights, over_rows((total - 2.0 * parts[0], total - 2.0 * parts[1])))

    if query_rows is not None:
        q = kept(q_rows, h, hidden, query_h, ACC, first)
        weights = add(weights, over_rows(_rounding(q, direct_i, sums)))
    scale = number(scale_bits).to(ACC)
    weight += o * weight_outer + m * weight_inner
    to = grad_query + ((split * entries + entry) * row_count + r[:, None, :, None]) * hidden
    inside = (r < row_count)[:, None, :, None]
    _store(to, h, hidden, inside, _weighted(sums, weight, h, hidden, weight_h, scale))
    to = grad_weight + ((split * tile_count + tile) * entries + entry) * hidden
    _store_weight(to, h, hidden, scale, weights)


@kernel
def key_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, gradient, flags, flag_rows, flag_keys,
    grad_key, grad_weight, inner, entries, entry_begin, rows, row_begin, row_count, row_padded,
    keys, key_begin, key_count, key_padded, hidden, left, right, scale_bits, splits,
    rows_per_split,
    RX: tl.constexpr, TX: tl.constexpr, RH: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    padded: tl.constexpr, SPARSE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of keys and 2 RH TH features, a range of rows: dk to ``grad_key``
    [split][entry][key]; what the roundings of K leave out of dw to ``grad_weight``
    [split][key tile][entry]."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    BX: tl.constexpr = RX * TX
    TILE: tl.constexpr = 2 * RH * TH
    entry, split, tile, tile_count, c, j, h, o, m = feature_tile(
        key_count, key_begin, keys, padded, inner, splits, entry_begin, RX, TX, RH, TH
    )
    k_rows = key + o * key_outer + m * key_inner + j[:, None, :, None] * key_row
    k = kept(k_rows, h, hidden, key_h, ACC)
    g_columns = gradient + entry * row_padded * key_padded + c  # [RX, TX]
    zeros = tl.zeros([RX, RH, TX, TH], ACC)
    sums = (zeros, zeros)  # of G (1 - t^2) / 4
    q_rows = query + o * query_outer + m * query_inner
    first = tl.maximum(key_begin + tile * BX - right, row_begin)
    last = tl.minimum(key_begin + tile * BX + BX + left, row_begin + row_count)
    begin = split * rows_per_split
    first = tl.maximum((first - row_begin) // BLOCK * BLOCK, begin)
    last = tl.minimum(last - row_begin, begin + rows_per_split)
    if query_rows is not None:
        at_query = o * query_exp_outer + m * query_exp_inner
        at_key = o * key_exp_outer + m * key_exp_inner
        size_j = tl.load(key_rows.size + at_key + j)
        direct_j = size_j > SAFE
        B, _B_error = exponentials(k, direct_j, -2.0)
        any_direct_j = tl.max(direct_j.to(tl.int32)) != 0
        A_first = query_rows.exponential + at_query * padded
        flat_columns = gradient + entry * row_padded * key_padded + tile * BX
        flat_columns += tl.arange(0, BX)[None, :]

    for r0 in range(first, last, BLOCK):
        end = tl.minimum(r0 + BLOCK, last)
        if query_rows is not None:
            # A row decides something only where G is not 0.
            block = r0 + tl.arange(0, BLOCK)
            counts = tl.load(flat_columns + block[:, None].to(tl.int64) * key_padded) != 0.0
            size_i = tl.load(query_rows.size + at_query + tl.minimum(row_begin + block, rows - 1))
            row_counts = tl.max(counts.to(tl.int32), 1)
            if SPARSE:
                end = tl.where(tl.max(row_counts, 0) != 0, end, r0)
            size_i = tl.where(row_counts != 0, size_i, 0.0)
            take_direct = any_direct_j | (tl.max(size_i) > SAFE)
        if query_rows is None or take_direct:
            for r in range(r0, end):
                i1 = tl.minimum(row_begin + r, rows - 1).to(tl.int64)
                g = tl.load(g_columns + tl.cast(r, tl.int64) * key_padded)[:, None, :, None]
                q = raw(q_rows + i1 * query_row, h, hidden, query_h, ACC)
                slopes, _terms = direct_pairs(k, q, g, TARGET)
                if query_rows is not None:
                    # Pairs in range give the same bits as without such a row or key.
                    direct = tl.maximum(size_j, tl.load(query_rows.size + at_query + i1)) > SAFE
                    direct = direct[:, None, :, None]
                    s = fractions(B, prepared(A_first + i1 * padded, h, padded, TILE), TARGET)
                    sums = add(sums, scaled(tl.where(direct, 0.0, g), slope(s)))
                    slopes = where(direct, slopes, (0.0, 0.0))
                sums = add(sums, slopes)
        else:
            A_rows = A_first + tl.cast(row_begin + r0, tl.int64) * padded
            g_place = g_columns + tl.cast(r0, tl.int64) * key_padded
            for _ in range(r0, end, 4):
                for u in tl.static_range(4):
                    g = tl.load(g_place)[:, None, :, None]
                    s = fractions(B, prepared(A_rows + u * padded, h, padded, TILE), TARGET)
                    sums = add(sums, scaled(g, slope(s)))
                    g_place += key_padded
                A_rows += 4 * padded

    scale = number(scale_bits).to(ACC)
    weight += o * weight_outer + m * weight_inner
    to = grad_key + ((split * entries + entry) * key_count + c[:, None, :, None]) * hidden
    inside = (c < key_count)[:, None, :, None]
    _store(to, h, hidden, inside, _weighted(sums, weight, h, hidden, weight_h, scale))
    if query_rows is not None:
        # The other kernel has used the stored e^{2k}, with its rounding.
        _K, K_error = exponentials(k, direct_j, 2.0)
        xa = tl.sum(tl.where(inside, 2.0 * sums[0] * K_error[0], 0.0), 0)
        xb = tl.sum(tl.where(inside, 2.0 * sums[1] * K_error[1], 0.0), 0)
        to = grad_weight + ((split * tile_count + tile) * entries + entry) * hidden
        _store_weight(to, h, hidden, scale, (xa, xb))
