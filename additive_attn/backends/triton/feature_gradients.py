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
from additive_attn.backends.triton.launch import kernel
from additive_attn.backends.triton.numerics import (
    exp_with_error,
    number,
    reciprocal,
    split4,
    tanh,
    tanh_slope,
)
from additive_attn.backends.triton.prepare import PROJECTIONS, SAFE
from additive_attn.backends.triton.score_tiles import extremes, small_tanh


@triton.jit
def _add(x, y):
    return x[0] + y[0], x[1] + y[1]


@triton.jit
def _scaled(g, x):
    return g * x[0], g * x[1]


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1])


@triton.jit
def _exponentials(x, direct, factor):
    """e^{factor x} of both halves, 1 in rows that take the direct form, and their errors."""
    direct = direct[:, None, :, None]
    ea, ra = exp_with_error(tl.where(direct, 0.0, factor * x[0]))
    eb, rb = exp_with_error(tl.where(direct, 0.0, factor * x[1]))
    return (ea, eb), (ra / ea, rb / eb)


@triton.jit
def _fractions(x, y, TARGET: tl.constexpr):
    """s = 1 / (1 + x y) of both halves from one reciprocal: of a single pair (i, j), so that pairs
    of rows and keys stay apart."""
    ya = x[0] * y[0] + 1.0
    yb = x[1] * y[1] + 1.0
    both = reciprocal(ya * yb, TARGET)
    return both * yb, both * ya


@triton.jit
def _slopes(s):
    """(1 - t^2) / 4 of both halves."""
    return s[0] - s[0] * s[0], s[1] - s[1] * s[1]


@triton.jit
def _prepared(row, h, padded: tl.constexpr, TILE: tl.constexpr):
    """Both halves of a prepared row, [1, RH, 1, TH]; 1 beyond the last feature, since what lies
    there belongs to other rows."""
    if padded % TILE == 0:
        xa = tl.load(row + h[0])
        xb = tl.load(row + h[1])
    else:
        xa = tl.load(row + h[0], mask=h[0] < padded, other=1.0)
        xb = tl.load(row + h[1], mask=h[1] < padded, other=1.0)
    return xa[None, :, None, :], xb[None, :, None, :]


@triton.jit
def _raw(row, h, hidden, stride, ACC: tl.constexpr):
    """Both halves of a row of the input, [1, RH, 1, TH]; the last feature again beyond it."""
    xa = tl.load(row + tl.minimum(h[0], hidden - 1).to(tl.int64) * stride).to(ACC)
    xb = tl.load(row + tl.minimum(h[1], hidden - 1).to(tl.int64) * stride).to(ACC)
    return xa[None, :, None, :], xb[None, :, None, :]


@triton.jit
def _kept(rows, h, hidden, stride, ACC: tl.constexpr, again=None):
    """The same of a tile of rows, [RX, RH, TX, TH], to stay in registers. A loop's layout follows
    that of such loads, which follows the contiguity of their addresses. Here it is not the true
    one but an order, last dim first, so that threads lie along TX and TH, registers along RX and
    RH, which Triton 3.6 does not choose by itself. A multiple of 1: never a vector.

    ``again``, a number >= 0: reads what the program has read before, which costs less than
    registers through its loop. The addresses depend on it, since the compiler keeps those that
    do not change in registers."""
    if again is not None:
        hidden = tl.maximum(hidden, -again)
    a = rows + tl.minimum(h[0], hidden - 1).to(tl.int64)[None, :, None, :] * stride
    b = rows + tl.minimum(h[1], hidden - 1).to(tl.int64)[None, :, None, :] * stride
    a = tl.multiple_of(tl.max_contiguous(a, [1, 2, 4, 8]), [1, 1, 1, 1])
    b = tl.multiple_of(tl.max_contiguous(b, [1, 2, 4, 8]), [1, 1, 1, 1])
    VOLATILE: tl.constexpr = again is not None
    return tl.load(a, volatile=VOLATILE).to(ACC), tl.load(b, volatile=VOLATILE).to(ACC)


