"""The attention of published decoders, written from their formulas in plain PyTorch.

A layer prepares its memory once (``begin``), then attends with one query per sequence at a time
(``step``). A step returns the state that the next one reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from additive_attn.compat.coqui import OriginalAttention

PROJECTION = "part: projection"


class State(NamedTuple):
    """The inputs of a step: projected keys ``(B, Lk, H)``, values ``(B, Lk, Dv)``, padding ``(B,
    Lk)``, True = ignore; and the last weights and their sum ``(B, Lk)``."""

    key: Tensor
    value: Tensor
    padding: Tensor
    previous: Tensor
    cumulative: Tensor


@dataclass(frozen=True)
class Location:
    """Features of earlier weights that are added to the keys: ``inputs`` of the last weights, of
    their sum, or of both, filtered, then projected. Without filters, the input is one feature.

    Before the first step the weights are ``uniform`` over a sequence, or zero. ``detached``: no
    gradient flows into them.
    """

    inputs: tuple[str, ...]
    filters: int = 0
    kernel_size: int = 1
    bias: bool = False
    uniform: bool = False
    detached: bool = False


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, and which of its parts have a bias. ``output_dim``: a projection of the
    context. ``normalize``: the energy's weight is normalised (arXiv:1602.07868)."""

    query_dim: int
    memory_dim: int
    hidden_dim: int
    query_bias: bool = False
    key_bias: bool = False
    energy_bias: bool = False
    scale: float = 1.0
    location: Location | None = None
    output_dim: int | None = None
    value_dim: int | None = None
    normalize: bool = False
    weighted_sum: str = "product"


