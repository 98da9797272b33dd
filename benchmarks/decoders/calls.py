"""Single calls as problems: pooling, a step, 16 bits, beams, raw scores, operators of a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from additive_attn import AdditiveAttention, additive_attention, additive_scores
from benchmarks.decoders.problem import Problem


def named(results: Any) -> dict[str, Tensor]:
    tensors = [results] if isinstance(results, Tensor) else list(results)
    return {str(number): tensor.detach() for number, tensor in enumerate(tensors)}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def full(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> Any:
    """Returns a function that runs a call with its gradients."""

    def run() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, upstream)

    return run


def lengths_of(batch: int, keys: int) -> Tensor:
    return torch.linspace(keys, keys / 2, batch).long()


class Pooling(nn.Module):
    """A learned query: ``softmax(w . tanh(U x + b)) x`` over the keys of each sequence."""

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.project, self.energy = nn.Linear(dim, hidden), nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.energy(torch.tanh(self.project(x))).squeeze(-1)
        return torch.bmm(scores.softmax(-1)[:, None], x).squeeze(1)


def pooling(batch: int, keys: int, hidden: int, dim: int) -> Problem:
    torch.manual_seed(0)
    layer = Pooling(hidden, dim)
    x, upstream = randn(batch, keys, dim).requires_grad_(), randn(batch, dim)
    leaves = [x, *layer.parameters()]

    def fused(x: Tensor) -> Tensor:
        learned = layer.project.bias.expand(batch, 1, hidden)
        weights = layer.energy.weight, layer.project.weight
        return additive_attention(learned, x, x, weights[0], key_weight=weights[1]).squeeze(1)

    def run(function: Callable[[Tensor], Tensor]) -> Any:
        return full(lambda x, *_: function(x), leaves, upstream)

    compiled = torch.compile(layer, dynamic=False)
    runs = {"plain": run(layer), "torch.compile": run(compiled), "fused": run(fused)}
    return Problem(runs, named)


def operators(batch: int, keys: int, hidden: int, values: int, steps: int) -> Problem:
    """Makes all gradients at each step and sums them, against those of keys, values and weight
    once for all steps."""
    torch.manual_seed(0)
    ops = torch.ops.additive_attn
    key, value = randn(batch, keys, hidden), randn(batch, keys, values)
    weight = randn(hidden) / hidden**0.5
    queries = [randn(batch, 1, hidden) for _ in range(steps)]
    upstream = [randn(batch, 1, values) for _ in range(steps)]
    lengths = lengths_of(batch, keys)[:, None]
    masking = None, lengths, None, None, None, -1, -1

    def at_each_step() -> list[Tensor]:
        records = [
            ops.forward(q, key, value, weight, *masking, None, 0.0, 1.0, True) for q in queries
        ]
        sums = [torch.zeros_like(key), torch.zeros_like(value), torch.zeros(batch, hidden)]
        grads = []
        for q, grad_out, (_, _, lse) in zip(queries, upstream, records, strict=True):
            grad_query, *others, _ = ops.backward(
                grad_out, None, None, q, key, value, weight, *masking, None, 0.0, 1.0, lse,
                True, True, True, True, False,
            )  # fmt: skip
            grads.append(grad_query)
            for total, grad in zip(sums, others, strict=True):
                total.add_(grad)
        return [torch.cat(grads, dim=1), *sums]

    def once() -> list[Tensor]:
        prepared = ops.prepare_keys(key, weight)
        memory = key, value, weight, prepared, None, None, None, lengths, None, 0.0, 1.0
        records = [ops.step(q, *memory) for q in queries]
        grads, scores = [], []
        for q, grad_out, (_, weights, lse) in zip(queries, upstream, records, strict=True):
            grad_query, grad_scores, *_ = ops.step_backward(
                grad_out, None, None, q, *memory, weights, lse, None
            )
            grads.append(grad_query)
            scores.append(grad_scores)
        _, grad_key, grad_weight, _ = ops.scores_backward(
            torch.cat(scores, dim=1), torch.cat(queries, dim=1), key, weight,
            None, lengths.expand(batch, steps), None, None, None, -1, -1, 1.0,
            False, True, True, False,
        )  # fmt: skip
        weights = torch.cat([weights for _, weights, _ in records], dim=1)
        grad_value = torch.bmm(weights.transpose(1, 2), torch.cat(upstream, dim=1))
        return [torch.cat(grads, dim=1), grad_key, grad_value, grad_weight]

    runs = {"gradients at each step": at_each_step, "fused": once}
    return Problem(runs, named, grad=False)


def step_layer(hidden: int) -> AdditiveAttention:
    """Returns a layer whose projections are identities, so that the step alone is measured."""
    layer = AdditiveAttention(hidden, hidden, bias=False)
    layer.query_layer, layer.key_layer = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    return layer


def step(batch: int, keys: int, hidden: int, values: int) -> Problem:
    """Measures ``step`` against the function with one query."""
    torch.manual_seed(0)
    layer = step_layer(hidden)
    query, key, value = (
        randn(batch, hidden),
        randn(batch, keys, hidden),
        randn(batch, keys, values),
    )
    memory, weight = layer.project(key, value), layer.energy_layer.weight.squeeze(0)

    def function() -> Any:
        out, weights = additive_attention(query[:, None], key, value, weight, need_weights=True)
        return out.squeeze(1), weights.squeeze(1)

    return Problem(
        {"function": function, "fused": lambda: layer.step(query, memory)}, named, grad=False
    )


def half_step(batch: int, keys: int, hidden: int, values: int) -> Problem:
    torch.manual_seed(0)
    layer = step_layer(hidden)
    query, key, value = (
        randn(batch, hidden),
        randn(batch, keys, hidden),
        randn(batch, keys, values),
    )
    memory = layer.project(key, value)
    small = layer.project(key, value, dtype=torch.bfloat16)
    runs = {
        "fused, float32": lambda: layer.step(query, memory),
        "fused": lambda: layer.step(query, small),
    }
    return Problem(runs, named, tolerance=5e-2, grad=False)


def half(batch: int, length: int, hidden: int, values: int, mode: str) -> Problem:
    torch.manual_seed(0)
    shapes = (batch, length, hidden), (batch, length, hidden), (batch, length, values)
    inputs = [randn(*shape) for shape in shapes] + [randn(hidden) / hidden**0.5]
    upstream = randn(batch, length, values)

    def run(dtype: torch.dtype) -> Any:
        leaves = [each.to(dtype).requires_grad_() for each in inputs]
        if mode == "full":
            return full(additive_attention, leaves, upstream.to(dtype))
        return lambda: additive_attention(*leaves)

    dtypes = torch.float32, torch.bfloat16, torch.float16
    runs = {f"fused, {str(dtype).removeprefix('torch.')}": run(dtype) for dtype in dtypes}
    return Problem(runs, named, tolerance=1e-1, grad=mode == "full")


def beams(batch: int, beam: int, keys: int, hidden: int, values: int) -> Problem:
    """Measures a step of all beams, which share the keys of their sequence or have copies."""
    torch.manual_seed(0)
    layer = step_layer(hidden)
    key, value = randn(batch, keys, hidden), randn(batch, keys, values)
    query = randn(batch, beam, hidden)
    copies = [each.repeat_interleave(beam, dim=0) for each in (key, value)]
    memory, copied = layer.project(key, value), layer.project(copies[0], copies[1])

    def copying() -> Any:
        out, weights = layer.step(query.flatten(0, 1), copied)
        return [each.unflatten(0, (batch, beam)) for each in (out, weights) if each is not None]

    runs = {"fused, copied memory": copying, "fused": lambda: layer.step(query, memory)}
    return Problem(runs, named, grad=False)


def scores(batch: int, rows: int, keys: int, hidden: int, mode: str) -> Problem:
    """Measures scores against the plain formula, and against the attention of the same shape."""
    torch.manual_seed(0)
    query, key = randn(batch, rows, hidden), randn(batch, keys, hidden)
    value, weight = randn(batch, keys, hidden), randn(hidden) / hidden**0.5
    leaves = [each.requires_grad_() for each in (query, key, weight)]
    upstream = randn(batch, rows, keys)

    def plain(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(query[:, :, None] + key[:, None]) @ weight

    runs: dict[str, Any] = {}
    for name, function in (("plain", plain), ("fused", additive_scores)):
        call = full(function, leaves, upstream)
        runs[name] = call if mode == "full" else lambda f=function: (f(*leaves),)
    grad_out = randn(batch, rows, hidden)

    def attention() -> Any:
        out = additive_attention(query, key, value.requires_grad_(), weight)
        if mode == "full":
            torch.autograd.grad(out, [*leaves, value], grad_out)

    expected: list[dict[str, Tensor]] = []

    def results(found: Any) -> dict[str, Tensor]:
        # The attention is another function: only its time is compared.
        if found is not None:
            expected[:] = [named(found)]
        return expected[0]

    runs["fused attention"] = attention
    return Problem(runs, results, grad=mode == "full")
