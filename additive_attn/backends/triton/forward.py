"""The operators ``additive_attn::forward`` and ``scores`` on a GPU.

A bounded number of scores at a time, so few that they stay in the second-level cache: the scores
of all pairs, a tile per program; the log-sum-exp of each row; the weighted sum of the values, the
keys split over programs where rows alone would not fill the machine. So the score kernel has all
registers to itself: with the accumulators of an online softmax beside its tiles it spilled, or
spent more instructions per tanh, in every shape that was tried. One query per entry has kernels of
its own (``decode_forward.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from additive_attn.backends.triton import decode_forward, tiles
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.launch import launch, matmul_precision, target
from additive_attn.backends.triton.plan import splits
from additive_attn.backends.triton.score_tiles import tile_scores
from additive_attn.backends.triton.softmax_values import lse_kernel, value_kernel
from additive_attn.spec.call import Call, call_of_scores


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, need_weights = Call(*arguments[:14]), arguments[14]
    query, p = call.query, Problem(call, quads=True)
    shape = (*p.batch.shape, p.rows)
    if p.entries == 0 or p.rows == 0 or p.keys == 0:
        return empty_rows(p, need_weights)
    if p.rows == 1:
        return decode_forward.decode_forward(p, need_weights)
    weights = query.new_zeros((*shape, p.keys) if need_weights else (0,))
    lse = query.new_empty(shape, dtype=p.accumulator)
    tile = tiles.value_tile(p.rows, p.wide)
    out = query.new_empty((*shape, p.values))
    flat = out.view(p.entries, p.rows, p.values)
    for piece in p.pieces():
        entry, entries, row, rows = piece
        begin, end = p.key_range(piece)
        count = end - begin
        scores = tile_scores(p, piece, begin, count)
        tops, inverses = lse.new_empty(2, entries * rows)
        launch(
            lse_kernel, entries * rows, scores,
            scores, lse, tops, inverses, weights if need_weights else None, entry, p.rows, row,
            rows, p.keys, begin, count, scores.shape[-1], **tiles.row_block(count),
        )  # fmt: skip
        programs = entries * -(-rows // tile["BM"]) * -(-p.values // tile["BD"])
        ranges, per_range = splits(programs, count, tile["BN"], p.processors)
        # Consecutive in memory: some rows of one entry, or all rows of some entries.
        part = flat[entry : entry + entries, row : row + rows]
        parts = part if ranges == 1 else scores.new_empty(ranges, *part.shape)
        launch(
            value_kernel, programs * ranges, scores,
            scores, tops, inverses, p.value, *p.value_strides, *p.dropout_arguments(),
            parts, p.batch.inner, entries, entry, row, rows, begin, count,
            scores.shape[-1], p.values, p.left, p.right, ranges, per_range,
            SPARSE=p.block_tiles is not None, PRECISION=precision(p), **tile,
        )  # fmt: skip
        if ranges > 1:
            part.copy_(parts.sum(0))
        del scores  # before the next ones are allocated
    return out, weights, lse


def empty_rows(p: Problem, need_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of a call without keys, or without rows."""
    shape = (*p.batch.shape, p.rows)
    weights = torch.zeros(
        (*shape, p.keys) if need_weights else (0,), dtype=p.dtype, device=p.device
    )
    lse = torch.full(shape, -torch.inf, dtype=p.accumulator, device=p.device)
    return weights.new_zeros((*shape, p.values)), weights, lse


def scores(*arguments: Any) -> Tensor:
    p = Problem(call_of_scores(*arguments), quads=True)
    shape = (*p.batch.shape, p.rows, p.keys)
    if p.rows == 1 and p.keys and p.entries:
        return unstored(decode_forward.decode_scores(p), p)
    result = torch.full(shape, -torch.inf, dtype=p.dtype, device=p.device)
    flat = result.view(p.entries, p.rows, p.keys)
    for piece in p.pieces() if p.rows and p.keys else ():
        entry, entries, row, rows = piece
        begin, end = p.key_range(piece)
        if begin < end:
            part = tile_scores(p, piece, begin, end - begin)[..., : end - begin]
            flat[entry : entry + entries, row : row + rows, begin:end] = unstored(part, p)
    return result


def unstored(scores: Tensor, p: Problem) -> Tensor:
    """Scores as users know them: -inf too where an attended one overflowed (``masks.stored``)."""
    lowest = torch.finfo(scores.dtype).min
    return torch.threshold(scores, lowest, -torch.inf).to(p.dtype)


def precision(p: Problem) -> str:
    """TF32 holds 16-bit numbers exactly; for float32 the user decides."""
    if target() == "hip":
        return "ieee"
    allowed = matmul_precision() == "tf32"
    return "tf32" if p.dtype in (torch.float16, torch.bfloat16) or allowed else "ieee"
