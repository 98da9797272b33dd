"""Finds out whether tensors have been written to since something was computed from them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from torch import Tensor

from additive_attn.ops.checks import is_wrapper

# Per tensor: all of a vector of the usual sizes, and a part of a matrix, which optimizers change.
_BYTES = 1024


def count_writes(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors count writes. Inference tensors do not, and a tensor that a transform
    left behind has no memory to read."""
    for x in tensors:  # a generator would cost as much as two tensors
        if x.is_inference() or is_wrapper(x):
            return False
    return True


def version(tensor: Tensor) -> int:
    """A number that changes when a tensor is written to; 0 for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def parameter_state(parameters: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Numbers that change when a parameter is written to, moved in memory, frozen or unfrozen."""
    return tuple(
        number
        for x in parameters
        if x is not None
        for number in (version(x), x.data_ptr(), x.requires_grad)
    )


class Watched:
    """A copy of the first bytes of tensors. Fused optimizers, ``.data`` and NumPy write without a
    new version. Tensors on other devices than the CPU are left out: to read them would wait."""

    __slots__ = ("_bytes",)

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        views = [
            (ctypes.c_char * min(x.nbytes, _BYTES)).from_address(x.data_ptr())
            for x in tensors
            if x is not None and x.is_cpu and x.is_contiguous() and x.data_ptr()
        ]
        self._bytes = [(view, view.raw) for view in views]

    def unchanged(self) -> bool:
        """Only to be called while the tensors exist and have the same ``data_ptr``."""
        for view, earlier in self._bytes:
            if view.raw != earlier:
                return False
        return True
