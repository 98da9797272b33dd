"""Other layouts of the same numbers, which lie between numbers that must not be read."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = float("nan")


def around(x: Tensor, *pads: tuple[int, int]) -> Tensor:
    """Returns x as a slice of a larger tensor of NaN: a read beyond x is a read of NaN."""
    size = [n + before + after for n, (before, after) in zip(x.shape, pads, strict=True)]
    outer = torch.full(size, NAN, dtype=x.dtype)
    inner = outer[tuple(slice(b, b + n) for n, (b, _) in zip(x.shape, pads, strict=True))]
    inner.copy_(x)
    return inner


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def row_padded(x: Tensor) -> Tensor:
    return around(x, *[(0, 0)] * (x.dim() - 1), (0, 5))


def offset(x: Tensor) -> Tensor:
    return around(x, *[(0, 0)] * (x.dim() - 1), (3, 2))


def surrounded(x: Tensor) -> Tensor:
    return around(x, *[(1, 2)] * x.dim())


def rows_apart(x: Tensor) -> Tensor:
    return around(x, *[(0, 0)] * (x.dim() - 2), (2, 70), (0, 0))


def batch_last(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def every_second_feature(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), NAN, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def every_third_row(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-2], 3 * x.shape[-2], x.shape[-1]), NAN, dtype=x.dtype)
    wide[..., 1::3, :] = x
    return wide[..., 1::3, :]


def unaligned(x: Tensor) -> Tensor:
    """Returns x with data that begins one element into the storage."""
    flat = torch.full((x.numel() + 1,), NAN, dtype=x.dtype)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def sequence_first(x: Tensor) -> Tensor:
    return x.transpose(0, -2).contiguous().transpose(0, -2)
