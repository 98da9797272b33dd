"""Projects keys at every step, as much code does, or once: measures the gain of hoisting, and that
of fusing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoders.originals import Attention, Layer
from benchmarks.decoders.ours import FusedContent
from benchmarks.decoders.problem import Problem


def hoisting(batch: int, keys: int, hidden: int, values: int, steps: int) -> Problem:
    """A content-based layer with given queries, forward and backward."""
    torch.manual_seed(0)
    attention = Attention(Layer(hidden, values, hidden))
    fused = FusedContent(attention)
    memory = torch.randn(batch, keys, values, requires_grad=True)
    queries = [torch.randn(batch, hidden, requires_grad=True) for _ in range(steps)]
    upstream = [torch.randn(batch, values) for _ in range(steps)]
    lengths = torch.full((batch,), keys)
    leaves = [memory, *queries, attention.query.weight, attention.key.weight]

    def unrolled(layer: Any, once: bool) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            state, contexts = layer.begin(memory, lengths), []
            for n, query in enumerate(queries):
                if n > 0 and not once:
                    state = layer.begin(memory, lengths)
                contexts.append(layer.step(query, state)[0])
            return [*contexts, *torch.autograd.grad(contexts, leaves, upstream)]

        return run

    runs = {
        "plain, keys at each step": unrolled(attention, False),
        "fused, keys at each step": unrolled(fused, False),
        "plain": unrolled(attention, True),
        "fused": unrolled(fused, True),
    }
    return Problem(runs, lambda found: {str(n): x.detach() for n, x in enumerate(found)})