@triton.jit
def _direct(x, y, g, TARGET: tl.constexpr):
    """g (1 - t^2) / 4 and g t with t = tanh(x + y); a pair with G = 0 contributes exactly 0."""
    z = x + y
    t = tanh(z, TARGET)
    counts = g != 0.0
    return (
        tl.where(counts, g * tanh_slope(z, t) * 0.25, 0.0),
        tl.where(counts, g * t, 0.0),
    )


@triton.jit
def _direct_pairs(x, y, g, TARGET: tl.constexpr):
    """``_direct`` of both halves: the slopes, and the terms of dw."""
    da, ta = _direct(x[0], y[0], g, TARGET)
    db, tb = _direct(x[1], y[1], g, TARGET)
    return (da, db), (ta, tb)


@triton.jit
def _over_rows(x):
    """The sums over a thread's rows, [RH, TX, TH]."""
    return tl.sum(x[0], 0), tl.sum(x[1], 0)


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
    wa, wb = _raw(weight, h, hidden, stride, x[0].dtype)
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
    A, A_error = _exponentials(q, direct_i, -2.0)
    _Q, Q_error = _exponentials(q, direct_i, 2.0)
    half = (0.5 * (A_error[0] + Q_error[0]), 0.5 * (A_error[1] + Q_error[1]))
    for c in range(begin, end):
        j1 = tl.minimum(key_begin + c, keys - 1).to(tl.int64)
        g = tl.load(g_rows + c)[:, None, :, None]
        K = _prepared(K_first + j1 * padded, h, padded, TILE)
        ya = A[0] + K[0]
        yb = A[1] + K[1]
        both = reciprocal(ya * yb, TARGET)
        t = ((K[0] - A[0]) * (both * yb), (K[1] - A[1]) * (both * ya))
        d = (g * (1.0 - t[0] * t[0]), g * (1.0 - t[1] * t[1]))
        sums = _add(sums, _scaled(0.25, d))
        terms = (g * t[0] - d[0] * half[0], g * t[1] - d[1] * half[1])
        weights = _add(weights, _over_rows(terms))
    return sums, weights


