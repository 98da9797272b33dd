"""Promise 3: a row with no key to attend to gives 0, 0, -inf and zero gradients."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import OUTPUTS, assert_layout_free, assert_same, fused, gradients, make

from additive_attn import AdditiveAttention, additive_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
QUERIES, KEYS = 5, 70
EMPTY = 2  # the row of entry 0 that gets no key


def bool_mask(dtype):
    mask = torch.rand(2, QUERIES, KEYS) < 0.7
    mask[0, EMPTY] = False
    return dict(attn_mask=mask)


def float_mask(dtype):
    mask = torch.randn(2, QUERIES, KEYS).to(dtype)
    mask[0, EMPTY] = -math.inf
    return dict(attn_mask=mask)


def lengths(dtype):
    rows = torch.randint(1, KEYS + 1, (2, QUERIES))
    rows[0, EMPTY] = 0
    return dict(lengths=rows)


def disjoint(dtype):
    """Returns masks each of which leaves keys, while their intersection leaves none."""
    mask = torch.ones(2, QUERIES, KEYS, dtype=torch.bool)
    mask[0, EMPTY, :3] = False
    return dict(attn_mask=mask, is_causal=True)


KINDS = [bool_mask, float_mask, lengths, disjoint]


@pytest.mark.interpreter(dtype=[torch.float32])
@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_row(kind, dtype):
    inputs = make((2,), QUERIES, KEYS, 12, 9, dtype=dtype)
    outputs = fused(inputs, **kind(dtype))
    assert torch.equal(outputs["out"][0, EMPTY], torch.zeros(9, dtype=dtype))
    assert torch.equal(outputs["weights"][0, EMPTY], torch.zeros(KEYS, dtype=dtype))
    assert outputs["lse"][0, EMPTY] == -math.inf
    full = torch.ones(2, QUERIES, dtype=torch.bool)
    full[0, EMPTY] = False
    for name in OUTPUTS:
        assert outputs[name].isfinite()[full].all()
    assert (outputs["weights"][full].float().sum(-1) - 1).abs().max() < 0.05
    assert outputs["lse"].isinf().sum() == 1


@pytest.mark.interpreter(dtype=[torch.float32], kind=[lengths])
@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_an_empty_row_are_zero(kind, dtype):
    """They are zero for any upstream gradient, and the row contributes nothing to other
    gradients."""
    options = kind(dtype)
    inputs = make((2,), QUERIES, KEYS, 12, 9, dtype=dtype)
    outputs = fused(inputs, **options)
    upstream = {name: torch.randn(outputs[name].shape).to(outputs[name].dtype) for name in OUTPUTS}
    _, grads = gradients(lambda x: fused(x, **options), inputs, upstream)
    assert torch.equal(grads["query"][0, EMPTY], torch.zeros(12, dtype=dtype))
    assert all(grad.isfinite().all() for grad in grads.values())

    changed = {name: grad.clone() for name, grad in upstream.items()}
    for name in OUTPUTS:
        changed[name][0, EMPTY] = 1e4
    _, same = gradients(lambda x: fused(x, **options), inputs, changed)
    for name in grads:
        assert_same(grads[name], same[name], name)


def test_gradient_of_the_mask_of_an_empty_row_is_zero():
    inputs = make((), QUERIES, KEYS, 12, 9)
    inputs["attn_mask"] = float_mask(torch.float32)["attn_mask"][0]
    upstream = {name: torch.randn_like(x) for name, x in fused(inputs).items()}
    _, grads = gradients(fused, inputs, upstream)
    assert torch.equal(grads["attn_mask"][EMPTY], torch.zeros(KEYS))
    assert grads["attn_mask"].isfinite().all() and (grads["attn_mask"] != 0).any()


@pytest.mark.parametrize("queries", [1, 3, 130])
def test_every_row_empty(queries):
    inputs = make((2,), queries, 40, 8, 6)
    none = dict(lengths=torch.zeros(2, dtype=torch.int64))
    for options in (none, dict(attn_mask=torch.zeros(40, dtype=torch.bool)), {**none}):
        outputs, grads = gradients(
            lambda x, o=options: fused(x, **o),
            inputs,
            {"out": torch.randn(2, queries, 6), "weights": torch.randn(2, queries, 40)},
        )
        assert torch.equal(outputs["out"], torch.zeros(2, queries, 6))
        assert torch.equal(outputs["weights"], torch.zeros(2, queries, 40))
        assert torch.equal(outputs["lse"], torch.full((2, queries), -math.inf))
        for name, grad in grads.items():
            assert torch.equal(grad, torch.zeros_like(inputs[name])), name


def test_one_sequence_without_keys():
    """Its gradients are zero, and the other sequence has the results of a call with it alone."""
    inputs = make((2,), 6, 50, 8, 6)
    upstream = {"out": torch.randn(2, 6, 6)}
    _, grads = gradients(lambda x: fused(x, lengths=torch.tensor([0, 50])), inputs, upstream)
    for name in ("query", "key", "value"):
        assert torch.equal(grads[name][0], torch.zeros_like(grads[name][0])), name
    alone = {name: x[1] if name != "weight" else x for name, x in inputs.items()}
    _, expected = gradients(fused, alone, {"out": upstream["out"][1]})
    for name in ("query", "key", "value"):
        torch.testing.assert_close(grads[name][1], expected[name])
    torch.testing.assert_close(grads["weight"], expected["weight"])


def test_leading_keys_masked():
    """The first tiles are empty and later ones are not: the running maximum starts at -inf."""
    inputs = make((), 20, 400, 8, 6)
    allowed = torch.zeros(20, 400, dtype=torch.bool)
    allowed[:, 300:] = True
    allowed[7] = False
    ours = fused(inputs, attn_mask=allowed)
    later = {**inputs, "key": inputs["key"][300:], "value": inputs["value"][300:]}
    expected = fused(later)
    rows = torch.arange(20) != 7
    torch.testing.assert_close(ours["out"][rows], expected["out"][rows])
    torch.testing.assert_close(ours["lse"][rows], expected["lse"][rows])
    assert torch.equal(ours["out"][7], torch.zeros(6))


def test_empty_rows_where_keys_are_split():
    inputs = make((3,), 1, 9000, 6, 4)
    ours = fused(inputs, lengths=torch.tensor([0, 9000, 10]))
    assert torch.equal(ours["out"][0], torch.zeros(1, 4)) and ours["lse"][0] == -math.inf
    for entry, length in ((1, 9000), (2, 10)):
        alone = {
            "query": inputs["query"][entry],
            "key": inputs["key"][entry, :length],
            "value": inputs["value"][entry, :length],
            "weight": inputs["weight"],
        }
        torch.testing.assert_close(ours["out"][entry], fused(alone)["out"])


def test_no_keys_at_all():
    inputs = make((2,), 3, 0, 8, 6)
    outputs, grads = gradients(
        fused, inputs, {"out": torch.randn(2, 3, 6), "lse": torch.randn(2, 3)}
    )
    assert torch.equal(outputs["out"], torch.zeros(2, 3, 6))
    assert outputs["weights"].shape == (2, 3, 0)
    assert torch.equal(outputs["lse"], torch.full((2, 3), -math.inf))
    for name, grad in grads.items():
        assert torch.equal(grad, torch.zeros_like(inputs[name])), name


def test_under_dropout():
    inputs = make((2,), QUERIES, KEYS, 8, 6)
    options = bool_mask(torch.float32)
    upstream = {"out": torch.randn(2, QUERIES, 6), "weights": torch.randn(2, QUERIES, KEYS)}
    outputs, grads = gradients(lambda x: fused(x, dropout_p=0.5, **options), inputs, upstream)
    assert torch.equal(outputs["out"][0, EMPTY], torch.zeros(6))
    assert torch.equal(grads["query"][0, EMPTY], torch.zeros(8))
    assert all(grad.isfinite().all() for grad in grads.values())


def test_in_the_module():
    """nn.MultiheadAttention returns NaN here."""
    layer = AdditiveAttention(12, 8)
    x = torch.randn(2, 4, 12, requires_grad=True)
    ignore = torch.tensor([[False] * 4, [True] * 4])
    out, weights = layer(x, x, key_padding_mask=ignore)
    assert torch.equal(out[1], torch.zeros(4, 12))
    assert torch.equal(weights[1], torch.zeros(4, 4))
    (out.sum() + weights.square().sum()).backward()
    assert torch.equal(x.grad[1], torch.zeros(4, 12))
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_second_derivative():
    inputs = make((2,), 3, 6, 4, 2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    out = additive_attention(*leaves, lengths=torch.tensor([[0, 6, 6], [2, 0, 3]]))
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert all(g.isfinite().all() for g in (*grads, *second))
    assert torch.equal(second[0][0, 0], torch.zeros(4, dtype=torch.float64))


def test_rows_beside_an_empty_one_do_not_change():
    inputs = make((2,), QUERIES, KEYS, 8, 6)
    options = bool_mask(torch.float32)
    filled = options["attn_mask"].clone()
    filled[0, EMPTY, 5] = True
    with_empty, without = fused(inputs, **options), fused(inputs, attn_mask=filled)
    rows = torch.ones(2, QUERIES, dtype=torch.bool)
    rows[0, EMPTY] = False
    assert_layout_free(
        {k: v[rows] for k, v in with_empty.items()}, {k: v[rows] for k, v in without.items()}
    )
