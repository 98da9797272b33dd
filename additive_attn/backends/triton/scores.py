"""The scores of a tile of queries and keys: the inner loop of every pass.

    score_ij = scale sum_h w_h tanh(q_ih + k_jh) + mask_ij

With a = e^{-2q} and b = e^{2k} (``prepare.py``) the fractions of four features are joined,
z0/y0 + z1/y1 = (z0 y1 + z1 y0) / (y0 y1), twice, so that they share one reciprocal. The forms, of
which a tile takes one, as the CPU kernel does (``csrc/energy.h`` says why each is needed):

    factored    z = w a         y = a + b    sum (w - 2 z/y)    3.75 instructions a tanh
    difference  z = w (b - a)   y = a + b    sum z/y            few features; all |q|, |k| <= 1
    direct      tanh(q + k)                  float64; rows or keys beyond SAFE, NaN, Inf

A thread keeps RM rows by RN keys in registers: tiles are [RM, RN, TM, TN], since Triton gives the
last dims to the threads, and are turned to [RM TM, RN TN] when the sum is complete.
"""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.launch import VARYING
from additive_attn.backends.triton.masks import interval, masked_bias
from additive_attn.backends.triton.numerics import reciprocal, split4, tanh
from additive_attn.backends.triton.prepare import SAFE


