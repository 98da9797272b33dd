"""Integers that come from sizes stay symbolic in graphs: windows, lengths, starts, packed
sequences, rows of a step. A scale or a probability, which is no integer, becomes a constant that
the program guards, or raises. No program computes with the number of another call."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from additive_attn import (
    AdditiveAttention,
    MultiheadAdditiveAttention,
    additive_attention,
    additive_scores,
    varlen_additive_attention,
)

D, LK = 8, 7
WEIGHT = torch.linspace(-1, 1, D)
ALONE, HEADS = AdditiveAttention(D, D), MultiheadAdditiveAttention(D, 2, batch_first=True)


def self_attention(x, **options):
    return additive_attention(x, x, x, WEIGHT, **options)


def packed(x, n):
    ends = torch.tensor([0, n, LK])
    options = {"window": (n, 0), "need_lse": True}
    return varlen_additive_attention(x[0], x[0], x[0], WEIGHT, ends, ends, LK, LK, **options)[1]


INTEGERS = {
    "window": lambda x, n: self_attention(x, window=(n, 0)),
    "layer's window": lambda x, n: ALONE(x, x, window=(0, n))[0],
    "wide window": lambda x, n: self_attention(x, window=(n * 2**40, n)),
    "window of scores": lambda x, n: additive_scores(x, x, WEIGHT, window=(n, 0)).exp(),
    "lengths": lambda x, n: self_attention(x, lengths=[n, 2]),
    "length": lambda x, n: self_attention(x[0], lengths=n),
    "starts": lambda x, n: self_attention(x, starts=[n - 1, 0]),
    "memory": lambda x, n: ALONE.step(x[:, 0], ALONE.project(x, lengths=[n, 1]))[0],
    "memory of heads": lambda x, n: HEADS.step(x[:, 0], HEADS.project(x, lengths=[n, 1]))[0],
    "rows": lambda x, n: ALONE.step(x[:, :1].expand(-1, n, -1), ALONE.project(x))[0].sum(1),
    "packed": packed,
    "dropout": lambda x, n: self_attention(x[:, :1].expand(-1, n, -1), dropout_p=0.5).sum(1),
}
NUMBERS = {
    "scale": lambda x, n: self_attention(x, scale=1.0 / n),
    "whole scale": lambda x, n: self_attention(x, scale=n),
    "root": lambda x, n: self_attention(x, scale=1 / math.sqrt(n)),
    "probability": lambda x, n: self_attention(x, dropout_p=1.0 - 1.0 / n),
}


class Model(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.alone, self.heads = call, ALONE, HEADS

    def forward(self, x, like):
        return self.call(x, like.shape[0])


def seeded(call, x, n):
    torch.manual_seed(1)
    return call(x, torch.empty(n))


@pytest.mark.parametrize("call", INTEGERS.values(), ids=INTEGERS)
def test_exported_integers(call):
    model, x = Model(call), torch.randn(2, LK, D)
    shapes = {}, {0: torch.export.Dim("n", min=2, max=LK)}
    program = torch.export.export(model, (x, torch.empty(4)), dynamic_shapes=shapes).module()
    for n in (4, 5, 7, 2):
        torch.testing.assert_close(seeded(program, x, n), seeded(model, x, n))


@pytest.mark.parametrize("call", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("strict", [False, True])
def test_exported_numbers(call, strict):
    """Export raises if the size must be dynamic; else the exported program raises for another
    size."""
    model, x = Model(call), torch.randn(2, LK, D)
    given = (x, torch.empty(4))
    shapes = {}, {0: torch.export.Dim("n", min=2, max=LK)}
    with pytest.raises((torch._dynamo.exc.UserError, ValueError)):
        torch.export.export(model, given, dynamic_shapes=shapes, strict=strict)
    try:
        shapes = {}, {0: torch.export.Dim.AUTO}
        program = torch.export.export(model, given, dynamic_shapes=shapes, strict=strict).module()
    except ValueError:
        return
    torch.testing.assert_close(seeded(program, x, 4), seeded(model, x, 4))
    with pytest.raises(AssertionError, match="Guard"):
        program(x, torch.empty(5))


@pytest.mark.parametrize("name", ["window", "window of scores", "length", "rows", "packed"])
def test_compiled_integers(name):
    """All numbers share one graph, with gradients."""
    model, made, counts = Model(INTEGERS[name]), [], []

    def backend(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 5, 7, 2):
        x, results = torch.randn(2, LK, D, requires_grad=True), []
        for call in (compiled, model):
            out = seeded(call, x, n)
            results.append([out, *torch.autograd.grad(out.square().sum(), x)])
        torch.testing.assert_close(*results)
        counts.append(len(made))
    assert len(set(counts)) == 1
    torch._dynamo.reset()
