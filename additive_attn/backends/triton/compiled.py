"""Caches compiled kernels, since Triton's own search takes most of a launch's time.

Triton compiles a kernel anew for other constants, dtypes and options; for an argument that is
None; for an address or, unless named in ``do_not_specialize``, an integer that is a multiple of
16, and for a 1; for integers beyond 32 bits. All of these are the key of the cache, and no value
besides."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

_MOST = 4096  # entries of a cache, which is then cleared
_run = JITFunction.run  # if replaced, as by the interpreter, launches must call the replacement
_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation
_drivers = triton.runtime.driver
TENSORS = (Tensor, torch.nn.Parameter)


class Compiled(NamedTuple):
    """A compiled kernel, and the constants that follow the arguments of a launch."""

    kernel: CompiledKernel
    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


class _Kinds(dict[int, int]):
    """The kinds of integers that Triton distinguishes."""

    def __init__(self, specialised: bool) -> None:
        super().__init__()
        self.specialised = specialised

    def __missing__(self, x: int) -> int:
        kind = 0 if -(2**31) <= x < 2**31 else 1 if x < 2**63 else 2
        if self.specialised:
            kind += 4 if x % 16 == 0 else 8 if x == 1 else 0
        if len(self) >= 16 * _MOST:
            self.clear()
        self[x] = kind
        return kind


_plain, _specialised = _Kinds(False).__getitem__, _Kinds(True).__getitem__


class _Signature:
    """The places of integers, tensors and tuples among arguments of these types. ``known`` says
    whether all others are None."""

    def __init__(self, function: JITFunction[Any], types: tuple[type, ...]) -> None:
        self.known = len(types) <= len(function.params)
        self.tuples: list[int] = []
        plain: list[int] = []
        special: list[int] = []
        tensors: list[int] = []
        for n, (kind, parameter) in enumerate(zip(types, function.params, strict=False)):
            if kind is int and not parameter.is_constexpr:
                (plain if parameter.do_not_specialize else special).append(n)
            elif kind in TENSORS:
                tensors.append(n)
            elif issubclass(kind, tuple):
                self.tuples.append(n)
            elif kind is not type(None):
                self.known = False
        self.plain, self.special, self.tensors = map(_getter, (plain, special, tensors))

    def kinds(self, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Returns what a kernel is compiled for; None if that is not known."""
        tensors: list[Any] = [_kind(x) for x in self.tensors(arguments)]
        integers = [
            *map(_plain, self.plain(arguments)),
            *map(_specialised, self.special(arguments)),
        ]
        for n in self.tuples:
            for x in arguments[n]:
                if type(x) in TENSORS:
                    tensors.append(_kind(x))
                elif type(x) is int:
                    integers.append(_specialised(x))
                elif x is not None:
                    return None
                tensors.append(type(x))
        return (*tensors, *integers)


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.data_ptr() % 16 == 0


def _kind_on_amd(x: Tensor) -> tuple[Any, ...]:
    """Returns the kind on AMD GPUs, where kernels are also compiled for memory that 31 bits
    address."""
    return x.dtype, x.data_ptr() % 16 == 0, x.untyped_storage().nbytes() < 2**31


if torch.version.hip is not None:
    _kind = _kind_on_amd


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda arguments: tuple(arguments[n] for n in places)


_signatures: dict[Any, _Signature] = {}
_compiled: dict[Any, Compiled] = {}


class _Thread(threading.local):
    recorder: Any = None


_thread = _Thread()


@contextlib.contextmanager
def recorded(recorder: Any) -> Iterator[None]:
    """Passes the launches of this thread to ``recorder``."""
    before, _thread.recorder = _thread.recorder, recorder
    try:
        yield
    finally:
        _thread.recorder = before


def unknown() -> None:
    """Records a launch that this cache does not hold."""
    if _thread.recorder is not None:
        _thread.recorder.launched(None, 0)


def settings() -> tuple[Any, ...] | None:
    """Returns what else Triton compiles for: the driver, the device, options of the process.
    Returns None where hooks, instrumentation or another ``JITFunction.run`` must be called at
    launches."""
    before, after = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    if (
        JITFunction.run is not _run
        or getattr(before, "calls", before)
        or getattr(after, "calls", after)
        or _runtime.add_stages_inspection_hook is not None
        or _compilation.instrumentation_mode
    ):
        return None
    driver = _drivers.active
    return driver, driver.get_current_device(), _runtime.debug


def run(
    function: JITFunction[Any], programs: int, arguments: tuple[Any, ...], options: dict[str, Any],
    where: tuple[Any, ...],
) -> None:  # fmt: skip
    """Runs ``function[(programs,)](*arguments, **options)``; ``where`` are the ``settings``."""
    names = function.fn, *map(type, arguments)
    signature = _signatures.get(names)
    if signature is None:
        signature = _kept(_signatures, names, _Signature(function, names[1:]))
    kinds = signature.kinds(arguments) if signature.known else None
    key = found = None
    if kinds is not None:
        key = names, kinds, where, *options, *options.values()
        found = _compiled.get(key)
    if found is None:
        kernel = function[(programs,)](*arguments, **options)
        rest = [parameter.name for parameter in function.params[len(arguments) :]]
        if key is None or type(kernel) is not CompiledKernel or not options.keys() >= set(rest):
            return unknown()
        constants = tuple(options[name] for name in rest)
        binary = kernel, kernel.run, kernel.function, kernel.packed_metadata
        found = _kept(_compiled, key, Compiled(*binary, constants))
    else:
        driver, device = where[:2]
        found.run(
            programs, 1, 1, driver.get_current_stream(device), found.function, found.metadata,
            None, None, None, *arguments, *found.constants,
        )  # fmt: skip
    if _thread.recorder is not None:
        _thread.recorder.launched(found, programs, arguments)


def _kept(cache: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(cache) >= _MOST:
        cache.clear()
    cache[key] = value
    return value
