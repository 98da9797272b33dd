"""What the score kernels read: exponentials, once per query and key, and weights scaled by a power
of two so that abs(w) < 2.

With a = e^{-2q} and b = e^{2k} a pair (i, j) costs one addition per feature and a share of one
reciprocal (math.md, eq. 3, 4). Both are rounded. To first order, with the relative roundings rho,

    tanh(q + k) = t + (1 - t^2) / 2 (rho_b - rho_a)

which shows where t is small: there 1 - t^2 is near 1, and one correction per row and one per key
take it out of the scores (math.md, eq. 8). From the gradient of the weight, where the roundings of
a row or a key add up over all its pairs, they are always taken out.

All t of a tile are small where all |q|, |k| <= 1. Of an opposite pair, q near -k in every feature
that matters, they are small too, but q and k are not. A ``sketch`` of rows and keys tells such
pairs without a look at the features (``opposite.py``).
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
SKETCH = tl.constexpr(32)  # numbers of a sketch


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
    ``sketch`` (outer, inner, LP, 32), in float16: sums of w x / |w| over every 32nd feature, with
    random signs; ``distance`` (outer, inner, LP): the square of a key's sketch, and what twice its
    product with a query's and this square must stay below for a pair to be opposite."""

    exponential: Tensor
    size: Tensor
    correction: Tensor
    distance: Tensor
    sketch: Tensor


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
def _opposite_limit(square, hidden):
    """Below what squared distance from -k a query with this square is opposite to a key: so small
    that of ordinary rows and keys, which have only ``hidden`` ways to differ, hardly any are."""
    share = tl.where(hidden >= 16, 0.04, tl.where(hidden >= 8, 0.01, 0.0025))
    share = tl.where(hidden >= 4, share, tl.where(hidden >= 2, 1e-5, 0.0))
    return share * tl.minimum(2.0 * square, 1.0)


@kernel
def rows_kernel(
    x, weight, exponential, size, correction, distance, sketch,
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
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    w_row = weight + o * weight_outer + m * weight_inner
    for h0 in range(0, padded, BLOCK):
        f = (h0 + h)[None, :]
        v = tl.load(
            source + f.to(tl.int64) * stride_h, mask=inside[:, None] & (f < hidden), other=0.0
        ).to(tl.float32)
        # A comparison with NaN is false: NaN counts as infinite.
        absolute = tl.abs(v)
        absolute = tl.where(absolute < float("inf"), absolute, float("inf"))
        largest = tl.maximum(largest, absolute)
        w = tl.load(w_row + h0 + h, mask=h0 + h < padded, other=0.0)
        squares += w * w
        w = tl.where(((h0 + h).to(tl.uint32) * 2654435769) >> 31 != 0, -w, w)
        sums += w[None, :] * v
    most = tl.max(largest, 1)
    at = n * length_padded + row
    stored = row < length_padded
    tl.store(size + at, most, mask=stored)
    of_row = tl.sum(tl.reshape(sums, [ROWS, BLOCK // SKETCH, SKETCH]), 1)
    of_row = (of_row / tl.sqrt(tl.sum(squares, 0))).to(tl.float16)  # [ROWS, SKETCH]
    place = SKETCH * at[:, None] + tl.arange(0, SKETCH)[None, :]
    tl.store(sketch + place, of_row, mask=stored[:, None])
    square = tl.sum(of_row.to(tl.float32) * of_row.to(tl.float32), 1)
    if SIGN < 0:
        square = _opposite_limit(square, hidden) - square
    tl.store(distance + at, square, mask=stored)

    total = tl.zeros([ROWS, BLOCK], tl.float32)
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
    size, correction, distance = exponential.new_empty(3, outer, inner, length_padded)
    sketch = exponential.new_empty(outer, inner, length_padded, SKETCH.value, dtype=torch.float16)
    rows, block = 8, max(SKETCH.value, min(128, power_of_two(padded)))
    launch(
        rows_kernel, outer * inner * -(-length_padded // rows), x, view, weight,
        exponential, size, correction, distance, sketch, *view.stride(), *weight.stride()[:2],
        inner, length, length_padded, hidden, padded, SIGN=sign, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return PreparedRows(*map(batch.expand, (exponential, size, correction, distance, sketch)))
