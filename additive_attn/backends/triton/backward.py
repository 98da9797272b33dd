"""The operator ``additive_attn::backward`` on a GPU.

With P = exp(S - lse), D the dropout factors, and the upstream gradients of out, weights and lse,

    dP = D o (dO V^T) + dWeights    delta_i = sum_j P_ij dP_ij      G = P o (dP - delta + dlse)
    dV = (P o D)^T dO               dMask = G                       dS = scale G
    dq_ih = w_h sum_j dS_ij (1 - t^2)               dk_jh = w_h sum_i dS_ij (1 - t^2)
    dw_h = sum_ij dS_ij t_ijh

With Q = e^{2q}, K = e^{2k} and s = 1 / (1 + Q K): t = 1 - 2 s and 1 - t^2 = 4 (s - s^2), which
costs six instructions per tanh for dq with dw and five for dk, two features sharing a reciprocal.
The same s - s^2 comes from 1 / (1 + 1/(Q K)), so that either pass streams what ``prepare.py`` has
stored, K or 1/Q, and keeps the other in registers. Loops run over the reduced index, j for dq and
i for dk: no sum crosses threads until its end, nothing is atomic, and results repeat bit for bit.

G of a bounded number of rows is kept at a time.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import configs, single
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.launch import batch_entry, launch
from additive_attn.backends.triton.numerics import (
    exp_and_rest,
    keep_factors,
    number,
    quarters,
    reciprocal,
    tanh,
)
from additive_attn.backends.triton.prepare import SAFE


@triton.jit(do_not_specialize=configs.VARYING)
def _gradient_kernel(
    scores, products, gradient, lse,
    grad_weights, gw_outer, gw_inner, gw_row, gw_column,
    grad_lse, gl_outer, gl_inner, gl_row,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    inner, entry_begin, rows, row_begin, row_count, row_padded, key_begin, key_count, key_padded,
    score_padded,
    BLOCK: tl.constexpr, GRAD_WEIGHTS: tl.constexpr, GRAD_LSE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A row: scores become P o D, ``gradient`` G, with zeros up to its padded size. ``products``
    is dO V^T. P is divided by its sum, which takes out the rounding of lse."""
    program = tl.program_id(0)
    r = program % row_padded
    n, o, m = batch_entry(entry_begin + program // row_padded, inner)
    entry = n - entry_begin
    i = row_begin + r
    inside = r < row_count
    source = (entry * row_count + r) * score_padded
    product = (entry * row_count + r) * key_count
    j = tl.arange(0, BLOCK)
    base = tl.load(lse + n * rows + i, mask=inside, other=0.0)
    base = tl.where(base == float("inf"), float("nan"), base)
    base = tl.where(base == float("-inf"), 0.0, base)
    totals = tl.zeros([BLOCK], scores.dtype.element_ty)
    deltas = tl.zeros([BLOCK], scores.dtype.element_ty)
    count = tl.where(inside, key_count, 0)
    for key0 in range(0, count, BLOCK):
        p, g, factor = _probabilities(
            scores, products, grad_weights, gw_outer, gw_inner, gw_row, gw_column,
            seed, seed_outer, seed_inner, threshold, keep_bits,
            o, m, n, i, source, product, key_begin, key0, key_count, base,
            BLOCK, GRAD_WEIGHTS, DROPOUT,
        )  # fmt: skip
        totals += p
        deltas += p * g
    total = tl.sum(totals, 0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = tl.sum(deltas, 0) * inverse
    if GRAD_LSE:
        delta -= tl.load(
            grad_lse + o * gl_outer + m * gl_inner + i.to(tl.int64) * gl_row,
            mask=inside,
            other=0.0,
        )
    to = (entry * row_padded + r) * key_padded
    for key0 in range(0, count, BLOCK):
        p, g, factor = _probabilities(
            scores, products, grad_weights, gw_outer, gw_inner, gw_row, gw_column,
            seed, seed_outer, seed_inner, threshold, keep_bits,
            o, m, n, i, source, product, key_begin, key0, key_count, base,
            BLOCK, GRAD_WEIGHTS, DROPOUT,
        )  # fmt: skip
        p = p * inverse
        g = tl.where(p == 0.0, 0.0, p * (g - delta))
        tl.store(gradient + to + key0 + j, g, mask=key0 + j < key_padded)
        tl.store(
            scores + source + key0 + j,
            p * factor,
            mask=key0 + j < key_count,
        )
    for key0 in range(tl.cdiv(count, BLOCK) * BLOCK, key_padded, BLOCK):
        zeros = tl.zeros([BLOCK], scores.dtype.element_ty)
        tl.store(gradient + to + key0 + j, zeros, mask=key0 + j < key_padded)


@triton.jit
def _probabilities(
    scores, products, grad_weights, gw_outer, gw_inner, gw_row, gw_column,
    seed, seed_outer, seed_inner, threshold, keep_bits,
    o, m, n, i, source, product, key_begin, key0, key_count, base,
    BLOCK: tl.constexpr, GRAD_WEIGHTS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """P, dP and D of some keys of a row; 0 where it does not attend."""
    j = key0 + tl.arange(0, BLOCK)
    here = j < key_count
    x = tl.load(scores + source + j, mask=here, other=float("-inf"))
    used = x != float("-inf")
    p = tl.where(used, tl.exp(x - base), 0.0)
    g = tl.load(products + product + j, mask=here & used, other=0.0)
    factor = tl.full([BLOCK], 1.0, p.dtype)
    if DROPOUT:
        word = tl.load(seed + o * seed_outer + m * seed_inner)
        factor = keep_factors(
            word,
            n,
            i + tl.zeros([1], tl.int32),
            key_begin + key0,
            threshold,
            number(keep_bits).to(p.dtype),
            1,
            BLOCK,
        )
        factor = tl.reshape(factor, [BLOCK]).to(p.dtype)
        g = tl.where(factor == 0.0, 0.0, g * factor)
    if GRAD_WEIGHTS:
        place = grad_weights + o * gw_outer + m * gw_inner + i.to(tl.int64) * gw_row
        upstream = tl.load(place + (key_begin + j).to(tl.int64) * gw_column, mask=here, other=0.0)
        g += tl.where(used, upstream.to(p.dtype), 0.0)
    return p, g, factor


@triton.jit
def _pair(y0, y1, TARGET: tl.constexpr):
    """1/y0 and 1/y1 from one reciprocal: of a single pair (i, j), so that pairs stay apart."""
    both = reciprocal(y0 * y1, TARGET)
    return both * y1, both * y0


@triton.jit
def _features(place, h, padded: tl.constexpr, TILE: tl.constexpr):
    """A prepared row's features h, 1 beyond the last: what lies there belongs to other rows."""
    if padded % TILE == 0:
        return tl.load(place + h)
    else:
        return tl.load(place + h, mask=h < padded, other=1.0)


@triton.jit
def _tile(
    length, begin, limit, padded, inner, splits, entry_begin,
    RX: tl.constexpr, TX: tl.constexpr, RH: tl.constexpr, TH: tl.constexpr,
):  # fmt: skip
    """What a program takes: (entry, split, tile) and the number of tiles; its rows (or keys)
    within the chunk, [RX, TX], and in the input, not beyond ``limit``; the first half of its
    features, [RH, TH]; the indices of its entry into (outer, inner)."""
    tiles = tl.cdiv(length, RX * TX)
    feature_tiles = tl.cdiv(padded, 2 * RH * TH)
    program = tl.program_id(0)
    tile = program % tiles
    rest = program // tiles
    h0 = rest % feature_tiles * (2 * RH * TH)
    rest = rest // feature_tiles
    split = rest % splits
    n, o, m = batch_entry(entry_begin + rest // splits, inner)
    h = h0 + tl.arange(0, RH)[:, None] + RH * tl.arange(0, TH)[None, :]
    c = tile * (RX * TX) + tl.arange(0, RX)[:, None] + RX * tl.arange(0, TX)[None, :]
    x = tl.minimum(begin + c, limit - 1).to(tl.int64)
    return n - entry_begin, split, tile, tiles, c, x, h, o, m


@triton.jit
def _raw(rows, h, hidden, stride, ACC: tl.constexpr):
    """Features h of the input's rows; beyond the last, the last again."""
    return tl.load(rows + tl.minimum(h, hidden - 1).to(tl.int64) * stride).to(ACC)


@triton.jit
def _kept(rows, h, hidden, stride, ACC: tl.constexpr):
    """The same of a tile [RX, RH, TX, TH], to stay in registers. A loop's layout follows that of
    such loads, which follows the contiguity of their addresses. Here it is not the true one but an
    order, last dim first, so that threads lie along TX and TH, registers along RX and RH, which
    Triton 3.6 does not choose by itself. A multiple of 1: never a vector."""
    place = rows + tl.minimum(h, hidden - 1).to(tl.int64) * stride
    place = tl.multiple_of(tl.max_contiguous(place, [1, 2, 4, 8]), [1, 1, 1, 1])
    return tl.load(place).to(ACC)


@triton.jit
def _direct(x, y, g):
    """g (1 - t^2) / 4 and g t with t = tanh(x + y); a g of 0 leaves no trace of its pair."""
    t = tanh(x + y)
    used = g != 0.0
    return tl.where(used, g * (1.0 - t * t) * 0.25, 0.0), tl.where(used, g * t, 0.0)


@triton.jit(do_not_specialize=configs.VARYING)
def query_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    key_exp, query_size, key_size,
    query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    gradient, grad_query, grad_weight,
    inner, entries, entry_begin, rows, row_begin, row_count, row_padded,
    keys, key_begin, key_count, key_padded, hidden, left, right, splits, keys_per_split,
    RX: tl.constexpr, TX: tl.constexpr, RH: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    padded: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of rows and 2 RH TH features, a range of keys: sum_j G (1 - t^2) / 4 to
    ``grad_query`` [split][entry][row] and, summed over the rows too, sum G t to ``grad_weight``
    [split][entry][row tile]."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    BX: tl.constexpr = RX * TX
    BH: tl.constexpr = RH * TH
    entry, split, tile, tiles, r, i, ha, o, m = _tile(
        row_count, row_begin, rows, padded, inner, splits, entry_begin, RX, TX, RH, TH
    )
    hb = ha + BH
    q_rows = query + o * query_outer + m * query_inner + i[:, None, :, None] * query_row
    qa = _kept(q_rows, ha[None, :, None, :], hidden, query_h, ACC)
    qb = _kept(q_rows, hb[None, :, None, :], hidden, query_h, ACC)
    g_rows = gradient + (entry * row_padded + r.to(tl.int64)) * key_padded
    sum_a = tl.zeros([RX, RH, TX, TH], ACC)
    sum_b = tl.zeros([RX, RH, TX, TH], ACC)
    weight_a = tl.zeros([RH, TX, TH], ACC)
    weight_b = tl.zeros([RH, TX, TH], ACC)
    k_rows = key + o * key_outer + m * key_inner
    first = tl.maximum(row_begin + tile * BX - left, key_begin)
    last = tl.minimum(row_begin + tile * BX + BX + right, key_begin + key_count)
    begin = split * keys_per_split
    first = tl.maximum((first - key_begin) // BLOCK * BLOCK, begin)
    last = tl.minimum(last - key_begin, begin + keys_per_split)

    if not WIDE:
        at_query = o * query_exp_outer + m * query_exp_inner
        at_key = o * key_exp_outer + m * key_exp_inner
        size_i = tl.load(query_size + at_query + i)
        wild_i = size_i > SAFE
        Qa, rest_a = exp_and_rest(tl.where(wild_i[:, None, :, None], 0.0, 2.0 * qa))
        Qb, rest_b = exp_and_rest(tl.where(wild_i[:, None, :, None], 0.0, 2.0 * qb))
        any_wild_i = tl.max(wild_i.to(tl.int32)) != 0
        all_small_i = tl.max(tl.where(wild_i, 0.0, size_i)) <= 1.0
        b_rows = key_exp + at_key * padded
        flat = tl.arange(0, BX)[:, None].to(tl.int64) + tile * BX
        flat_rows = gradient + (entry * row_padded + flat) * key_padded

    for k0 in range(first, last, BLOCK):
        if WIDE:
            for c in range(k0, tl.minimum(k0 + BLOCK, last)):
                g = tl.load(g_rows + c)[:, None, :, None]
                k_row = k_rows + tl.minimum(key_begin + c, keys - 1).to(tl.int64) * key_row
                ka = _raw(k_row, ha, hidden, key_h, ACC)
                kb = _raw(k_row, hb, hidden, key_h, ACC)
                da, ta = _direct(qa, ka[None, :, None, :], g)
                db, tb = _direct(qb, kb[None, :, None, :], g)
                sum_a += da
                sum_b += db
                weight_a += tl.sum(ta, 0)
                weight_b += tl.sum(tb, 0)
        else:
            # A key decides something only where G is not 0.
            block = k0 + tl.arange(0, BLOCK)
            used = tl.load(flat_rows + block[None, :]) != 0.0
            size_j = tl.load(key_size + at_key + tl.minimum(key_begin + block, keys - 1))
            size_j = tl.where(tl.max(used.to(tl.int32), 0) != 0, size_j, 0.0)
            wild = any_wild_i | (tl.max(size_j) > SAFE)
            small = all_small_i & (tl.max(tl.where(size_j > SAFE, 0.0, size_j)) <= 1.0)
            if wild:
                part_a = tl.zeros([RX, RH, TX, TH], ACC)
                part_b = tl.zeros([RX, RH, TX, TH], ACC)
                total = tl.zeros([RX, 1, TX, 1], ACC)
                for c in range(k0, tl.minimum(k0 + BLOCK, last)):
                    j1 = tl.minimum(key_begin + c, keys - 1)
                    g = tl.load(g_rows + c)[:, None, :, None]
                    k_row = k_rows + j1.to(tl.int64) * key_row
                    ka = _raw(k_row, ha, hidden, key_h, ACC)
                    kb = _raw(k_row, hb, hidden, key_h, ACC)
                    da, ta = _direct(qa, ka[None, :, None, :], g)
                    db, tb = _direct(qb, kb[None, :, None, :], g)
                    # The other pairs as beside no such row or key, to the bit.
                    direct = tl.maximum(size_i, tl.load(key_size + at_key + j1)) > SAFE
                    direct = direct[:, None, :, None]
                    Ka = _features(b_rows + j1.to(tl.int64) * padded, ha, padded, 2 * BH)[
                        None, :, None, :
                    ]
                    Kb = _features(b_rows + j1.to(tl.int64) * padded, hb, padded, 2 * BH)[
                        None, :, None, :
                    ]
                    sa, sb = _pair(Qa * Ka + 1.0, Qb * Kb + 1.0, TARGET)
                    g = tl.where(direct, 0.0, g)
                    sum_a += g * (sa - sa * sa)
                    sum_b += g * (sb - sb * sb)
                    part_a += g * sa
                    part_b += g * sb
                    total += g
                    da = tl.where(direct, da, 0.0)
                    db = tl.where(direct, db, 0.0)
                    ta = tl.where(direct, ta, 0.0)
                    tb = tl.where(direct, tb, 0.0)
                    sum_a += da
                    sum_b += db
                    weight_a += tl.sum(ta, 0)
                    weight_b += tl.sum(tb, 0)
                weight_a += tl.sum(total - 2.0 * part_a, 0)
                weight_b += tl.sum(total - 2.0 * part_b, 0)
            elif small:
                # t = (K - 1/Q) / (K + 1/Q), whose difference is exact; 1/Q has its own rounding,
                # which takes the place of that of Q.
                la, ra = exp_and_rest(-2.0 * qa)
                lb, rb = exp_and_rest(-2.0 * qb)
                ra = 0.5 * (ra / la + rest_a / Qa)
                rb = 0.5 * (rb / lb + rest_b / Qb)
                for c in range(k0, tl.minimum(k0 + BLOCK, last)):
                    j1 = tl.minimum(key_begin + c, keys - 1).to(tl.int64)
                    g = tl.load(g_rows + c)[:, None, :, None]
                    Ka = _features(b_rows + j1 * padded, ha, padded, 2 * BH)[None, :, None, :]
                    Kb = _features(b_rows + j1 * padded, hb, padded, 2 * BH)[None, :, None, :]
                    sa, sb = _pair(la + Ka, lb + Kb, TARGET)
                    ta = (Ka - la) * sa
                    tb = (Kb - lb) * sb
                    da = g * (1.0 - ta * ta)
                    db = g * (1.0 - tb * tb)
                    sum_a += 0.25 * da
                    sum_b += 0.25 * db
                    weight_a += tl.sum(g * ta - da * ra, 0)
                    weight_b += tl.sum(g * tb - db * rb, 0)
            else:
                part_a = tl.zeros([RX, RH, TX, TH], tl.float32)
                part_b = tl.zeros([RX, RH, TX, TH], tl.float32)
                total = tl.zeros([RX, TX], tl.float32)
                g_four = g_rows[:, :, None] + tl.arange(0, 4)[None, None, :]
                K_rows = b_rows + tl.cast(key_begin + k0, tl.int64) * padded
                for c in range(k0, tl.minimum(k0 + BLOCK, last), 4):
                    g = quarters(tl.load(g_four + c), RX, TX)
                    for u in tl.static_range(4):
                        Ka = _features(K_rows + u * padded, ha, padded, 2 * BH)
                        Kb = _features(K_rows + u * padded, hb, padded, 2 * BH)
                        g1 = g[u]
                        total += g1
                        g1 = g1[:, None, :, None]
                        sa, sb = _pair(
                            Qa * Ka[None, :, None, :] + 1.0,
                            Qb * Kb[None, :, None, :] + 1.0,
                            TARGET,
                        )
                        sum_a += g1 * (sa - sa * sa)
                        sum_b += g1 * (sb - sb * sb)
                        part_a += g1 * sa
                        part_b += g1 * sb
                    K_rows += 4 * padded
                weight_a += tl.sum(total[:, None, :, None] - 2.0 * part_a, 0)
                weight_b += tl.sum(total[:, None, :, None] - 2.0 * part_b, 0)

    if not WIDE:
        # dw by the roundings of Q, which all keys of a row share: + (1 - t^2) / 2 per unit.
        weight_a += tl.sum(2.0 * sum_a * (rest_a / Qa), 0)
        weight_b += tl.sum(2.0 * sum_b * (rest_b / Qb), 0)
    to = grad_query + ((split * entries + entry) * row_count + r[:, None, :, None]) * hidden
    inside = (r < row_count)[:, None, :, None]
    tl.store(to + ha[None, :, None, :], sum_a, mask=inside & (ha < hidden)[None, :, None, :])
    tl.store(to + hb[None, :, None, :], sum_b, mask=inside & (hb < hidden)[None, :, None, :])
    to = grad_weight + ((split * entries + entry) * tiles + tile) * hidden
    tl.store(to + ha, tl.sum(weight_a, 1), mask=ha < hidden)
    tl.store(to + hb, tl.sum(weight_b, 1), mask=hb < hidden)


@triton.jit(do_not_specialize=configs.VARYING)
def key_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_exp, query_size, key_size,
    query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    gradient, grad_key, grad_weight,
    inner, entries, entry_begin, rows, row_begin, row_count, row_padded,
    keys, key_begin, key_count, key_padded, hidden, left, right, splits, rows_per_split,
    RX: tl.constexpr, TX: tl.constexpr, RH: tl.constexpr, TH: tl.constexpr, BLOCK: tl.constexpr,
    padded: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of keys and 2 RH TH features, a range of rows: sum_i G (1 - t^2) / 4 to ``grad_key``
    [split][entry][key]; what the roundings of K leave out of dw to ``grad_weight``
    [split][entry][key tile]."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    BX: tl.constexpr = RX * TX
    BH: tl.constexpr = RH * TH
    entry, split, tile, tiles, c, j, ha, o, m = _tile(
        key_count, key_begin, keys, padded, inner, splits, entry_begin, RX, TX, RH, TH
    )
    hb = ha + BH
    k_rows = key + o * key_outer + m * key_inner + j[:, None, :, None] * key_row
    ka = _kept(k_rows, ha[None, :, None, :], hidden, key_h, ACC)
    kb = _kept(k_rows, hb[None, :, None, :], hidden, key_h, ACC)
    g_columns = gradient + entry * row_padded * key_padded + c
    sum_a = tl.zeros([RX, RH, TX, TH], ACC)
    sum_b = tl.zeros([RX, RH, TX, TH], ACC)
    q_rows = query + o * query_outer + m * query_inner
    first = tl.maximum(key_begin + tile * BX - right, row_begin)
    last = tl.minimum(key_begin + tile * BX + BX + left, row_begin + row_count)
    begin = split * rows_per_split
    first = tl.maximum((first - row_begin) // BLOCK * BLOCK, begin)
    last = tl.minimum(last - row_begin, begin + rows_per_split)

    if not WIDE:
        at_query = o * query_exp_outer + m * query_exp_inner
        at_key = o * key_exp_outer + m * key_exp_inner
        size_j = tl.load(key_size + at_key + j)
        wild_j = size_j > SAFE
        Ba, _rest_a = exp_and_rest(tl.where(wild_j[:, None, :, None], 0.0, -2.0 * ka))
        Bb, _rest_b = exp_and_rest(tl.where(wild_j[:, None, :, None], 0.0, -2.0 * kb))
        any_wild_j = tl.max(wild_j.to(tl.int32)) != 0
        a_rows = query_exp + at_query * padded
        flat_columns = gradient + entry * row_padded * key_padded + tile * BX
        flat_columns += tl.arange(0, BX)[None, :]

    for r0 in range(first, last, BLOCK):
        if WIDE:
            for r in range(r0, tl.minimum(r0 + BLOCK, last)):
                g = tl.load(g_columns + tl.cast(r, tl.int64) * key_padded)[:, None, :, None]
                q_row = q_rows + tl.minimum(row_begin + r, rows - 1).to(tl.int64) * query_row
                qa = _raw(q_row, ha, hidden, query_h, ACC)
                qb = _raw(q_row, hb, hidden, query_h, ACC)
                da, _ta = _direct(ka, qa[None, :, None, :], g)
                db, _tb = _direct(kb, qb[None, :, None, :], g)
                sum_a += da
                sum_b += db
        else:
            # A row decides something only where G is not 0.
            block = r0 + tl.arange(0, BLOCK)
            used = tl.load(flat_columns + block[:, None].to(tl.int64) * key_padded) != 0.0
            size_i = tl.load(query_size + at_query + tl.minimum(row_begin + block, rows - 1))
            size_i = tl.where(tl.max(used.to(tl.int32), 1) != 0, size_i, 0.0)
            wild = any_wild_j | (tl.max(size_i) > SAFE)
            if wild:
                for r in range(r0, tl.minimum(r0 + BLOCK, last)):
                    i1 = tl.minimum(row_begin + r, rows - 1).to(tl.int64)
                    g = tl.load(g_columns + tl.cast(r, tl.int64) * key_padded)[:, None, :, None]
                    q_row = q_rows + i1 * query_row
                    qa = _raw(q_row, ha, hidden, query_h, ACC)
                    qb = _raw(q_row, hb, hidden, query_h, ACC)
                    da, _ta = _direct(ka, qa[None, :, None, :], g)
                    db, _tb = _direct(kb, qb[None, :, None, :], g)
                    direct = tl.maximum(size_j, tl.load(query_size + at_query + i1)) > SAFE
                    direct = direct[:, None, :, None]
                    Aa = _features(a_rows + i1 * padded, ha, padded, 2 * BH)[None, :, None, :]
                    Ab = _features(a_rows + i1 * padded, hb, padded, 2 * BH)[None, :, None, :]
                    sa, sb = _pair(Ba * Aa + 1.0, Bb * Ab + 1.0, TARGET)
                    g = tl.where(direct, 0.0, g)
                    sum_a += g * (sa - sa * sa)
                    sum_b += g * (sb - sb * sb)
                    da = tl.where(direct, da, 0.0)
                    db = tl.where(direct, db, 0.0)
                    sum_a += da
                    sum_b += db
            else:
                A_rows = a_rows + tl.cast(row_begin + r0, tl.int64) * padded
                g_place = g_columns + tl.cast(r0, tl.int64) * key_padded
                for _ in range(r0, tl.minimum(r0 + BLOCK, last), 4):
                    for u in tl.static_range(4):
                        g = tl.load(g_place)[:, None, :, None]
                        Aa = _features(A_rows + u * padded, ha, padded, 2 * BH)[None, :, None, :]
                        Ab = _features(A_rows + u * padded, hb, padded, 2 * BH)[None, :, None, :]
                        sa, sb = _pair(Ba * Aa + 1.0, Bb * Ab + 1.0, TARGET)
                        sum_a += g * (sa - sa * sa)
                        sum_b += g * (sb - sb * sb)
                        g_place += key_padded
                    A_rows += 4 * padded

    to = grad_key + ((split * entries + entry) * key_count + c[:, None, :, None]) * hidden
    inside = (c < key_count)[:, None, :, None]
    tl.store(to + ha[None, :, None, :], sum_a, mask=inside & (ha < hidden)[None, :, None, :])
    tl.store(to + hb[None, :, None, :], sum_b, mask=inside & (hb < hidden)[None, :, None, :])
    if not WIDE:
        # The other kernel has used the stored e^{2k}, with its rounding.
        Ka, left_a = exp_and_rest(tl.where(wild_j[:, None, :, None], 0.0, 2.0 * ka))
        Kb, left_b = exp_and_rest(tl.where(wild_j[:, None, :, None], 0.0, 2.0 * kb))
        correction_a = tl.sum(tl.sum(tl.where(inside, 2.0 * sum_a * (left_a / Ka), 0.0), 0), 1)
        correction_b = tl.sum(tl.sum(tl.where(inside, 2.0 * sum_b * (left_b / Kb), 0.0), 0), 1)
        to = grad_weight + ((split * entries + entry) * tiles + tile) * hidden
        tl.store(to + ha, correction_a, mask=ha < hidden)
        tl.store(to + hb, correction_b, mask=hb < hidden)


def backward(
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_weight: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = Problem(query, key, value, weight, attn_mask, lengths, seed, left, right, dropout_p, scale)
    need_mask = need_mask and attn_mask is not None

    def zeros(needed: bool, *shape: int) -> Tensor:
        return torch.zeros(shape if needed else (0,), dtype=p.accumulator, device=p.device)

    grad_mask = zeros(need_mask, *(() if attn_mask is None else attn_mask.shape))
    lse = lse.contiguous()
    some = p.entries > 0 and p.rows > 0 and p.keys > 0
    if some and p.rows == 1:
        gradients, gradient = single.backward(
            p, lse, grad_out, grad_weights, grad_lse,
            need_query, need_key, need_value, need_weight,
        )  # fmt: skip
        if need_mask:
            _add_mask(p, gradient, 0, 0, 0, grad_mask)
        return (*gradients, grad_mask.to(p.dtype))
    grad_query = zeros(need_query or need_weight, p.entries, p.rows, p.hidden)
    grad_key = zeros(need_key, p.entries, p.keys, p.hidden)
    grad_value = zeros(need_value, p.entries, p.keys, p.values)
    grad_weight = zeros(need_weight, p.entries, p.hidden)
    if some:
        upstream = None if grad_out is None else _entries(grad_out, p, 2)
        values = _entries(value, p, 2)
        for chunk in p.chunks(configs.gradient_block(p.rows)):
            _chunk(
                p, chunk, lse, values, upstream, grad_weights, grad_lse,
                grad_query, grad_key, grad_value, grad_weight, grad_mask,
                need_query, need_key, need_value, need_weight, need_mask,
            )  # fmt: skip
    # dS = scale G, and the weight, which no pair needed.
    factor = _entries(weight, p, 1)[:, None] * (4 * scale)
    batch = p.batch.shape
    if need_query:
        grad_query = (grad_query * factor).to(p.dtype).view(*batch, *query.shape[-2:])
    if need_key:
        grad_key = (grad_key * factor).to(p.dtype).view(*batch, *key.shape[-2:])
    if need_value:
        grad_value = grad_value.to(p.dtype).view(*batch, *value.shape[-2:])
    if need_weight:
        grad_weight = (grad_weight * scale).view(*batch, p.hidden)
    return (
        grad_query if need_query else query.new_empty(0),
        grad_key if need_key else query.new_empty(0),
        grad_value if need_value else query.new_empty(0),
        grad_weight if need_weight else lse.new_empty(0),
        grad_mask.to(p.dtype),
    )


def _entries(x: Tensor, p: Problem, rank: int) -> Tensor:
    """(entries, ...) in the computing dtype, and contiguous: how matmul rounds depends on that."""
    x = p.batch.view(x, rank)
    return x.to(p.accumulator).reshape(p.entries, *x.shape[2:]).contiguous()


def _chunk(
    p: Problem, chunk: tuple[int, int, int, int], lse: Tensor, values: Tensor,
    grad_out: Tensor | None, grad_weights: Tensor | None, grad_lse: Tensor | None,
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad_weight: Tensor,
    grad_mask: Tensor,
    need_query: bool, need_key: bool, need_value: bool, need_weight: bool, need_mask: bool,
) -> None:  # fmt: skip
    """The share of some rows of some entries in all gradients."""
    entry, entries, row, rows = chunk
    key, end = p.key_range(row, row + rows)
    count = end - key
    if count <= 0:
        return
    scores = p.scores(entry, entries, row, rows, key, count)
    upstream = None if grad_out is None else grad_out[entry : entry + entries, row : row + rows]
    if upstream is None:
        products = scores.new_zeros(entries, rows, count)
    else:
        products = upstream @ values[entry : entry + entries, key:end].mT
    row_block, key_block = configs.gradient_block(rows), configs.gradient_block(count)
    row_padded = -(-rows // row_block) * row_block
    key_padded = -(-count // key_block) * key_block
    gradient = torch.empty(entries, row_padded, key_padded, dtype=p.accumulator, device=p.device)
    launch(
        _gradient_kernel, entries * row_padded, scores,
        scores, products, gradient, lse, *_strided(grad_weights, 2, p, lse),
        *_strided(grad_lse, 1, p, lse),
        *p.dropout_arguments(), p.batch.inner, entry, p.rows, row, rows, row_padded,
        key, count, key_padded, scores.shape[-1],
        **configs.row_block(count), GRAD_WEIGHTS=grad_weights is not None,
        GRAD_LSE=grad_lse is not None, DROPOUT=p.seed is not None,
    )  # fmt: skip
    if need_value and upstream is not None:
        grad_value[entry : entry + entries, key:end] += scores[..., :count].mT @ upstream
    if need_mask:
        _add_mask(p, gradient[:, :rows, :count], entry, row, key, grad_mask)
    if p.hidden == 0:
        return

    prepared: tuple[object, ...]
    if p.wide:
        prepared = (p.weight.weight, p.weight.weight, p.weight.weight, 0, 0, 0, 0)
        query_exp = p.weight.weight
    else:
        of_query, of_key = p.prepared
        query_exp = of_query.exponential
        prepared = (
            of_key.exponential, of_query.size, of_key.size,
            *of_query.size.stride()[:2], *of_key.size.stride()[:2],
        )  # fmt: skip
    inputs = (p.query, p.key, *p.query_strides, *p.key_strides)
    sizes = (
        p.batch.inner, entries, entry, p.rows, row, rows, row_padded, p.keys, key, count,
        key_padded, p.hidden, p.left, p.right,
    )  # fmt: skip
    options = {"padded": p.weight.padded, "WIDE": p.wide, "TARGET": p.form()["TARGET"]}

    def parts(
        length: int, reduced: int, block: int, total: Tensor
    ) -> tuple[int, int, int, Tensor, Tensor, dict[str, int]]:
        tile = configs.gradient_tile(length)
        tiles = -(-length // (tile["RX"] * tile["TX"]))
        programs = entries * tiles * -(-p.weight.padded // (2 * tile["RH"] * tile["TH"]))
        splits, per_split = configs.splits(programs, reduced, block, p.processors)
        of_rows = total[None] if splits == 1 else total.new_empty(splits, *total.shape)
        of_weight = total.new_empty(splits, entries, tiles, p.hidden)
        return programs, splits, per_split, of_rows, of_weight, tile

    if need_query or need_weight:
        total = grad_query[entry : entry + entries, row : row + rows]
        programs, splits, per_split, of_rows, of_weight, tile = parts(
            rows, count, key_block, total
        )
        launch(
            query_kernel, programs * splits, total,
            *inputs, *prepared, gradient, of_rows, of_weight, *sizes, splits, per_split,
            **tile, BLOCK=key_block, **options,
        )  # fmt: skip
        if splits > 1:
            torch.sum(of_rows, 0, out=total)
        if need_weight:
            grad_weight[entry : entry + entries] += of_weight.sum((0, 2))
    if need_key or (need_weight and not p.wide):
        total = gradient.new_empty(entries, count, p.hidden)
        programs, splits, per_split, of_rows, of_weight, tile = parts(
            count, rows, row_block, total
        )
        launch(
            key_kernel, programs * splits, total,
            *inputs, query_exp, *prepared[1:], gradient, of_rows, of_weight, *sizes, splits,
            per_split, **tile, BLOCK=row_block, **options,
        )  # fmt: skip
        if need_key:
            grad_key[entry : entry + entries, key:end] += of_rows.sum(0)
        if need_weight and not p.wide:
            grad_weight[entry : entry + entries] += of_weight.sum((0, 2))


def _strided(x: Tensor | None, rank: int, p: Problem, stand_in: Tensor) -> tuple[object, ...]:
    """A tensor and its strides as kernels take them; one that is missing is not read."""
    if x is None:
        return (stand_in, *(0,) * (rank + 2))
    view = p.batch.view(x, rank)
    return (view, *view.stride())


def _add_mask(
    p: Problem, gradient: Tensor, entry: int, row: int, key: int, grad_mask: Tensor
) -> None:
    """Adds G to the mask's gradient, summed over what the mask broadcasts."""
    mask = torch.atleast_2d(grad_mask)
    rows, keys = gradient.shape[1:]
    target = mask[..., row : row + rows, :] if mask.shape[-2] > 1 else mask
    target = target[..., key : key + keys] if mask.shape[-1] > 1 else target
    leading = mask.shape[:-2]
    tail = tuple(target.shape[-2:])
    gradient = gradient.sum_to_size(gradient.shape[0], *tail)
    if all(size == 1 for size in leading):
        target += gradient.sum(0).view(target.shape)
        return
    # Entries of a chunk are consecutive, not always whole batch dims.
    target = target.expand(*p.batch.shape, *tail)
    indices = itertools.product(*map(range, p.batch.shape))
    for index, share in zip(itertools.islice(indices, entry, None), gradient, strict=False):
        target[index] += share
