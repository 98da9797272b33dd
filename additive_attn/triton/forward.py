"""The operator ``additive_attn::forward`` on a GPU.

A bounded number of scores at a time, so few that they stay in the second-level cache: the scores
of all pairs, a tile per program; the log-sum-exp of each row; the weighted sum of the values, the
keys split over programs where rows alone would not fill the machine. So the score kernel has all
registers to itself: with the accumulators of an online softmax beside its tiles it spilled, or
spent more instructions per tanh, in every shape that was tried."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.triton import configs
from additive_attn.triton.launch import launch, target
from additive_attn.triton.numerics import keep_factors
from additive_attn.triton.problem import Problem


@triton.jit
def shielded_product(p, v, used, acc, PRECISION: tl.constexpr):
    """acc + p @ v, in which a pair that is not ``used`` adds 0 whatever v holds."""
    finite = tl.abs(v) < float("inf")
    if tl.min(finite.to(tl.int32)) != 0:
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(p, tl.where(finite, v, 0.0), acc, input_precision=PRECISION)
        column = tl.arange(0, p.shape[1])
        for k in range(0, p.shape[1]):
            here = (column == k)[None, :]
            p_k = tl.sum(tl.where(here, p, 0.0), 1)
            used_k = tl.max((here & used).to(tl.int32), 1) != 0
            v_k = tl.sum(tl.where((column == k)[:, None] & (finite.to(tl.int32) == 0), v, 0.0), 0)
            acc += tl.where(used_k[:, None], p_k[:, None] * v_k[None, :], 0.0)
    return acc


@triton.jit(do_not_specialize=["rows", "row_begin", "row_count", "keys", "key_begin", "key_count"])
def _lse_kernel(
    scores, lse, weights, entry_begin, rows, row_begin, row_count, keys, key_begin, key_count,
    BLOCK: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of a row of scores, and its softmax if wanted."""
    program = tl.program_id(0).to(tl.int64)
    row = (entry_begin + program // row_count) * rows + row_begin + program % row_count
    j = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], float("-inf"), scores.dtype.element_ty)
    for key0 in range(0, key_count, BLOCK):
        x = tl.load(
            scores + program * key_count + key0 + j, mask=key0 + j < key_count, other=float("-inf")
        )
        maximum = tl.maximum(maximum, x)
    most = tl.max(maximum, 0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    sums = tl.zeros([BLOCK], scores.dtype.element_ty)
    for key0 in range(0, key_count, BLOCK):
        x = tl.load(
            scores + program * key_count + key0 + j, mask=key0 + j < key_count, other=float("-inf")
        )
        sums += tl.exp(x - shift)
    total = tl.sum(sums, 0)
    empty = total == 0.0
    tl.store(lse + row, tl.where(empty, float("-inf"), shift + tl.log(total)))
    if NEED_WEIGHTS:
        inverse = 1.0 / tl.where(empty, 1.0, total)
        for key0 in range(0, key_count, BLOCK):
            x = tl.load(
                scores + program * key_count + key0 + j,
                mask=key0 + j < key_count,
                other=float("-inf"),
            )
            p = tl.where(x == float("-inf"), 0.0, tl.exp(x - shift) * inverse)
            tl.store(
                weights + row * keys + key_begin + key0 + j, p.to(weights.dtype.element_ty),
                mask=key0 + j < key_count,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "rows",
        "row_begin",
        "row_count",
        "keys",
        "key_begin",
        "key_count",
        "keys_per_split",
    ]
)
def _value_kernel(
    scores, lse, value, value_outer, value_inner, value_row, value_column,
    seed, seed_outer, seed_inner, threshold, keep_scale,
    out, inner, entry_begin, entries, rows, row_begin, row_count, keys, key_begin, key_count,
    values, splits, keys_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split][entry][row] = sum_j exp(score_ij - lse_i) D_ij value_j over a range of keys."""
    row_tiles = tl.cdiv(row_count, BM)
    value_tiles = tl.cdiv(values, BD)
    program = tl.program_id(0).to(tl.int64)
    row0 = (program % row_tiles).to(tl.int32) * BM
    rest = program // row_tiles
    d = (rest % value_tiles).to(tl.int32) * BD + tl.arange(0, BD)
    split = rest // value_tiles % splits
    entry = rest // value_tiles // splits
    n = entry_begin + entry
    o = n // inner
    m = n % inner
    r = row0 + tl.arange(0, BM)
    base = tl.load(lse + n * rows + row_begin + r, mask=r < row_count, other=0.0)
    base = tl.where(base == float("-inf"), 0.0, base)
    begin = split.to(tl.int32) * keys_per_split
    acc = tl.zeros([BM, BD], scores.dtype.element_ty)
    for k0 in range(begin, tl.minimum(begin + keys_per_split, key_count), BN):
        c = k0 + tl.arange(0, BN)
        x = tl.load(
            scores + (entry * row_count + r)[:, None] * key_count + c[None, :],
            mask=(r < row_count)[:, None] & (c < key_count)[None, :], other=float("-inf"),
        )  # fmt: skip
        used = x != float("-inf")
        p = tl.where(used, tl.exp(x - base[:, None]), 0.0)
        if DROPOUT:
            word = tl.load(seed + o * seed_outer + m * seed_inner)
            p *= keep_factors(
                word, n, row_begin + r, key_begin + k0, threshold, keep_scale, BM, BN
            )
        j = key_begin + c
        place = value + o * value_outer + m * value_inner + j[:, None].to(tl.int64) * value_row
        v = tl.load(
            place + d[None, :].to(tl.int64) * value_column,
            mask=(c < key_count)[:, None] & (d < values)[None, :], other=0.0,
        ).to(acc.dtype)  # fmt: skip
        if BM == 1:
            shielded = tl.where(tl.reshape(used, [BN])[:, None], v, 0.0)
            acc += tl.sum(tl.reshape(p, [BN])[:, None] * shielded, 0)[None, :]
        else:
            acc = shielded_product(p, v, used, acc, PRECISION)
    row = (split * entries + n) * rows + row_begin + r
    tl.store(
        out + row[:, None] * values + d[None, :], acc.to(out.dtype.element_ty),
        mask=(r < row_count)[:, None] & (d < values)[None, :],
    )  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    p = Problem(query, key, value, weight, attn_mask, lengths, seed, left, right, dropout_p, scale)
    shape = (*p.batch.shape, p.rows)
    lse = query.new_empty(shape, dtype=p.accumulator)
    weights = query.new_zeros((*shape, p.keys) if need_weights else (0,))
    if lse.numel() == 0 or p.keys == 0:
        return query.new_zeros((*shape, p.values)), weights, lse.fill_(-torch.inf)
    single = p.rows == 1 or p.wide
    BM, BN, BD = (1, 32, 64) if single else (16, 32, 64)
    out = None
    chunks = p.chunks()
    for entry, entries, row, rows in chunks:
        begin, end = p.key_range(row, row + rows)
        count = end - begin
        scores = p.scores(entry, entries, row, rows, begin, count)
        launch(
            _lse_kernel, entries * rows, scores,
            scores, lse, weights, entry, p.rows, row, rows, p.keys, begin, count,
            BLOCK=256, NEED_WEIGHTS=need_weights, num_warps=2,
        )  # fmt: skip
        programs = entries * -(-rows // BM) * -(-p.values // BD)
        splits = 1
        if len(chunks) == 1:
            splits = configs.splits(programs, count, BN, processors(p.device))
        per_split = -(-count // (splits * BN)) * BN
        splits = max(1, -(-count // max(1, per_split)))
        if out is None:
            out = torch.empty(
                (splits, *shape, p.values), device=p.device,
                dtype=p.dtype if splits == 1 else p.accumulator,
            )  # fmt: skip
        launch(
            _value_kernel, programs * splits, scores,
            scores, lse, p.value, *p.value.stride(), *p.dropout_arguments(),
            out, p.batch.inner, entry, p.entries, p.rows, row, rows, p.keys, begin, count,
            p.values, splits, per_split, BM=BM, BN=BN, BD=BD, DROPOUT=p.seed is not None,
            PRECISION=precision(p), num_warps=4,
        )  # fmt: skip
    assert out is not None
    return (out[0] if len(out) == 1 else out.sum(0).to(p.dtype)), weights, lse


def precision(p: Problem) -> str:
    """TF32 holds 16-bit numbers exactly; for float32 the user decides."""
    if target() == "hip":
        return "ieee"
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if p.dtype in (torch.float16, torch.bfloat16) or allowed else "ieee"


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
