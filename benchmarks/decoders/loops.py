"""Makes problems of decoders: T steps, forward and backward, by every provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from benchmarks.decoders.originals import Attention, Coqui, Heads, Layer, PointerNetwork
from benchmarks.decoders.ours import FusedPointerNetwork, ours
from benchmarks.decoders.problem import Problem


@dataclass(frozen=True)
class Loop:
    """T steps with B sequences of up to Lk keys. ``cell_dim``: features of an LSTM cell, whose
    inputs are ``input_dim`` features and the last context; 0: the attention alone, with given
    queries. ``feeds``: features of a layer between input and cell. ``cell_state``: the query is
    the cell's hidden state, concatenated with its memory. ``coverage``: the loss of See et al.
    2017. ``coqui``: how Coqui TTS's attention makes weights, and whether it is forward
    attention."""

    batch: int
    keys: int
    steps: int
    layer: Layer | None
    heads: int = 1
    input_dim: int = 0
    cell_dim: int = 0
    feeds: int = 0
    cell_state: bool = False
    coverage: bool = False
    pointer: int = 0
    coqui: tuple[str, bool] | None = None


class Decoder(nn.Module):
    """The original attention, the cell, and the decoder's inputs."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
        self.attention: Any
        if loop.layer is None:
            self.attention = PointerNetwork(loop.pointer)
            query_dim = memory_dim = context_dim = loop.pointer
        else:
            layer = loop.layer
            query_dim, memory_dim = layer.query_dim, layer.memory_dim
            context_dim = layer.output_dim or layer.value_dim or memory_dim
            if loop.coqui:
                self.attention = Coqui(layer, *loop.coqui)
            elif loop.heads > 1:
                self.attention, context_dim = Heads(layer, loop.heads), memory_dim
            else:
                self.attention = Attention(layer)
        self.context_dim = context_dim
        self.cell = self.feed = None
        if loop.cell_dim:
            fed = loop.input_dim + context_dim
            if loop.feeds:
                self.feed, fed = nn.Linear(fed, loop.feeds), loop.feeds
            self.cell = nn.LSTMCell(fed, loop.cell_dim)

        def leaf(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape))

        self.lengths = torch.full((loop.batch,), loop.keys)
        self.memory = leaf(loop.batch, loop.keys, memory_dim)
        width = loop.input_dim if loop.cell_dim else query_dim
        self.inputs = nn.ParameterList(leaf(loop.batch, width) for _ in range(loop.steps))
        outputs = loop.steps * (2 if loop.cell_dim else 1)
        widths = [context_dim, loop.cell_dim][: outputs // loop.steps] * loop.steps
        self.upstream = [torch.randn(loop.batch, width) for width in widths]

    def run(self, attention: Any) -> list[Tensor]:
        """Runs forward and backward. Gradients are in the ``grad`` of the parameters."""
        self.zero_grad()
        outputs, coverage = self.unroll(attention)
        upstream = list(self.upstream)
        if coverage:
            outputs.append(torch.stack(coverage).sum() / len(self.lengths))
            upstream.append(torch.ones(()))
        torch.autograd.backward(outputs, upstream)
        return outputs

    def unroll(self, attention: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of all steps, and the coverage loss of each."""
        outputs: list[Tensor] = []
        losses: list[Tensor] = []
        with record_function("part: attention"):
            state = attention.begin(self.memory, self.lengths)
        context = self.memory.new_zeros(len(self.memory), self.context_dim)
        covered = self.memory.new_zeros(self.memory.shape[:2])
        hidden = cell = self.memory.new_zeros(len(self.memory), self.loop.cell_dim)
        for query in self.inputs:
            if self.cell is not None:
                with record_function("part: cell"):
                    query = torch.cat([query, context], dim=1)
                    query = query if self.feed is None else self.feed(query)
                    hidden, cell = self.cell(query, (hidden, cell))
                    query = torch.cat([hidden, cell], 1) if self.loop.cell_state else hidden
            with record_function("part: attention"):
                context, weights, state = attention.step(query, state)
            outputs += [context, hidden] if self.cell is not None else [context]
            if self.loop.coverage:
                losses.append(torch.minimum(weights, covered).sum())
                covered = covered + weights
        return outputs, losses

    def results(self, outputs: list[Tensor]) -> dict[str, Tensor]:
        found = {f"output {n}": each.detach() for n, each in enumerate(outputs)}
        for name, parameter in self.named_parameters():
            if name.endswith(
                ("energy.bias", "parts.v.linear_layer.bias")
            ):  # cancels: its gradient is zero, or a rounding error
                continue
            grad = parameter.grad
            found[f"gradient of {name}"] = torch.zeros_like(parameter) if grad is None else grad
        return found


class Compiled:
    """An original with a compiled step."""

    def __init__(self, attention: Any) -> None:
        self.begin = attention.begin
        self.step = torch.compile(attention.step, dynamic=False)


def loop_problem(loop: Loop) -> Problem:
    torch.manual_seed(0)
    decoder = Decoder(loop)
    attention = decoder.attention
    providers = {"plain": attention, "torch.compile": Compiled(attention)}
    if isinstance(attention, PointerNetwork):
        providers["fused, keys at each step"] = ours(attention)
        providers["fused"] = FusedPointerNetwork(attention, once=True)
    else:
        providers["fused"] = ours(attention)

    def bound(provider: Any) -> Callable[[], list[Tensor]]:
        return lambda: decoder.run(provider)

    return Problem({name: bound(each) for name, each in providers.items()}, decoder.results)
