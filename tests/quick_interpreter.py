"""Triton's interpreter in less time. For every operation of every program it makes types and
shapes anew, of which there are few: here each is made once, by Triton's own code, and copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def patch(tl: Any, interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    core, semantic = tl.core, type(getattr(interpreter, "interpreter_semantic", None))
    for owner, name, made in (
        (core.block_type, "__init__", _block_type),
        (core.tensor, "__init__", _tensor),
        (core, "_unwrap_if_constexpr", _unwrap),
        (interpreter, "_get_np_dtype", _numpy_dtype),
        (semantic, "broadcast_impl_value", _broadcast),
    ):
        if hasattr(owner, name):  # what another version lacks is left as it is
            patch.setattr(owner, name, made(core, getattr(owner, name)))


def _block_type(core: Any, original: Any) -> Callable[..., None]:
    made: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, Any] = {}
    constexpr = core.constexpr

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([x.value if type(x) is constexpr else x for x in shape])
        key = type(element_ty), element_ty.name, sizes
        found = made.get(key)
        if found is None:
            original(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            found = made[key] = dict(vars(self))
        self.__dict__.update(found)
        self.element_ty = element_ty

    return init


def _tensor(core: Any, original: Any) -> Callable[..., None]:
    made: dict[Any, dict[str, Any]] = {}
    block_type = core.block_type

    def init(self: Any, handle: Any, type: Any) -> None:
        # What a tensor holds depends on its shape, which blocks of equal shape share, and type.
        key = id(type.shape) if isinstance(type, block_type) else None
        found = made.get(key)
        if found is None:
            original(self, handle, type)
            found = made[key] = dict(vars(self))
        self.__dict__.update(found)
        self.handle, self.type, self.dtype = handle, type, type.scalar

    return init


def _broadcast(core: Any, original: Any) -> Callable[..., Any]:
    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block():
            if b.is_block() and a.shape is b.shape:
                return lhs, rhs
        elif not b.is_block():
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast


def _numpy_dtype(core: Any, original: Any) -> Callable[[Any], Any]:
    made: dict[Any, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        key = type(dtype), dtype.name
        found = made.get(key)
        if found is None:
            found = made[key] = original(dtype)
        return found

    return numpy_dtype


def _unwrap(core: Any, original: Any) -> Callable[[Any], Any]:
    constexpr = core.constexpr

    def unwrap(x: Any) -> Any:
        kind = type(x)
        if kind is int or kind is core.dtype or kind is core.block_type:
            return x
        return x.value if kind is constexpr else original(x)

    return unwrap
