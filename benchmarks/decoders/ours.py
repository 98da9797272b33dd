"""The originals' layers in this package, with the parameters of the originals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from additive_attn import (
    AdditiveAttention,
    CoverageAttention,
    LocationSensitiveAttention,
    additive_attention,
    additive_scores,
)
from additive_attn.compat.speechbrain import LocationAwareAttention
from additive_attn.ops.decoding import attend_step
from additive_attn.ops.location import location_features
from additive_attn.ops.memory import lend
from additive_attn.ops.products import lend_weight, multiply
from benchmarks.decoders.originals import Attention, Coqui, Heads, PointerNetwork, State


def ours(original: nn.Module) -> Any:
    """Returns the layer that replaces an original, with the same parameters."""
    if isinstance(original, Heads):
        return FusedHeads(original)
    if isinstance(original, PointerNetwork):
        return FusedPointerNetwork(original)
    if isinstance(original, Coqui):
        return FusedCoqui(original)
    assert isinstance(original, Attention)
    location = original.layer.location
    if location is None:
        return FusedContent(original)
    return FusedSpeechBrain(original) if location.detached else FusedHistory(original)


def zero_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A bias of the scores cancels. It gets a zero gradient, as in the original."""
    return weight if bias is None else torch.add(weight, bias, alpha=0)


