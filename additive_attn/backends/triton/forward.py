"""The operators ``additive_attn::forward`` and ``scores`` on a GPU.

Several queries per entry take one pass over the keys (``one_pass.py``), a single one takes another
(``decode_forward.py``). ``scores`` computes a bounded number of scores at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from additive_attn.backends.triton import decode_forward
from additive_attn.backends.triton.arguments import Problem
from additive_attn.backends.triton.launch import matmul_precision, target
from additive_attn.backends.triton.one_pass import attend
from additive_attn.backends.triton.score_tiles import tile_scores
from additive_attn.spec.call import Call, call_of_scores


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, need_weights = Call(*arguments[:14]), arguments[14]
    p = Problem(call, quads=True)
    if p.entries == 0 or p.rows == 0 or p.keys == 0:
        return empty_rows(p, need_weights)
    if p.rows == 1:
        return decode_forward.decode_forward(p, need_weights)
    return attend(p, need_weights)


def empty_rows(p: Problem, need_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the results of a call without keys, or without rows."""
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
    """Returns scores as users get them: -inf also where an attended one overflowed
    (``masks.stored``)."""
    lowest = torch.finfo(scores.dtype).min
    return torch.threshold(scores, lowest, -torch.inf).to(p.dtype)


def precision(p: Problem) -> str:
    """Returns the precision of products. TF32 holds 16-bit numbers exactly; for float32 the user
    decides."""
    if target() == "hip":
        return "ieee"
    allowed = matmul_precision() == "tf32"
    return "tf32" if p.dtype in (torch.float16, torch.bfloat16) or allowed else "ieee"
