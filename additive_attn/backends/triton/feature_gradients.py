"""dq, dk and dw from G: passes over the features."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.launch import VARYING
from additive_attn.backends.triton.numerics import exp_with_error, reciprocal, split4, tanh
from additive_attn.backends.triton.prepare import SAFE


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
    """What a program takes: (entry, split, tile) and the number of tile_count; its rows (or keys)
    within the chunk, [RX, TX], and in the input, not beyond ``limit``; the first half of its
    features, [RH, TH]; the indices of its entry into (outer, inner)."""
    tile_count = tl.cdiv(length, RX * TX)
    feature_tiles = tl.cdiv(padded, 2 * RH * TH)
    program = tl.program_id(0)
    tile = program % tile_count
    rest = program // tile_count
    h0 = rest % feature_tiles * (2 * RH * TH)
    rest = rest // feature_tiles
    split = rest % splits
    n, o, m = batch_entry(entry_begin + rest // splits, inner)
    h = h0 + tl.arange(0, RH)[:, None] + RH * tl.arange(0, TH)[None, :]
    c = tile * (RX * TX) + tl.arange(0, RX)[:, None] + RX * tl.arange(0, TX)[None, :]
    x = tl.minimum(begin + c, limit - 1).to(tl.int64)
    return n - entry_begin, split, tile, tile_count, c, x, h, o, m


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


@triton.jit(do_not_specialize=VARYING)
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
    entry, split, tile, tile_count, r, i, ha, o, m = _tile(
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
        Qa, rest_a = exp_with_error(tl.where(wild_i[:, None, :, None], 0.0, 2.0 * qa))
        Qb, rest_b = exp_with_error(tl.where(wild_i[:, None, :, None], 0.0, 2.0 * qb))
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
                la, ra = exp_with_error(-2.0 * qa)
                lb, rb = exp_with_error(-2.0 * qb)
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
                    g = split4(tl.load(g_four + c), RX, TX)
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
    to = grad_weight + ((split * entries + entry) * tile_count + tile) * hidden
    tl.store(to + ha, tl.sum(weight_a, 1), mask=ha < hidden)
    tl.store(to + hb, tl.sum(weight_b, 1), mask=hb < hidden)


@triton.jit(do_not_specialize=VARYING)
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
    entry, split, tile, tile_count, c, j, ha, o, m = _tile(
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
        Ba, _rest_a = exp_with_error(tl.where(wild_j[:, None, :, None], 0.0, -2.0 * ka))
        Bb, _rest_b = exp_with_error(tl.where(wild_j[:, None, :, None], 0.0, -2.0 * kb))
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
        Ka, left_a = exp_with_error(tl.where(wild_j[:, None, :, None], 0.0, 2.0 * ka))
        Kb, left_b = exp_with_error(tl.where(wild_j[:, None, :, None], 0.0, 2.0 * kb))
        correction_a = tl.sum(tl.sum(tl.where(inside, 2.0 * sum_a * (left_a / Ka), 0.0), 0), 1)
        correction_b = tl.sum(tl.sum(tl.where(inside, 2.0 * sum_b * (left_b / Kb), 0.0), 0), 1)
        to = grad_weight + ((split * entries + entry) * tile_count + tile) * hidden
        tl.store(to + ha, correction_a, mask=ha < hidden)
        tl.store(to + hb, correction_b, mask=hb < hidden)
