"""The scores of a tile of queries and keys: the inner loop of every pass (math.md, eq. 1).

A tile takes one of three forms (math.md, eq. 3 to 7, which say why each is needed):

    factored    z = w a         y = a + b    sum (w - 2 z/y)    3.75 instructions a tanh
    difference  z = w (b - a)   y = a + b    sum z/y            few features; all |q|, |k| <= 1
    direct      tanh(q + k)                  float64; rows or keys beyond SAFE, NaN, Inf;
                                             opposite pairs

with a = e^{-2q} and b = e^{2k} (``prepare.py``). The fractions of four features are joined, so
that they share one reciprocal. One small product of sketches tells whether a tile holds an
opposite pair. If so its pairs are computed in both forms, and each takes its own.

A thread keeps RM rows by RN keys in registers: tiles are [RM, RN, TM, TN], since Triton gives the
last dims to the threads, and become [RM TM, RN TN] = [BM, BN] when the sum is complete.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.launch import kernel, launch, registers
from additive_attn.backends.triton.masks import attended_pairs, block_codes, interval, stored
from additive_attn.backends.triton.numerics import exact_reciprocal, reciprocal, split4, tanh
from additive_attn.backends.triton.opposite import (
    Flags,
    holds_opposite,
    no_flags,
    opposite_pairs,
)
from additive_attn.backends.triton.plan import Piece
from additive_attn.backends.triton.prepare import SAFE


@triton.jit
def _rows_of(x):
    """[RM, TM] as [RM, 1, TM, 1]."""
    return x[:, None, :, None]


@triton.jit
def _keys_of(x):
    """[RN, TN] as [1, RN, 1, TN]."""
    return x[None, :, None, :]


@triton.jit
def _joined(
    a_rows, b_rows, weight, acc, h0, h1,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIFFERENCE: tl.constexpr, EXACT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + sum z/y over features [h0, h1): (math.md, eq. 4)."""
    f = tl.arange(0, 4)
    for h in range(h0, h1, 4):
        a4 = tl.load(a_rows + h)  # [RM, TM, 4]
        b4 = tl.load(b_rows + h)  # [RN, TN, 4]
        w4 = tl.load(weight + h + f)  # [4]
        a0, a1, a2, a3 = split4(a4, RM, TM)
        b0, b1, b2, b3 = split4(b4, RN, TN)
        y0 = _rows_of(a0) + _keys_of(b0)  # [RM, RN, TM, TN], as all below
        y1 = _rows_of(a1) + _keys_of(b1)
        y2 = _rows_of(a2) + _keys_of(b2)
        y3 = _rows_of(a3) + _keys_of(b3)
        if DIFFERENCE:
            w0, w1, w2, w3 = split4(w4[None, None, :] + tl.zeros([RM, TM, 4], tl.float32), RM, TM)
            z0 = (_keys_of(b0) - _rows_of(a0)) * _rows_of(w0)
            z1 = (_keys_of(b1) - _rows_of(a1)) * _rows_of(w1)
            z2 = (_keys_of(b2) - _rows_of(a2)) * _rows_of(w2)
            z3 = (_keys_of(b3) - _rows_of(a3)) * _rows_of(w3)
        else:
            z0, z1, z2, z3 = split4(a4 * w4[None, None, :], RM, TM)
            z0 = _rows_of(z0)
            z1 = _rows_of(z1)
            z2 = _rows_of(z2)
            z3 = _rows_of(z3)
        z01 = z0 * y1 + z1 * y0
        z23 = z2 * y3 + z3 * y2
        y01 = y0 * y1
        y23 = y2 * y3
        if EXACT:
            acc += (z01 * y23 + z23 * y01) * exact_reciprocal(y01 * y23, TARGET)
        else:
            acc += (z01 * y23 + z23 * y01) * reciprocal(y01 * y23, TARGET)
    return acc