def projected(layer: Any, tensor: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        compiled: Tensor = layer(tensor)
        return compiled
    with record_function(PROJECTION):
        output: Tensor = layer(tensor)
        return output


class Attention(nn.Module):
    """One head."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        hidden, location = layer.hidden_dim, layer.location
        self.query = nn.Linear(layer.query_dim, hidden, layer.query_bias)
        self.key = nn.Linear(layer.memory_dim, hidden, layer.key_bias)
        self.energy = nn.Linear(hidden, 1, layer.energy_bias)
        self.value = self.output = self.filters = self.location = None
        value_dim = layer.memory_dim
        if layer.value_dim is not None:
            value_dim = layer.value_dim
            self.value = nn.Linear(layer.memory_dim, value_dim, False)
        if layer.output_dim is not None:
            self.output = nn.Linear(value_dim, layer.output_dim)
        if layer.normalize:
            self.gain = nn.Parameter(torch.tensor(hidden**-0.5))
            self.offset = nn.Parameter(torch.zeros(hidden))
        if location is not None:
            inputs, size = len(location.inputs), location.kernel_size
            if location.filters:
                self.filters = nn.Conv1d(
                    inputs, location.filters, size, padding=size // 2, bias=False
                )
            self.location = nn.Linear(location.filters or inputs, hidden, location.bias)

    def begin(self, memory: Tensor, lengths: Tensor) -> State:
        location = self.layer.location
        padding = torch.arange(memory.shape[1]) >= lengths[:, None]
        start = memory.new_zeros(memory.shape[:2])
        previous = start
        if location is not None and location.uniform:
            previous = (~padding).to(memory.dtype) / lengths[:, None]
        value = memory if self.value is None else projected(self.value, memory)
        return State(projected(self.key, memory), value, padding, previous, start)

    def step(self, query: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """``query (B, query_dim)`` -> context ``(B, Dv)``, weights ``(B, Lk)``, the next state."""
        location = self.layer.location
        query = projected(self.query, query)
        if self.layer.normalize:
            query = query + self.offset
        energy = state.key + query[:, None]
        if self.location is not None:
            energy = energy + self.location(self.features(state))
        scores = self.scores(torch.tanh(energy)).masked_fill(state.padding, -torch.inf)
        weights = torch.softmax(self.layer.scale * scores, dim=-1)
        if self.layer.weighted_sum == "product":
            context = torch.bmm(weights[:, None], state.value).squeeze(1)
        else:
            context = torch.sum(state.value * weights[:, :, None], dim=1)
        if self.output is not None:
            context = projected(self.output, context)
        if location is not None:
            previous = weights.detach() if location.detached else weights
            state = state._replace(previous=previous, cumulative=state.cumulative + previous)
        return context, weights, state

    def scores(self, energy: Tensor) -> Tensor:
        if not self.layer.normalize:
            return self.energy(energy).squeeze(-1)
        weight = self.energy.weight
        return F.linear(energy, self.gain * weight / weight.norm()).squeeze(-1)

    def features(self, state: State) -> Tensor:
        """``(B, Lk, F)``"""
        assert self.layer.location is not None
        names = self.layer.location.inputs
        inputs = torch.stack([getattr(state, name) for name in names], dim=1)  # (B, inputs, Lk)
        return (inputs if self.filters is None else self.filters(inputs)).transpose(1, 2)


class Heads(nn.Module):
    """Several heads one after the other, each with its own projections. Their contexts are
    concatenated and projected."""

    def __init__(self, layer: Layer, heads: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = nn.ModuleList(Attention(layer) for _ in range(heads))
        assert layer.value_dim is not None
        self.output = nn.Linear(heads * layer.value_dim, layer.memory_dim, False)

    def begin(self, memory: Tensor, lengths: Tensor) -> list[State]:
        return [head.begin(memory, lengths) for head in self.each()]

    def step(self, query: Tensor, state: list[State]) -> tuple[Tensor, list[Tensor], list[State]]:
        pairs = zip(self.each(), state, strict=True)
        contexts, weights, states = zip(*(head.step(query, s) for head, s in pairs), strict=True)
        context = projected(self.output, torch.cat(contexts, dim=-1))
        return context, list(weights), list(states)

    def each(self) -> list[Any]:
        return list(self.heads)


class PointerNetwork(nn.Module):
    """A glimpse at the memory, then a pointer, whose scores are ``10 tanh(score)`` (Bello et al.
    2016, arXiv:1611.09940). Both project the keys at every step, by a convolution of width 1 as
    code of this model does, and the projected keys are also the values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.glimpse_query, self.pointer_query = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.glimpse_key, self.pointer_key = nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, dim, 1)
        self.glimpse_weight = nn.Parameter(torch.randn(dim) / dim**0.5)
        self.pointer_weight = nn.Parameter(torch.randn(dim) / dim**0.5)

    def begin(self, memory: Tensor, lengths: Tensor) -> Tensor:
        return memory.transpose(1, 2)  # (B, D, Lk)

    def step(self, query: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = projected(self.glimpse_key, state)
        scores = self.scores(projected(self.glimpse_query, query), key, self.glimpse_weight)
        glimpse = torch.bmm(key, scores.softmax(-1)[:, :, None]).squeeze(2)
        key = projected(self.pointer_key, state)
        scores = self.scores(projected(self.pointer_query, glimpse), key, self.pointer_weight)
        weights = (10 * torch.tanh(scores)).softmax(-1)
        return torch.bmm(key, weights[:, :, None]).squeeze(2), weights, state

    def scores(self, query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        energy = torch.tanh(query[:, :, None] + key)
        return torch.bmm(weight.expand(len(query), 1, -1), energy).squeeze(1)


class ForwardState(NamedTuple):
    """The inputs of a step of :class:`Coqui`: ``State``, and the weights of forward attention."""

    key: Tensor
    value: Tensor
    attended: Tensor
    previous: Tensor
    cumulative: Tensor
    alpha: Tensor


class Coqui(nn.Module):
    """Coqui TTS's attention: weights by a sigmoid, its default, or by a softmax; and with
    ``moving`` forward attention (Zhang et al. 2018, arXiv:1807.06736), whose weights stay at a key
    or advance by one."""

    def __init__(self, layer: Layer, norm: str, moving: bool) -> None:
        super().__init__()
        location, self.norm, self.moving = layer.location, norm, moving
        assert location is not None
        self.parts: Any = OriginalAttention(
            layer.query_dim, layer.memory_dim, layer.hidden_dim, True, location.filters,
            location.kernel_size, False, norm, moving, False, False,
        )  # fmt: skip

    def begin(self, memory: Tensor, lengths: Tensor) -> ForwardState:
        attended = torch.arange(memory.shape[1]) < lengths[:, None]
        zeros = memory.new_zeros(memory.shape[:2])
        alpha = torch.cat([zeros[:, :1] + 1, zeros[:, 1:] + 1e-7], dim=1)
        key = projected(self.parts.inputs_layer, memory)
        return ForwardState(key, memory, attended, zeros, zeros, alpha)

    def step(self, query: Tensor, state: ForwardState) -> tuple[Tensor, Tensor, ForwardState]:
        parts, alpha = self.parts, state.alpha
        inputs = torch.stack([state.previous, state.cumulative], dim=1)
        energy = projected(parts.query_layer, query)[:, None] + parts.location_layer(inputs)
        scores = parts.v(torch.tanh(energy + state.key)).squeeze(-1)
        scores = scores.masked_fill(~state.attended, -torch.inf)
        if self.norm == "softmax":
            weights = torch.softmax(scores, dim=-1)
        else:
            weights = torch.sigmoid(scores)
            weights = weights / weights.sum(dim=1, keepdim=True)
        cumulative = state.cumulative + weights
        if self.moving:
            moved = F.pad(alpha[:, :-1], (1, 0))
            alpha = (0.5 * alpha + 0.5 * moved + 1e-8) * weights
            alpha = weights = alpha / alpha.sum(dim=1, keepdim=True)
        context = torch.bmm(weights[:, None], state.value).squeeze(1)
        state = state._replace(previous=weights, cumulative=cumulative, alpha=alpha)
        return context, weights, state
