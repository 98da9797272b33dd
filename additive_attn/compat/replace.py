"""Swaps the attention layers of a model for those of this package, in place."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from additive_attn.compat._known import KNOWN, Known


class Swap(NamedTuple):
    """What :func:`replace_attention` did with one layer."""

    name: str  # in the model
    kind: str  # its class, with its module
    swapped: bool
    reason: str  # why it was left

    def __str__(self) -> str:
        done = "swapped" if self.swapped else f"left: {self.reason}"
        return f"{self.name or 'the model'} ({self.kind}): {done}"


def replace_attention(model: nn.Module) -> list[Swap]:
    """Swaps the layers of ``model`` that :mod:`additive_attn.compat` has classes for.

    A layer stays the same object, with its parameters, buffers, hooks, device, dtype and training
    flag: only the code that computes it changes. Optimisers, references to the layer and
    ``isinstance`` stay valid. Layers are found by the names of their classes; no other project is
    imported.

    A layer is swapped if its class, not one derived from it, has the signature, the parameters
    and, in a trial on a copy of it with small random inputs, in training and in evaluation, the
    results of ours. All others are left as they are.

    Returns:
        one entry for each layer that has a known class, in the order of ``named_modules()``.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module.")
    swaps = []
    for name, module in model.named_modules():
        found = _known(module)
        if found is None:
            continue
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        reason = _reason(module, found)
        if reason is None:
            module.__class__ = _joined(KNOWN[found].ours, type(module))
        swaps.append(Swap(name, kind, reason is None, reason or ""))
    return swaps


def _known(module: nn.Module) -> str | None:
    """Returns the name of the known class that a module has, or is derived from."""
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
        return name if name in KNOWN else None
    names = (base.__name__ for base in type(module).__mro__)
    return next((name for name in names if name in KNOWN), None)


def _reason(module: nn.Module, name: str) -> str | None:
    """Says why a module is left; None if it can be swapped."""
    cls, known = type(module), KNOWN[name]
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has compiled it; swap before scripting"
    if issubclass(cls, known.ours):
        return "it is of this package already"
    if cls.__name__ != name:
        return f"it is derived from {name}, and may compute something else"
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    given, ours = (list(inspect.signature(x.forward).parameters) for x in (cls, known.ours))
    if given != ours:
        return f"its forward takes ({', '.join(given)}), ours ({', '.join(ours)})"
    if any(type(x) not in (nn.Parameter, Tensor) for x in _tensors(module).values()):
        return "its parameters are sharded, quantised or otherwise not plain tensors"
    if any(x.is_meta for x in _tensors(module).values()):
        return "its parameters have no values yet; swap after loading them"
    try:
        arguments = known.arguments(module)
        with torch.device("meta"):
            expected = _tensors(known.ours(*arguments))
    except Exception as error:
        return str(error) if isinstance(error, ValueError) else f"it has other parts ({error})"
    shapes, wanted = ({k: tuple(x.shape) for k, x in y.items()} for y in
                      (_tensors(module), expected))  # fmt: skip
    if shapes != wanted:
        differ = sorted({k for k, _ in shapes.items() ^ wanted.items()})
        return f"its parameters differ from ours: {', '.join(differ)}"
    return _tried(module, known)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _tried(module: nn.Module, known: Known) -> str | None:
    """Runs both on the same inputs, and says why they differ; None if they do not."""
    try:
        layer = copy.deepcopy(module)
    except Exception as error:
        return f"it cannot be copied for a trial ({error}); swap between two sequences"
    for part in layer.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(part, hooks).clear()
    parameter = next(layer.parameters())

    def results(training: bool) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device="cpu").to(parameter)

        layer.train(training)
        with torch.no_grad():
            return [x for x in tree_leaves(known.trial(layer, randn)) if isinstance(x, Tensor)]

    try:
        expected = [results(training) for training in (True, False)]
        layer.__class__ = _joined(known.ours, type(module))
        found = [results(training) for training in (True, False)]
        eps = torch.finfo(parameter.dtype).eps
        torch.testing.assert_close(found, expected, rtol=eps**0.6, atol=eps**0.6, equal_nan=True)
    except Exception as error:
        return f"a trial did not give the same results ({str(error).splitlines()[0]})"
    return None


def _join(ours: type[nn.Module], original: type[nn.Module]) -> Any:
    """Creates a class that computes as ours does and is still the original for ``isinstance``."""

    def reduce(layer: nn.Module, protocol: Any) -> Any:
        return _rebuilt, (ours, original), layer.__dict__.copy()

    names = {"__module__": original.__module__, "__doc__": original.__doc__,
             "__qualname__": original.__qualname__, "__reduce_ex__": reduce}  # fmt: skip
    return type(original.__name__, (ours, original), names)


_joined: Any = functools.cache(_join)


def _rebuilt(ours: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    cls = _joined(ours, original)
    layer: nn.Module = cls.__new__(cls)
    return layer
