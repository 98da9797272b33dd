"""The operators ``additive_attn::backward`` and ``scores_backward`` on a GPU, in the notation of
math.md, eq. 9 to 12.

G of a bounded number of rows is stored at a time: ``backward`` computes scores again, and from
them G of each row; ``scores_backward`` is given G. Kernels compute the gradients of query, key and
weight from G. Those of the mask, and in large calls of the values, are sums of torch."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.decode_backward import Rows, decode_gradients, decode_rows
from additive_attn.backends.triton.feature_pass import (
    FeaturePlan,
    FeatureSums,
    Finish,
    feature_pass,
    feature_plan,
    small_plan,
)
from additive_attn.backends.triton.key_sums import key_sum_kernel
from additive_attn.backends.triton.launch import launch
from additive_attn.backends.triton.opposite import Flags, opposite_tiles
from additive_attn.backends.triton.plan import Piece
from additive_attn.backends.triton.row_gradient import given_kernel, row_gradients
from additive_attn.backends.triton.row_pass import row_pass
from additive_attn.backends.triton.score_tiles import flagged_scores
from additive_attn.spec.call import Needs, Upstream, backward_arguments, call_of_scores


class Gradients(NamedTuple):
    """The gradients of all entries, which pieces store or add to; None where not needed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    weight: Tensor | None
    mask: Tensor | None
    added: bool  # whether pieces add to zeros: they share keys, or leave some out
    small: FeaturePlan | None  # of a single piece, where one kernel computes all from G


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _small(p: Problem, pieces: list[Piece]) -> FeaturePlan | None:
    if p.wide or p.hidden == 0 or len(pieces) != 1 or p.key_range(pieces[0]) != (0, p.keys):
        return None
    return small_plan(p)


def _gradients(p: Problem, needs: Needs, pieces: list[Piece], upstream: Upstream) -> Gradients:
    """Allocates the gradients. A tensor that a piece stores as a whole is not filled, and one that
    it stores in the final dtype is not converted: either would take a launch, as long as
    everything else in a small call."""
    ranges = [p.key_range(piece) for piece in pieces]
    added = not pieces or pieces[0].rows < p.rows or ranges[0] != (0, p.keys)
    no_keys = not pieces or any(begin == end for begin, end in ranges)

    def result(needed: bool, filled: bool, dtype: torch.dtype, *shape: int) -> Tensor | None:
        if not needed:
            return None
        make = torch.zeros if filled else torch.empty
        return make(shape, dtype=dtype, device=p.device)

    n, dtype, accumulator, small = p.entries, p.dtype, p.accumulator, _small(p, pieces)
    dtype_of_sums = accumulator if added else dtype
    return Gradients(
        query=result(needs.query, no_keys, dtype, n, p.rows, p.hidden),
        key=result(needs.key, added, dtype_of_sums, n, p.keys, p.hidden),
        value=result(
            needs.value, added or upstream.out is None, accumulator if small is None else dtype,
            n, p.keys, p.values,
        ),
        weight=result(needs.weight, added, accumulator, n, p.hidden),
        mask=result(
            needs.mask, True, accumulator, *(() if p.float_mask is None else p.float_mask.shape)
        ),
        added=added,
        small=small,
    )  # fmt: skip


def _results(p: Problem, sums: Gradients) -> Results:
    def result(x: Tensor | None, dtype: torch.dtype) -> Tensor:
        if x is None:
            return torch.empty(0, dtype=dtype, device=p.device)
        return x.to(dtype).view(*p.batch.shape, *x.shape[1:])

    query, key, value = (result(x, p.dtype) for x in sums[:3])
    return query, key, value, result(sums.weight, p.accumulator), _mask_result(p, sums.mask)


def _mask_result(p: Problem, mask: Tensor | None) -> Tensor:
    if mask is None or p.float_mask is None:
        return torch.empty(0, dtype=p.dtype, device=p.device)
    return mask.to(p.float_mask.dtype)


def backward(*arguments: Any) -> Results:
    upstream, call, lse, needs = backward_arguments(arguments)
    p, lse = Problem(call, exponential=True, quads=True), lse.contiguous()
    p.check_outputs(**upstream.named(), lse=lse)
    needs = needs._replace(mask=needs.mask and p.float_mask is not None)
    if p.entries and p.rows == 1 and p.keys:
        rows = decode_rows(p, lse, upstream)
        gradient = torch.empty_like(rows.probabilities) if needs.mask else None
        return _decode_results(p, rows, needs, gradient, upstream)
    pieces = _pieces(p)
    sums = _gradients(p, needs, pieces, upstream)
    if sums.small is not None:
        _add_small(p, pieces[0], lse, upstream, sums)
    elif pieces:
        grad_out = None if upstream.out is None else _entries(upstream.out, p, 2)
        upstream, values = upstream._replace(out=grad_out), _entries(call.value, p, 2)
        with torch._C._DisableAutocast():  # products would be rounded to 16 bits
            for piece in pieces:
                _add_piece(p, piece, lse, values, upstream, sums)
    return _results(p, sums)


