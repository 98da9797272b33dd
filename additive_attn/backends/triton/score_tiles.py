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
from additive_attn.backends.triton.numerics import exact_reciprocal, reciprocal, tanh, tile4
from additive_attn.backends.triton.opposite import (
    Flags,
    holds_opposite,
    no_flags,
    opposite_pairs,
)
from additive_attn.backends.triton.plan import Piece
from additive_attn.backends.triton.prepare import SAFE, padded_length


@triton.jit
def _rows_of(x):
    """[RM, TM] as [RM, 1, TM, 1]."""
    return x[:, None, :, None]


@triton.jit
def _keys_of(x):
    """[RN, TN] as [1, RN, 1, TN]."""
    return x[None, :, None, :]


@triton.jit
def _pairs(x, y):
    """x + y of rows [RM, TM, TN] and keys [RN, TM, TN]: [RM, RN, TM, TN]."""
    return x[:, None, :, :] + y[None, :, :, :]


@triton.jit
def _joined(
    a_rows, z_rows, b_rows, weight, acc, u0, u1, a_step, b_step,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIFFERENCE: tl.constexpr, EXACT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """acc + sum z/y over quads [u0, u1) of features (math.md, eq. 4).

    Every thread loads what it multiplies, so that the loop needs no shared memory and no barrier.
    The loads' layout follows the contiguity of their addresses. That of the last dim is true, that
    of the others is an order, last dim first, since Triton 3.6 would have threads lie along R. The
    hint counts only where it meets the load."""
    for u in range(u0, u1):
        a_at = a_rows + tl.cast(u, tl.int64) * a_step
        b_at = b_rows + tl.cast(u, tl.int64) * b_step
        a4 = tl.load(tl.multiple_of(tl.max_contiguous(a_at, [1, 2, 4, 8]), [1, 1, 1, 16]))
        b4 = tl.load(tl.multiple_of(tl.max_contiguous(b_at, [1, 2, 4, 8]), [1, 1, 1, 16]))
        a0, a1, a2, a3 = tile4(a4, RM, TM, TN)
        b0, b1, b2, b3 = tile4(b4, RN, TM, TN)
        y0 = _pairs(a0, b0)
        y1 = _pairs(a1, b1)
        y2 = _pairs(a2, b2)
        y3 = _pairs(a3, b3)
        if DIFFERENCE:
            w_at = weight + 4 * u
            z0 = _pairs(-a0, b0) * tl.load(w_at)
            z1 = _pairs(-a1, b1) * tl.load(w_at + 1)
            z2 = _pairs(-a2, b2) * tl.load(w_at + 2)
            z3 = _pairs(-a3, b3) * tl.load(w_at + 3)
        else:
            z_at = z_rows + tl.cast(u, tl.int64) * a_step
            z4 = tl.load(tl.multiple_of(tl.max_contiguous(z_at, [1, 2, 4, 8]), [1, 1, 1, 16]))
            z0, z1, z2, z3 = tile4(z4, RM, TM, TN)
            z0 = z0[:, None, :, :]
            z1 = z1[:, None, :, :]
            z2 = z2[:, None, :, :]
            z3 = z3[:, None, :, :]
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
    query_rows, key_rows, weight, centre, at_query, at_key, row0, key0, rows, keys, padded, small,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIFFERENCE: tl.constexpr, FEATURES_PER_SUM: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The energies of a tile in the difference or the factored form, [RM, RN, TM, TN]. Of rows and
    keys beyond the last they are finite: what is read in their place are other rows."""
    padded = tl.multiple_of(padded, 4)
    a_step = 4 * padded_length(rows).to(tl.int64)
    b_step = 4 * padded_length(keys).to(tl.int64)
    f = tl.arange(0, 4)
    none = tl.zeros([1, TM, TN, 1], tl.int32)
    ri = RM * tl.arange(0, TM)[None, :] + tl.arange(0, RM)[:, None]  # [RM, TM]
    rj = TN * tl.arange(0, RN)[:, None] + tl.arange(0, TN)[None, :]  # [RN, TN]
    of_rows = 4 * ri[:, :, None, None] + none + f[None, None, None, :]
    of_keys = 4 * rj[:, None, :, None] + none + f[None, None, None, :]
    a_rows = query_rows.quads + (at_query * padded + 4 * row0) + of_rows
    z_rows = query_rows.weighted + (at_query * padded + 4 * row0) + of_rows
    b_rows = key_rows.quads + (at_key * padded + 4 * key0) + of_keys
    quads = padded // 4
    total = tl.zeros([RM, RN, TM, TN], tl.float32)
    if small:
        total = _joined(
            a_rows, z_rows, b_rows, weight, total, 0, quads, a_step, b_step,
            RM, TM, RN, TN, True, True, TARGET,
        )  # fmt: skip
    elif DIFFERENCE:
        total = _joined(
            a_rows, z_rows, b_rows, weight, total, 0, quads, a_step, b_step,
            RM, TM, RN, TN, True, False, TARGET,
        )  # fmt: skip
    else:
        STEPS: tl.constexpr = FEATURES_PER_SUM // 4
        for block in range(0, padded // FEATURES_PER_SUM):
            part = tl.zeros([RM, RN, TM, TN], tl.float32)
            part = _joined(
                a_rows, z_rows, b_rows, weight, part, block * STEPS, block * STEPS + STEPS,
                a_step, b_step, RM, TM, RN, TN, False, False, TARGET,
            )  # fmt: skip
            total += 2.0 * (tl.load(centre + block) - part)
    return total


@triton.jit
def _square(x, RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr):
    """[RM, RN, TM, TN] to [BM, BN]; row = tm RM + rm, key = rn TN + tn."""
    return tl.reshape(tl.permute(x, [2, 0, 1, 3]), [RM * TM, RN * TN])


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
        rj = key0 + TN * tl.arange(0, RN)[:, None] + tl.arange(0, TN)[None, :]
        ri = tl.minimum(ri, rows - 1).to(tl.int64)  # [RM, TM]
        rj = tl.minimum(rj, keys - 1).to(tl.int64)  # [RN, TN]
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
            centre = prepared.centre + at_weight * (padded // FEATURES_PER_SUM)
            total = _indirect(
                query_rows, key_rows, weight, centre, at_query, at_key, row0, key0, rows, keys,
                padded, small, RM, TM, RN, TN, DIFFERENCE, FEATURES_PER_SUM, TARGET,
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
