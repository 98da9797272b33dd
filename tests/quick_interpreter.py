"""Makes Triton's interpreter faster. For every operation of every program it makes types and
shapes anew, converts and broadcasts. There are few cases of these. Triton's own code computes the
first operation of each case, and the others reuse the type and shape of its result."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

BINARY: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal, "and": np.bitwise_and, "or": np.bitwise_or,
    "mod": np.fmod, "lshift": np.left_shift, "rshift": np.right_shift,
    "floordiv": lambda x, y: (x - np.fmod(x, y)) // y,
}  # fmt: skip
INTEGERS = ("lshift__", "rshift__", "floordiv__")  # operations of integers alone
NEW = object.__new__


@contextlib.contextmanager
def patched(tl: Any, interpreter: Any) -> Iterator[None]:
    scopes: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", _once(interpreter._patch_lang, scopes))
        patch.setattr(interpreter, "_patch_attr", _attribute(interpreter.interpreter_semantic))
        patch.setattr(interpreter, "_patch_lang_tensor", _indexed(interpreter._patch_lang_tensor))
        _patch(tl, interpreter, patch)
        try:
            yield
        finally:
            for scope in reversed(scopes):
                scope.restore()


def _patch(tl: Any, interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    core, semantic = tl.core, interpreter.interpreter_semantic
    # As compiled, the minimum or maximum of a number and NaN is the number. The interpreter of
    # Triton 3.6 gives NaN.
    for name, operation in (("minnumf", np.fmin), ("maxnumf", np.fmax)):
        patch.setattr(type(semantic.builder), f"create_{name}", _elementwise(operation))
    for owner, name, made in (
        (core.block_type, "__init__", _block_type),
        (core.tensor, "__init__", _tensor),
        (core, "_unwrap_if_constexpr", _unwrap),
        (interpreter, "_get_np_dtype", _numpy_dtype),
        (type(semantic), "broadcast_impl_value", _broadcast),
        (interpreter.ReduceOps, "generic_reduce", _reduce),
    ):
        if hasattr(owner, name):  # another version of Triton may lack it
            patch.setattr(owner, name, made(core, getattr(owner, name)))

    def quick(owner: Any, name: str, made: Callable[..., Any], *more: Any) -> None:
        """Replaces a member. The interpreter keeps this function, since it replaces builtins
        only."""
        original = getattr(owner, name)
        patch.setattr(owner, name, made(core, interpreter, original, *more))

    for name, operation in BINARY.items():
        quick(core.tensor, f"__{name}__", _binary, operation)
        if hasattr(core.tensor, f"__r{name}__"):
            quick(core.tensor, f"__r{name}__", _binary, lambda x, y, f=operation: f(y, x))
    quick(core.tensor, "__add__", _address)
    quick(core.tensor, "__getitem__", _item)
    quick(core.tensor, "to", _cast)
    for owner in (tl, core):
        quick(owner, "minimum", _binary, np.fmin)
        quick(owner, "maximum", _binary, np.fmax)
        quick(owner, "where", _where)
        quick(owner, "cast", _cast)
        quick(owner, "load", _load)
    quick(tl, "sort", _sort)


def _elementwise(operation: Any) -> Callable[..., Any]:
    return lambda builder, x, y: builder.binary_op(x, y, operation)


class _Done:
    def restore(self) -> None:
        pass


def _once(original: Callable[[Any], Any], scopes: list[Any]) -> Callable[[Any], Any]:
    """Patches the language once for each module of kernels. Patches are undone together at the
    end."""
    modules: set[int] = set()

    def patch_lang(function: Any) -> Any:
        if id(function.__globals__) not in modules:
            modules.add(id(function.__globals__))
            scopes.append(original(function))
        return _Done()

    return patch_lang


def _attribute(semantic: Any) -> Callable[..., None]:
    """Patches a builtin without a check, in each call, whether Triton's compiler calls it."""

    def patch_attr(owner: Any, name: str, member: Any, _builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    return patch_attr


def _indexed(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Triton 3.6 converts arrays of one element by int(), for which NumPy 2.4 raises."""

    def patch_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_tensor


class _Cases:
    """The types and shapes of an operation's results, by the shapes and dtypes of its operands."""

    def __init__(self, core: Any, interpreter: Any, original: Callable[..., Any]) -> None:
        self.tensor, self.constexpr, self.bool = core.tensor, core.constexpr, core.int1
        self.handle, self.semantic = interpreter.TensorHandle, interpreter.interpreter_semantic
        self.original = original
        self.found: dict[Any, Any] = {}
        numbers = {core.int32: np.int32, core.int64: np.int64,
                   core.float32: np.float32, core.float64: np.float64}  # fmt: skip
        self.numbers = {id(dtype): number for dtype, number in numbers.items()}
        self.kinds = {id(x): float if x.is_floating() else int for x in numbers}
        self.numbers[id(core.float16)], self.numbers[id(core.int1)] = np.float16, bool

    def slow(self, *operands: Any, **options: Any) -> Any:
        return self.original(*operands, **{**options, "_semantic": self.semantic})

    def first(self, key: Any, *operands: Any, **options: Any) -> Any:
        result = self.slow(*operands, **options)
        shapes = [getattr(x, "shape", None) for x in operands]  # kept, since their ids are keys
        self.found[key] = (
            result.handle.dtype, result.shape, result.numel, result.type, result.dtype, shapes
        )  # fmt: skip
        return result

    def made(self, found: Any, data: Any) -> Any:
        handle, result = NEW(self.handle), NEW(self.tensor)
        handle.data, handle.attr = data, {}
        handle.dtype, result.shape, result.numel, result.type, result.dtype, _shapes = found
        result.handle = handle
        return result

    def operand(self, x: Any, dtype: Any) -> tuple[Any, Any]:
        """Returns the case and the data of an operand beside one of ``dtype``, or None where numpy
        might promote them otherwise than Triton. Both promote alike two integers, two floats, and
        numbers."""
        kind = type(x)
        if kind is self.tensor:
            if self.kinds.get(id(x.dtype)) is self.kinds[id(dtype)]:
                return (id(x.shape), id(x.dtype)), x.handle.data
        elif kind is int or kind is float:
            wanted = self.kinds[id(dtype)]
            if wanted is float or (kind is wanted and -(2**31) <= x < 2**31):
                return (kind,), np.array([x], self.numbers[id(dtype)])
        elif kind is self.constexpr:
            return self.operand(x.value, dtype)
        return None, None


@functools.cache
def _binary(
    core: Any, interpreter: Any, original: Callable[..., Any], operation: Callable[..., Any]
) -> Callable[..., Any]:
    cases = _Cases(core, interpreter, original)
    tensor, kinds, found, made = cases.tensor, cases.kinds, cases.found, cases.made
    if operation in (np.bitwise_and, np.bitwise_or):
        kinds[id(core.int1)] = bool
    name = original.__name__
    not_of = int if name.endswith("truediv__") else float if name.endswith(INTEGERS) else None

    def call(x: Any, y: Any, **options: Any) -> Any:
        if type(x) is tensor and type(y) is tensor and not options:
            known = found.get((id(x.shape), id(x.dtype), id(y.shape), id(y.dtype)))
            if known is not None:
                return made(known, operation(x.handle.data, y.handle.data))
        data = None
        if type(x) is int and operation in (np.fmin, np.fmax):
            x, y = y, x
        if type(x) is tensor and kinds.get(id(x.dtype), not_of) is not not_of:
            case, data = cases.operand(y, x.dtype)
        if data is None or options:
            return cases.slow(x, y, **options)
        key = id(x.shape), id(x.dtype), *case
        if key not in found:
            return cases.first(key, x, y)
        return made(found[key], operation(x.handle.data, data))

    return call


@functools.cache
def _address(core: Any, interpreter: Any, add: Callable[..., Any]) -> Callable[..., Any]:
    """Adds integers to addresses; passes other sums to ``add``."""
    cases = _Cases(core, interpreter, add)
    found, made = cases.found, cases.made

    def call(x: Any, y: Any, **options: Any) -> Any:
        if options or type(x.dtype) is not core.pointer_type:
            return add(x, y, **options)
        case, data = cases.operand(y, core.int64)
        if data is None:
            return add(x, y)
        key = id(x.shape), x.dtype.name, case
        if key not in found:
            return cases.first(key, x, y)
        size = max(1, x.dtype.element_ty.primitive_bitwidth // 8)
        return made(found[key], x.handle.data + size * data.astype(np.uint64))

    return call


@functools.cache
def _where(core: Any, interpreter: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    cases = _Cases(core, interpreter, original)
    kinds, found, made = cases.kinds, cases.found, cases.made

    def where(condition: Any, x: Any, y: Any, **options: Any) -> Any:
        kind = type(condition)
        if kind is cases.constexpr:
            condition = condition.value
            kind = type(condition)
        if kind is bool and type(x) is type(y) is cases.tensor:
            if x.shape is y.shape and x.dtype is y.dtype:
                return x if condition else y
        data = other = None
        some = x if type(x) is cases.tensor else y
        if type(some) is cases.tensor and id(some.dtype) in kinds:
            case, data = cases.operand(x, some.dtype)
            another, other = cases.operand(y, some.dtype)
        if data is None or other is None or getattr(condition, "dtype", None) is not cases.bool:
            return cases.slow(condition, x, y, **options)
        key = id(condition.shape), id(some.dtype), case, another
        if key not in found:
            return cases.first(key, condition, x, y)
        return made(found[key], np.where(condition.handle.data, data, other))

    return where


@functools.cache
def _cast(core: Any, interpreter: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    cases = _Cases(core, interpreter, original)
    kinds, numbers, found = cases.kinds, cases.numbers, cases.found

    def of_number(x: int, dtype: Any) -> Any:
        data = cases.operand(x, dtype)[1]
        if data is None:
            return cases.slow(x, dtype)
        if id(dtype) not in found:
            return cases.first(id(dtype), x, dtype)
        return cases.made(found[id(dtype)], data)

    def cast(x: Any, dtype: Any, *more: Any, **options: Any) -> Any:
        bitcast = options == {"bitcast": True}
        number = None if more or (options and not bitcast) else numbers.get(id(dtype))
        if type(x) is int and id(dtype) in kinds and not (more or options):
            return of_number(x, dtype)
        if number in (None, bool) or type(x) is not cases.tensor or id(x.dtype) not in numbers:
            return cases.slow(x, dtype, *more, **options)
        if x.dtype is dtype:
            return x
        key = id(x.shape), id(x.dtype), id(dtype), bitcast
        if key not in found:
            return cases.first(key, x, dtype, **options)
        data = x.handle.data
        return cases.made(found[key], data.view(number) if bitcast else data.astype(number))

    return cast


@functools.cache
def _item(core: Any, interpreter: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Indexes with [:, None] and the like."""
    cases = _Cases(core, interpreter, original)
    whole = slice(None)

    def item(x: Any, places: Any, **options: Any) -> Any:
        dtype = x.dtype
        known = cases.numbers.get(id(dtype)) if x.shape else None
        if x.shape and type(dtype) is core.pointer_type:
            known = dtype.name
        if (
            options
            or known is None
            or type(places) is not tuple
            or not all(place is None or place == whole for place in places)
        ):
            return cases.slow(x, places, **options)
        key = id(x.shape), known, tuple([place is None for place in places])
        if key not in cases.found:
            return cases.first(key, x, places)
        return cases.made(cases.found[key], x.handle.data[places])

    return item


@functools.cache
def _load(core: Any, interpreter: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    cases = _Cases(core, interpreter, original)

    def load(pointer: Any, mask: Any = None, other: Any = None, **options: Any) -> Any:
        dtype = getattr(pointer.dtype, "element_ty", None)
        number, data = cases.numbers.get(id(dtype)), None
        case = another = None
        plain = not options and number not in (None, bool)
        if plain and mask is None and other is None:
            at = pointer.handle.data
            where, data = np.ones(at.shape, bool), np.zeros(at.shape, number)
        elif plain and id(dtype) in cases.kinds and getattr(mask, "dtype", None) is cases.bool:
            another, data = cases.operand(0 if other is None else other, dtype)
            if data is not None:
                case = id(mask.shape)
                at, where, data = np.broadcast_arrays(pointer.handle.data, mask.handle.data, data)
        if data is None:
            return cases.slow(pointer, mask, other, **options)
        key = id(pointer.shape), pointer.dtype.name, case, another, other is None
        if key not in cases.found:
            return cases.first(key, pointer, mask, other)
        return cases.made(
            cases.found[key], interpreter._interpreter.load(at, where, data, np.dtype(number))
        )

    return load


def _sort(core: Any, interpreter: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Sorts along the last dim in one step; Triton's own sort compares and swaps in many steps."""

    def sort(x: Any, dim: Any = None, descending: Any = False) -> Any:
        if dim is not None or x.dtype.is_floating():  # floats may hold NaN
            return original(x, dim, descending)
        data = np.sort(x.handle.data)
        if core._unwrap_if_constexpr(descending):
            data = np.flip(data, -1).copy()
        return core.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

    return sort


@functools.cache
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


@functools.cache
def _tensor(core: Any, original: Any) -> Callable[..., None]:
    made: dict[Any, dict[str, Any]] = {}
    block_type = core.block_type

    def init(self: Any, handle: Any, type: Any) -> None:
        # A tensor's attributes depend on its type and shape alone; blocks of equal shape share
        # one.
        key = id(type.shape) if isinstance(type, block_type) else None
        found = made.get(key)
        if found is None:
            original(self, handle, type)
            found = made[key] = dict(vars(self))
        self.__dict__.update(found)
        self.handle, self.type, self.dtype = handle, type, type.scalar

    return init


@functools.cache
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


@functools.cache
def _reduce(core: Any, original: Any) -> Callable[..., Any]:
    """Reduces whole slices, in the order of Triton's own code, which takes single elements."""

    def reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        if self.axis is None:
            return original(self, inputs)
        total: tuple[Any, ...] = ()
        for i in range(inputs[0].shape[self.axis]):
            these = [self.to_tensor(x.handle.data.take(i, self.axis), x.dtype) for x in inputs]
            total = self.combine_fn.fn(*total, *these) if total else tuple(these)
            total = total if type(total) is tuple else (total,)
        data = [x.handle.data for x in total]
        if not inputs[0].shape[1:]:
            data = [x[0] for x in data]  # a number is an array of one element
        if self.keep_dims:
            data = [np.expand_dims(x, self.axis) for x in data]
        return [self.to_tensor(x, y.dtype) for x, y in zip(data, inputs, strict=True)]

    return reduce


@functools.cache
def _numpy_dtype(core: Any, original: Any) -> Callable[[Any], Any]:
    made: dict[Any, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        key = type(dtype), dtype.name
        found = made.get(key)
        if found is None:
            found = made[key] = original(dtype)
        return found

    return numpy_dtype


@functools.cache
def _unwrap(core: Any, original: Any) -> Callable[[Any], Any]:
    constexpr = core.constexpr

    def unwrap(x: Any) -> Any:
        kind = type(x)
        if kind is int or kind is core.dtype or kind is core.block_type:
            return x
        return x.value if kind is constexpr else original(x)

    return unwrap