def _pieces(p: Problem) -> list[Piece]:
    if not (p.entries and p.rows and p.keys):
        return []
    return p.pieces(tiles.gradient_block(p.rows), p.padded if p.hidden else 0)


def scores_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = call_of_scores(*arguments[1:12])
    grad_scores, p = arguments[0], Problem(call, exponential=True)
    p.check_outputs(grad_scores=grad_scores)
    need_query, need_key, need_weight, need_mask = arguments[12:]
    need_mask = need_mask and p.float_mask is not None
    needs = Needs(need_query, need_key, False, need_weight, need_mask)
    if p.entries and p.rows == 1 and p.keys:
        gradient = grad_scores.new_empty((p.entries, 1, p.keys), dtype=p.accumulator)
        _given(p, Piece(0, p.entries, 0, 1), grad_scores, gradient, 1, p.keys)
        results = _decode_results(p, Rows(gradient), needs, gradient, Upstream())
    else:
        pieces = _pieces(p)
        sums = _gradients(p, needs, pieces, Upstream())
        for piece in pieces:
            key, end = p.key_range(piece)
            if key < end:
                gradient = _fours(p, piece, end - key)
                rows, keys = gradient.shape[2], 4 * gradient.shape[1]
                _given(p, piece, grad_scores, gradient, rows, keys)
                flags = None if p.wide else opposite_tiles(p, piece, key, end - key)
                _add_from_scores(p, piece, gradient, flags, sums)
        results = _results(p, sums)
    return (*results[:2], *results[3:])


def _decode_results(
    p: Problem, rows: Rows, needs: Needs, gradient: Tensor | None, upstream: Upstream
) -> Results:
    """Returns the gradients for one query per entry. G is the mask's gradient before it is
    summed."""
    written = None if rows.products is None else gradient
    gradients = decode_gradients(p, rows, needs, upstream, written)
    mask = None
    if needs.mask and gradient is not None and p.float_mask is not None:
        mask = torch.zeros(p.float_mask.shape, dtype=p.accumulator, device=p.device)
        _add_mask(p, gradient, 0, 0, 0, mask)
    return (*gradients, _mask_result(p, mask))


def _entries(x: Tensor, p: Problem, rank: int) -> Tensor:
    """Returns ``x`` as (entries, ...) in the computing dtype, contiguous: the rounding of matmul
    depends on that."""
    x = p.batch.view(x, rank)
    return x.to(p.accumulator).reshape(p.entries, *x.shape[2:]).contiguous()


