"""Where and how kernels run: the batch as two dims, the device, the target."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import Any

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
        """``x`` as (outer or 1, inner or 1, ...), its last ``rank`` dims kept. Copies only what
        broadcasts in some of more than two batch dims."""
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
        """(outer or 1, inner or 1, ...) to (outer, inner, ...), stride 0 where it broadcasts."""
        return x.expand(self.outer, self.inner, *x.shape[2:])

    def view(self, x: Tensor, rank: int) -> Tensor:
        """``x`` as (outer, inner, ...), its last ``rank`` dims kept, with stride 0 where it
        broadcasts."""
        return self.expand(self.narrow(x, rank))

    def strided(self, x: Tensor, rank: int) -> tuple[Tensor, tuple[int, ...]]:
        """A tensor and the strides of ``view``, which for up to two batch dims needs no view."""
        if len(self.shape) > 2:
            x = self.view(x, rank)
            return x, x.stride()
        sizes, strides = x.shape, x.stride()
        dims = len(sizes) - rank
        outer = strides[0] if dims == 2 and sizes[0] != 1 else 0
        inner = strides[dims - 1] if dims >= 1 and sizes[dims - 1] != 1 else 0
        return x, (outer, inner, *strides[dims:])


@triton.jit
def batch_entry(n, inner):
    """Entry n with its indices into (outer, inner), in 64 bits, which offsets need. Divided in 32,
    which programs are counted in: a 64-bit division is a call of about a hundred instructions."""
    return n.to(tl.int64), (n // inner).to(tl.int64), (n % inner).to(tl.int64)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on any device."""
    return bool(triton.knobs.runtime.interpret)


def target() -> str:
    """What the kernels' inline assembly is written for: cuda, hip or none."""
    if interpreted():
        return "none"
    return "hip" if torch.version.hip is not None else "cuda"


def bits(x: float) -> int:
    """A number as kernels take it (``numerics.number``)."""
    (integer,) = struct.unpack("<q", struct.pack("<d", x))
    return int(integer)


def power_of_two(n: int) -> int:
    """The smallest that is at least n and 1."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number in the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(kernel: Any, programs: int, tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs ``programs`` programs on the device, and the current stream, of ``tensor``."""
    if programs == 0:
        return
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            launch(kernel, programs, tensor, *arguments, **options)
        return
    # Named, since later versions of Triton do not fuse by default.
    kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)
