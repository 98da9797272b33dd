"""Location features: the correlation of earlier weights with filters. Its gradients are
correlations too, so that one kernel computes all. The convolutions of libraries are slow with one
input channel."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton import tiles
from additive_attn.backends.triton.batch import batch_entry
from additive_attn.backends.triton.launch import kernel, launch, registers
from additive_attn.spec.call import lse_dtype


@kernel
def correlation_kernel(
    x, x_outer, x_inner, x_channel, x_column, y, y_outer, y_output, y_channel, y_term, out,
    inner, outputs, channels, length, terms, shift, width,
    BF: tl.constexpr, BX: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Stores out [outer][inner][output][column] = the sum over channels and terms of
    y [outer][output][channel][term] x [outer][inner][channel][column + term - shift], where x is 0
    beyond its ``length``. Sums of TERMS are added up, which keeps them accurate."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    column_tiles = tl.cdiv(width, BX)
    output_tiles = tl.cdiv(outputs, BF)
    program = tl.program_id(0)
    column = program % column_tiles * BX + tl.arange(0, BX)
    program = program // column_tiles
    f = program % output_tiles * BF + tl.arange(0, BF)
    n, o, m = batch_entry(program // output_tiles, inner)
    x += o * x_outer + m * x_inner
    y += o * y_outer + f.to(tl.int64) * y_output
    acc = tl.zeros([BF, BX], ACC)
    t = tl.arange(0, TERMS)
    for _ in range(0, channels):
        for term0 in range(0, terms, TERMS):
            term = term0 + t
            a = tl.load(  # [BF, TERMS]
                y[:, None] + term[None, :].to(tl.int64) * y_term,
                mask=(f < outputs)[:, None] & (term < terms)[None, :], other=0.0,
            ).to(ACC)  # fmt: skip
            j = column[None, :] + term[:, None] - shift  # [TERMS, BX]
            inside = (term < terms)[:, None] & (column < width)[None, :]
            b = tl.load(
                x + j.to(tl.int64) * x_column,
                mask=inside & (j >= 0) & (j < length), other=0.0,
            ).to(ACC)  # fmt: skip
            acc += tl.dot(a, b, input_precision="ieee")
        x += x_channel
        y += y_channel
    tl.store(
        out + (n * outputs + f[:, None]) * width + column[None, :], acc.to(out.dtype.element_ty),
        mask=(f < outputs)[:, None] & (column < width)[None, :],
    )  # fmt: skip


def _correlate(x: Tensor, y: Tensor, out: Tensor, shift: int) -> Tensor:
    """Correlates ``x`` (outer, inner, channels, length) with ``y`` (outer, outputs, channels,
    terms)."""
    outer, inner, channels, length = x.shape
    outputs, width = out.shape[-2:]
    tile = tiles.correlation_tile(outputs)
    launch(
        correlation_kernel,
        outer * inner * -(-outputs // tile["BF"]) * -(-width // tile["BX"]), out,
        x, *x.stride(), y, *y.stride(), out,
        inner, outputs, channels, length, y.shape[-1], shift, width, **tile, **registers(128),
    )  # fmt: skip
    return out


def _check(inputs: Tensor, filters: Tensor) -> None:
    """Raises unless shapes and dtypes agree: the kernel reads by the channels of the inputs."""
    if not (inputs.dim() == filters.dim() == 3 and inputs.shape[1] == filters.shape[1]):
        raise RuntimeError(
            f"inputs has shape {tuple(inputs.shape)} and filters {tuple(filters.shape)}; they "
            "must be (B, C, Lk) and (F, C, width), with the same C."
        )
    if filters.shape[2] % 2 == 0:
        raise RuntimeError(f"The width of filters is {filters.shape[2]}; it must be odd.")
    if inputs.dtype != filters.dtype:
        raise RuntimeError(f"inputs is {inputs.dtype}, but filters is {filters.dtype}.")


def location_features(inputs: Tensor, filters: Tensor) -> Tensor:
    """Correlates ``inputs`` (B, C, Lk) with ``filters`` (F, C, width) to (B, F, Lk)."""
    _check(inputs, filters)
    batch, _, length = inputs.shape
    outputs, width = filters.shape[0], filters.shape[-1]
    out = inputs.new_empty(batch, outputs, length)
    return _correlate(inputs[:, None], filters.expand(batch, *filters.shape), out, width // 2)


def location_features_backward(
    grad: Tensor, inputs: Tensor, filters: Tensor, need_inputs: bool, need_filters: bool
) -> tuple[Tensor, Tensor]:
    _check(inputs, filters)
    features = inputs.shape[0], filters.shape[0], inputs.shape[2]
    if tuple(grad.shape) != features:
        raise RuntimeError(f"grad has shape {tuple(grad.shape)}; it must be {features}.")
    grad_inputs = grad_filters = grad.new_empty(0)
    if need_inputs:
        grad_inputs = location_features(grad, filters.transpose(0, 1).flip(-1))
    if need_filters:
        (batch, channels, _), (outputs, _, width) = inputs.shape, filters.shape
        parts = torch.empty(
            batch, channels, outputs, width, dtype=lse_dtype(grad.dtype), device=grad.device
        )
        _correlate(inputs[:, :, None], grad[:, :, None], parts, width // 2)
        grad_filters = parts.sum(0).transpose(0, 1).to(filters.dtype).contiguous()
    return grad_inputs, grad_filters
