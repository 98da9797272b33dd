"""Switches between the paths that compute on the CPU, within one process: every instruction set of
the kernel, plain PyTorch as users get it (small calls as a whole) and always in blocks, and the
GPU's kernels in Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import emulation
import numpy as np
import pytest
import quick_interpreter
import torch

from additive_attn.backends.plain import steps, whole
from additive_attn.ops import dispatch

DEVICE = os.environ.get("ADDITIVE_ATTN_TEST_DEVICE", "cpu")  # all tests run there
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
PLAIN = ("pytorch", "blocks")
FORCED = os.environ.get("ADDITIVE_ATTN_CPU")


def _select(instruction_set: str) -> str:
    """Selects the kernels of an instruction set, and returns their name."""
    name: str = torch.ops.additive_attn.select_cpu_isa(instruction_set)
    return name


def _runs(instruction_set: str) -> bool:
    try:
        _select(instruction_set)
    except RuntimeError:
        return False
    return True


@functools.cache
def native() -> str:
    """The path that users of this machine get, on which every test runs."""
    if DEVICE != "cpu":
        return "triton" if dispatch.gpu_path()[0] is not None else "pytorch"
    return dispatch.cpu_path() if FORCED is None else FORCED


@functools.cache
def available() -> tuple[str, ...]:
    """All paths, the native one first. It is the only one if ADDITIVE_ATTN_CPU names it, or on a
    GPU."""
    first = native()
    if DEVICE != "cpu" or FORCED is not None or first == "pytorch":
        return (first,)
    others = [name for name in INSTRUCTION_SETS if name != first and _runs(name)]
    others and _select("")
    interpreter = ["triton"] if importlib.util.find_spec("triton") else []
    return (first, *others, *PLAIN, *interpreter)


class _Override:
    """Replaces the implementations of the CPU's operators, and counts their calls."""

    def __init__(self, operators: dict[str, Callable[..., Any]]) -> None:
        self.calls = 0
        self.library = torch.library.Library("additive_attn", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="[^$]*only once for all operators")
            for name, function in operators.items():
                self.library.impl(name, self.counted(function), "CPU", allow_override=True)

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            return function(*arguments)

        return call


_interpreters: dict[Any, Any] = {}


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    """Runs Triton's kernels in its interpreter, as if TRITON_INTERPRET=1 had been set before the
    first import. Afterwards they compile again."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def interpreter(kernel: Any) -> Any:
        if kernel.fn not in _interpreters:
            _interpreters[kernel.fn] = InterpretedFunction(kernel.fn)
        return _interpreters[kernel.fn]

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):  # as on a GPU
            interpreter(kernel).run(*args, **kwargs)

    ready: dict[Any, Callable[..., Any]] = {}

    def nested(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.fn not in ready:
            triton.runtime.interpreter._patch_lang(kernel.fn)
            ready[kernel.fn] = interpreter(kernel).rewrite()
        return ready[kernel.fn](*args, **kwargs)

    originals = JITFunction.run, JITFunction.__call__
    JITFunction.run = run
    JITFunction.__call__ = nested
    triton.knobs.runtime.interpret = True
    try:
        with quick_interpreter.patched(triton.language, triton.runtime.interpreter):
            yield
    finally:
        triton.knobs.runtime.interpret = False
        JITFunction.run, JITFunction.__call__ = originals


_running: list[str] = []


def current() -> str:
    """The path that is computed on now."""
    return _running[-1] if _running else native()


@contextlib.contextmanager
def running(path: str) -> Iterator[None]:
    """Calls within the context compute on ``path``."""
    _running.append(path)
    try:
        with _switched(path):
            yield
    finally:
        _running.pop()


@contextlib.contextmanager
def _switched(path: str) -> Iterator[None]:
    """Switches to ``path``, and asserts that it is what computes."""
    if path == native():
        assert DEVICE != "cpu" or FORCED == "baseline" or dispatch.cpu_path() == path
        yield
        return
    if path in INSTRUCTION_SETS:
        name = _select(path)
        try:
            yield
            assert dispatch.cpu_path() == name, f"{dispatch.cpu_path()} ran instead of {name}"
        finally:
            _select("")
        return
    with contextlib.ExitStack() as stack:
        if path == "triton":
            from additive_attn.backends import triton

            compiled = emulation.installed()
            stack.enter_context(emulation.running() if compiled else _interpreted())
            operators = {name: getattr(triton, name, None) for name in dispatch.PLAIN}
            override = _Override(
                {
                    name: dispatch.PLAIN[name] if operator is None
                    else emulation.operator(operator) if compiled
                    else operator
                    for name, operator in operators.items()
                }
            )  # fmt: skip
        else:
            override = _Override(dispatch.PLAIN)
        stack.callback(override.library._destroy)
        if path == "pytorch":
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(dispatch, "cpu_is_plain", True)
            for name in ("attend", "score"):
                patch.setattr(whole, name, override.counted(getattr(whole, name)))
            patch.setattr(steps, "convolved", override.counted(steps.convolved))
        yield
        assert override.calls, f"nothing was computed by {path}"
