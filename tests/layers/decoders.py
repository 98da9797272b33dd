"""Decoders with attention that depends on its earlier weights, and the same in plain PyTorch."""

from __future__ import annotations

import time

import pytest
import torch
from oracle import error, generator
from torch import Tensor, nn

from additive_attn import CoverageAttention, LocationSensitiveAttention

B, LK, D, K, H, DV = 3, 11, 6, 5, 8, 7  # batch, keys, features of queries, keys, hidden, values

# The options of code bases: Tacotron 2; ESPnet's AttLoc and AttCovLoc; the pointer-generator's
# coverage, and ESPnet's AttCov.
KINDS = {
    "tacotron": dict(filters=4, kernel_size=5, bias=False),
    "attloc": dict(filters=3, kernel_size=15, inputs=("previous",), initial="uniform", scale=2.0),
    "attcovloc": dict(filters=3, kernel_size=3, inputs=("cumulative",), initial="uniform"),
    "pointer": dict(),
    "attcov": dict(initial="uniform", scale=2.0),
}

LENGTHS = [LK, 4, 0]
EVERY = pytest.mark.parametrize("kind", KINDS)
SOME = pytest.mark.parametrize("kind", ["attloc", "pointer"])


def attended():
    return torch.arange(LK) < torch.tensor(LENGTHS)[:, None]


def assert_close(ours, theirs, tolerance=1e-12):
    """Asserts that differences are within ``tolerance`` of each tensor's largest entry, or of
    1."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert error(a, b.double()) <= tolerance * max(1.0, b.abs().max().item())


def build(kind: str, hidden: int = H, **options):
    torch.manual_seed(3)
    cls = CoverageAttention if kind in ("pointer", "attcov") else LocationSensitiveAttention
    return cls(D, K, hidden, **KINDS[kind] | options)


class Plain(nn.Module):
    """The layer in plain PyTorch, with the parameters of ``layer``; builds (B, Lk, H)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def step(self, query, memory, previous, cumulative):
        key, value, attended = memory
        layer = self.layer
        if isinstance(layer, CoverageAttention):
            term = layer.coverage_layer(cumulative[..., None])
        else:
            both = {"previous": previous, "cumulative": cumulative}
            inputs = torch.stack([both[name] for name in layer.inputs], dim=1)
            features = layer.location_conv(inputs)
            term = layer.location_layer(features.transpose(1, 2))
        energy = torch.tanh(layer.query_layer(query)[:, None] + layer.key_layer(key) + term)
        score = layer.scale * layer.energy_layer(energy).squeeze(-1)
        empty = ~attended.any(-1, keepdim=True)
        score = score.masked_fill(~attended, -torch.inf).masked_fill(empty, 0.0)
        weights = score.softmax(-1).masked_fill(~attended, 0.0)
        return (weights[:, None] @ value).squeeze(1), weights, weights, cumulative + weights

    def initial(self, attended: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weights = torch.zeros(attended.shape, dtype=dtype)
        if self.layer.initial == "uniform":
            weights = attended.to(dtype) / attended.sum(-1, keepdim=True).clamp(min=1)
        return weights, weights


class Decoder(nn.Module):
    """T steps with a cell between them, so that each query depends on the steps before."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer = layer
        self.cell = nn.Linear(DV + D, D)
        self.to(dtype)

    def forward(self, key, value, query, steps=4, ordinary=False, **masking):
        """Contexts and weights of all steps, and the last state."""
        memory = self.layer.project(key, value, **masking)
        if ordinary:  # steps of a replaced memory do not defer gradients
            memory = memory._replace(key=memory.key)
        state = self.layer.initial_state(memory)
        found = []
        for _ in range(steps):
            context, weights, state = self.layer.step(query, memory, state)
            query = torch.tanh(self.cell(torch.cat([context, query], -1)))
            found += [context, weights]
        return *found, *state

    def plain(self, key, value, query, steps=4, attended=None):
        plain = Plain(self.layer)
        if attended is None:
            attended = torch.ones(key.shape[:2], dtype=torch.bool)
        state, found = plain.initial(attended, key.dtype), []
        for _ in range(steps):
            context, weights, *state = plain.step(query, (key, value, attended), *state)
            query = torch.tanh(self.cell(torch.cat([context, query], -1)))
            found += [context, weights]
        return *found, *state


def eventually(condition):
    """Whether ``condition`` is true within ten seconds: autograd's thread for a GPU frees a pass
    shortly after its end."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def inputs(dtype: torch.dtype = torch.float64, batch: int = B):
    g = generator(0)
    shapes = (batch, LK, K), (batch, LK, DV), (batch, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
            for s in shapes]  # fmt: skip


def results(decoder: Decoder, run, tensors, **options):
    """Outputs, and gradients of inputs and parameters by random upstream gradients."""
    outputs = run(*tensors, **options)
    g = generator(1)
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in outputs]
    leaves = [*tensors, *(x for x in decoder.parameters() if x.requires_grad)]
    grads = torch.autograd.grad(
        outputs, leaves, upstream, materialize_grads=True, allow_unused=True
    )
    return [x.detach() for x in outputs], list(grads)
