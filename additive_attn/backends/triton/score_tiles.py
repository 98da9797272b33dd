"""The scores of a tile of queries and keys: the inner loop of every pass (math.md, eq. 1).

A tile takes one of three forms (math.md, section 2.2, which says why each is needed):

    matched     z = p - c + b_0 g    y = (b_0 + a_0) (b_1 + a_1)    sum (z/y - d) of matches
    difference  z = w (b - a)        y = b + a                      few features; all |q|, |k| <= 1
    direct      tanh(q + k)                                         float64; rows or keys beyond
                                                                    SAFE, NaN, Inf; opposite pairs

with a = e^{-2q} and b = e^{2k} (``prepare_rows.py``). The fractions of four features are joined,
so that they share one reciprocal: 3.75 instructions a tanh in the matched form. One small product
of sketches tells whether a tile holds an opposite pair. If so its pairs are computed in both
forms, and each takes its own.

A thread keeps RM rows by RN keys in registers: tiles are [RM, RN, TM, TN], since Triton gives the
last dims to the threads.
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
from additive_attn.backends.triton.masks import (
    attended_pairs,
    block_codes,
    interval,
    stored,
    tile_keys,
    tile_rows,
)
from additive_attn.backends.triton.numerics import anew, tanh
from additive_attn.backends.triton.opposite import (
    Flags,
    no_flags,
    opposite_pairs,
    tiles_with_opposite,
)
from additive_attn.backends.triton.plan import Piece
from additive_attn.backends.triton.prefetch import lines_of_quads, use
from additive_attn.backends.triton.prepare_rows import GROUP, SAFE, SMALL, UNSAFE, padded_length
from additive_attn.backends.triton.quad_layout import quad_numbers
from additive_attn.backends.triton.quads import difference_sums, matched_sums


@triton.jit
def _within(begin, i, count):
    """Returns begin + i, or the last of ``count`` beyond it."""
    return begin + tl.minimum(i, count - 1)


@triton.jit
def _indirect(
    query_rows, key_rows, weight, quad_weight, at_query, at_key, row0, key0, i, j, rows, keys,
    padded, small,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr, SPLIT: tl.constexpr,
    DIFFERENCE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Returns the sums over features of a tile in the matched or the difference form, [RM, RN, TM,
    TN]. Those of rows and keys beyond the last are undefined: others are read in their place.

    SPLIT TM = TS: each of SPLIT groups of threads takes a range of features."""
    TS: tl.constexpr = SPLIT * TM
    padded = tl.multiple_of(padded, 4)
    OF_ROW: tl.constexpr = 4 if DIFFERENCE else 8  # numbers of a quad
    row_length, key_length = padded_length(anew(rows, key0)), padded_length(anew(keys, key0))
    a_step, b_step = OF_ROW * row_length.to(tl.int64), 4 * key_length.to(tl.int64)
    f = tl.arange(0, 4)
    none = tl.zeros([1, TS, TN, 1], tl.int32)
    # In int64, so that the compiler knows how far the places of a thread are apart.
    tm = anew(tl.arange(0, TS), key0).to(tl.int64) % TM
    tn = anew(tl.arange(0, TN), key0).to(tl.int64)
    ri = RM // 2 * tm[None, :] + tl.arange(0, RM // 2)[:, None]  # [RM / 2, TS], of twins
    rj = TN * tl.arange(0, RN)[:, None] + tn[None, :]  # [RN, TN]
    of_rows = 2 * OF_ROW * ri[:, :, None, None] + none + f[None, None, None, :]
    of_keys = 4 * rj[:, None, :, None] + none + f[None, None, None, :]
    at_row = at_query * quad_numbers(padded, -1, not DIFFERENCE) + OF_ROW * row0
    a_rows = query_rows.quads + at_row + of_rows
    at_first = at_key * quad_numbers(padded, 1, not DIFFERENCE) + 4 * key0
    b_rows = key_rows.quads + at_first + of_keys
    features, quads = padded, padded // 4
    p_first = quads
    p_last = None
    if SPLIT > 1:
        part = tl.arange(0, TS)[None, :, None, None] // TM  # [1, TS, 1, 1]
        features //= SPLIT
        quads //= SPLIT
        first = part * quads
        a_rows += first * a_step
        b_rows += first * b_step
        at_weight = 4 * quads * (tl.arange(0, TS)[None, None, :, None] // TM)  # [1, 1, TS, 1]
        weight += at_weight
        quad_weight += at_weight
        p_last = p_first - tl.where(part == SPLIT - 1, first, (first - quads) // 2)
        p_first -= first // 2
    lines = None
    if TARGET == "cuda":
        next_keys = tl.where(key0 + 2 * RN * TN <= key_length, 4 * RN * TN, 0)
        lines = lines_of_quads(
            query_rows.quads + at_row, key_rows.quads + at_first, OF_ROW * row_length,
            4 * key_length, padded // 4, quads, next_keys, RM * TM, RN * TN, SPLIT, TS * TN,
            not DIFFERENCE,
        )  # fmt: skip
    if DIFFERENCE:
        if small:
            total, ahead = difference_sums(
                a_rows, b_rows, weight, quads, a_step, b_step, lines, RM, TS, RN, TN, True, TARGET
            )
        else:
            total, ahead = difference_sums(
                a_rows, b_rows, weight, quads, a_step, b_step, lines, RM, TS, RN, TN, False, TARGET
            )
    elif small:
        total, ahead = difference_sums(
            a_rows, b_rows, quad_weight, quads, a_step, b_step, lines, RM, TS, RN, TN, True, TARGET
        )
    else:
        total, ahead = matched_sums(
            a_rows, b_rows, features, p_first, p_last, a_step, b_step, lines,
            RM, TS, RN, TN, TARGET,
        )  # fmt: skip
    if SPLIT > 1:
        total = tl.sum(tl.reshape(total, [RM, RN, SPLIT, TM, TN]), 2)
    if not (DIFFERENCE | small):
        of_row = tl.load(query_rows.correction + 2 * _within(at_query, i, rows) + 1)
        total += of_row + tl.load(key_rows.correction + 2 * _within(at_key, j, keys) + 1)
    if lines is not None:
        # Where threads have waited for other loads.
        use(ahead, query_rows.quads)
    return total


@triton.jit
def _direct(
    query, key, query_row, query_h, key_row, key_h, weight, ri, rj, hidden, acc,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Returns acc + sum w tanh(q + k) of rows ri and keys rj (math.md, eq. 7)."""
    q_place = query + ri.to(tl.int64) * query_row
    k_place = key + rj.to(tl.int64) * key_row
    for h in range(0, hidden):
        q = tl.load(q_place).to(acc.dtype)
        k = tl.load(k_place).to(acc.dtype)
        acc += tl.load(weight + h) * tanh(q[:, None, :, None] + k[None, :, None, :], TARGET)
        q_place += query_h
        k_place += key_h
    return acc


@triton.jit
def special_tiles(
    query_rows, key_rows, at_query, at_key, row0, key0, rows, keys,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Returns, as a bit for each, which of TILES tiles from ``key0`` hold a pair that may be
    small, beyond SAFE or opposite, masked ones included."""
    bits = 0
    if query_rows is not None:  # float64 has no special pairs
        GROUPS: tl.constexpr = BN // GROUP
        size = tl.load(query_rows.size + at_query + tl.minimum(row0 + tl.arange(0, BM), rows - 1))
        of_rows = tl.sum(tl.where(size <= 1.0, SMALL, 0) + tl.where(size > SAFE, UNSAFE, 0), 0)
        tile = tl.arange(0, TILES)
        group = key0 // GROUP + GROUPS * tile[:, None] + tl.arange(0, GROUPS)[None, :]
        flags = tl.load(
            key_rows.flags + at_key // GROUP + group, mask=group * GROUP < keys, other=0
        )
        flags = tl.sum(flags, 1)  # [TILES]
        small = (of_rows % UNSAFE != 0) & (flags % UNSAFE != 0)
        opposite = tiles_with_opposite(
            query_rows, key_rows, at_query, at_key, row0, key0, rows, keys, BM, BN, TILES
        )
        special = small | (of_rows >= UNSAFE) | (flags >= UNSAFE) | opposite
        bits = tl.sum(special.to(tl.int32) << tile, 0)
    return bits


@triton.jit
def _all_small(query_rows, key_rows, i, j, attended):
    """Whether no |q|, |k| of the attended pairs (i, j) is above 1, except those beyond SAFE."""
    size = tl.maximum(tl.load(query_rows.size + i), tl.load(key_rows.size + j))
    return tl.max((attended & (size > 1.0) & (size <= SAFE)).to(tl.int32)) == 0


@triton.jit
def pair_scores(
    query, key, query_row, query_h, key_row, key_h, query_rows, key_rows, at_query, at_key,
    prepared, at_weight, low, high, mask, mask_row, mask_column, block_tiles,
    row0, key0, rows, keys, hidden, padded, special,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr, SPLIT: tl.constexpr,
    DIFFERENCE: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Returns, for a tile [RM, RN, TM, TN], scale * score + mask, the attended pairs, and whether
    one of them is opposite. Row = tm RM + rm, key = rn TN + tn. ``low`` and ``high``, [RM, 1, TM,
    1], are the rows' intervals; pointers are the entry's, those of ``prepared`` the first one's.
    ``special``: whether a pair of the tile may take another form (``special_tiles``)."""
    weight = prepared.weight + at_weight * padded
    quad_weight = prepared.quad_weight + at_weight * padded
    ri = tile_rows(row0, RM, TM)  # [RM, TM]
    rj = tile_keys(key0, RN, TN)  # [RN, TN]
    i = ri[:, None, :, None]
    j = rj[None, :, None, :]
    any_opposite = 0
    if query_rows is None:
        bias, attended = attended_pairs(low, high, mask, mask_row, mask_column, block_tiles, i, j)
        total = _direct(
            query, key, query_row, query_h, key_row, key_h, weight, _within(0, ri, rows),
            _within(0, rj, keys), hidden, tl.zeros([RM, RN, TM, TN], ACC), TARGET,
        )  # fmt: skip
    else:
        # Attended pairs and the places of rows and keys are computed again at each use: most tiles
        # use them once, and what is kept takes registers.
        small = key0 < 0
        if special != 0:
            # Rows and keys that attend to nothing here do not affect the choice.
            _bias, attended = attended_pairs(
                low, high, mask, mask_row, mask_column, block_tiles, i, j
            )
            qi, kj = _within(at_query, i, rows), _within(at_key, j, keys)
            small = _all_small(query_rows, key_rows, qi, kj, attended)
        total = _indirect(
            query_rows, key_rows, weight, quad_weight, at_query, at_key, row0, key0, i, j, rows,
            keys, padded, small, RM, TM, RN, TN, SPLIT, DIFFERENCE, TARGET,
        )  # fmt: skip
        if special != 0:
            _bias, attended = attended_pairs(
                low, high, mask, mask_row, mask_column, block_tiles, i, j
            )
            qi, kj = _within(at_query, i, rows), _within(at_key, j, keys)
            size = tl.maximum(tl.load(query_rows.size + qi), tl.load(key_rows.size + kj))
            # Corrects for the rounding of the exponentials (math.md, eq. 8).
            of_row = tl.load(query_rows.correction + 2 * qi)
            rounding = of_row + tl.load(key_rows.correction + 2 * kj)
            total += tl.where((size <= 1.0) & (DIFFERENCE | small), rounding, 0.0)
            opposite = opposite_pairs(query_rows, key_rows, qi, kj)
            any_opposite = tl.max((attended & opposite).to(tl.int32))
            direct = attended & (opposite | (size > SAFE))
            if tl.max(direct.to(tl.int32)) != 0:
                exact = _direct(
                    query, key, query_row, query_h, key_row, key_h, weight, _within(0, ri, rows),
                    _within(0, rj, keys), hidden, tl.zeros([RM, RN, TM, TN], ACC), TARGET,
                )  # fmt: skip
                total = tl.where(direct, exact, total)
        bias, attended = attended_pairs(low, high, mask, mask_row, mask_column, block_tiles, i, j)
    scale = prepared.score_scale + 2 * at_weight
    score = total * tl.load(scale) * tl.load(scale + 1)
    if mask is not None:
        score += bias
    return score, attended, any_opposite


@triton.jit
def row_interval(
    lengths, length_row, row0, rows, keys, left, right, RM: tl.constexpr, TM: tl.constexpr
):  # fmt: skip
    """Returns the intervals of the rows of a tile, [RM, 1, TM, 1]."""
    i = tile_rows(row0, RM, TM)
    low, high = interval(lengths, length_row, i, rows, keys, left, right)
    return low[:, None, :, None], high[:, None, :, None]


@triton.jit
def is_kept(
    mask, mask_row, mask_column, block_tiles, row0, key0, rows, keys,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Whether a block table keeps a pair of a tile."""
    i = (row0 + tl.arange(0, BM))[:, None]
    j = (key0 + tl.arange(0, BN))[None, :]
    code = block_codes(mask, mask_row, mask_column, block_tiles, i, j, (i < rows) & (j < keys))
    return tl.max((code != 0).to(tl.int32)) != 0


@triton.jit
def store_tile(scores, x, n, row0, key0, rows, keys):
    """Stores a tile of scores [entry][row][key]."""
    RM: tl.constexpr = x.shape[0]
    RN: tl.constexpr = x.shape[1]
    TM: tl.constexpr = x.shape[2]
    TN: tl.constexpr = x.shape[3]
    r = tile_rows(row0, RM, TM)  # [RM, TM]
    j = tile_keys(key0, RN, TN)  # [RN, TN]
    place = scores + (n * rows + r[:, None, :, None]) * keys + j[None, :, None, :]
    tl.store(place, x, mask=(r < rows)[:, None, :, None] & (j < keys)[None, :, None, :])


@kernel
def score_kernel(
    query, key, query_outer, query_inner, query_row, query_h, key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    prepared, weight_outer, weight_inner,
    mask, mask_outer, mask_inner, mask_row, mask_column, block_tiles,
    lengths, length_outer, length_inner, length_row,
    scores, flags, inner, entry_begin, rows, row_begin, row_count, keys, key_begin, score_padded,
    hidden, padded, left, right,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr, SPLIT: tl.constexpr,
    DIFFERENCE: tl.constexpr, TARGET: tl.constexpr,
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
    if lengths is not None:
        lengths += o * length_outer + m * length_inner
    if mask is not None:
        mask += o * mask_outer + m * mask_inner
    low, high = row_interval(lengths, length_row, row0, rows, keys, left, right, RM, TM)
    entry, r0, c0 = n - entry_begin, row0 - row_begin, key0 - key_begin
    any_opposite = 0
    computed = tl.max(tl.minimum(high, key0 + BN) - tl.maximum(low, key0)) > 0
    if block_tiles is not None:
        computed &= is_kept(
            mask, mask_row, mask_column, block_tiles, row0, key0, rows, keys, BM, BN
        )
    if computed:
        at_weight = o * weight_outer + m * weight_inner
        at_query = o * query_exp_outer + m * query_exp_inner
        at_key = o * key_exp_outer + m * key_exp_inner
        special = special_tiles(
            query_rows, key_rows, at_query, at_key, row0, key0, rows, keys, BM, BN, 1
        )
        score, attended, any_opposite = pair_scores(
            query + o * query_outer + m * query_inner, key + o * key_outer + m * key_inner,
            query_row, query_h, key_row, key_h, query_rows, key_rows, at_query, at_key,
            prepared, at_weight, low, high, mask, mask_row, mask_column, block_tiles,
            row0, key0, rows, keys, hidden, padded, special,
            RM, TM, RN, TN, SPLIT, DIFFERENCE, TARGET, ACC,
        )  # fmt: skip
        kept = stored(score, attended)
        store_tile(scores, kept, entry, r0, c0, row_count, score_padded)
    else:
        minus = tl.full([RM, RN, TM, TN], float("-inf"), ACC)
        store_tile(scores, minus, entry, r0, c0, row_count, score_padded)
    if flags is not None:
        entry_tile = key_tile // key_tiles * row_tiles + program % row_tiles
        tl.store(flags + entry_tile * key_tiles + key_tile % key_tiles, any_opposite)


def tile_scores(p: Problem, piece: Piece, key: int, keys: int) -> Tensor:
    """Returns (entries, rows, keys and padding): scale * score + mask, -inf where the pair is
    masked."""
    return _tile_scores(p, piece, key, keys, None)


def flagged_scores(p: Problem, piece: Piece, key: int, keys: int) -> tuple[Tensor, Flags | None]:
    """Returns ``tile_scores``, and which of the tiles hold an opposite pair; None in float64."""
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
