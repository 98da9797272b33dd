"""What the score kernels read: exponentials, once per query and key, and weights of a known size.

With a = e^{-2q} and b = e^{2k},

    tanh(q + k) = (b - a) / (b + a) = 1 - 2 a / (a + b)

so that a pair (i, j) costs one addition per feature and a share of one reciprocal (``scores.py``).
Both are rounded; to first order, with the relative roundings rho,

    tanh(q + k) = t + (1 - t^2) / 2 (rho_b - rho_a)

which is taken out where it would show: for small q and k, where t is small and 1 - t^2 near 1,
from the scores, as one correction per row and one per key; and from the gradient of the weight,
where the roundings of a row or a key add up over all its pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton.batch import BatchShape, batch_entry
from additive_attn.backends.triton.launch import VARYING, bits, launch
from additive_attn.backends.triton.numerics import exp_with_error, number
from additive_attn.backends.triton.tiles import power_of_two

SAFE = tl.constexpr(10.0)  # (e^{2 SAFE} + e^{2 SAFE})^4 < 2^120
FEW_FEATURES = 64  # up to so many the plain layer rounds so little that w (b - a) is needed
STEP = 4  # the gradient's loops take so many rows at a time, and may begin anywhere
CENTRED_FEATURES = 32  # partial sums are centred after so many features, which keeps them small


@triton.jit(do_not_specialize=VARYING)
def _weight_kernel(
    weight, prepared, unit, centre,
    stride_outer, stride_inner, stride_h, inner, hidden, padded, scale_bits,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    n, o, m = batch_entry(tl.program_id(0), inner)
    h = tl.arange(0, BLOCK)
    source = weight + o * stride_outer + m * stride_inner
    w = tl.load(source + h.to(tl.int64) * stride_h, mask=h < hidden, other=0.0)
    if w.dtype != tl.float64:
        w = w.to(tl.float32)
        finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32), 0)
        largest = tl.max(tl.where(tl.abs(w) < float("inf"), tl.abs(w), 0.0), 0)
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.where(largest == 0.0, 0, tl.maximum(tl.minimum(exponent, 125), -125))
        inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        scale = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
        w = w * inverse
        scale = tl.where(finite != 0, scale, float("nan"))
        tl.store(unit + n, scale * number(scale_bits).to(tl.float32))
        sums = tl.sum(tl.reshape(w, [BLOCK // CENTRED, CENTRED]), 1)
        block = tl.arange(0, BLOCK // CENTRED)
        tl.store(
            centre + n * (padded // CENTRED) + block, sums * 0.5, mask=block < padded // CENTRED
        )
    else:
        finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32), 0)
        tl.store(unit + n, tl.where(finite != 0, number(scale_bits), float("nan")))
    tl.store(prepared + n * padded + h, w, mask=h < padded)


@triton.jit(do_not_specialize=VARYING)
def _exp_kernel(
    x, weight, exponential, size, correction,
    stride_outer, stride_inner, stride_row, stride_h,
    weight_outer, weight_inner, inner, length, length_padded, hidden, padded,
    SIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(length_padded, ROWS)
    n, o, m = batch_entry(tl.program_id(0) // row_tiles, inner)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, BLOCK)
    inside = row < length
    source = x + o * stride_outer + m * stride_inner
    source += row[:, None].to(tl.int64) * stride_row
    largest = tl.zeros([ROWS], tl.float32)
    for h0 in range(0, padded, BLOCK):
        here = inside[:, None] & (h0 + h < hidden)[None, :]
        v = tl.load(source + (h0 + h)[None, :].to(tl.int64) * stride_h, mask=here, other=0.0)
        v = tl.abs(v.to(tl.float32))
        # A comparison with NaN is false: NaN counts as infinite.
        largest = tl.maximum(largest, tl.max(tl.where(v < float("inf"), v, float("inf")), 1))
    tl.store(size + n * length_padded + row, largest, mask=row < length_padded)

    total = tl.zeros([ROWS], tl.float32)
    w_row = weight + o * weight_outer + m * weight_inner
    for h0 in range(0, padded, BLOCK):
        here = inside[:, None] & (h0 + h < hidden)[None, :] & (largest <= SAFE)[:, None]
        v = tl.load(source + (h0 + h)[None, :].to(tl.int64) * stride_h, mask=here, other=0.0)
        e, rest = exp_with_error(v.to(tl.float32) * (2.0 * SIGN))
        w = tl.load(w_row + h0 + h, mask=h0 + h < padded, other=0.0)
        total += tl.sum(w[None, :] * (rest / e), 1)
        to = exponential + (n * length_padded + row[:, None].to(tl.int64)) * padded
        tl.store(
            to + (h0 + h)[None, :], e,
            mask=(row < length_padded)[:, None] & (h0 + h < padded)[None, :],
        )  # fmt: skip
    tl.store(correction + n * length_padded + row, total * (0.5 * SIGN), mask=row < length_padded)


@dataclass(frozen=True)
class PreparedWeight:
    """``weight`` (outer, inner, HP) = w / unit padded with zeros, in the computing dtype; |w| < 2
    after that. ``unit`` (outer, inner) is a power of two times the scale of the scores,
    NaN where a weight is not finite.
    ``centre`` (outer, inner, HP / 32): half the sums of 32 weights each."""

    weight: Tensor
    unit: Tensor
    centre: Tensor
    hidden: int
    padded: int


@dataclass(frozen=True)
class PreparedRows:
    """Of queries (e^{-2q}) or keys (e^{2k}): ``exponential`` (outer, inner, LP, HP), 1 in rows
    that are not within SAFE and in the rows beyond the last, so that loops need no bounds;
    ``size`` (outer, inner, LP) = max |x|, Inf for NaN; ``correction``."""

    exponential: Tensor
    size: Tensor
    correction: Tensor


def prepare_weight(weight: Tensor, batch: BatchShape, scale: float) -> PreparedWeight:
    """``weight`` (*b, H) of any strides."""
    view = batch.narrow(weight, 1)
    outer, inner, hidden = view.shape
    few = hidden <= FEW_FEATURES
    padded = -(-max(hidden, 1) // (4 if few else CENTRED_FEATURES)) * (
        4 if few else CENTRED_FEATURES
    )
    block = max(CENTRED_FEATURES, power_of_two(padded))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    prepared = torch.empty(outer, inner, padded, dtype=dtype, device=weight.device)
    unit = torch.empty(outer, inner, dtype=dtype, device=weight.device)
    centre = torch.empty(
        outer, inner, padded // CENTRED_FEATURES, dtype=dtype, device=weight.device
    )
    launch(
        _weight_kernel, outer * inner, weight, view, prepared, unit, centre, *view.stride(),
        inner, hidden, padded, bits(scale), BLOCK=block, CENTRED=CENTRED_FEATURES,
    )  # fmt: skip
    return PreparedWeight(
        batch.expand(prepared), batch.expand(unit), batch.expand(centre), hidden, padded
    )


def prepare_rows(x: Tensor, sign: int, weight: PreparedWeight, batch: BatchShape) -> PreparedRows:
    """``x`` (*b, L, H) of any strides: queries with sign -1, keys with +1."""
    view = batch.narrow(x, 2)
    # The correction depends on the weight, which may have more heads than x.
    outer = max(view.shape[0], 1 if weight.weight.stride(0) == 0 else batch.outer)
    inner = max(view.shape[1], 1 if weight.weight.stride(1) == 0 else batch.inner)
    length, hidden = view.shape[2:]
    view = view.expand(outer, inner, length, hidden)
    length_padded = -(-(length + STEP - 1) // STEP) * STEP
    shape = (outer, inner, length_padded)
    exponential = torch.empty(*shape, weight.padded, dtype=torch.float32, device=x.device)
    size = torch.empty(shape, dtype=torch.float32, device=x.device)
    correction = torch.empty(shape, dtype=torch.float32, device=x.device)
    rows, block = 8, min(128, power_of_two(weight.padded))
    launch(
        _exp_kernel, outer * inner * -(-length_padded // rows), x, view, weight.weight,
        exponential, size, correction, *view.stride(), *weight.weight.stride()[:2], inner, length,
        length_padded, hidden, weight.padded, SIGN=sign, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return PreparedRows(batch.expand(exponential), batch.expand(size), batch.expand(correction))
