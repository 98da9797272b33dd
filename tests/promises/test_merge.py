"""merge_attention: results over disjoint sets of keys combine into the result over their union."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import error, fused, make, plain

from additive_attn import additive_attention, merge_attention


def chunks(inputs, cuts, **options):
    """Returns outputs and lse of each range of keys."""
    outs, lses = [], []
    for start, stop in itertools.pairwise(cuts):
        mask = options.get("attn_mask")
        out, lse = additive_attention(
            inputs["query"], *(inputs[name][..., start:stop, :] for name in ("key", "value")),
            inputs["weight"], attn_mask=None if mask is None else mask[..., start:stop],
            need_lse=True,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return outs, lses


@pytest.mark.parametrize(
    "cuts", [(0, 90), (0, 1, 90), (0, 30, 60, 90), (0, 0, 45, 45, 90)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_keys(cuts, dtype):
    inputs = make((2, 3), 7, 90, 12, 5, dtype=dtype, heads=True)
    out, lse = merge_attention(*chunks(inputs, cuts))
    assert out.dtype == dtype
    exact = plain(*(x.double() for x in inputs.values()))
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    assert error(out, exact["out"]) < tolerance
    assert error(lse, exact["lse"]) < min(tolerance * 3, 1e-5)


def test_gradients_through_the_merge():
    inputs = make((), 5, 30, 8, 4, dtype=torch.float64)
    upstream = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    results = []
    for merged in (True, False):
        x = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        if merged:
            out, lse = merge_attention(*chunks(x, (0, 11, 12, 30)))
        else:
            outputs = fused(x)
            out, lse = outputs["out"], outputs["lse"]
        results.append(torch.autograd.grad((out, lse), list(x.values()), upstream))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_empty_sets():
    inputs = make((), 4, 20, 8, 5)
    mask = torch.ones(4, 20, dtype=torch.bool)
    mask[0] = False
    mask[1, :10] = False
    mask[2, 10:] = False
    outs, lses = chunks(inputs, (0, 10, 20), attn_mask=mask)
    out, lse = merge_attention(outs, lses)
    whole = fused(inputs, attn_mask=mask)
    torch.testing.assert_close(out, whole["out"])
    torch.testing.assert_close(lse, whole["lse"])
    assert torch.equal(out[0], torch.zeros(5)) and lse[0] == -math.inf
    assert torch.equal(out[1], outs[1][1]) and torch.equal(out[2], outs[0][2])


def test_gradients_of_empty_sets_are_zero():
    inputs = make((), 3, 20, 8, 5)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[1, 3] = True
    out, lse = merge_attention(*chunks(leaves, (0, 10, 20), attn_mask=mask))
    (out.sum() + lse[1]).backward()
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all(), name
    assert torch.equal(leaves["query"].grad[0], torch.zeros(8))


def test_far_apart():
    """One set has e^1000 times the weight of the other."""
    outs = [torch.ones(2, 3), torch.zeros(2, 3)]
    out, lse = merge_attention(outs, [torch.full((2,), 500.0), torch.full((2,), -500.0)])
    assert torch.equal(out, outs[0]) and torch.equal(lse, torch.full((2,), 500.0))


def test_in_any_order_and_in_steps():
    inputs = make((2,), 5, 60, 8, 4)
    outs, lses = chunks(inputs, (0, 20, 40, 60))
    out, lse = merge_attention(outs, lses)
    back, back_lse = merge_attention(outs[::-1], lses[::-1])
    torch.testing.assert_close((out, lse), (back, back_lse))
    first = merge_attention(outs[:2], lses[:2])
    stepped = merge_attention([first[0], outs[2]], [first[1], lses[2]])
    torch.testing.assert_close(stepped, (out, lse))
    torch.testing.assert_close(out, fused(inputs)["out"])


@pytest.mark.parametrize("finite", [-30.0, -1e4, -1e9])
def test_sets_masked_with_a_finite_value(finite):
    """The shares of sets are exact to the spacing of a float32 lse. At -1e9 that is 64, so the
    number of keys is lost, as the docstring says."""
    inputs = make((), 3, 7, 8, 5)
    mask = torch.full((3, 7), finite)
    outs, lses = chunks(inputs, (0, 1, 7), attn_mask=mask)
    merged, _ = merge_attention(outs, lses)
    if finite == -1e9:
        torch.testing.assert_close(merged, (outs[0] + outs[1]) / 2)
    else:
        spacing = 2.0 ** (math.floor(math.log2(abs(finite))) - 23)
        assert (merged - fused(inputs)["out"]).abs().max() <= 8 * spacing + 1e-5


@pytest.mark.parametrize("finite", [-1e4, -1e9])
def test_a_set_masked_with_a_finite_value_beside_others(finite):
    """The result is exact: beside a key that is not masked, such a set has no weight."""
    inputs = make((), 3, 7, 8, 5)
    mask = torch.zeros(3, 7)
    mask[:, :4] = finite
    merged = merge_attention(*chunks(inputs, (0, 4, 7), attn_mask=mask))
    whole = fused(inputs, attn_mask=mask)
    torch.testing.assert_close(merged, (whole["out"], whole["lse"]))