@triton.jit
def joined(
    a_rows, b_rows, weight, acc, h0, h1,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIFFERENCE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + sum z/y over features [h0, h1)."""
    f = tl.arange(0, 4)
    for h in range(h0, h1, 4):
        a4 = tl.load(a_rows + h)
        b4 = tl.load(b_rows + h)
        w4 = tl.load(weight + h + f)
        a0, a1, a2, a3 = split4(a4, RM, TM)
        b0, b1, b2, b3 = split4(b4, RN, TN)
        a0 = a0[:, None, :, None]
        a1 = a1[:, None, :, None]
        a2 = a2[:, None, :, None]
        a3 = a3[:, None, :, None]
        b0 = b0[None, :, None, :]
        b1 = b1[None, :, None, :]
        b2 = b2[None, :, None, :]
        b3 = b3[None, :, None, :]
        y0 = a0 + b0
        y1 = a1 + b1
        y2 = a2 + b2
        y3 = a3 + b3
        if DIFFERENCE:
            w0, w1, w2, w3 = split4(
                w4[None, None, :] + tl.zeros([RM, TM, 4], tl.float32), RM, TM
            )
            z0 = (b0 - a0) * w0[:, None, :, None]
            z1 = (b1 - a1) * w1[:, None, :, None]
            z2 = (b2 - a2) * w2[:, None, :, None]
            z3 = (b3 - a3) * w3[:, None, :, None]
        else:
            z0, z1, z2, z3 = split4(a4 * w4[None, None, :], RM, TM)
            z0 = z0[:, None, :, None]
            z1 = z1[:, None, :, None]
            z2 = z2[:, None, :, None]
            z3 = z3[:, None, :, None]
        z01 = z0 * y1 + z1 * y0
        z23 = z2 * y3 + z3 * y2
        y01 = y0 * y1
        y23 = y2 * y3
        acc += (z01 * y23 + z23 * y01) * reciprocal(y01 * y23, TARGET)
    return acc


@triton.jit
def square(x, RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr):
    """[RM, RN, TM, TN] to [rows, keys]; row = tm RM + rm, key = tn RN + rn."""
    return tl.reshape(tl.permute(x, [2, 0, 3, 1]), [RM * TM, RN * TN])


@triton.jit
def energies(
    query, key, query_row, query_h, key_row, key_h,
    query_exp, key_exp, query_size, key_size, query_correction, key_correction,
    weight, centre, row0, rows, key0, keys, hidden, padded, used,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    FEW: tl.constexpr, WIDE: tl.constexpr, CENTRED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """sum_h w_h tanh(q_ih + k_jh) of rows row0 ... and keys key0 ..., in units of the weight.

    Pointers are those of the batch entry. ``used`` [BM, BN]: pairs that count; what the others
    hold decides nothing. Rows and keys beyond the last repeat the last."""
    BM: tl.constexpr = RM * TM
    BN: tl.constexpr = RN * TN
    f = tl.arange(0, 4)
    i = tl.minimum(row0 + tl.arange(0, RM)[:, None] + RM * tl.arange(0, TM)[None, :], rows - 1)
    j = tl.minimum(key0 + tl.arange(0, RN)[:, None] + RN * tl.arange(0, TN)[None, :], keys - 1)
    i = i.to(tl.int64)
    j = j.to(tl.int64)
    if WIDE:
        result = tl.zeros([BM, BN], tl.float64)
        any_direct = True
    else:
        padded = tl.multiple_of(padded, 4)
        flat_i = tl.minimum(row0 + tl.arange(0, BM), rows - 1)
        flat_j = tl.minimum(key0 + tl.arange(0, BN), keys - 1)
        size_i = tl.load(query_size + flat_i)
        size_j = tl.load(key_size + flat_j)
        wild_j = (size_j > SAFE)[None, :] & used
        wild_i = (size_i > SAFE) | (tl.max(wild_j.to(tl.int32), 1) != 0)
        small = (size_i <= 1.0)[:, None] & (size_j <= 1.0)[None, :]
        any_direct = tl.max(wild_i.to(tl.int32), 0) != 0
        all_small = tl.min((small | (used.to(tl.int32) == 0) | wild_i[:, None]).to(tl.int32)) != 0

        a_rows = query_exp + i[:, :, None] * padded + f[None, None, :]
        b_rows = key_exp + j[:, :, None] * padded + f[None, None, :]
        total = tl.zeros([RM, RN, TM, TN], tl.float32)
        if FEW:
            total = joined(a_rows, b_rows, weight, total, 0, padded, RM, TM, RN, TN, True, TARGET)
        elif all_small:
            total = joined(a_rows, b_rows, weight, total, 0, padded, RM, TM, RN, TN, True, TARGET)
        else:
            for block in range(0, padded // CENTRED):
                part = tl.zeros([RM, RN, TM, TN], tl.float32)
                part = joined(
                    a_rows, b_rows, weight, part, block * CENTRED, (block + 1) * CENTRED,
                    RM, TM, RN, TN, False, TARGET,
                )  # fmt: skip
                total += 2.0 * (tl.load(centre + block) - part)
        result = square(total, RM, TM, RN, TN)
        rounding = tl.load(query_correction + flat_i)[:, None]
        rounding += tl.load(key_correction + flat_j)[None, :]
        result += tl.where(small, rounding, 0.0)

    if any_direct:
        exact = tl.zeros([RM, RN, TM, TN], result.dtype)
        q_place = query + i * query_row
        k_place = key + j * key_row
        for h in range(0, hidden):
            q = tl.load(q_place).to(result.dtype)
            k = tl.load(k_place).to(result.dtype)
            exact += tl.load(weight + h) * tanh(q[:, None, :, None] + k[None, :, None, :])
            q_place += query_h
            k_place += key_h
        exact = square(exact, RM, TM, RN, TN)
        if WIDE:
            result = exact
        else:
            result = tl.where(wild_i[:, None], exact, result)
    return result


@triton.jit
def score_tile(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_exp, key_exp, query_size, key_size, query_correction, key_correction,
    query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    weight, unit, centre, weight_outer, weight_inner,
    mask, mask_outer, mask_inner, mask_row, mask_column,
    o, m, row0, rows, key0, keys, hidden, padded, low, high,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    FEW: tl.constexpr, WIDE: tl.constexpr, CENTRED: tl.constexpr, MASK: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """[BM, BN]: scale * score + mask of entry (o, m), -inf where a row may not attend."""
    i = row0 + tl.arange(0, RM * TM)
    j = key0 + tl.arange(0, RN * TN)
    used = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
    if MASK != "none":
        bias, used = masked_bias(
            mask + o * mask_outer + m * mask_inner, mask_row, mask_column, i, j, used, MASK
        )
    # The prepared tensors are contiguous within an entry: one stride serves all their parts.
    at_query = o * query_exp_outer + m * query_exp_inner
    at_key = o * key_exp_outer + m * key_exp_inner
    at_weight = o * weight_outer + m * weight_inner
    energy = energies(
        query + o * query_outer + m * query_inner, key + o * key_outer + m * key_inner,
        query_row, query_h, key_row, key_h,
        query_exp + at_query * padded, key_exp + at_key * padded,
        query_size + at_query, key_size + at_key,
        query_correction + at_query, key_correction + at_key,
        weight + at_weight * padded, centre + at_weight * (padded // CENTRED),
        row0, rows, key0, keys, hidden, padded, used,
        RM, TM, RN, TN, FEW, WIDE, CENTRED, TARGET,
    )  # fmt: skip
    score = energy * tl.load(unit + at_weight)
    if MASK == "float":
        score += bias
    return tl.where(used, score, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def score_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_exp, key_exp, query_size, key_size, query_correction, key_correction,
    query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    weight, unit, centre, weight_outer, weight_inner,
    mask, mask_outer, mask_inner, mask_row, mask_column,
    lengths, length_outer, length_inner, length_row,
    scores, inner, entry_begin, rows, row_begin, row_count, keys, key_begin, score_padded,
    hidden, padded, left, right,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    FEW: tl.constexpr, WIDE: tl.constexpr, CENTRED: tl.constexpr, MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """scores [entry][row][key] of rows from row_begin and keys from key_begin, tile by tile; -inf
    beyond the last key."""
    BM: tl.constexpr = RM * TM
    BN: tl.constexpr = RN * TN
    row_tiles = tl.cdiv(row_count, BM)
    key_tiles = score_padded // BN
    program = tl.program_id(0)
    row0 = row_begin + program % row_tiles * BM
    rest = program // row_tiles
    key0 = key_begin + rest % key_tiles * BN
    n, o, m = batch_entry(entry_begin + rest // key_tiles, inner)
    entry = n - entry_begin
    i = row0 + tl.arange(0, BM)
    j = key0 + tl.arange(0, BN)
    low, high = interval(
        lengths + o * length_outer + m * length_inner, length_row,
        i, rows, keys, left, right, HAS_LENGTHS,
    )  # fmt: skip
    place = (entry * row_count + i - row_begin)[:, None] * score_padded + (j - key_begin)[None, :]
    inside = (i < row_begin + row_count)[:, None] & (tl.full([BN], 1, tl.int1))[None, :]
    if (tl.max(tl.minimum(high, key0 + BN) - tl.maximum(low, key0), 0)) > 0:
        score = score_tile(
            query, key, query_outer, query_inner, query_row, query_h,
            key_outer, key_inner, key_row, key_h,
            query_exp, key_exp, query_size, key_size, query_correction, key_correction,
            query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
            weight, unit, centre, weight_outer, weight_inner,
            mask, mask_outer, mask_inner, mask_row, mask_column,
            o, m, row0, rows, key0, keys, hidden, padded, low, high,
            RM, TM, RN, TN, FEW, WIDE, CENTRED, MASK, TARGET,
        )  # fmt: skip
        tl.store(scores + place, score, mask=inside)
    else:
        tl.store(scores + place, float("-inf"), mask=inside)
