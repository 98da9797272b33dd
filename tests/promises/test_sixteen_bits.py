"""The kernel reads keys and values in 16 bits where they are stored. The results are those of
their copies in float32, on the CPU to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_layout_free, generator

pytestmark = pytest.mark.kernel
OPS = torch.ops.additive_attn
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
SHAPES = pytest.mark.parametrize(
    ("queries", "keys", "hidden", "values"),
    [(1, 1, 1, 1), (1, 37, 20, 13), (1, 300, 64, 40), (1, 5000, 6, 3), (2, 50, 8, 5),
     (5, 300, 72, 33), (40, 150, 130, 17), (3, 0, 4, 4), (3, 9, 0, 4), (3, 9, 4, 0)],
    ids=lambda x: str(x),
)  # fmt: skip


def make(queries, keys, hidden, values, dtype, batch=2):
    """Returns a query and weight in float32, and a memory in 16 bits with gaps between its
    rows."""
    g = generator(0)
    query = torch.randn(batch, queries, hidden, generator=g)
    weight = torch.randn(hidden, generator=g)
    key = torch.randn(batch, keys, 2 * hidden + 1, generator=g).to(dtype)[..., 1 : hidden + 1]
    value = torch.randn(keys, batch, values, generator=g).to(dtype).transpose(0, 1)
    return query, key, value, weight


def poison(key, value, lengths):
    """Writes NaN beyond the lengths."""
    padding = torch.arange(key.shape[-2]) >= lengths.unsqueeze(-1)
    return (x.masked_fill(padding.transpose(-1, -2), math.nan) for x in (key, value))


def both(function, key, value):
    ours, other = function(key, value), function(key.float(), value.float())
    assert_layout_free(*({str(i): x for i, x in enumerate(each)} for each in (ours, other)))
    return ours


@pytest.mark.interpreter(queries=[2, 5], masking=["none"])
@DTYPES
@SHAPES
@pytest.mark.parametrize("masking", ["none", "lengths", "mask", "dropout"])
def test_forward_and_backward(queries, keys, hidden, values, masking, dtype):
    query, key, value, weight = make(queries, keys, hidden, values, dtype)
    mask = lengths = seed = None
    if masking == "lengths":
        lengths = torch.tensor([[max(keys - 3, 0)], [keys // 2]])
        key, value = poison(key, value, lengths)
    if masking == "mask":
        mask = torch.rand(queries, keys, generator=generator(1)) > 0.3
    if masking == "dropout":
        seed = torch.tensor(7)
    dropout_p = 0.0 if seed is None else 0.3
    options = (mask, lengths, None, None, None, -1, -1, seed, dropout_p, 0.7)
    outputs = both(lambda k, v: OPS.forward(query, k, v, weight, *options, True), key, value)
    upstream = [torch.randn(x.shape, generator=generator(2)) for x in outputs]

    def backward(k, v):
        """Gradients of all inputs."""
        return OPS.backward(
            *upstream, query, k, v, weight, *options, outputs[2], True, True, True, True, False
        )

    both(backward, key, value)


@DTYPES
@SHAPES
def test_scores(queries, keys, hidden, values, dtype):
    query, key, _, weight = make(queries, keys, hidden, values, dtype)
    options = (None,) * 5 + (-1, 2, 0.7)
    g = torch.randn(2, queries, keys, generator=generator(1))
    both(lambda k, _: (OPS.scores(query, k, weight, *options),), key, key)
    both(
        lambda k, _: OPS.scores_backward(
            g, query, k, weight, *options, True, True, True, False
        ),
        key, key,
    )  # fmt: skip


@DTYPES
@pytest.mark.parametrize("location", [False, True])
@pytest.mark.parametrize(("keys", "hidden", "values"), [(1, 1, 1), (37, 20, 13), (300, 72, 64)])
def test_step(keys, hidden, values, location, dtype):
    """Steps read the keys themselves, since prepared keys are rounded (test_step_operator.py)."""
    query, key, value, weight = make(1, keys, hidden, values, dtype)
    lengths = torch.tensor([[keys], [max(keys - 3, 0)]])
    key, value = poison(key, value, lengths)
    term = (None, None)
    if location:
        term = tuple(torch.randn(2, 3, n, generator=generator(1)) for n in (keys, hidden))
        term = (term[0], term[1][:1])

    def arguments(k, v):
        return query, k, v, weight, None, *term, None, lengths, torch.tensor(3), 0.3, 0.7

    outputs = both(lambda k, v: OPS.step(*arguments(k, v)), key, value)
    upstream = [torch.randn(x.shape, generator=generator(2)) for x in outputs]

    def backward(k, v):
        """Gradients of a step."""
        grad_key = torch.zeros(2, keys, hidden) if location else None
        grads = OPS.step_backward(*upstream, *arguments(k, v), *outputs[1:], grad_key)
        return grads if grad_key is None else (*grads, grad_key)

    both(backward, key, value)


@DTYPES
def test_every_number_is_widened_exactly(dtype):
    """All 65536 numbers are values, each of which one key returns."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = bits[bits.isfinite()]
    one = torch.ones(1, 1, 1)
    for width in (1, 7, 64, bits.numel()):
        value = bits[: bits.numel() // width * width].view(-1, 1, width)
        key = one.to(dtype).expand(value.shape[0], 1, 1)
        options = (None,) * 5 + (-1, -1, None, 0.0, 1.0)
        out = OPS.forward(one, key, value, one[0, 0], *options, False)[0]
        assert torch.equal(out, value.float())
