"""The operator ``additive_attn::forward`` on a GPU.

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
from additive_attn.backends.triton.launch import launch, target
from additive_attn.backends.triton.plan import splits
from additive_attn.backends.triton.score_tiles import tile_scores
from additive_attn.backends.triton.softmax_values import lse_kernel, value_kernel
from additive_attn.spec.call import Call


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, need_weights = Call(*arguments[:11]), arguments[11]
    query = call.inputs.query
    p = Problem(call)
    shape = (*p.batch.shape, p.rows)
    if p.entries == 0 or p.rows == 0 or p.keys == 0:
        weights = query.new_zeros((*shape, p.keys) if need_weights else (0,))
        lse = query.new_full(shape, -torch.inf, dtype=p.accumulator)
        return query.new_zeros((*shape, p.values)), weights, lse
    if p.rows == 1:
        return decode_forward.decode_forward(p, need_weights)
    weights = query.new_zeros((*shape, p.keys) if need_weights else (0,))
    lse = query.new_empty(shape, dtype=p.accumulator)
    tile = tiles.value_tile(p.rows, p.wide)
    out = query.new_empty((*shape, p.values))
    flat = out.view(p.entries, p.rows, p.values)
    for entry, entries, row, rows in p.pieces():
        begin, end = p.key_range(row, row + rows)
        count = end - begin
        scores = tile_scores(p, entry, entries, row, rows, begin, count)
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
            PRECISION=precision(p), **tile,
        )  # fmt: skip
        if ranges > 1:
            part.copy_(parts.sum(0))
        del scores  # before the next ones are allocated
    return out, weights, lse


def precision(p: Problem) -> str:
    """TF32 holds 16-bit numbers exactly; for float32 the user decides."""
    if target() == "hip":
        return "ieee"
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if p.dtype in (torch.float16, torch.bfloat16) or allowed else "ieee"
