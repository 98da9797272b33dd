"""What does not fit a layer of another code base. Its own classes take anything that happens to
work; so nothing is checked until a call has failed, but what ours alone would take silently."""

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
from additive_attn.ops.checks import INTEGERS, bounds, is_readable

_ERRORS = AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError


def explained(**wanted: str) -> Callable[[Any], Any]:
    """For a method: ``wanted`` says of each argument what it must be, as "(B, Lk) or None", beside
    those annotated as numbers. It is read to find the first that does not fit."""

    def decorate(method: Any) -> Any:
        parameters = tuple(inspect.signature(method).parameters.values())[1:]
        names = [each.name for each in parameters]
        numbers = {"int": "an integer", "float": "a number"}
        texts = {x.name: numbers[x.annotation] for x in parameters if x.annotation in numbers}
        texts.update(wanted)

        @functools.wraps(method)
        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return method(self, *arguments, **options)
            except _ERRORS as error:
                given = {**dict(zip(names, arguments, strict=False)), **options}
                caller = type(self).__name__
                caller += "" if method.__name__ == "__init__" else f".{method.__name__}"
                _refuse(caller, _parameter(self), texts, given, type(error))
                raise

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
        found = _misfit(given[name], text, parameter) if name in given else ""
        if found:
            kind = kind if kind in (RuntimeError, ValueError) else TypeError
            raise kind(f"{caller} got {name} {found}, but needs {text}.") from None


def _misfit(x: Any, text: str, parameter: Tensor | None) -> str:
    """What is wrong with an argument; empty where nothing is."""
    if x is None:
        return "" if "None" in text else "None"
    if text.startswith(("an integer", "a number")):
        is_number = isinstance(x, Integral if text.startswith("an integer") else Real)
        return "" if is_number and not isinstance(x, bool) else f"{x!r:.60}"
    if not isinstance(x, Tensor):
        wanted = Integral if text.startswith("integers") else Tensor
        listed = isinstance(x, list | tuple) and "list" in text
        return "" if listed and all(isinstance(each, wanted) for each in x[:1]) else f"{x!r:.60}"
    if "(" not in text or x.layout is not torch.strided or x.is_nested:
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
    """Of a mask ``(B, Lk)`` beside keys ``(B, ..., Lk, H)``."""
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
