"""Calls of the Triton operators, for ``machine_code``: which kernels they run depends on sizes,
dtypes and options."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from additive_attn.backends import triton as operators
from additive_attn.spec.call import lse_dtype


@dataclass(frozen=True)
class Call:
    """A call for ``compiled_calls``; its inputs are made each time."""

    inputs: Callable[[], tuple[Any, ...]]
    run: Callable[..., None]

    def __call__(self) -> None:
        self.run(*self.inputs())


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def call(
    batch: int, queries: int, keys: int, hidden: int, values: int, *,
    dtype: torch.dtype = torch.float32, mask: torch.dtype | None = None, lengths: bool = False,
    dropout_p: float = 0.0, need_weights: bool = True, left: int = -1, right: int = -1,
    upstream: Collection[str] = ("out",),
) -> Call:  # fmt: skip
    """Forward and, unless nothing is ``upstream``, backward with all gradients wanted."""

    def inputs() -> tuple[Any, ...]:
        return (
            zeros(dtype, batch, queries, hidden), zeros(dtype, batch, keys, hidden),
            zeros(dtype, batch, keys, values), zeros(dtype, hidden),
            None if mask is None else zeros(mask, batch, queries, keys),
            zeros(torch.int64, batch, queries) if lengths else None,
            None, None, None, left, right,
            zeros(torch.int64) if dropout_p else None, dropout_p, 1.0,
        )  # fmt: skip

    def run(*inputs: Any) -> None:
        out, weights, lse = operators.forward(*inputs, need_weights)
        grads = [x if name in upstream else None for name, x in
                 (("out", out), ("weights", weights), ("lse", lse))]  # fmt: skip
        needs = (True, True, True, True, mask is not None and mask.is_floating_point)
        if upstream:
            operators.backward(*grads, *inputs, lse, *needs)

    return Call(inputs, run)


def step_call(
    batch: int, queries: int, keys: int, hidden: int, values: int, *, filters: int = 0,
    dtype: torch.dtype = torch.float32, mask: torch.dtype | None = None, lengths: bool = False,
    dropout_p: float = 0.0,
) -> Call:  # fmt: skip
    """A decoder's step and its backward, with a location term and its features if ``filters``."""
    assert queries == 1

    def inputs() -> tuple[Any, ...]:
        location = width = location_weight = grad_key = None
        if filters:
            location, width = zeros(dtype, batch, 2, keys), zeros(dtype, filters, 2, 31)
            location_weight = zeros(dtype, filters, hidden)
            grad_key = zeros(lse_dtype(dtype), batch, keys, hidden)
        return (
            location, width, grad_key,
            zeros(dtype, batch, 1, hidden), zeros(dtype, batch, keys, hidden),
            zeros(dtype, batch, keys, values), zeros(dtype, hidden), None, None, location_weight,
            None if mask is None else zeros(mask, batch, 1, keys),
            zeros(torch.int64, batch, 1) if lengths else None,
            zeros(torch.int64) if dropout_p else None, dropout_p, 1.0,
        )  # fmt: skip

    def run(inputs: Any, width: Any, grad_key: Any, *rest: Any) -> None:
        location = None
        if filters:
            location = operators.location_features(inputs, width)
            operators.location_features_backward(location, inputs, width, True, True)
        arguments = *rest[:5], location, *rest[6:]
        out, weights, lse = operators.step(*arguments)
        operators.step_backward(out, weights, lse, *arguments, weights, lse, grad_key)

    return Call(inputs, run)


def scores_call(queries: int, mask: torch.dtype) -> Call:
    """Scores and all their gradients."""

    def inputs() -> tuple[Any, ...]:
        return (
            torch.zeros(2, queries, 128), torch.zeros(2, 300, 128), torch.zeros(128),
            zeros(mask, 2, queries, 300), zeros(torch.int64, 2, queries),
            None, None, None, -1, -1, 1.0,
        )  # fmt: skip

    def run(*inputs: Any) -> None:
        scores = operators.scores(*inputs)
        operators.scores_backward(scores, *inputs, True, True, True, True)

    return Call(inputs, run)
