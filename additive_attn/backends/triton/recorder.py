"""Records what a call does while it runs: allocations, launches, operations of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from additive_attn.backends.triton.compiled import TENSORS, Compiled

_FRESH = {"empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like"}


class NotPlanned(Exception):
    """Says why a recorded call cannot be repeated."""


@dataclass(eq=False)
class Buffer:
    """Memory of a call: given, allocated, or made by an operation of torch."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    address: int  # while it was recorded
    born: int = -1  # the number of a step; -1 for those that are given
    dies: int = -1  # the last step that reads or writes it
    seen: bool = False  # whether an operation takes or returns it, as a tensor
    number: int = -1  # of the tensor that holds it in a plan
    begin: int = 0  # where in that tensor, in bytes

    @property
    def bytes(self) -> int:
        return _bytes(self.shape, self.stride, self.dtype)


class Part(NamedTuple):
    """A tensor, as a part of a buffer: ``offset`` in bytes."""

    buffer: Buffer
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def is_whole(self) -> bool:
        x = self.buffer
        return self[1:] == (x.shape, x.stride, x.dtype, 0)

    @property
    def fills(self) -> bool:
        """Whether the buffer holds nothing else."""
        return self.offset == 0 and _bytes(*self[1:4]) == self.buffer.bytes

    @property
    def place(self) -> tuple[int, int]:
        """The number of the tensor that holds the part, and bytes from its begin. A part without
        elements has no address."""
        x = self.buffer
        return (x.number, x.begin + self.offset) if all(self.shape) else (-1, 0)

    def of(self, x: Tensor) -> Tensor:
        """Returns the part, where ``x`` holds the buffer."""
        if self.is_whole:
            return x
        offset = x.storage_offset() + self.offset // self.dtype.itemsize
        return x.as_strided(self.shape, self.stride, offset)


class Launch(NamedTuple):
    found: Compiled
    programs: int
    arguments: tuple[Any, ...]  # with parts for tensors


class Operation(NamedTuple):
    function: Any
    arguments: tuple[Any, ...]  # with parts for tensors
    options: dict[str, Any]
    results: tuple[Buffer, ...]


class Recorder(TorchDispatchMode):
    """Records a call. ``reason`` says why it cannot be repeated; None if it can."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Launch | Operation] = []
        self.device = given[0].device if given else None
        self.given = [_buffer(x) for x in given]
        self.allocated: list[Buffer] = []
        self.reason: str | None = None
        self._buffers: Any = WeakIdKeyDictionary()
        self._buffers.update(zip(given, self.given, strict=True))

    def part(self, x: Tensor) -> Part:
        buffer = self._buffers.get(x)
        if buffer is None:
            raise NotPlanned("a tensor comes from elsewhere")
        buffer.dies = max(buffer.dies, len(self.steps))
        offset = x.data_ptr() - buffer.address if x.numel() else 0
        return Part(buffer, tuple(x.shape), x.stride(), x.dtype, offset)

    def _parts(self, arguments: Any) -> Any:
        """Replaces tensors by parts."""
        if type(arguments) in TENSORS:
            return self.part(arguments)
        if isinstance(arguments, (tuple, list)):
            return tuple(map(self._parts, arguments))
        return arguments

    def launched(
        self, found: Compiled | None, programs: int, arguments: tuple[Any, ...] = ()
    ) -> None:
        """Records a launch of a compiled kernel; None where Triton itself searched for it."""
        if self.reason is None:
            try:
                if found is None:
                    raise NotPlanned("a launch is Triton's own")
                arguments = (*self._parts(arguments), *found.constants)
                self.steps.append(Launch(found, programs, arguments))
            except NotPlanned as error:
                self.reason = str(error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.reason is None:
            try:
                self._add(func, args, kwargs or {}, result)
            except NotPlanned as error:
                self.reason = str(error)
        return result

    def _add(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        if torch.Tag.dynamic_output_shape in func.tags:
            raise NotPlanned(f"{func} reads a tensor, to know the shape of its result")
        if not all(type(x) is Tensor for x in results):
            raise NotPlanned(f"{func} reads a tensor")
        name, now = func._schema.name.split("::")[1], len(self.steps)
        fixed = not any(x.alias_info and x.alias_info.is_write for x in func._schema.arguments)
        bases = [self._base(x, args) if fixed else None for x in results]
        nothing = len(results) == 1 and fixed and not results[0].numel()  # nothing reads it
        if name in _FRESH or (nothing and bases == [None]):
            if result.device != self.device:
                raise NotPlanned(f"{func} takes memory on {result.device}")
            buffer = self._buffers[result] = _buffer(result, born=now)
            self.allocated.append(buffer)
        elif results and all(bases):
            self._buffers.update(zip(results, bases, strict=True))
        elif name != "copy_" or not _same(args[0], args[1]):
            arguments, options = self._parts(args), {n: self._parts(x) for n, x in kwargs.items()}
            for part in _found((arguments, tuple(options.values()))):
                part.buffer.seen = True
                if part.dtype != part.buffer.dtype:
                    raise NotPlanned(f"{func} takes a tensor as another dtype")
            new = [x for x in results if x not in self._buffers]
            if 0 < len(new) < len(results):
                raise NotPlanned(f"{func} gives an argument and something new")
            made = tuple(_buffer(x, born=now, dies=now, seen=True) for x in new)
            self._buffers.update(zip(new, made, strict=True))
            self.steps.append(Operation(func, arguments, options, made))

    def _base(self, x: Tensor, args: Any) -> Buffer | None:
        """Returns the buffer of the argument that ``x`` is, or is a view of."""
        storage = x.untyped_storage()._cdata
        for y in args:
            if type(y) is Tensor and y.untyped_storage()._cdata == storage:
                return self.part(y).buffer
        return None


def _buffer(x: Tensor, **known: Any) -> Buffer:
    return Buffer(tuple(x.shape), x.stride(), x.dtype, x.data_ptr(), **known)


def _bytes(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> int:
    if not all(shape):
        return 0
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return (last + 1) * dtype.itemsize


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether a copy has no effect, as after an addition in place to a part of a tensor."""
    return x.data_ptr() == y.data_ptr() and (x.shape, x.stride()) == (y.shape, y.stride())


def _found(arguments: Any) -> Iterator[Part]:
    """Yields the parts among arguments."""
    if isinstance(arguments, Part):
        yield arguments
    elif isinstance(arguments, tuple):
        for x in arguments:
            yield from _found(x)
