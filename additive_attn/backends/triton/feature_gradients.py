# ruff: noqa: RUF005 (Triton has no starred expressions)
# mypy: disable-error-code="assignment, var-annotated"
"""dq, dk and dw from G: a pass over the features (math.md, eq. 10, 11, 13).

With Q = e^{2q}, K = e^{2k} and s = 1 / (1 + Q K): t = 1 - 2 s and 1 - t^2 = 4 (s - s^2), which all
three gradients share. A program takes a tile of rows and of features, and a range of keys. It
accumulates its dq and dw in registers. It sums its share of dk over its rows, in a thread and then
across lanes, and stores it: ``key_sum_kernel`` adds up the tiles. Nothing is atomic, every sum has
a fixed order, and results repeat bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.block_forms import forms_of_block
from additive_attn.backends.triton.feature_loop import APART, first_key, quick_loop, store_sum
from additive_attn.backends.triton.gradient_sums import task
from additive_attn.backends.triton.halves import (
    added,
    direct_pairs,
    energies,
    exponentials,
    fractions,
    of_rows,
    prepared,
    raw,
    repeated,
    rows_last,
    slope,
    weighted,
)
from additive_attn.backends.triton.numerics import number, slices
from additive_attn.backends.triton.prepare_rows import SAFE


@triton.jit
def _rare_loop(
    K_place, g_place, dk_place, q_rows, k_rows, query_row, query_h, key_row, key_h, sizes_i,
    sizes_j, h, f, stored, i0, last_row, last_key, hidden, begin, end, row_padded, opposite,
    RX: tl.constexpr, padded: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
    DK: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Computes keys [begin, end) where some pairs take the direct form, or all. Stores dk; returns
    dq and the sums of G t. dw is corrected for the rounding of Q and K at the end, from dq and dk.
    Direct pairs do not round these: their correction is subtracted here."""
    ACC: tl.constexpr = g_place.dtype.element_ty
    # As in ``_finish``: hoisted addresses of rare loops would take registers from the others.
    hidden = tl.maximum(hidden, -begin)
    last_row = tl.maximum(last_row, -begin)
    zeros = tl.zeros(f.shape, ACC)
    dq, dw = repeated(zeros, RX), zeros
    for c in range(begin, end):
        j1 = tl.minimum(c, last_key).to(tl.int64)
        k = raw(k_rows + j1 * key_row, h, hidden, key_h, ACC)
        if not WIDE:
            K = prepared(K_place + tl.cast(c, tl.int64) * padded, f, padded, TILE)
            size_j = tl.load(sizes_j + j1)
            _K, K_error = exponentials(k, size_j > SAFE)
        dk = zeros
        share = zeros
        for x in range(RX):
            g = tl.load(g_place + tl.cast(c // 4, tl.int64) * (4 * row_padded) + (4 * x + c % 4))
            g = g[:, :, :, None]
            i = tl.minimum(i0 + x, last_row).to(tl.int64)
            q = raw(q_rows + i * query_row, h, hidden, query_h, ACC)
            slopes, terms = direct_pairs(q, k, g, TARGET)
            if not WIDE:
                # Pairs in range give the same bits as without such a row or key.
                size_i = tl.load(sizes_i + i)[:, :, :, None]
                direct = opposite | (tl.maximum(size_i, size_j) > SAFE)
                Q, Q_error = exponentials(q, size_i > SAFE)
                s = fractions(Q, K, False, TARGET)
                s = tl.where(c % 4 < APART, fractions(Q, K, True, TARGET), s)
                t = energies(Q, K, s, TARGET)
                terms -= 2.0 * slopes * (K_error + Q_error)
                terms = tl.where(direct, terms, g * t)
                v = slope(s)
            share += terms
            sums = ()
            for y in tl.static_range(RX):
                of_row = dq[y]
                if WIDE:
                    of_row = tl.where(x == y, of_row + slopes, of_row)
                else:
                    more = tl.where(direct, of_row + slopes, of_row + g * v)
                    of_row = tl.where(x == y, more, of_row)
                sums = sums + (of_row,)
            dq = sums
            if WIDE:
                dk += slopes
            else:
                dk = tl.where(direct, dk + slopes, dk + g * v)
        dw += share
        if DK:
            store_sum(dk_place + tl.cast(c, tl.int64) * padded, dk, stored)
    return dq, dw


@triton.jit
def _store_zeros(to, stored, begin, end, padded: tl.constexpr):
    """Stores zeros for keys that no row of the tile attends to, if their gradient is needed."""
    if to is not None:
        zeros = tl.zeros(stored.shape, to.dtype.element_ty)
        to += tl.cast(begin, tl.int64) * padded
        for _ in range(begin, end):
            tl.store(to, zeros, mask=stored)
            to += padded


@triton.jit
def _places(h0, row0, RX: tl.constexpr, TX: tl.constexpr, TW: tl.constexpr, TF: tl.constexpr):
    """Returns the first feature of each thread, both features, and its first row, [TW, TX, TF]."""
    zeros = tl.zeros([TW, TX, TF], tl.int32)
    h = h0 + 2 * TF * tl.arange(0, TW)[:, None, None] + 2 * tl.arange(0, TF)[None, None, :]
    h += zeros
    r0 = row0 + RX * tl.arange(0, TX)[None, :, None] + zeros
    return h, h[:, :, :, None] + tl.arange(0, 2), r0


@triton.jit
def _finish(
    dq, dw, q_rows, query_row, query_h, sizes_i, weight, weight_h, grad_query, weight_sums,
    h, f, stored, r0, row_begin, rows, row_count, stride, hidden, scale_bits,
    RX: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Stores dq and the sums of dw. ``rows`` and ``hidden`` are such that the compiler cannot
    prove that what is loaded again has the same addresses: it would keep these in registers
    through the loop."""
    ACC: tl.constexpr = dw.dtype
    scale = number(scale_bits).to(ACC)
    w = raw(weight, h, hidden, weight_h, ACC)
    # All rows at once, [TW, TX, TF, 2, RX]: the compiler takes seconds for each further access.
    dq = of_rows(dq, RX)
    h4, r = h[:, :, :, None], r0[:, :, :, None] + tl.arange(0, RX)
    if weight_sums is not None and not WIDE:
        # Corrects for the rounding of Q, the same for all keys of a row: + (1 - t^2) / 2 per unit.
        i = tl.minimum(row_begin + r, rows - 1).to(tl.int64)
        q = rows_last(raw(q_rows + i * query_row, h4, hidden, query_h, ACC))
        _e, error = exponentials(q, (tl.load(sizes_i + i) > SAFE)[:, :, :, None, :])
        dw += tl.sum(2.0 * dq * error, 4)
    if grad_query is not None:
        to = grad_query[:, :, :, None] + tl.arange(0, RX) * stride
        inside = r < row_count
        x = weighted(dq, w[:, :, :, :, None], scale)
        xa, xb = tl.split(rows_last(x))
        tl.store(to, xa, mask=inside & (h4 < hidden))
        tl.store(to + 1, xb, mask=inside & (h4 + 1 < hidden))
    if weight_sums is not None:
        store_sum(weight_sums, dw * scale, stored & (f < hidden))


@triton.jit
def feature_tile(
    program, query, key, query_outer, query_inner, query_row, query_h,
    key_outer, key_inner, key_row, key_h,
    query_rows, key_rows, query_exp_outer, query_exp_inner, key_exp_outer, key_exp_inner,
    weight, weight_outer, weight_inner, weight_h, gradient, flags,
    grad_query, key_sums, weight_sums, inner, entries, entry_begin, rows, row_begin, row_count,
    row_padded, keys, key_begin, key_count, key_padded, hidden, left, right, scale_bits, splits,
    keys_per_split,
    RX: tl.constexpr, TX: tl.constexpr, TW: tl.constexpr, TF: tl.constexpr, BLOCK: tl.constexpr,
    padded: tl.constexpr, FLAG_ROWS: tl.constexpr, FLAG_KEYS: tl.constexpr, MOST: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Computes a tile of rows and 2 TW TF features over a range of keys, and returns its end.
    Stores dq, [split][entry][row]; sums over the rows, which ``key_sums`` weighs to dk, [row
    tile][entry][key], padded; and dw in ``weight_sums`` [split][row tile][entry]. ``flags``:
    ``Flags``."""
    ACC: tl.constexpr = gradient.dtype.element_ty
    BX: tl.constexpr = RX * TX
    TILE: tl.constexpr = 2 * TW * TF
    WIDE: tl.constexpr = query_rows is None
    DQ: tl.constexpr = grad_query is not None
    DK: tl.constexpr = key_sums is not None
    DW: tl.constexpr = weight_sums is not None
    tile_count = tl.cdiv(row_count, BX)
    tile, part, split, n = task(program, tile_count, tl.cdiv(padded, TILE), splits)
    h0, row0 = part * TILE, tile * BX
    n, o, m = batch_entry(entry_begin + n, inner)
    entry = n - entry_begin
    zeros = tl.zeros([TW, TX, TF, 2], ACC)
    h, f, r0 = _places(h0, row0, RX, TX, TW, TF)
    q_rows = query + o * query_outer + m * query_inner
    k_rows = key + o * key_outer + m * key_inner + key_begin.to(tl.int64) * key_row
    gradient += entry * row_padded * key_padded + 4 * row0
    g_place = gradient + 4 * (r0 - row0)
    stored = (tl.arange(0, TX)[None, :, None, None] == 0) & (f < padded)
    dk_place, K_place, sizes_i, sizes_j = None, None, None, None
    if DK:
        dk_place = key_sums + (tile * entries + entry) * (tl.cdiv(key_count, 8) * 8) * padded + f
        dk_place += first_key(TX) * padded
    first = tl.maximum(row_begin + row0 - left, key_begin) - key_begin
    last = tl.minimum(row_begin + row0 + BX + right, key_begin + key_count) - key_begin
    begin = split * keys_per_split
    limit = tl.minimum(begin + keys_per_split, key_count)
    first = tl.minimum(tl.maximum(first // BLOCK * BLOCK, begin), limit)
    last = tl.maximum(tl.minimum(last, limit), first)
    Q = ()
    dq, dw, last_key = repeated(zeros, RX), zeros, keys - 1 - key_begin
    if not WIDE:
        sizes_i = query_rows.size + o * query_exp_outer + m * query_exp_inner
        at_key = o * key_exp_outer + m * key_exp_inner + key_begin
        sizes_j, K_place = key_rows.size + at_key, key_rows.exponential + at_key * padded + f
        i = tl.minimum(row_begin + r0[:, :, :, None] + tl.arange(0, RX), rows - 1).to(tl.int64)
        q = rows_last(raw(q_rows + i * query_row, h[:, :, :, None], hidden, query_h, ACC))
        e, _error = exponentials(q, (tl.load(sizes_i + i) > SAFE)[:, :, :, None, :])
        Q = slices(e, RX)
        row = tl.arange(0, BX)[None, :]
        size_i = tl.load(sizes_i + tl.minimum(row_begin + row0 + row, rows - 1))
        at_rows = 4 * row[:, :, None] + tl.arange(0, 4)[None, None, :]
        FLAGS: tl.constexpr = max(BX // FLAG_ROWS, 1)
        tl.static_assert(FLAGS * FLAG_ROWS % BX == 0 and FLAG_KEYS % BLOCK == 0)
        flag_stride = tl.cdiv(key_count, FLAG_KEYS)
        flag_count, flag_row = tl.cdiv(row_count, FLAG_ROWS), row0 // FLAG_ROWS
        flags += (entry * flag_count + flag_row) * flag_stride
    _store_zeros(dk_place, stored, begin, first, padded)
    _store_zeros(dk_place, stored, last, limit, padded)

    end = first
    for k0 in range(first, last, BLOCK):
        end = tl.minimum(k0 + BLOCK, last)
        if WIDE:
            block_dq, block_dw = _rare_loop(
                K_place, g_place, dk_place, q_rows, k_rows, query_row, query_h, key_row, key_h,
                sizes_i, sizes_j, h, f, stored, row_begin + r0, rows - 1, last_key, hidden,
                k0, end, row_padded, False, RX, padded, TILE, True, DK, TARGET,
            )  # fmt: skip
        else:
            # ``again`` hides that loops use the same addresses: shared ones would take registers
            # there.
            again = tl.multiple_of(tl.maximum(row_padded, -k0), 16)
            fours = (k0 // 4 + tl.arange(0, BLOCK // 4)).to(tl.int64)[:, None, None]
            G_place = gradient + fours * (4 * again) + at_rows
            G = tl.load(G_place)
            direct, opposite, small, skipped = forms_of_block(
                G, G_place, size_i, sizes_j, k0, last_key, flags + k0 // FLAG_KEYS, flag_stride,
                flag_count - flag_row, FLAGS,
            )  # fmt: skip
            total = tl.sum(tl.sum(G, 2)) / TX + zeros
            if skipped:
                block_dq, block_dw = repeated(zeros, RX), zeros
                _store_zeros(dk_place, stored, k0, end, padded)
            elif direct | opposite:
                block_dq, block_dw = _rare_loop(
                    K_place, g_place, dk_place, q_rows, k_rows, query_row, query_h, key_row,
                    key_h, sizes_i, sizes_j, h, f, stored, row_begin + r0, rows - 1, last_key,
                    hidden, k0, end, row_padded, opposite, RX, padded, TILE, False, DK, TARGET,
                )  # fmt: skip
            else:
                block_dq, block_dw = quick_loop(
                    Q, K_place, g_place, dk_place, f, f < padded, k0, end, row_padded, total,
                    small, RX, padded, TILE, MOST, DQ or DW, DK, DW, TARGET,
                )  # fmt: skip
        # Adds block by block: many equal terms, one by one, would all be rounded the same way.
        dq = added(dq, block_dq, RX)
        dw += block_dw

    # Computes these again, as in ``_finish``.
    h, f, r0 = _places(tl.maximum(h0, -end), tl.maximum(row0, -end), RX, TX, TW, TF)
    if DW:
        weight_sums += ((split * tile_count + tile) * entries + entry) * hidden + f
    if DQ:
        grad_query += ((split * entries + entry) * row_count + r0) * hidden + h
    weight += o * weight_outer + m * weight_inner
    _finish(
        dq, dw, q_rows, query_row, query_h, sizes_i, weight, weight_h, grad_query,
        weight_sums, h, f, stored, r0, row_begin, tl.maximum(rows, -end), row_count, hidden,
        tl.maximum(hidden, -end), scale_bits, RX, WIDE, TARGET,
    )  # fmt: skip
    return end
