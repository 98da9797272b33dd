"""Runs a decoder's loop with two layers, and compares them by the accuracy rule."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import generator
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Loop = Callable[[Any, Inputs], list[Tensor]]


class Sizes(NamedTuple):
    batch: int = 3
    keys: int = 11
    memory: int = 6
    query: int = 5
    hidden: int = 8
    steps: int = 5


SIZES = Sizes()


def inputs(sizes: Sizes = SIZES, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Returns the memory, what is added to the query of each step, and the weights that feed a
    context back."""
    g = generator(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "memory": randn(sizes.batch, sizes.keys, sizes.memory),
        "steps": randn(sizes.steps, sizes.batch, sizes.query),
        "feedback": randn(sizes.memory, sizes.query) / sizes.memory**0.5,
    }


def lengths(sizes: Sizes = SIZES) -> Tensor:
    return torch.linspace(sizes.keys, 1, sizes.batch).long()


def padding(sizes: Sizes = SIZES) -> Tensor:
    """True = ignore."""
    return torch.arange(sizes.keys) >= lengths(sizes)[:, None]


def plain(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, ignored: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes one query per sequence by the formula. Terms that change per step are part of the
    key."""
    scores = scale * (torch.tanh(query[..., None, :] + key) @ weight.unsqueeze(-1)).squeeze(-1)
    if ignored is not None:
        scores = scores.masked_fill(ignored, -torch.inf)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(-2) @ value).squeeze(-2), weights


def next_query(given: Inputs, t: int, context: Tensor | None) -> Tensor:
    query = given["steps"][t]
    return query if context is None else torch.tanh(query + context @ given["feedback"])


def run(layer: nn.Module, loop: Loop, given: Inputs) -> tuple[list[Tensor], Inputs]:
    """Outputs of all steps, and the gradients of inputs and parameters."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    outputs = loop(layer, leaves)
    g = generator(7)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in outputs]
    wanted = {**leaves, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(
        outputs, list(wanted.values()), upstream, allow_unused=True, materialize_grads=True
    )
    return [x.detach() for x in outputs], dict(zip(wanted, grads, strict=True))


def check(
    ours: nn.Module, reference: nn.Module, loop: Loop, reference_loop: Loop | None = None,
    sizes: Sizes = SIZES,
) -> None:  # fmt: skip
    """Compares results and all gradients: to 1e-10 in float64; in float32, the errors against
    float64 are at most twice (gradients: three times) those of the reference."""
    theirs = reference_loop or loop
    exact = run(reference.double(), theirs, inputs(sizes))
    found = run(ours.double(), loop, inputs(sizes))
    _compare(found, exact, lambda best, _: 1e-10 * (1 + best.abs().max().item()))
    single = inputs(sizes, torch.float32)
    rounded = {name: x.double() for name, x in single.items()}
    for layer in (ours, reference):
        layer.float()
    same = run(reference, theirs, single)
    found = run(ours, loop, single)
    exact = run(reference.double(), theirs, rounded)
    eps = torch.finfo(torch.float32).eps

    def allowed(best: Tensor, error: float, factor: int = 3) -> float:
        return factor * error + 16 * eps * (1 + best.abs().max().item())

    _compare(found, exact, allowed, same)
    ours.double()


def _compare(found: Any, exact: Any, allowed: Any, same: Any = None) -> None:
    names = [f"output {i}" for i in range(len(exact[0]))] + list(exact[1])
    bests = [*exact[0], *exact[1].values()]
    mine = [*found[0], *found[1].values()]
    others = bests if same is None else [*same[0], *same[1].values()]
    assert len(mine) == len(bests) == len(others)
    for name, x, best, other in zip(names, mine, bests, others, strict=True):
        assert x.shape == best.shape, f"{name}: {tuple(x.shape)}, {tuple(best.shape)}"
        error = (x.double() - best).abs().max().item()
        plain_error = (other.double() - best).abs().max().item()
        assert error <= allowed(best, plain_error), f"{name}: {error:.3g}"


def exchange(ours: nn.Module, theirs: nn.Module) -> None:
    """Asserts that each of two layers loads the other's state_dict."""
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())


def project(package: str, file: str) -> Any:
    """Imports a module of another project from its file. The packages around it may need more than
    is installed here, so their own code does not run."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    root = Path(found.submodule_search_locations[0])
    parts = [package, *Path(file).with_suffix("").parts]
    before = dict(sys.modules)
    try:
        for folder in sorted(root.rglob("__init__.py")):
            name = ".".join([package, *folder.parent.relative_to(root).parts])
            bare = types.ModuleType(name)
            bare.__path__ = [str(folder.parent)]
            sys.modules[name] = bare
        return importlib.import_module(".".join(parts))
    except (ImportError, OSError) as error:
        pytest.skip(f"{package} needs more than is installed: {error}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(before)
