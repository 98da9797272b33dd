"""Where and how kernels run: the batch as two dims, the device, the target."""

from __future__ import annotations

import math
import struct
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
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


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number in the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(kernel: Any, programs: int, tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs ``programs`` programs on the device, and the current stream, of ``tensor``."""
    if programs == 0:
        return
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with device:
        # Named, since later versions of Triton do not fuse by default.
        kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)
