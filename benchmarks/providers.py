"""Who is measured: the plain layer, torch.compile of it in two spellings, the fused layer, and
dot-product attention as the price to approach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from additive_attn import AdditiveAttention, PlainAdditiveAttention, additive_attention
from benchmarks.shapes import Case


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. ``blocked`` is the dense form of its masks, True = do not attend."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    grad_out: Tensor
    lengths: Tensor | None = None
    blocked: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def pick(self, batches: Tensor, rows: Tensor) -> Inputs:
        """The same problem for a few sequences and a few of their queries."""
        if self.query.dim() == 2:
            return self
        blocked = self.blocked
        if blocked is not None:
            blocked = blocked[batches] if blocked.shape[0] > 1 else blocked
            blocked = blocked[:, rows] if blocked.shape[1] > 1 else blocked
        return replace(
            self,
            query=self.query[batches][:, rows],
            key=self.key[batches],
            value=self.value[batches],
            grad_out=self.grad_out[batches][:, rows],
            lengths=None if self.lengths is None else self.lengths[batches],
            blocked=blocked,
        )

    def double(self) -> Inputs:
        return replace(
            self,
            query=self.query.double(),
            key=self.key.double(),
            value=self.value.double(),
            weight=self.weight.double(),
            grad_out=self.grad_out.double(),
            state={name: tensor.double() for name, tensor in self.state.items()},
        )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    if case.module:
        layer = PlainAdditiveAttention(case.value_dim, case.hidden).to(device, dtype)
        return Inputs(
            query=randn(case.query_len, case.value_dim),
            key=randn(case.key_len, case.value_dim),
            value=randn(case.key_len, case.value_dim),
            weight=randn(case.hidden),
            grad_out=randn(case.query_len, case.value_dim),
            state=layer.state_dict(),
        )

    blocked = lengths = None
    row = torch.arange(case.query_len, device=device)[:, None]
    column = torch.arange(case.key_len, device=device)[None, :]
    if case.is_causal:
        blocked = (column > row)[None]
    elif case.window is not None:
        left, right = case.window
        blocked = ((column < row - left) | (column > row + right))[None]
    elif case.half_lengths:
        half = case.key_len // 2
        lengths = half + torch.arange(case.batch, device=device) % half
        blocked = column >= lengths[:, None, None]
    return Inputs(
        query=randn(case.batch, case.query_len, case.hidden),
        key=randn(case.batch, case.key_len, case.hidden),
        value=randn(case.batch, case.key_len, case.value_dim),
        weight=randn(case.hidden) / case.hidden**0.5,
        grad_out=randn(case.batch, case.query_len, case.value_dim),
        lengths=lengths,
        blocked=blocked,
    )


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


Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def energy(query: Tensor, key: Tensor) -> Tensor:
    return torch.tanh(query[..., :, None, :] + key[..., None, :, :])


def score_linear(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return F.linear(energy(query, key), weight[None]).squeeze(-1)


def score_matmul(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return energy(query, key) @ weight


def score_sum(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return (energy(query, key) * weight).sum(-1)


def layer_runner(layer: torch.nn.Module, inputs: Inputs, compiled: bool = False) -> Runner:
    layer.to(inputs.query.device, inputs.query.dtype).load_state_dict(inputs.state)
    call = torch.compile(layer, dynamic=False) if compiled else layer
    return Runner(
        lambda *tensors: call(*tensors)[0],
        [inputs.query, inputs.key, inputs.value],
        list(layer.parameters()),
    )


def plain_runner(
    case: Case, inputs: Inputs, score: Score = score_linear, compiled: bool = False
) -> Runner:
    if case.module:
        layer = PlainAdditiveAttention(case.value_dim, case.hidden)
        return layer_runner(layer, inputs, compiled)

    blocked, dropout_p = inputs.blocked, case.dropout_p

    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        scores = score(query, key, weight)
        if blocked is not None:
            scores = scores.masked_fill(blocked, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        if dropout_p:
            weights = F.dropout(weights, dropout_p)
        return weights @ value

    function = torch.compile(attend, dynamic=False) if compiled else attend
    return Runner(function, [inputs.query, inputs.key, inputs.value, inputs.weight], [])


def compile_matmul_runner(case: Case, inputs: Inputs) -> Runner:
    return plain_runner(case, inputs, score_matmul, compiled=True)


def compile_sum_runner(case: Case, inputs: Inputs) -> Runner | None:
    return None if case.module else plain_runner(case, inputs, score_sum, compiled=True)


def fused_runner(case: Case, inputs: Inputs) -> Runner:
    if case.module:
        return layer_runner(AdditiveAttention(case.value_dim, case.hidden), inputs)

    options: dict[str, Any] = {}
    if case.is_causal:
        options["is_causal"] = True
    if case.window is not None:
        options["window"] = case.window
    if inputs.lengths is not None:
        options["lengths"] = inputs.lengths
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p

    function = partial(additive_attention, **options) if options else additive_attention
    return Runner(function, [inputs.query, inputs.key, inputs.value, inputs.weight], [])


def dot_product_runner(case: Case, inputs: Inputs) -> Runner | None:
    if case.module:
        return None
    is_causal, dropout_p = case.is_causal, case.dropout_p
    allowed = None if inputs.blocked is None or is_causal else ~inputs.blocked[:, None]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The head dim opens the fused kernels, which take four dims only.
        return F.scaled_dot_product_attention(
            query[:, None],
            key[:, None],
            value[:, None],
            attn_mask=allowed,
            is_causal=is_causal,
            dropout_p=dropout_p,
        )[:, 0]

    return Runner(attend, [inputs.query, inputs.key, inputs.value], [])


@dataclass(frozen=True)
class Provider:
    """``energy_copies``: the peak memory that it was measured to need at the least, by mode, as a
    multiple of the ``B Lq Lk H`` elements of the energy tensor."""

    name: str
    runner: Callable[[Case, Inputs], Runner | None]
    additive: bool = True
    energy_copies: dict[str, float] = field(default_factory=dict)

    def bytes_needed(self, case: Case, mode: str, itemsize: int) -> int:
        elements = case.batch * case.query_len * case.key_len * case.hidden
        return int(self.energy_copies.get(mode, 0) * elements * itemsize)


PROVIDERS = [
    Provider("plain", plain_runner, energy_copies={"forward": 2, "full": 3}),
    Provider("compile matmul", compile_matmul_runner, energy_copies={"forward": 0, "full": 2}),
    Provider("compile sum", compile_sum_runner, energy_copies={"forward": 0, "full": 2}),
    Provider("fused", fused_runner),
    Provider("dot product", dot_product_runner, additive=False),
]
