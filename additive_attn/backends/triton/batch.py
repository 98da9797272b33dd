"""Reshapes the broadcast batch dims of a call to the two that kernels index by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class BatchShape:
    """The broadcast batch dims as (outer, inner), which is what kernels index by: entry n lies at
    outer index n // inner and inner index n % inner."""

    shape: torch.Size

    @property
    def inner(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def outer(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def entries(self) -> int:
        return self.outer * self.inner

    def narrow(self, x: Tensor, rank: int) -> Tensor:
        """Returns ``x`` as (outer or 1, inner or 1, ...), with its last ``rank`` dims unchanged.
        Copies only a tensor that broadcasts in some of more than two batch dims."""
        tail = x.shape[x.dim() - rank :]
        missing = len(self.shape) + rank - x.dim()
        x = x.reshape((1,) * missing + tuple(x.shape)) if missing else x
        dims = x.shape[: x.dim() - rank]
        inner = dims[-1] if dims else 1
        leading = dims[:-1]
        if all(size == 1 for size in leading):
            return x.reshape(1, inner, *tail)
        if len(leading) > 1:
            x = x.expand(*self.shape[:-1], inner, *tail)
        return x.reshape(self.outer, inner, *tail)

    def expand(self, x: Tensor) -> Tensor:
        """Expands (outer or 1, inner or 1, ...) to (outer, inner, ...), with stride 0 where it
        broadcasts."""
        return x.expand(self.outer, self.inner, *x.shape[2:])

    def view(self, x: Tensor, rank: int) -> Tensor:
        """Returns ``x`` as (outer, inner, ...), with its last ``rank`` dims unchanged, and stride
        0 where it broadcasts."""
        return self.expand(self.narrow(x, rank))

    def strided(self, x: Tensor, rank: int) -> tuple[Tensor, tuple[int, ...]]:
        """Returns a tensor and the strides of its ``view``. Up to two batch dims need no view."""
        if len(self.shape) > 2:
            x = self.view(x, rank)
            return x, x.stride()
        sizes, strides = x.shape, x.stride()
        dims = len(sizes) - rank
        outer = strides[0] if dims == 2 and sizes[0] != 1 else 0
        inner = strides[dims - 1] if dims >= 1 and sizes[dims - 1] != 1 else 0
        return x, (outer, inner, *strides[dims:])


def batch_strides(x: Tensor, size: int = 1) -> tuple[int, int]:
    """Returns the batch strides of a contiguous (outer, inner, ...) with ``size`` numbers per
    entry; 0 where it broadcasts."""
    outer, inner = x.shape[:2]
    return (0 if outer == 1 else inner * size), (0 if inner == 1 else size)


@triton.jit
def batch_entry(n, inner):
    """Returns entry n and its indices into (outer, inner), in 64 bits, which offsets need. Divides
    in 32 bits, in which programs are counted: a 64-bit division is a call of about a hundred
    instructions."""
    return n.to(tl.int64), (n // inner).to(tl.int64), (n % inner).to(tl.int64)


def aligned(*strides: int) -> bool:
    """Whether entries with these strides begin at multiples of 16 (``entry_offset``)."""
    return not any(stride % 16 for stride in strides)


@triton.jit
def entry_offset(o, outer, m, inner, ALIGNED: tl.constexpr):
    """Returns where entry (o, m) begins. ALIGNED declares to the compiler that this is a multiple
    of 16, since it drops that property of an argument of this function."""
    offset = o * outer + m * inner
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset
