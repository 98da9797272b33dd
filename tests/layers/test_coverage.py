"""Coverage attention against a pointer-generator's, and the coverage loss. Its common parts with
location-sensitive attention are tested in test_location.py."""

from __future__ import annotations

import pytest
import torch
from decoders import DV, LK, B, D, H, K, build
from oracle import generator
from torch import nn

from additive_attn import CoverageAttention, coverage_loss

LENGTHS = [LK, 4, 0]


def pointer_generator(layer, encoded, values, queries, mask):
    """Computes the decoder of See et al. as their code does, with renormalised masked weights."""
    coverage, loss, found = torch.zeros(mask.shape, dtype=encoded.dtype), 0.0, []
    features = layer.key_layer(encoded)
    for query in queries:
        combined = features + layer.query_layer(query)[:, None]
        combined = combined + coverage[:, :, None] * layer.coverage_layer.weight[:, 0]
        scores = layer.energy_layer(torch.tanh(combined)).squeeze(2)
        weights = torch.softmax(scores, dim=1) * mask
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-300)
        loss = loss + torch.min(weights, coverage).sum(1)
        coverage = coverage + weights
        found += [(weights[:, None] @ values).squeeze(1), weights]
    return *found, coverage, loss


def ours(layer, encoded, values, queries):
    memory = layer.project(encoded, values, LENGTHS)
    state, loss, found = layer.initial_state(memory), 0.0, []
    for query in queries:
        context, weights, after = layer.step(query, memory, state)
        loss = loss + coverage_loss(weights, state.cumulative)
        state = after
        found += [context, weights]
    return *found, state.cumulative, loss


@pytest.mark.core
def test_pointer_generator(path):
    layer = CoverageAttention(D, K, H, dtype=torch.float64)
    tensors = [torch.randn(s, dtype=torch.float64).requires_grad_()
               for s in ((B, LK, K), (B, LK, DV), (4, B, D))]  # fmt: skip
    mask = (torch.arange(LK) < torch.tensor(LENGTHS)[:, None]).double()
    results = []
    for outputs in (ours(layer, *tensors), pointer_generator(layer, *tensors, mask)):
        g = generator(1)
        upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in outputs]
        leaves = [*tensors, *layer.parameters()]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert results[0][-len(leaves) - 1][2] == 0, "a sequence without keys adds no loss"


def test_coverage_loss():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 0.0]])
    coverage = torch.tensor([[0.1, 0.9, 0.2], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(coverage_loss(weights, coverage), torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(coverage_loss(weights[0], coverage[0]), torch.tensor(0.6))
    stacked = coverage_loss(weights.expand(4, 2, 3), coverage.expand(4, 2, 3))
    assert stacked.shape == (4, 2)
    first = coverage_loss(weights, torch.zeros_like(weights))
    assert torch.equal(first, torch.zeros(2)), "the first step has no coverage"
    mixed = coverage_loss(weights.bfloat16(), coverage)
    assert mixed.dtype == torch.float32
    with pytest.raises(ValueError, match=r"coverage .*before it"):
        coverage_loss(weights, coverage[:1])


def test_gradcheck_of_the_loss():
    weights = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    coverage = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(coverage_loss, (weights, coverage))


def test_training_on_the_loss():
    """After training on the coverage loss alone, five steps attend to different keys."""
    torch.manual_seed(0)
    layer, cell = CoverageAttention(D, K, 16), nn.GRUCell(K, D)
    encoded = torch.randn(4, 8, K)
    optimizer = torch.optim.Adam([*layer.parameters(), *cell.parameters()], 0.05)
    losses = []
    for _ in range(40):
        memory = layer.project(encoded)
        state, query, loss = layer.initial_state(memory), torch.zeros(4, D), 0.0
        for _ in range(5):
            context, weights, after = layer.step(query, memory, state)
            loss = loss + coverage_loss(weights, state.cumulative).mean()
            query, state = cell(context, query), after
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_state_dict():
    layer = build("pointer")
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {
        "query_layer.weight": (H, D), "query_layer.bias": (H,),
        "key_layer.weight": (H, K), "key_layer.bias": (H,),
        "energy_layer.weight": (1, H), "energy_layer.bias": (1,),
        "coverage_layer.weight": (H, 1),
    }  # fmt: skip
    assert layer.extra_repr() == "query_dim=6, key_dim=5, hidden_dim=8"


def test_sentences():
    with pytest.raises(ValueError, match="initial is 'one', but must be one of"):
        CoverageAttention(2, 3, 4, initial="one")
    with pytest.raises(TypeError, match=r"CoverageAttention\.initial_state got a memory .* tuple"):
        build("pointer").initial_state((1, 2))