def _fours(p: Problem, piece: Piece, keys: int) -> Tensor:
    """Allocates G of a piece, (entries, keys / 4, rows, 4), padded to whole blocks, since the pass
    over features reads whole blocks. A thread reads four keys of several rows at once."""
    row_block, key_block = tiles.gradient_block(piece.rows), tiles.gradient_block(keys)
    rows, keys = -(-piece.rows // row_block) * row_block, -(-keys // key_block) * key_block
    return torch.empty(piece.entries, keys // 4, rows, 4, dtype=p.accumulator, device=p.device)


def _given(
    p: Problem, piece: Piece, grad_scores: Tensor, gradient: Tensor, padded_rows: int,
    padded_keys: int,
) -> None:  # fmt: skip
    """Fills G of a piece from the gradient of the scores."""
    entry, entries, row, rows = piece
    key, end = p.key_range(piece)
    launch(
        given_kernel, entries * padded_rows, gradient,
        *p.batched(grad_scores, 2), *p.mask_arguments(), *p.length_arguments(), gradient,
        p.batch.inner, entry, p.rows, row, rows, padded_rows, p.keys, key, padded_keys,
        p.left, p.right, **tiles.row_block(end - key),
    )  # fmt: skip


def _add_small(p: Problem, piece: Piece, lse: Tensor, upstream: Upstream, sums: Gradients) -> None:
    """Fills all gradients of a small call, without operations of torch where dO is given."""
    out, gradient = upstream.out, _fours(p, piece, p.keys)
    flags: Flags | None
    if out is not None:
        scores, flags = row_pass(p, lse, upstream, gradient)
    else:
        scores, flags = flagged_scores(p, piece, 0, p.keys)
        products = scores.new_zeros(p.entries, p.rows, p.keys)
        row_gradients(p, piece, lse, upstream, scores, products, gradient)
    of_value = None if out is None else (scores, out)
    _add_from_scores(p, piece, gradient, flags, sums, of_value)


def _add_piece(
    p: Problem, piece: Piece, lse: Tensor, values: Tensor, upstream: Upstream, sums: Gradients
) -> None:
    """Adds the share of a piece to all gradients."""
    entry, entries, row, rows = piece
    key, end = p.key_range(piece)
    count = end - key
    if count <= 0:
        return
    of_entries, of_keys = slice(entry, entry + entries), slice(key, end)
    scores, flags = flagged_scores(p, piece, key, count)
    if upstream.out is None:
        products = scores.new_zeros(entries, rows, count)
    else:
        grad_out = upstream.out[of_entries, row : row + rows]
        products = grad_out @ values[of_entries, of_keys].mT
    gradient = _fours(p, piece, count)
    row_gradients(p, piece, lse, upstream, scores, products, gradient)
    if sums.value is not None and upstream.out is not None:
        total, factor = sums.value[of_entries, of_keys], scores[..., :count].mT
        if sums.added:
            total.baddbmm_(factor, grad_out)
        else:
            torch.bmm(factor, grad_out, out=total)
    _add_from_scores(p, piece, gradient, flags, sums)


def _add_from_scores(
    p: Problem, piece: Piece, gradient: Tensor, flags: Flags | None, sums: Gradients,
    of_value: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Adds what is computed from the padded G of a piece: the gradients of mask, query, key and
    weight; in a small call that of the value too, from P o D and dO."""
    entry, _, row, rows = piece
    key, end = p.key_range(piece)
    count = end - key
    if sums.mask is not None:
        of_rows = gradient.permute(0, 2, 1, 3).flatten(2)
        _add_mask(p, of_rows[:, :rows, :count], entry, row, key, sums.mask)
    if p.hidden == 0:
        return
    if sums.small is not None:
        scores, grad_out = of_value or (None, None)
        finish = Finish(sums.key, sums.weight, sums.value, scores, grad_out)
        need_weight = sums.weight is not None
        feature_pass(
            p, sums.small, piece, gradient, flags, sums.query, sums.key is not None or need_weight,
            need_weight, finish=finish,
        )  # fmt: skip
    elif sums.query is not None or sums.key is not None or sums.weight is not None:
        _add_features(p, piece, gradient, flags, sums)


def _add_features(
    p: Problem, piece: Piece, gradient: Tensor, flags: Flags | None, sums: Gradients
) -> None:
    """Adds the gradients of query, key and weight."""
    entry, entries, row, rows = piece
    key, end = p.key_range(piece)
    most = 255 if p.wide else tiles.GRADIENT_REGISTERS
    plan = feature_plan(p, entries, rows, end - key, most)
    query = None
    if sums.query is not None:
        query = sums.query[entry : entry + entries, row : row + rows]
    # dw is corrected for the rounding of the keys' exponentials, from the sums of dk.
    corrected = sums.weight is not None and not p.wide
    blocks = 0
    if corrected:
        count = end - key
        blocks = -(-count // tiles.key_sum_tile(count, plan.row_tiles, p.padded)["BLOCK"])
    parts = feature_pass(
        p, plan, piece, gradient, flags, query, sums.key is not None or corrected,
        sums.weight is not None, blocks,
    )  # fmt: skip
    if parts.query is not None and query is not None and plan.ranges > 1:
        _total(parts.query, query)
    _add_key_sums(p, piece, plan, parts, sums)


def _add_key_sums(
    p: Problem, piece: Piece, plan: FeaturePlan, parts: FeatureSums, sums: Gradients
) -> None:
    """Adds the gradients of key and weight."""
    entry, entries = piece[:2]
    row_tiles, ranges, key_sums, weight_sums = plan.row_tiles, plan.ranges, parts.key, parts.weight
    key, end = p.key_range(piece)
    count = end - key
    of_entries = slice(entry, entry + entries)
    sum_tile = tiles.key_sum_tile(count, row_tiles, p.padded)
    shares, blocks = ranges * row_tiles, -(-count // sum_tile["BLOCK"])
    corrected = sums.weight is not None and not p.wide
    weight = None if sums.weight is None else sums.weight[of_entries]
    whole = corrected and blocks == 1 and shares <= 32 and not sums.added
    if key_sums is not None:
        of_key = None if sums.key is None else sums.key[of_entries, key:end]
        if of_key is not None and sums.added:
            of_key = key_sums.new_empty(of_key.shape)
        of_weight = None
        if corrected and weight_sums is not None:
            of_weight = weight if whole else weight_sums[shares:]
        _, key_rows, _, _, *key_strides = p.prepared_rows_arguments()
        launch(
            key_sum_kernel, entries * blocks * -(-p.hidden // sum_tile["FEATURES"]), key_sums,
            p.key, *p.key_strides, key_rows, *key_strides, p.weight, *p.weight_strides,
            key_sums, weight_sums if whole else None, of_key, of_weight,
            p.batch.inner, entries, entry, row_tiles, key, count, p.keys, p.hidden, p.padded,
            p.scale_bits, shares, **sum_tile,
        )  # fmt: skip
        if of_key is not None and sums.key is not None and sums.added:
            sums.key[of_entries, key:end].add_(of_key)
    if weight is not None and weight_sums is not None and not whole:
        if sums.added:
            weight.add_(weight_sums.sum(0))
        else:
            torch.sum(weight_sums, 0, out=weight)


def _total(parts: Tensor, out: Tensor) -> None:
    """Stores the sum of parts in ``out``, rounded once."""
    if out.dtype == parts.dtype:
        torch.sum(parts, 0, out=out)
    else:
        out.copy_(parts.sum(0))


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
    # Entries of a piece are consecutive, not always whole batch dims.
    target = target.expand(*p.batch.shape, *tail)
    indices = itertools.product(*map(range, p.batch.shape))
    for index, share in zip(itertools.islice(indices, entry, None), gradient, strict=False):
        target[index] += share
