"""Kernels whose parameters are named tuples, and the tuples that several of them take.

Triton accepts tuples, but compiles a kernel anew for each kind of number in them, whatever
``do_not_specialize`` says. So ``flat`` makes a function whose parameters are the members. In
Triton 3.6 a tuple of tuples must hold no number beside them: constants in these would be lost."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable
from typing import Any, NamedTuple, NewType, get_args, get_type_hints

import triton
import triton.language as tl

from additive_attn.backends.triton.batch import entry_offset

# A number for whose kinds a kernel is not compiled anew.
Varying = NewType("Varying", int)


class Matrix(NamedTuple):
    """A tensor (outer, inner, rows, columns): where it begins, and its strides."""

    data: Any
    outer: Varying
    inner: Varying
    row: int
    column: int


class OfKeys(NamedTuple):
    """A ``Matrix`` with a column for each key: its row stride varies with the number of keys."""

    data: Any
    outer: Varying
    inner: Varying
    row: Varying
    column: int


class Row(NamedTuple):
    """A tensor (outer, inner, columns)."""

    data: Any
    outer: Varying
    inner: Varying
    column: int


class Scalar(NamedTuple):
    """A tensor (outer, inner)."""

    data: Any
    outer: Varying
    inner: Varying


class Dropout(NamedTuple):
    """The parameters of dropout (``dropout.py``)."""

    seed: Scalar
    threshold: Varying
    keep_bits: Varying


@triton.jit
def at_entry(x, o, m, ALIGNED: tl.constexpr = False):
    """Returns where entry (o, m) of a tensor begins."""
    return x.data + entry_offset(o, x.outer, m, x.inner, ALIGNED)


def flat(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[str]]:
    """Replaces each parameter of ``function`` that is annotated as a tuple with numbers by its
    members: ``mask``, ``mask_outer`` and so on for ``mask: Matrix``. Also returns which parameters
    are ``Varying``. ``Matrix | None`` is None where its first member is."""
    hints = get_type_hints(function)
    if not any(map(_tuple_with_numbers, hints.values())):
        return function, []
    used = {"__name__": function.__module__, "tl": tl, "body": triton.jit(function)}
    parameters: dict[str, Any] = {}
    arguments = [
        _argument(name, hints.get(name), parameters, used)
        for name in inspect.signature(function).parameters
    ]
    head = ", ".join(
        f"{name}: tl.constexpr" if hint is tl.constexpr else name
        for name, hint in parameters.items()
    )
    inner = ",\n        ".join(arguments)
    source = f"def {function.__name__}({head}):\n    body(\n        {inner}\n    )\n"
    # Triton reads the source of a function through ``inspect``, which takes it from this cache.
    place = f"<{function.__module__}.{function.__name__}>"
    linecache.cache[place] = len(source), None, source.splitlines(keepends=True), place
    exec(compile(source, place, "exec"), used)
    varying = [name for name, hint in parameters.items() if hint is Varying]
    return used[function.__name__], varying


def _argument(name: str, hint: Any, parameters: dict[str, Any], used: dict[str, Any]) -> str:
    """Returns the expression that replaces one parameter, and adds the parameters in it to
    ``parameters``."""
    kind = _tuple_with_numbers(hint)
    if kind is None:
        parameters[name] = hint
        return name
    used[kind.__name__] = kind
    count = len(parameters)
    members = [
        _argument(name if field == "data" else f"{name}_{field}", own, parameters, used)
        for field, own in get_type_hints(kind).items()
    ]
    together = f"{kind.__name__}({', '.join(members)})"
    first = list(parameters)[count]
    return together if kind is hint else f"{together} if {first} is not None else None"


def _tuple_with_numbers(hint: Any) -> Any:
    for kind in get_args(hint) or (hint,):
        if isinstance(kind, type) and issubclass(kind, tuple):
            hints = get_type_hints(kind).values()
            if any(x in (int, Varying) or _tuple_with_numbers(x) for x in hints):
                return kind
    return None
