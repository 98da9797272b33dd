"""The same layers by this package, with the parameters of the originals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from additive_attn import AdditiveAttention, additive_attention
from benchmarks.decoders.originals import Attention, Heads, PointerNetwork


def ours(original: nn.Module) -> Any:
    """The layer in the place of an original, which shares its parameters."""
    if isinstance(original, Heads):
        return FusedHeads(original)
    if isinstance(original, PointerNetwork):
        return FusedPointerNetwork(original)
    assert isinstance(original, Attention)
    return FusedAttention(original)


class FusedAttention:
    """A step without, or with a location term."""

    def __init__(self, original: Attention) -> None:
        self.original: Any = original
        layer = original.layer
        self.attention = AdditiveAttention(
            1, layer.hidden_dim, query_dim=layer.query_dim, key_dim=layer.memory_dim,
            bias=False, scale=layer.scale, normalize=layer.normalize,
        )  # fmt: skip
        self.attention.query_layer = original.query
        self.attention.key_layer = original.key
        self.attention.energy_layer = original.energy
        if layer.normalize:
            self.attention.energy_gain = original.gain
            self.attention.energy_offset = original.offset

    def begin(self, memory: Tensor, lengths: Tensor) -> Any:
        state = self.original.begin(memory, lengths) if self.original.location else None
        value = memory if self.original.value is None else self.original.value(memory)
        return self.attention.project(memory, value, lengths), state

    def step(self, query: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        memory, location = state
        original = self.original
        if location is not None:
            assert original.layer.location is not None
            term = original.location(original.features(location))
            context, weights = self.attention.step(query, memory._replace(key=memory.key + term))
            assert weights is not None
            previous = weights.detach() if original.layer.location.detached else weights
            location = location._replace(
                previous=previous, cumulative=location.cumulative + previous
            )
        else:
            context, weights = self.attention.step(query, memory)
        if original.output is not None:
            context = original.output(context)
        return context, weights, (memory, location)


class FusedHeads:
    def __init__(self, original: Heads) -> None:
        self.original = original
        self.heads = [FusedAttention(head) for head in original.each()]

    def begin(self, memory: Tensor, lengths: Tensor) -> list[Any]:
        return [head.begin(memory, lengths) for head in self.heads]

    def step(self, query: Tensor, state: list[Any]) -> tuple[Tensor, Any, list[Any]]:
        pairs = zip(self.heads, state, strict=True)
        contexts, weights, states = zip(*(head.step(query, s) for head, s in pairs), strict=True)
        return self.original.output(torch.cat(contexts, dim=-1)), weights, list(states)


class FusedPointerNetwork:
    """``once``: the keys are projected before the first step."""

    def __init__(self, original: PointerNetwork, once: bool = False) -> None:
        self.original, self.once = original, once

    def keys(self, memory: Tensor) -> list[Tensor]:
        layers = self.original.glimpse_key, self.original.pointer_key
        return [linear(memory, layer.weight.squeeze(-1), layer.bias) for layer in layers]

    def begin(self, memory: Tensor, lengths: Tensor) -> Any:
        return self.keys(memory) if self.once else memory

    def step(self, query: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        original = self.original
        glimpse_key, pointer_key = state if self.once else self.keys(state)
        query = original.glimpse_query(query)[:, None]
        glimpse = additive_attention(query, glimpse_key, glimpse_key, original.glimpse_weight)
        query = original.pointer_query(glimpse)
        scores = torch.tanh(query + pointer_key) @ original.pointer_weight
        weights = (10 * torch.tanh(scores)).softmax(-1)
        return torch.bmm(weights[:, None], pointer_key).squeeze(1), weights, state
