"""A libcuda that runs the launches of the compiled library in the emulator of PTX, so that launch
plans are repeated as on a GPU: from C++, with addresses."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import emulation
import pytest
import torch
from oracle import assert_same

from additive_attn.backends.triton import plans, programs
from tools import mock_driver


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    ]  # fmt: skip


_SIZES = {number: dtype.itemsize for dtype, number in programs._TYPES.items()}
_Parameters = ctypes.POINTER(ctypes.c_void_p)


class _Replay:
    """One replay of a plan, whose numbers list the memory that the library allocates for it."""

    def __init__(self, program: list[int], given: int) -> None:
        numbers = iter(program)
        self.bytes = {given: next(numbers)}
        for _ in range(next(numbers)):
            tensor, dtype, dims = (next(numbers) for _ in range(3))
            shape, stride = ([next(numbers) for _ in range(dims)] for _ in range(2))
            last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            self.bytes[tensor] = (last + 1) * _SIZES[dtype] if all(shape) else 0
        self.launches: list[list[tuple[int, int]]] = []
        for _ in range(next(numbers)):
            *_, count = (next(numbers) for _ in range(5))
            self.launches.append([(next(numbers), next(numbers)) for _ in range(count)])
        self.starts: dict[int, int] = {}
        self.problem: Exception | None = None

    def launch(self, config: _Config, function: int, parameters: Any) -> None:
        _, launcher = emulation.functions[function]
        metadata = launcher.metadata
        assert list(config.block) == [32 * metadata.num_warps, 1, 1], list(config.block)
        assert config.shared == metadata.shared and config.count == 0
        kinds, places = list(_flat(launcher.signature)), self.launches.pop(0)
        values, names = [], []
        for n, (kind, (tensor, offset)) in enumerate(zip(kinds, places, strict=True)):
            pointer = kind[0] == "*"
            size = 8 if pointer else max(int(kind[1:]) // 8, 1)
            read = ctypes.string_at(parameters[n], size)
            value: Any = int.from_bytes(read, "little", signed=kind[0] == "i")
            if tensor in self.bytes:
                start = value - offset
                if tensor not in self.starts:
                    emulation.made(start, self.bytes[tensor])
                assert self.starts.setdefault(tensor, start) == start
            values.append(emulation.at(value) if pointer else value)
            names.append(f"parameter {n}")
        emulation.run(function, tuple(config.grid), values, names)


_replays: list[_Replay] = []
_library_replay = plans._replay


def _flat(signature: Any) -> Iterator[str]:
    for kind in signature:
        if isinstance(kind, tuple):
            yield from _flat(kind)
        elif kind != "constexpr":
            yield str(kind)


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, _Parameters)
def _runs(config: Any, function: int, parameters: Any) -> int:
    try:
        _replays[-1].launch(config.contents, function, parameters)
    except Exception as error:  # C++ cannot pass an exception on
        _replays[-1].problem = error
        return 1
    return 0


@functools.cache
def _install() -> None:
    place = ctypes.c_void_p.in_dll(mock_driver.mock_library(), "runs")
    place.value = ctypes.cast(_runs, ctypes.c_void_p).value


def replay(number: int, stream: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Replaces ``plans._replay``."""
    plan = plans._plans.get(plans._key(number, tensors))
    if not isinstance(plan, plans.Plan) or plan.program is None:
        return []
    _install()
    now = _Replay(plan.program, len(tensors))
    _replays.append(now)
    try:
        results: list[torch.Tensor] = _library_replay(number, stream, tensors)
    except RuntimeError:
        if now.problem is not None:
            raise now.problem from None
        raise
    finally:
        _replays.pop()
    own = {x.data_ptr(): x for x in results}
    for tensor, start in now.starts.items():
        emulation.gone(start, None if tensor == len(tensors) else own[start])
    assert not (results and now.launches)
    return results


@contextlib.contextmanager
def plans_in_the_emulator() -> Iterator[None]:
    """Gives CPU tensors launch plans too, and registers all memory that plans allocate."""

    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        x = torch.empty_strided(*arguments, **options)
        emulation.memory.append(x)
        return x

    def operate(*arguments: Any) -> Any:
        made = original(*arguments)
        emulation.memory.extend(x for _, x in made)
        return made

    original = plans._operate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "on_cpu", True)
        patch.setattr(plans, "_empty", empty)
        patch.setattr(plans, "_operate", operate)
        if plans._replay is not None:
            patch.setattr(plans, "_replay", emulation.tracked(replay))
        plans.forget()
        try:
            yield
        finally:
            plans.forget()
            emulation.memory.clear()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _restore(x: torch.Tensor, old: torch.Tensor) -> None:
    if not torch.equal(_bits(x), _bits(old)):  # an operator has added to it
        once = tuple(slice(0, 1 if step == 0 else None) for step in x.stride())
        x[once].copy_(old[once])


def _replays_of(plan: Any, given: list[torch.Tensor]) -> Iterator[Any]:
    """Yields the replays of a plan: in Python, and by the library if it supports the plan."""
    yield lambda: plan.replay(given, 0)
    if plan.program is not None and plans._library is not None:
        plans._plans[plans._key(0, given)] = plan
        plans._library.keep_plan(0, given, plan.program)
        yield lambda: plans._replay(0, 0, given)


def with_plans(operator: Any) -> Any:
    """Wraps ``operator``: repeats each call from its plan, and asserts that the bits are equal."""

    def call(*arguments: Any) -> Any:
        given = [x for x in arguments if isinstance(x, torch.Tensor)]
        with plans_in_the_emulator():
            before = [x.clone() for x in given]
            results, plan = plans._written_down(operator.__wrapped__, arguments)
            after = [x.clone() for x in given]
            emulation.memory.extend(given)
            every = [results] if isinstance(results, torch.Tensor) else results
            for replay in _replays_of(plan, given) if isinstance(plan, plans.Plan) else ():
                for x, old in zip(given, before, strict=True):
                    _restore(x, old)
                for x, y in zip((*replay(), *given), (*every, *after), strict=True):
                    assert_same(x, y)
        return results

    return call if hasattr(operator, "__wrapped__") else operator