class FusedContent:
    """Attention without a location term: ``AdditiveAttention``."""

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
        value = memory if self.original.value is None else self.original.value(memory)
        return self.attention.project(memory, value, lengths)

    def step(self, query: Tensor, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        context, weights = self.attention.step(query, state)
        if self.original.output is not None:
            context = self.original.output(context)
        return context, weights, state


def next_state(original: Any, state: State, weights: Tensor) -> State:
    previous = weights.detach() if original.layer.location.detached else weights
    sums = "cumulative" in original.layer.location.inputs
    cumulative = state.cumulative + previous if sums else state.cumulative
    return state._replace(previous=previous, cumulative=cumulative)


def features_of(original: Any, state: State) -> Tensor:
    """``(B, F, Lk)``"""
    inputs = [getattr(state, name) for name in original.layer.location.inputs]
    stacked = torch.stack(inputs, dim=1)
    return (
        stacked
        if original.filters is None
        else location_features(stacked, original.filters.weight)
    )


class FusedHistory:
    """Attention with a location term or coverage: ``LocationSensitiveAttention``,
    ``CoverageAttention``."""

    def __init__(self, original: Attention) -> None:
        self.original: Any = original
        layer, location = original.layer, original.layer.location
        assert location is not None
        sizes = layer.query_dim, layer.memory_dim, layer.hidden_dim
        initial = "uniform" if location.uniform else "zeros"
        self.attention: Any
        if location.filters:
            self.attention = LocationSensitiveAttention(
                *sizes, filters=location.filters, kernel_size=location.kernel_size,
                inputs=location.inputs, initial=initial, scale=layer.scale,
            )  # fmt: skip
            self.attention.location_conv = self.original.filters
            self.attention.location_layer = self.original.location
        else:
            self.attention = CoverageAttention(*sizes, initial=initial, scale=layer.scale)
            self.attention.coverage_layer = original.location
        self.attention.query_layer = original.query
        self.attention.key_layer = original.key
        self.attention.energy_layer = original.energy

    def begin(self, memory: Tensor, lengths: Tensor) -> Any:
        projected = self.attention.project(memory, memory, lengths)
        return projected, self.attention.initial_state(projected)

    def step(self, query: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        memory, last = state
        context, weights, last = self.attention.step(query, memory, last)
        return context, weights, (memory, last)


class FusedSpeechBrain:
    """SpeechBrain's layer, whose location term has a bias and passes no gradient on."""

    def __init__(self, original: Any) -> None:
        layer, location = original.layer, original.layer.location
        assert location is not None and layer.output_dim is not None
        self.attention = LocationAwareAttention(
            layer.memory_dim, layer.query_dim, layer.hidden_dim, layer.output_dim,
            location.filters, location.kernel_size // 2, layer.scale,
        )  # fmt: skip
        self.attention.mlp_enc, self.attention.mlp_dec = original.key, original.query
        self.attention.mlp_attn, self.attention.mlp_out = original.energy, original.output
        self.attention.conv_loc, self.attention.mlp_loc = original.filters, original.location

    def begin(self, memory: Tensor, lengths: Tensor) -> Any:
        self.attention.reset()
        return memory, lengths

    def step(self, query: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        context, weights = self.attention(*state, query)
        return context, weights, state


class FusedCoqui:
    """The class of ``additive_attn.compat``."""

    def __init__(self, original: Coqui) -> None:
        self.attention = original.parts

    def begin(self, memory: Tensor, lengths: Tensor) -> Any:
        self.attention.init_states(memory)
        attended = torch.arange(memory.shape[1]) < lengths[:, None]
        return memory, self.attention.preprocess_inputs(memory), attended

    def step(self, query: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        context = self.attention(query, *state)
        return context, self.attention.attention_weights, state


class FusedHeads:
    """All heads in one call, as in ESPnet's class of ``additive_attn.compat``: a step sums the
    memory, and one product maps the sums of all heads to the output."""

    def __init__(self, original: Heads) -> None:
        self.original, self.heads = original, original.each()

    def joined(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a projection of all heads."""
        layers = [getattr(head, name) for head in self.heads]
        weight = torch.cat([layer.weight for layer in layers])
        no_bias = layers[0].bias is None
        return weight, None if no_bias else torch.cat([layer.bias for layer in layers])

    def begin(self, memory: Tensor, lengths: Tensor) -> Any:
        count = len(self.heads)
        key = linear(memory, *self.joined("key")).unflatten(-1, (count, -1)).transpose(1, 2)
        value = memory.unsqueeze(1)
        weights = [zero_bias(head.energy.weight, head.energy.bias) for head in self.heads]
        query_weight, query_bias = self.joined("query")
        lent = lend(
            key, value, torch.cat(weights), lengths=lengths[:, None, None],
            scale=self.original.layer.scale, query_weight=query_weight, query_bias=query_bias,
        )  # fmt: skip
        location_weight = states = None
        if self.heads[0].location is not None:
            padding = torch.arange(memory.shape[1]) >= lengths[:, None]
            uniform = (~padding).to(memory.dtype) / lengths[:, None]
            states = [State(key, value, padding, uniform, uniform)] * count
            location_weight = torch.stack([head.location.weight.T for head in self.heads])
        products = self.original.output.weight.unflatten(1, (count, -1)).transpose(0, 1)
        output = torch.bmm(products, torch.stack([head.value.weight for head in self.heads]))
        product = lend_weight(output.transpose(0, 1).flatten(1))
        return lent, location_weight, product, states

    def step(self, query: Tensor, state: Any) -> tuple[Tensor, Any, Any]:
        lent, location_weight, product, states = state
        location = None
        if states is not None:
            pairs = zip(self.heads, states, strict=True)
            location = torch.stack([features_of(head, last) for head, last in pairs], dim=1)
        context, weights = attend_step(
            lent, query, location=location, location_weight=location_weight
        )
        if states is not None:
            triples = zip(self.heads, states, weights.unbind(1), strict=True)
            states = [next_state(*triple) for triple in triples]
        state = lent, location_weight, product, states
        return multiply(product, context.flatten(1)), weights, state


class FusedPointerNetwork:
    """``once``: the keys are projected before the first step."""

    def __init__(self, original: PointerNetwork, once: bool = False) -> None:
        self.original, self.once = original, once

    def keys(self, memory: Tensor) -> list[Tensor]:
        layers = self.original.glimpse_key, self.original.pointer_key
        return [linear(memory, layer.weight.squeeze(-1), layer.bias) for layer in layers]

    def begin(self, memory: Tensor, lengths: Tensor) -> Any:
        if not self.once:
            return memory
        glimpse_key, pointer_key = self.keys(memory)
        original = self.original
        query = original.glimpse_query
        glimpse = lend(
            glimpse_key, glimpse_key, original.glimpse_weight,
            query_weight=query.weight, query_bias=query.bias,
        )  # fmt: skip
        return glimpse, pointer_key

    def step(self, query: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        original = self.original
        if self.once:
            glimpse, pointer_key = state
            glimpse = attend_step(glimpse, query)[0][:, None]
        else:
            glimpse_key, pointer_key = self.keys(state)
            query = original.glimpse_query(query)[:, None]
            glimpse = additive_attention(query, glimpse_key, glimpse_key, original.glimpse_weight)
        query = original.pointer_query(glimpse)
        scores = additive_scores(query, pointer_key, original.pointer_weight)
        weights = (10 * torch.tanh(scores)).softmax(-1)
        return torch.bmm(weights, pointer_key).squeeze(1), weights.squeeze(1), state
