"""What the score kernels read: exponentials, once per query and key, and weights scaled by a power
of two so that abs(w) < 2.

With a = e^{-2q} and b = e^{2k} a pair (i, j) costs one addition per feature and a share of one
reciprocal (math.md, eq. 3, 4). Both are rounded. To first order, with the relative roundings rho,

    tanh(q + k) = t + (1 - t^2) / 2 (rho_b - rho_a)

which shows where t is small: there 1 - t^2 is near 1, and one correction per row and one per key
take it out of the scores (math.md, eq. 8). From the gradient of the weight, where the roundings of
a row or a key add up over all its pairs, they are always taken out.

All t of a tile are small where all |q|, |k| <= 1, and where queries and keys are opposite: q near
c and k near -c in every feature. ``projections`` tell without a look at the features: of opposite
rows they are opposite too, and of others most unlikely so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton.batch import BatchShape, batch_entry
from additive_attn.backends.triton.launch import bits, kernel, launch
from additive_attn.backends.triton.numerics import exp_with_error, number
from additive_attn.backends.triton.tiles import power_of_two

SAFE = tl.constexpr(10.0)  # (e^{2 SAFE} + e^{2 SAFE})^4 < 2^120
DIFFERENCE_MAX_FEATURES = 64  # up to so many the plain layer rounds so little that w (b - a) helps
FEATURES_PER_SUM = 32  # partial sums are centred after so many features, which keeps them small
STEP = 4  # the gradient's loops take so many rows at a time, and may begin anywhere
PROJECTIONS = tl.constexpr(4)


class PreparedWeight(NamedTuple):
    """``weight`` (outer, inner, HP): w divided by a power of two, so that abs(w) < 2, and padded
    with zeros, in the computing dtype. ``score_scale`` (outer, inner, 2): two factors whose
    product is that power of two times the scale of the scores, NaN where a weight is not finite.
    One after the other they overflow only where the score does. ``centre`` (outer, inner,
    HP / 32): half the sums of 32 weights each."""

    weight: Tensor
    score_scale: Tensor
    centre: Tensor


class PreparedRows(NamedTuple):
    """Of queries (e^{-2q}) or keys (e^{2k}): ``exponential`` (outer, inner, LP, HP), 1 in rows
    that are not within SAFE and in the rows beyond the last, so that loops need no bounds;
    ``size`` (outer, inner, LP) = max |x|, Inf for NaN; ``correction`` (outer, inner, LP);
    ``projections`` (outer, inner, LP, 4): the mean over the features, and three sums with random
    signs over the root of their number."""

    exponential: Tensor
    size: Tensor
    correction: Tensor
    projections: Tensor


@kernel
def weight_kernel(
    weight, prepared, score_scale, centre,
    stride_outer, stride_inner, stride_h, inner, hidden, padded, scale_bits, scale_exponent,
    BLOCK: tl.constexpr, FEATURES_PER_SUM: tl.constexpr,
):  # fmt: skip
    n, o, m = batch_entry(tl.program_id(0), inner)
    h = tl.arange(0, BLOCK)
    source = weight + o * stride_outer + m * stride_inner
    w = tl.load(source + h.to(tl.int64) * stride_h, mask=h < hidden, other=0.0)
    mantissa = number(scale_bits)
    if w.dtype != tl.float64:
        w = w.to(tl.float32)
        finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32), 0)
        largest = tl.max(tl.where(tl.abs(w) < float("inf"), tl.abs(w), 0.0), 0)
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.where(largest == 0.0, 0, tl.maximum(tl.minimum(exponent, 125), -125))
        w = w * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        both = tl.maximum(tl.minimum(exponent + scale_exponent, 250), -250)
        half = both >> 1
        first = ((127 + half) << 23).to(tl.float32, bitcast=True) * mantissa.to(tl.float32)
        second = ((127 + both - half) << 23).to(tl.float32, bitcast=True)
        sums = tl.sum(tl.reshape(w, [BLOCK // FEATURES_PER_SUM, FEATURES_PER_SUM]), 1)
        block = tl.arange(0, BLOCK // FEATURES_PER_SUM)
        blocks = padded // FEATURES_PER_SUM
        tl.store(centre + n * blocks + block, sums * 0.5, mask=block < blocks)
    else:
        finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32), 0)
        first = mantissa
        second = 1.0
    tl.store(score_scale + 2 * n, tl.where(finite != 0, first, float("nan")))
    tl.store(score_scale + 2 * n + 1, second)
    tl.store(prepared + n * padded + h, w, mask=h < padded)


@triton.jit
def _signed(x, h, BIT: tl.constexpr):
    """x or -x, by a bit of a hash of the feature."""
    hash = h.to(tl.uint32) * 2654435769
    return tl.where(((hash >> BIT) & 1) != 0, -x, x)


@kernel
def rows_kernel(
    x, weight, exponential, size, correction, projections,
    stride_outer, stride_inner, stride_row, stride_h,
    weight_outer, weight_inner, inner, length, length_padded, hidden, padded,
    SIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of rows. Sums stay apart per thread until the loops end."""
    row_tiles = tl.cdiv(length_padded, ROWS)
    n, o, m = batch_entry(tl.program_id(0) // row_tiles, inner)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK)
    inside = row < length
    source = x + o * stride_outer + m * stride_inner
    source += row[:, None].to(tl.int64) * stride_row
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    sum0 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum1 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum2 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum3 = tl.zeros([ROWS, BLOCK], tl.float32)
    for h0 in range(0, padded, BLOCK):
        f = (h0 + h)[None, :]
        v = tl.load(
            source + f.to(tl.int64) * stride_h, mask=inside[:, None] & (f < hidden), other=0.0
        ).to(tl.float32)
        # A comparison with NaN is false: NaN counts as infinite.
        absolute = tl.abs(v)
        absolute = tl.where(absolute < float("inf"), absolute, float("inf"))
        largest = tl.maximum(largest, absolute)
        sum0 += v
        sum1 += _signed(v, f, 31)
        sum2 += _signed(v, f, 30)
        sum3 += _signed(v, f, 29)
    most = tl.max(largest, 1)
    at = n * length_padded + row
    stored = row < length_padded
    tl.store(size + at, most, mask=stored)
    root = tl.sqrt(hidden + tl.zeros([ROWS], tl.float32))
    tl.store(projections + PROJECTIONS * at, tl.sum(sum0, 1) / hidden, mask=stored)
    tl.store(projections + PROJECTIONS * at + 1, tl.sum(sum1, 1) / root, mask=stored)
    tl.store(projections + PROJECTIONS * at + 2, tl.sum(sum2, 1) / root, mask=stored)
    tl.store(projections + PROJECTIONS * at + 3, tl.sum(sum3, 1) / root, mask=stored)

    total = tl.zeros([ROWS, BLOCK], tl.float32)
    w_row = weight + o * weight_outer + m * weight_inner
    safe = inside & (most <= SAFE)
    for h0 in range(0, padded, BLOCK):
        f = (h0 + h)[None, :]
        v = tl.load(
            source + f.to(tl.int64) * stride_h, mask=safe[:, None] & (f < hidden), other=0.0
        )
        e, error = exp_with_error(v.to(tl.float32) * (2.0 * SIGN))
        total += tl.load(w_row + f, mask=f < padded, other=0.0) * (error / e)
        to = exponential + (n * length_padded + row[:, None].to(tl.int64)) * padded
        tl.store(to + f, e, mask=stored[:, None] & (f < padded))
    tl.store(correction + at, tl.sum(total, 1) * (0.5 * SIGN), mask=stored)


def prepare_weight(weight: Tensor, batch: BatchShape, scale: float) -> PreparedWeight:
    """``weight`` (*b, H) of any strides."""
    view = batch.narrow(weight, 1)
    outer, inner, hidden = view.shape
    multiple = 4 if hidden <= DIFFERENCE_MAX_FEATURES else FEATURES_PER_SUM
    padded = -(-max(hidden, 1) // multiple) * multiple
    block = max(FEATURES_PER_SUM, power_of_two(padded))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    prepared = torch.empty(outer, inner, padded, dtype=dtype, device=weight.device)
    score_scale = prepared.new_empty(outer, inner, 2)
    centre = prepared.new_empty(outer, inner, padded // FEATURES_PER_SUM)
    mantissa, exponent = (scale, 0) if dtype == torch.float64 else math.frexp(scale)
    launch(
        weight_kernel, outer * inner, weight, view, prepared, score_scale, centre, *view.stride(),
        inner, hidden, padded, bits(mantissa), exponent,
        BLOCK=block, FEATURES_PER_SUM=FEATURES_PER_SUM,
    )  # fmt: skip
    return PreparedWeight(*map(batch.expand, (prepared, score_scale, centre)))


def prepare_rows(x: Tensor, sign: int, weight: Tensor, batch: BatchShape) -> PreparedRows:
    """``x`` (*b, L, H) of any strides: queries with sign -1, keys with +1. ``weight`` is the
    prepared one."""
    view = batch.narrow(x, 2)
    # The correction depends on the weight, which may have more heads than x.
    outer = max(view.shape[0], 1 if weight.stride(0) == 0 else batch.outer)
    inner = max(view.shape[1], 1 if weight.stride(1) == 0 else batch.inner)
    length, hidden = view.shape[2:]
    view = view.expand(outer, inner, length, hidden)
    padded = weight.shape[-1]
    length_padded = -(-(length + STEP - 1) // STEP) * STEP
    exponential = torch.empty(
        outer, inner, length_padded, padded, dtype=torch.float32, device=x.device
    )
    size, correction = exponential.new_empty(2, outer, inner, length_padded)
    projections = exponential.new_empty(outer, inner, length_padded, PROJECTIONS.value)
    rows, block = 8, min(128, power_of_two(padded))
    launch(
        rows_kernel, outer * inner * -(-length_padded // rows), x, view, weight,
        exponential, size, correction, projections, *view.stride(), *weight.stride()[:2], inner,
        length, length_padded, hidden, padded, SIGN=sign, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return PreparedRows(*map(batch.expand, (exponential, size, correction, projections)))
