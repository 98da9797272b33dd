"""Whether tensors have been written to since something was made of them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from torch import Tensor

from additive_attn.ops.checks import is_wrapper

# Of each tensor: whole vectors of the usual sizes, and of a matrix what an optimizer changes too.
_BYTES = 1024


def count_writes(tensors: Iterable[Tensor]) -> bool:
    """Inference tensors do not, and what a transform has left behind has no memory to look at."""
    for x in tensors:  # a generator would cost as much as two tensors
        if x.is_inference() or is_wrapper(x):
            return False
    return True


def version(tensor: Tensor) -> int:
    """Changes where a tensor is written to; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def parameter_state(parameters: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Changes where a parameter is written to, gets other memory, or is frozen or no longer."""
    return tuple(
        number
        for x in parameters
        if x is not None
        for number in (version(x), x.data_ptr(), x.requires_grad)
    )


class Watched:
    """What the first bytes of tensors held. Fused optimizers, ``.data`` and NumPy write without a
    new version. Other devices than the CPU are not looked at: that would wait for them."""

    __slots__ = ("_bytes",)

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        views = [
            (ctypes.c_char * min(x.nbytes, _BYTES)).from_address(x.data_ptr())
            for x in tensors
            if x is not None and x.is_cpu and x.is_contiguous() and x.data_ptr()
        ]
        self._bytes = [(view, view.raw) for view in views]

    def unchanged(self) -> bool:
        """To be asked only while the tensors live, and ``data_ptr`` is what it was."""
        for view, seen in self._bytes:
            if view.raw != seen:
                return False
        return True