@kernel
def query_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, gradient, grad_query, grad_weight,
    inner, entries, entry_begin, rows, row_begin, row_count, row_padded, keys, key_begin,
    key_count, key_padded, hidden, left, right, scale_bits, splits, keys_per_split,
    RX: tl.constexpr, TX: tl.constexpr, RH: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    padded: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of rows and 2 RH TH features, a range of keys: dq to [split][entry][row] and, summed
    over the rows too, dw to [split][entry][row tile]."""
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
        Q, _error = _exponentials(_kept(q_rows, h, hidden, query_h, ACC), direct_i, 2.0)
        any_direct_i = tl.max(direct_i.to(tl.int32)) != 0
        largest_i = tl.max(tl.where(direct_i, 0.0, size_i))
        K_first = key_rows.exponential + at_key * padded
        flat = tl.arange(0, BX)[:, None].to(tl.int64) + tile * BX
        flat_rows = gradient + entry * row_padded * key_padded
        i1 = tl.minimum(row_begin + tile * BX + tl.arange(0, BX), rows - 1)
        near_i = tl.load(query_rows.size + at_query + i1) <= SAFE
        extremes_i = extremes(query_rows.projections + at_query * PROJECTIONS, i1, near_i)

    for k0 in range(first, last, BLOCK):
        end = tl.minimum(k0 + BLOCK, last)
        if query_rows is not None:
            # A key decides something only where G is not 0.
            block = k0 + tl.arange(0, BLOCK)
            j = tl.minimum(key_begin + block, keys - 1)
            places = flat * tl.maximum(key_padded, k0) + block[None, :]
            counts = tl.load(flat_rows + places) != 0.0  # [BX, BLOCK]
            key_counts = tl.max(counts.to(tl.int32), 0) != 0
            size_j = tl.where(key_counts, tl.load(key_rows.size + at_key + j), 0.0)
            take_direct = any_direct_i | (tl.max(size_j) > SAFE)
            key_counts = key_counts & (size_j <= SAFE)
            small = small_tanh(
                tl.maximum(largest_i, tl.max(tl.where(size_j > SAFE, 0.0, size_j))),
                extremes_i,
                extremes(key_rows.projections + at_key * PROJECTIONS, j, key_counts),
            )
        if query_rows is None or take_direct:
            q = _kept(q_rows, h, hidden, query_h, ACC, k0)
            parts = (zeros, zeros)
            total = tl.zeros([RX, 1, TX, 1], ACC)
            for c in range(k0, end):
                j1 = tl.minimum(key_begin + c, keys - 1).to(tl.int64)
                g = tl.load(g_rows + c)[:, None, :, None]
                k = _raw(k_rows + j1 * key_row, h, hidden, key_h, ACC)
                slopes, terms = _direct_pairs(q, k, g, TARGET)
                if query_rows is not None:
                    # Pairs in range give the same bits as without such a row or key.
                    direct = tl.maximum(size_i, tl.load(key_rows.size + at_key + j1)) > SAFE
                    direct = direct[:, None, :, None]
                    s = _fractions(Q, _prepared(K_first + j1 * padded, h, padded, TILE), TARGET)
                    g = tl.where(direct, 0.0, g)
                    sums = _add(sums, _scaled(g, _slopes(s)))
                    parts = _add(parts, _scaled(g, s))
                    total += g
                    slopes = _where(direct, slopes, (0.0, 0.0))
                    terms = _where(direct, terms, (0.0, 0.0))
                sums = _add(sums, slopes)
                weights = _add(weights, _over_rows(terms))
            weights = _add(weights, _over_rows((total - 2.0 * parts[0], total - 2.0 * parts[1])))
        elif small:
            q = _kept(q_rows, h, hidden, query_h, ACC, k0)
            sums, weights = _difference(
                q, direct_i, g_rows, K_first, key_begin, keys, k0, end, h, sums, weights,
                padded, TILE, TARGET,
            )  # fmt: skip
        else:
            parts = (zeros, zeros)
            total = tl.zeros([RX, TX], tl.float32)
            g_four = g_rows[:, :, None] + tl.arange(0, 4)[None, None, :]  # [RX, TX, 4]
            K_rows = K_first + tl.cast(key_begin + k0, tl.int64) * padded
            for c in range(k0, end, 4):
                g4 = split4(tl.load(g_four + c), RX, TX)
                for u in tl.static_range(4):
                    K = _prepared(K_rows + u * padded, h, padded, TILE)
                    total += g4[u]
                    g = g4[u][:, None, :, None]
                    s = _fractions(Q, K, TARGET)
                    sums = _add(sums, _scaled(g, _slopes(s)))
                    parts = _add(parts, _scaled(g, s))
                K_rows += 4 * padded
            total = total[:, None, :, None]
            weights = _add(weights, _over_rows((total - 2.0 * parts[0], total - 2.0 * parts[1])))

    if query_rows is not None:
        # dw by the roundings of Q, which all keys of a row share: + (1 - t^2) / 2 per unit.
        q = _kept(q_rows, h, hidden, query_h, ACC, first)
        _error, Q_error = _exponentials(q, direct_i, 2.0)
        rounding = (2.0 * sums[0] * Q_error[0], 2.0 * sums[1] * Q_error[1])
        weights = _add(weights, _over_rows(rounding))
    scale = number(scale_bits).to(ACC)
    weight += o * weight_outer + m * weight_inner
    to = grad_query + ((split * entries + entry) * row_count + r[:, None, :, None]) * hidden
    inside = (r < row_count)[:, None, :, None]
    _store(to, h, hidden, inside, _weighted(sums, weight, h, hidden, weight_h, scale))
    to = grad_weight + ((split * entries + entry) * tile_count + tile) * hidden
    _store_weight(to, h, hidden, scale, weights)


@kernel
def key_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, gradient, grad_key, grad_weight,
    inner, entries, entry_begin, rows, row_begin, row_count, row_padded,
    keys, key_begin, key_count, key_padded, hidden, left, right, scale_bits, splits,
    rows_per_split,
    RX: tl.constexpr, TX: tl.constexpr, RH: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    padded: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of keys and 2 RH TH features, a range of rows: dk to ``grad_key``
    [split][entry][key]; what the roundings of K leave out of dw to ``grad_weight``
    [split][entry][key tile]."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    BX: tl.constexpr = RX * TX
    TILE: tl.constexpr = 2 * RH * TH
    entry, split, tile, tile_count, c, j, h, o, m = feature_tile(
        key_count, key_begin, keys, padded, inner, splits, entry_begin, RX, TX, RH, TH
    )
    k_rows = key + o * key_outer + m * key_inner + j[:, None, :, None] * key_row
    k = _kept(k_rows, h, hidden, key_h, ACC)
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
        B, _B_error = _exponentials(k, direct_j, -2.0)
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
            size_i = tl.where(tl.max(counts.to(tl.int32), 1) != 0, size_i, 0.0)
            take_direct = any_direct_j | (tl.max(size_i) > SAFE)
        if query_rows is None or take_direct:
            for r in range(r0, end):
                i1 = tl.minimum(row_begin + r, rows - 1).to(tl.int64)
                g = tl.load(g_columns + tl.cast(r, tl.int64) * key_padded)[:, None, :, None]
                q = _raw(q_rows + i1 * query_row, h, hidden, query_h, ACC)
                slopes, _terms = _direct_pairs(k, q, g, TARGET)
                if query_rows is not None:
                    # Pairs in range give the same bits as without such a row or key.
                    direct = tl.maximum(size_j, tl.load(query_rows.size + at_query + i1)) > SAFE
                    direct = direct[:, None, :, None]
                    s = _fractions(B, _prepared(A_first + i1 * padded, h, padded, TILE), TARGET)
                    sums = _add(sums, _scaled(tl.where(direct, 0.0, g), _slopes(s)))
                    slopes = _where(direct, slopes, (0.0, 0.0))
                sums = _add(sums, slopes)
        else:
            A_rows = A_first + tl.cast(row_begin + r0, tl.int64) * padded
            g_place = g_columns + tl.cast(r0, tl.int64) * key_padded
            for _ in range(r0, end, 4):
                for u in tl.static_range(4):
                    g = tl.load(g_place)[:, None, :, None]
                    s = _fractions(B, _prepared(A_rows + u * padded, h, padded, TILE), TARGET)
                    sums = _add(sums, _scaled(g, _slopes(s)))
                    g_place += key_padded
                A_rows += 4 * padded

    scale = number(scale_bits).to(ACC)
    weight += o * weight_outer + m * weight_inner
    to = grad_key + ((split * entries + entry) * key_count + c[:, None, :, None]) * hidden
    inside = (c < key_count)[:, None, :, None]
    _store(to, h, hidden, inside, _weighted(sums, weight, h, hidden, weight_h, scale))
    if query_rows is not None:
        # The other kernel has used the stored e^{2k}, with its rounding.
        _K, K_error = _exponentials(k, direct_j, 2.0)
        xa = tl.sum(tl.where(inside, 2.0 * sums[0] * K_error[0], 0.0), 0)
        xb = tl.sum(tl.where(inside, 2.0 * sums[1] * K_error[1], 0.0), 0)
        to = grad_weight + ((split * entries + entry) * tile_count + tile) * hidden
        _store_weight(to, h, hidden, scale, (xa, xb))
