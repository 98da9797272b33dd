"""Providers, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs


class Runner:
    """A provider bound to the tensors of a case."""

    def __init__(
        self, function: Callable[..., Tensor], arguments: list[Tensor], parameters: list[Tensor]
    ) -> None:
        self.function = function
        self.arguments = [tensor.detach().requires_grad_() for tensor in arguments]
        self.leaves = self.arguments + parameters

    def forward(self) -> Tensor:
        return self.function(*self.arguments)

    def backward(self, out: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(out, self.leaves, grad_out, allow_unused=True)


@dataclass(frozen=True)
class Provider:
    """``energy_copies``: the least peak memory that was measured, by mode, as a multiple of the
    ``B Lq Lk H`` elements of the energy tensor."""

    name: str
    runner: Callable[[Case, Inputs], Runner | None]
    additive: bool = True
    energy_copies: dict[str, float] = field(default_factory=dict)

    def bytes_needed(self, case: Case, mode: str, itemsize: int) -> int:
        elements = case.batch * case.query_len * case.key_len * case.hidden
        return int(self.energy_copies.get(mode, 0) * elements * itemsize)


def layer_runner(layer: torch.nn.Module, inputs: Inputs, compiled: bool = False) -> Runner:
    layer.to(inputs.query.device, inputs.query.dtype).load_state_dict(inputs.state)
    call = torch.compile(layer, dynamic=False) if compiled else layer
    return Runner(
        lambda *tensors: call(*tensors)[0],
        [inputs.query, inputs.key, inputs.value],
        list(layer.parameters()),
    )