@triton.jit
def _indirect(
    a_rows, b_rows, weight, centre, padded, small,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIFFERENCE: tl.constexpr, FEATURES_PER_SUM: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The energies of a tile in the difference or the factored form, [RM, RN, TM, TN]."""
    total = tl.zeros([RM, RN, TM, TN], tl.float32)
    if small:
        total = _joined(
            a_rows, b_rows, weight, total, 0, padded, RM, TM, RN, TN, True, True, TARGET
        )
    elif DIFFERENCE:
        total = _joined(
            a_rows, b_rows, weight, total, 0, padded, RM, TM, RN, TN, True, False, TARGET
        )
    else:
        for block in range(0, padded // FEATURES_PER_SUM):
            part = tl.zeros([RM, RN, TM, TN], tl.float32)
            h0 = block * FEATURES_PER_SUM
            part = _joined(
                a_rows, b_rows, weight, part, h0, h0 + FEATURES_PER_SUM,
                RM, TM, RN, TN, False, False, TARGET,
            )  # fmt: skip
            total += 2.0 * (tl.load(centre + block) - part)
    return total


@triton.jit
def _square(x, RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr):
    """[RM, RN, TM, TN] to [BM, BN]; row = tm RM + rm, key = tn RN + rn."""
    return tl.reshape(tl.permute(x, [2, 0, 3, 1]), [RM * TM, RN * TN])


@triton.jit
def _chosen(query_rows, key_rows, i, j, attended):
    """Which pairs (i, j) take the direct form; whether one of the attended is opposite."""
    opposite = opposite_pairs(query_rows, key_rows, i, j)
    any_opposite = tl.max(tl.max((opposite & attended).to(tl.int32), 1), 0)
    direct_j = (tl.load(key_rows.size + j) > SAFE)[None, :] & attended
    direct_i = tl.load(query_rows.size + i) > SAFE
    direct_i |= tl.max(direct_j.to(tl.int32), 1) != 0
    return opposite | direct_i[:, None], any_opposite


@triton.jit
def _forms(
    query_rows, key_rows, at_query, at_key, row0, key0, rows, keys, attended,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Whether a pair of a tile takes the direct form, and whether no |q|, |k| of the others is
    above 1. What rows and keys hold that attend to nothing here decides nothing."""
    ci = tl.minimum(tl.arange(0, BM), rows - 1 - row0)
    cj = tl.minimum(tl.arange(0, BN), keys - 1 - key0)
    row_counts = tl.max(attended.to(tl.int32), 1) != 0
    key_counts = tl.max(attended.to(tl.int32), 0) != 0
    size_i = tl.where(row_counts, tl.load(query_rows.size + at_query + row0 + ci), 0.0)
    size_j = tl.where(key_counts, tl.load(key_rows.size + at_key + key0 + cj), 0.0)
    near_i = tl.where(size_i > SAFE, 0.0, size_i)
    near_j = tl.where(size_j > SAFE, 0.0, size_j)
    any_direct = tl.maximum(tl.max(size_i, 0), tl.max(size_j, 0)) > SAFE
    any_direct |= holds_opposite(
        query_rows, key_rows, at_query, at_key, row0, key0, rows, keys, BM, BN
    )
    return any_direct, tl.maximum(tl.max(near_i, 0), tl.max(near_j, 0)) <= 1.0


@triton.jit
def _rounding(rows, keys, ri, rj):
    """What the roundings of the exponentials leave out of the scores of rows ri and keys rj, [RM,
    RN, TM, TN] (math.md, eq. 8); 0 where a size is beyond 1."""
    rounding = _rows_of(tl.load(rows.correction + ri)) + _keys_of(tl.load(keys.correction + rj))
    near = _rows_of(tl.load(rows.size + ri) <= 1.0) & _keys_of(tl.load(keys.size + rj) <= 1.0)
    return tl.where(near, rounding, 0.0)


@triton.jit
def _direct(
    q_place, k_place, weight, hidden, query_h, key_h, acc,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + sum w tanh(q + k), [BM, BN] (math.md, eq. 7)."""
    for h in range(0, hidden):
        q = tl.load(q_place).to(acc.dtype)
        k = tl.load(k_place).to(acc.dtype)
        acc += tl.load(weight + h) * tanh(_rows_of(q) + _keys_of(k), TARGET)
        q_place += query_h
        k_place += key_h
    return _square(acc, RM, TM, RN, TN)


@kernel
def score_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    prepared, weight_outer, weight_inner,
    mask, mask_outer, mask_inner, mask_row, mask_column, block_tiles,
    lengths, length_outer, length_inner, length_row,
    scores, flags, inner, entry_begin, rows, row_begin, row_count, keys, key_begin, score_padded,
    hidden, padded, left, right,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIFFERENCE: tl.constexpr, FEATURES_PER_SUM: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """scores [entry][row][key] of rows from row_begin and keys from key_begin, tile by tile:
    scale * score + mask as ``masks.stored`` keeps them. ``query_rows``, ``key_rows`` and
    ``prepared`` are the tensors of ``prepare.py``; the first two are None in float64. ``flags``
    [entry][row tile][key tile], if given: whether an attended pair of the tile is opposite."""
    BM: tl.constexpr = RM * TM
    BN: tl.constexpr = RN * TN
    ACC: tl.constexpr = scores.dtype.element_ty
    row_tiles = tl.cdiv(row_count, BM)
    key_tiles = score_padded // BN
    program = tl.program_id(0)
    row0 = row_begin + program % row_tiles * BM
    key_tile = program // row_tiles
    key0 = key_begin + key_tile % key_tiles * BN
    n, o, m = batch_entry(entry_begin + key_tile // key_tiles, inner)
    i = row0 + tl.arange(0, BM)
    j = key0 + tl.arange(0, BN)
    if lengths is not None:
        lengths += o * length_outer + m * length_inner
    low, high = interval(lengths, length_row, i, rows, keys, left, right)
    place = ((n - entry_begin) * row_count + i - row_begin)[:, None] * score_padded
    place += (j - key_begin)[None, :]
    inside = (i < row_begin + row_count)[:, None] & (tl.full([BN], 1, tl.int1))[None, :]
    any_opposite = 0
    if mask is not None:
        mask += o * mask_outer + m * mask_inner
    computed = tl.max(tl.minimum(high, key0 + BN) - tl.maximum(low, key0), 0) > 0
    if block_tiles is not None:
        both = (i < rows)[:, None] & (j < keys)[None, :]
        code = block_codes(mask, mask_row, mask_column, block_tiles, i, j, both)
        computed &= tl.max(tl.max((code != 0).to(tl.int32), 1), 0) != 0
    if computed:
        # Rows and keys beyond the last repeat the last.
        ri = row0 + tl.arange(0, RM)[:, None] + RM * tl.arange(0, TM)[None, :]
        rj = key0 + tl.arange(0, RN)[:, None] + RN * tl.arange(0, TN)[None, :]
        ri = tl.minimum(ri, rows - 1).to(tl.int64)  # [RM, TM]
        rj = tl.minimum(rj, keys - 1).to(tl.int64)  # [RN, TN]
        f = tl.arange(0, 4)
        at_weight = o * weight_outer + m * weight_inner
        weight = prepared.weight + at_weight * padded
        if query_rows is None:
            energy = tl.zeros([BM, BN], ACC)
            any_direct = True
        else:
            _bias, attended = attended_pairs(
                lengths, length_row, mask, mask_row, mask_column, block_tiles, i,
                j, rows, keys, left, right,
            )  # fmt: skip
            at_query = o * query_exp_outer + m * query_exp_inner
            at_key = o * key_exp_outer + m * key_exp_inner
            any_direct, small = _forms(
                query_rows, key_rows, at_query, at_key, row0, key0, rows, keys, attended, BM, BN
            )
            padded = tl.multiple_of(padded, 4)
            a_rows = query_rows.exponential + at_query * padded
            a_rows += ri[:, :, None] * padded + f[None, None, :]  # [RM, TM, 4]
            b_rows = key_rows.exponential + at_key * padded
            b_rows += rj[:, :, None] * padded + f[None, None, :]  # [RN, TN, 4]
            centre = prepared.centre + at_weight * (padded // FEATURES_PER_SUM)
            total = _indirect(
                a_rows, b_rows, weight, centre, padded, small,
                RM, TM, RN, TN, DIFFERENCE, FEATURES_PER_SUM, TARGET,
            )  # fmt: skip
            total += _rounding(query_rows, key_rows, at_query + ri, at_key + rj)
            energy = _square(total, RM, TM, RN, TN)  # [BM, BN]

        # Which pairs are attended is computed again, from an i that the compiler cannot know to
        # be that of above: it would keep all pairs in registers through the loops.
        i = tl.maximum(row0, -padded) + tl.arange(0, BM)
        bias, attended = attended_pairs(
            lengths, length_row, mask, mask_row, mask_column, block_tiles, i,
            j, rows, keys, left, right,
        )  # fmt: skip
        if any_direct:
            chosen = attended
            if query_rows is not None:
                ci = at_query + tl.minimum(i, rows - 1)
                cj = at_key + tl.minimum(j, keys - 1)
                chosen, any_opposite = _chosen(query_rows, key_rows, ci, cj, attended)
            exact = _direct(
                query + o * query_outer + m * query_inner + ri * query_row,
                key + o * key_outer + m * key_inner + rj * key_row,
                weight, hidden, query_h, key_h, tl.zeros([RM, RN, TM, TN], ACC),
                RM, TM, RN, TN, TARGET,
            )  # fmt: skip
            energy = exact if query_rows is None else tl.where(chosen, exact, energy)

        score_scale = prepared.score_scale + 2 * at_weight
        score = energy * tl.load(score_scale) * tl.load(score_scale + 1)
        if mask is not None:
            if mask.dtype.element_ty.is_floating():
                score += bias
        tl.store(scores + place, stored(score, attended), mask=inside)
    else:
        tl.store(scores + place, float("-inf"), mask=inside)
    if flags is not None:
        entry_tile = key_tile // key_tiles * row_tiles + program % row_tiles
        tl.store(flags + entry_tile * key_tiles + key_tile % key_tiles, any_opposite)


def tile_scores(p: Problem, piece: Piece, key: int, keys: int) -> Tensor:
    """(entries, rows, keys and padding): scale * score + mask, -inf where the pair is masked."""
    return _tile_scores(p, piece, key, keys, None)


def flagged_scores(p: Problem, piece: Piece, key: int, keys: int) -> tuple[Tensor, Flags | None]:
    """``tile_scores``, and which of the tiles hold an opposite pair; float64 takes no notice."""
    flags = None if p.wide else no_flags(p, piece, keys)
    return _tile_scores(p, piece, key, keys, flags), flags


def _tile_scores(p: Problem, piece: Piece, key: int, keys: int, flags: Flags | None) -> Tensor:
    entry, entries, row, rows = piece
    tile = tiles.score_tile(rows, p.wide)
    padded = -(-keys // tile.keys) * tile.keys
    scores = torch.empty(entries, rows, padded, dtype=p.accumulator, device=p.device)
    programs = entries * -(-rows // tile.rows) * (padded // tile.keys)
    launch(
        score_kernel, programs, scores,
        *p.inputs(), *p.prepared_arguments(), *p.mask_arguments(), *p.length_arguments(),
        scores, None if flags is None else flags.tiles,
        p.batch.inner, entry, p.rows, row, rows, p.keys, key, padded,
        p.hidden, p.padded, p.left, p.right,
        **tile.sizes(), **p.form(), num_warps=tile.warps,
        **registers(min(255, 2048 // tile.warps)),
    )  # fmt: skip
    return scores
