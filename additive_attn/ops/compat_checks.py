"""Errors of layers that replace those of other code bases. The originals accept anything that
happens to work, so a call is checked only after it has failed. Only what the originals raise for
and this package would accept is checked before."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, fx, nn

from additive_attn.ops.autocast import autocast_dtype
from additive_attn.ops.checks import INTEGERS, bounds, is_dense, is_readable

_ERRORS = (
    AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError,
    ZeroDivisionError,
)  # fmt: skip


def explained(**wanted: str) -> Callable[[Any], Any]:
    """Decorates a method: when it fails, the error names the first argument that does not fit.
    ``wanted`` describes each argument, such as "(B, Lk) or None"; those annotated as int or float
    need no description. Equal letters are equal sizes. Integers that the layer was constructed
    with are letters too, by their names."""

    def decorate(method: Any) -> Any:
        parameters = tuple(inspect.signature(method).parameters.values())[1:]
        names = [each.name for each in parameters]
        numbers = {"int": "an integer, 0 or more", "float": "a number, 0 or more"}
        texts = {x.name: numbers[x.annotation] for x in parameters if x.annotation in numbers}
        numbered = [x.name for x in parameters if x.annotation == "int"]
        texts.update(wanted)

        @functools.wraps(method)
        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            making = method.__name__ == "__init__"
            given: dict[str, Any] = dict(options) if making else options
            try:
                results = method(self, *arguments, **options)
            except _ERRORS as error:
                given = {**dict(zip(names, arguments, strict=False)), **options}
                caller = type(self).__name__ + ("" if making else f".{method.__name__}")
                ordered = _in_order(texts, getattr(self, "batch_first", False) is True)
                _refuse(caller, _parameter(self), ordered, given, type(error))
                _refuse_sizes(caller, self.__dict__.get("_sizes", {}), ordered, given, error)
                _refuse_sequence(caller, self, names[0], given.get(names[0]), error)
                raise
            if making:
                given.update(zip(names, arguments, strict=False))
                known = getattr(self, "_size_names", {})
                sizes = {known.get(n, n): given[n] for n in numbered if n in given}
                self.__dict__.setdefault("_sizes", {}).update(sizes)
            return results

        return run

    return decorate


def _parameter(layer: Any) -> Tensor | None:
    made = "_parameters" in layer.__dict__ and isinstance(layer, nn.Module)
    return next(layer.parameters(), None) if made else None


def _refuse(
    caller: str, parameter: Tensor | None, wanted: dict[str, str], given: dict[str, Any], kind: Any
) -> None:
    if any(isinstance(x, fx.Proxy) for x in given.values()):
        return
    for name, text in wanted.items():
        if kind is ZeroDivisionError:
            text = text.replace("an integer, 0", "an integer, 1")
        found = _misfit(given[name], text, parameter) if name in given else ""
        if found:
            kind = kind if kind in (RuntimeError, ValueError) else TypeError
            raise kind(f"{caller} got {name} {found}, but needs {text}.") from None


def _in_order(texts: dict[str, str], batch_first: bool) -> dict[str, str]:
    """Puts the batch first in texts that have it second, for a layer of ``batch_first``."""
    swapped = {name: re.sub(r"\((L\w), B", r"(B, \1", text) for name, text in texts.items()}
    return swapped if batch_first else texts


def _refuse_sizes(
    caller: str, sizes: dict[str, int], wanted: dict[str, str], given: dict[str, Any], error: Any
) -> None:
    """Raises where a letter stands for two sizes. A batch of 1 is reported after all others."""
    for either in (1, None):
        known = {name: (size, "in this layer") for name, size in sizes.items()}
        for name, text in wanted.items():
            x = given.get(name)
            for each in x if isinstance(x, list | tuple) and "list of (" in text else (x,):
                shape = tuple(getattr(each, "shape", ()))
                if isinstance(each, list | tuple) and text.startswith("integers"):
                    shape = (len(each),)
                for letter, size in zip(_letters(text, len(shape)), shape, strict=False):
                    least = int(letter) if letter.isdigit() else size
                    needed, where = known.setdefault(letter, (least, f"in {name}"))
                    batch = letter == "B" and either in (size, needed)
                    if size != needed and not batch:
                        is_so = "" if letter.isdigit() else f", where {letter} is {needed} {where}"
                        kind = type(error) if type(error) is RuntimeError else ValueError
                        raise kind(
                            f"{caller} got {name} of shape {shape}, but needs {text}{is_so}."
                        ) from None


def _refuse_sequence(caller: str, layer: Any, name: str, x: Any, error: Any) -> None:
    """Raises where a layer still holds the mask of other sequences."""
    mask = getattr(layer, "mask", None) if hasattr(layer, "reset") else None
    if isinstance(mask, Tensor) and isinstance(x, Tensor) and mask.shape != x.shape[:2]:
        if type(error) in (RuntimeError, ValueError):
            raise type(error)(
                f"{caller} got {name} of shape {tuple(x.shape)}, but holds sequences of (B, Lk) = "
                f"{tuple(mask.shape)}. Call reset() before you pass others."
            ) from None


def _letters(text: str, rank: int) -> list[str]:
    """Returns the letters of the first shape of this rank in the text."""
    groups = [re.findall(r"\w+", group) for group in re.findall(r"\(([^)]*)\)", text)]
    return next((group for group in groups if len(group) == rank), [])


def _misfit(x: Any, text: str, parameter: Tensor | None) -> str:
    """Says what is wrong with an argument; empty where nothing is."""
    if x is None:
        return "" if "None" in text else "None"
    if text.startswith(("an integer", "a number")):
        kind: Any = Integral if text.startswith("an integer") else Real
        fits = isinstance(x, kind) and not isinstance(x, bool) and x >= ("1 or" in text)
        return "" if fits else f"{x!r:.60}"
    if not isinstance(x, Tensor):
        if not (isinstance(x, list | tuple) and "list" in text):
            return f"{x!r:.60}"
        if text.startswith("integers"):
            return "" if all(isinstance(each, Integral) for each in x) else f"{x!r:.60}"
        whole = "list of (" in text
        found = [_misfit(each, "(B, Lk)", parameter) for each in (x if whole else x[:1])]
        wrong = [f"that holds {each}" for each in found if each]
        return next(iter(wrong), "") if x else "that is empty"
    if text.startswith("a list"):
        return "that is a tensor"
    if "(" not in text or not is_dense(x):
        return f"that is a tensor {'nested' if x.is_nested else x.layout}"
    ranks = {group.count(",") + (group[-1] != ",") for group in re.findall(r"\(([^)]*)\)", text)}
    if x.dim() not in ranks:
        return f"of shape {tuple(x.shape)}"
    if parameter is not None and x.device != parameter.device:
        return f"on {x.device}, and the layer is on {parameter.device}"
    usual = {"bool": (torch.bool,), "inte": INTEGERS}.get(text[:4])
    if usual is not None:
        return (
            ""
            if x.dtype in usual or (text.startswith("inte") and x.is_floating_point())
            else (f"of {x.dtype}")
        )
    if parameter is None:
        return ""
    casts = autocast_dtype(x.device.type) is not None and x.is_floating_point()
    same = x.dtype == parameter.dtype or casts
    return "" if same else f"of {x.dtype}, and the layer is of {parameter.dtype}"


def check_keys(mask: Tensor, key: Tensor) -> None:
    """Checks a mask ``(B, Lk)`` beside keys ``(B, ..., Lk, H)``."""
    batch, keys = key.shape[0], key.shape[-2]
    rows = mask.shape[0]
    if mask.dim() != 2 or mask.shape[1] != keys or not (rows == batch or rows == 1 or batch == 1):
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}, but needs one entry per key, "
            f"{(batch, keys)}."
        )


def check_lengths(name: str, lengths: Tensor, batch: int, keys: int) -> None:
    if len(lengths) not in (1, batch):
        raise ValueError(f"{name} holds {len(lengths)} lengths for {batch} sequences.")
    if is_readable(lengths) and lengths.numel() and lengths.dtype in INTEGERS:
        low, high = bounds(lengths)
        if low < 0 or high > keys:
            raise ValueError(
                f"{name} holds {low} to {high}, but there are {keys} keys: lengths lie between 0 "
                f"and {keys}."
            )
