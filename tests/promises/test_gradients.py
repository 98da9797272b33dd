"""Promise 1: gradcheck and gradgradcheck pass in float64, on the kernel itself."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import (
    dense_mask,
    generator,
    gradients,
    make,
    plain,
    random_upstream,
)
from torch.autograd import gradcheck, gradgradcheck

from additive_attn import additive_attention
from additive_attn.ops import dispatch
from additive_attn.ops.autograd import attend
from additive_attn.spec.call import Call
from additive_attn.spec.dropout import keep_mask


def leaves(*args, **options):
    inputs = make(*args, dtype=torch.float64, **options)
    return tuple(x.requires_grad_() for x in inputs.values())


def function(pick, **options):
    """Returns the public function as a function of tensors that returns the picked outputs."""

    def call(query, key, value, weight, attn_mask=None):
        outputs = additive_attention(
            query, key, value, weight, attn_mask=attn_mask, need_weights=True, need_lse=True,
            **options,
        )  # fmt: skip
        return tuple(outputs[i] for i in pick)

    return call


PICKS = [(0,), (1,), (2,), (0, 1, 2)]
PICK_IDS = ["out", "weights", "lse", "all"]


@pytest.mark.core
@pytest.mark.parametrize("pick", PICKS, ids=PICK_IDS)
@pytest.mark.parametrize("queries", [1, 3], ids=["one row", "rows"])
def test_gradcheck(pick, queries):
    # Undefined upstream gradients of some of several outputs are part of gradcheck's default.
    assert gradcheck(function(pick, scale=0.7), leaves((2,), queries, 4, 5, 3))


@pytest.mark.parametrize("pick", PICKS, ids=PICK_IDS)
@pytest.mark.parametrize("queries", [1, 3], ids=["one row", "rows"])
def test_gradgradcheck(pick, queries):
    assert gradgradcheck(
        function(pick, scale=0.7),
        leaves((2,), queries, 3, 4, 2),
        gen_non_contig_grad_outputs=True,
        fast_mode=True,
    )


def test_gradgradcheck_of_every_element():
    assert gradgradcheck(function((0, 1, 2), scale=0.7), leaves((), 2, 3, 2, 2))


MASKING = {
    "bool": dict(attn_mask=torch.tensor([[True, False, True], [False, True, True]])),
    "lengths": dict(lengths=torch.tensor([2, 3])),
    "lengths per row": dict(lengths=torch.tensor([[1, 3], [0, 2]])),
    "causal": dict(is_causal=True),
    "window": dict(window=(0, 1)),
    "all": dict(
        attn_mask=torch.tensor([True, True, False]),
        lengths=torch.tensor([3, 2]),
        is_causal=True,
        window=(1, -1),
    ),
}


@pytest.mark.parametrize("masking", MASKING.values(), ids=MASKING.keys())
def test_masked(masking):
    inputs = leaves((2,), 2, 3, 4, 2)
    # The lse of an empty row is -inf, which has no numerical derivative.
    pick = (0, 1) if "lengths" in masking else (0, 1, 2)

    def call(*tensors):
        return additive_attention(*tensors, need_weights=True, need_lse=True, **masking)

    assert gradcheck(lambda *t: tuple(call(*t)[i] for i in pick), inputs)
    assert gradgradcheck(lambda *t: tuple(call(*t)[i] for i in pick), inputs, fast_mode=True)


@pytest.mark.parametrize(
    "shape", [(2, 4), (4,), (1, 4), (2, 1), (2, 2, 4), (2, 1, 4), ()], ids=str
)
def test_float_mask(shape):
    inputs = leaves((2,), 2, 4, 4, 2)
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(function((0, 1, 2)), (*inputs, mask))
    assert gradgradcheck(function((0, 1, 2)), (*inputs, mask), fast_mode=True)


def test_float_mask_with_minus_infinity():
    inputs = leaves((), 2, 4, 4, 2)
    hidden = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    mask = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def call(query, key, value, weight, mask):
        return additive_attention(
            query, key, value, weight, attn_mask=mask.masked_fill(hidden, -math.inf),
            need_weights=True,
        )  # fmt: skip

    assert gradcheck(call, (*inputs, mask))
    assert gradgradcheck(call, (*inputs, mask), fast_mode=True)


def test_heads_and_broadcast_inputs():
    g = generator(0)
    shapes = [(2, 1, 2, 3), (3, 4, 3), (2, 1, 4, 2), (1, 3)]
    tensors = tuple(
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    assert gradcheck(function((0, 1, 2)), tensors)
    assert gradgradcheck(function((0, 1, 2)), tensors, fast_mode=True)
    per_head = torch.randn(3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 3, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    assert gradcheck(function((0, 1, 2)), (query, *tensors[1:3], per_head))


@pytest.mark.core
@pytest.mark.parametrize("spread", [0.3, 4.0, 30.0, 120.0])
@pytest.mark.parametrize("hidden", [5, 66], ids=["few features", "many features"])
def test_every_form_of_the_kernel(hidden, spread):
    """The kernel computes small, usual, large and saturated activations in different forms, and
    few features in another than many."""
    query, key, value, weight = leaves((), 2, 3, hidden, 2, spread=spread)
    with torch.no_grad():  # makes some pairs near zero though both parts are large
        key[0] = 0.1 - query[0]
    assert gradcheck(function((0, 1, 2)), (query, key, value, weight))


@pytest.mark.core
@pytest.mark.parametrize("sizes", [(33, 70, 20, 9), (2, 130, 33, 17), (5, 16, 129, 4)], ids=str)
def test_beyond_one_tile(sizes):
    assert gradcheck(function((0, 1, 2)), leaves((2,), *sizes), fast_mode=True)


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_dropout_with_a_fixed_seed(p):
    inputs = leaves((2,), 3, 6, 4, 3)
    seed = torch.tensor(1234)

    def call(query, key, value, weight):
        call = Call(query, key, value, weight, seed=seed, dropout_p=p)
        return attend(call, need_weights=True)

    assert not keep_mask(seed, (2,), (0, 3), (0, 6), p).all(), "nothing is dropped"
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("queries", [1, 6])
def test_only_what_is_needed_is_computed(queries):
    """An input that alone needs a gradient gets the same one as together with the others."""
    inputs = make((2,), queries, 20, 9, 5)
    mask = torch.randn(queries, 20)
    together = [x.clone().requires_grad_() for x in (*inputs.values(), mask)]
    out = function((0,))(*together)[0]
    upstream = torch.randn_like(out)
    expected = torch.autograd.grad(out, together, upstream)
    for alone, grad in enumerate(expected):
        tensors = [*inputs.values(), mask]
        tensors[alone] = tensors[alone].clone().requires_grad_()
        got = torch.autograd.grad(function((0,))(*tensors)[0], tensors[alone], upstream)[0]
        assert torch.equal(got, grad), f"input {alone}"


@pytest.mark.interpreter
@pytest.mark.parametrize("queries", [1, 5])
def test_undefined_upstream_gradients_are_zeros(queries):
    inputs = make((2,), queries, 9, 6, 4)
    call = lambda x: dict(  # noqa: E731
        zip(("out", "weights", "lse"), function((0, 1, 2))(*x.values()), strict=True)
    )
    outputs = call(inputs)
    everything = random_upstream(outputs)
    for used in (["out"], ["weights"], ["lse"], ["out", "lse"], ["weights", "lse"]):
        some = {name: everything[name] for name in used}
        padded = {
            name: everything[name] if name in used else torch.zeros_like(everything[name])
            for name in everything
        }
        _, got = gradients(call, inputs, some)
        _, expected = gradients(call, inputs, padded)
        for name in got:
            torch.testing.assert_close(got[name], expected[name])


def test_second_derivative_equals_that_of_the_formula():
    """A gradient penalty of the fused layer is that of the plain one, also under masks."""
    inputs = make((2,), 4, 6, 5, 3, dtype=torch.float64)
    lengths = torch.tensor([6, 4])
    results = []
    for which in ("fused", "plain"):
        x = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        if which == "fused":
            out = additive_attention(*x.values(), lengths=lengths, is_causal=True)
        else:
            allowed = dense_mask(inputs, lengths=lengths, is_causal=True)
            out = plain(*x.values(), allowed=allowed)["out"]
        grad = torch.autograd.grad(out.square().sum(), x["query"], create_graph=True)[0]
        penalty = grad.square().sum()
        results.append(torch.autograd.grad(penalty, list(x.values())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_accumulate_and_graph_can_be_kept():
    query, key, value, weight = leaves((), 2, 3, 4, 2)
    out = additive_attention(query, key, value, weight)
    out.sum().backward(retain_graph=True)
    once = query.grad.clone()
    out.sum().backward()
    torch.testing.assert_close(query.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_saved_tensors_may_not_change():
    query, key, value, weight = (x.detach() for x in leaves((), 2, 3, 4, 2))
    weight.requires_grad_()
    out = additive_attention(query, key, value, weight)
    value.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_kernel_backward_against_the_formula_in_float32():
    """Calls the operators directly, without autograd."""
    inputs = make((3,), 10, 37, 21, 11)
    out, weights, lse = dispatch.forward(
        *inputs.values(), None, None, None, None, None, -1, -1, None, 0.0, 1.0, True
    )
    upstream = random_upstream({"out": out, "weights": weights, "lse": lse})
    grads = dispatch.backward(
        *upstream.values(), *inputs.values(), None, None, None, None, None, -1, -1, None, 0.0,
        1.0, lse, True, True, True, True, False,
    )  # fmt: skip
    _, exact = gradients(
        lambda x: plain(*x.values()), {k: v.double() for k, v in inputs.items()}, upstream
    )
    for name, grad in zip(("query", "key", "value"), grads[:3], strict=True):
        torch.testing.assert_close(grad.double(), exact[name], atol=3e-5, rtol=1e-4)
    assert grads[3].shape == (3, 21) and grads[4].shape == (0,)
    torch.testing.assert_close(grads[3].sum(0).double(), exact["weight"], atol=1e-4, rtol=1e-4)
