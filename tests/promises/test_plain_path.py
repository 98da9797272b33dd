"""Plain PyTorch: small calls as a whole, and the operators in blocks, keep the same rules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import assert_all_same, assert_same, check_against_plain, fused, gradients, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from additive_attn import AdditiveAttention, additive_attention
from additive_attn.backends.plain import blocks, whole
from additive_attn.ops import dispatch, masking
from additive_attn.spec import masks
from additive_attn.spec.call import Call


@pytest.fixture(autouse=True, params=["whole", "many pairs", "blocks"])
def part(request, monkeypatch):
    """The part of the plain path that computes."""
    calls = []
    module, name = (blocks, "forward") if request.param == "blocks" else (whole, "attend")
    function = getattr(module, name)
    monkeypatch.setattr(dispatch, "cpu_is_plain", True)
    monkeypatch.setattr(module, name, lambda *a: calls.append(1) or function(*a))
    library = torch.library.Library("additive_attn", "IMPL")
    library.impl("forward", lambda *a: blocks.forward(*a), "CPU", allow_override=True)
    library.impl("backward", lambda *a: blocks.backward(*a), "CPU", allow_override=True)
    if request.param == "many pairs":  # more than those that autograd differentiates
        monkeypatch.setattr(whole, "_SHORT_SUM", -1)
    if request.param == "blocks":
        monkeypatch.setattr(whole, "ELEMENTS", -1)
        monkeypatch.setattr("additive_attn.backends.plain.plan._BLOCK_ELEMENTS", 4000)
    yield request.param
    library._destroy()
    assert calls


MASKS = {
    "none": {},
    "lengths": dict(lengths=torch.tensor([30, 0])),
    "causal": dict(is_causal=True),
    "window": dict(window=(3, 20)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 9])
def test_accuracy(queries, mask, dtype):
    cases = [make((2,), queries, 40, 24, 5, dtype=dtype, seed=seed) for seed in range(3)]
    check_against_plain(cases, scale=0.7, **MASKS[mask])


LEADING = [(), (3,), (2, 3)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("shapes", itertools.product(LEADING, repeat=3), ids=str)
def test_leading_dims_broadcast_with_and_without_lse(shapes, dropout_p):
    """A call that also returns lse has the same other outputs."""
    sizes = {"query": (1, 4), "key": (5, 4), "value": (5, 6)}
    inputs = {
        name: torch.randn(*leading, *size)
        for (name, size), leading in zip(sizes.items(), shapes, strict=True)
    }
    inputs["weight"] = torch.randn(4)
    batch = torch.broadcast_shapes(*shapes)
    upstream = {"out": torch.randn(*batch, 1, 6), "weights": torch.randn(*batch, 1, 5)}

    def called(need_lse):
        def call(x):
            torch.manual_seed(5)
            options = dict(dropout_p=dropout_p, need_weights=True, need_lse=need_lse)
            out, weights = additive_attention(*x.values(), **options)[:2]
            return dict(out=out, weights=weights)

        return gradients(call, inputs, upstream)

    for ours, expected in zip(called(False), called(True), strict=True):
        torch.testing.assert_close(ours, expected)


def test_sums_over_many_pairs():
    """The gradient of the weight sums 8,192 pairs, too many for a sum in one float."""
    check_against_plain([make((32,), 32, 8, 32, 4, seed=seed) for seed in range(3)])


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads"),
    [((), 1, 1000, 1), ((2,), 20, 25, 1), ((), 31, 33, 1), ((1, 2), 22, 23, 2)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_sums_over_few_pairs(batch, queries, keys, heads, masked):
    """The gradient of the weight sums hundreds of pairs. Each case is judged by itself."""
    mask = torch.rand(queries, keys) < 0.8
    for seed in range(20):
        case = make(batch, queries, keys, 16, 5, seed=seed)
        if heads > 1:
            case["weight"] = torch.randn(heads, 16)
        check_against_plain([case], **(dict(attn_mask=mask) if masked else {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_an_unbatched_layer_is_a_batch_of_one(rows, bias):
    layer, upstream = (
        AdditiveAttention(6, 8, bias=bias),
        (torch.randn(rows, 5), torch.randn(rows, 9)),
    )
    inputs = [torch.randn(*size) for size in ((rows, 6), (9, 6), (9, 5))]

    def results(lead):
        leaves = [x.view(*lead, *x.shape).requires_grad_() for x in inputs]
        outputs = layer(*leaves)
        parameters, grads = tuple(layer.parameters()), [x.view(*lead, *x.shape) for x in upstream]
        found = torch.autograd.grad(outputs, (*leaves, *parameters), grads)
        return [*outputs, *found[:3]], found[3:]

    (alone, of_parameters), (batched, expected) = results(()), results((1,))
    torch.testing.assert_close(alone, [x.squeeze(0) for x in batched])
    torch.testing.assert_close(of_parameters, expected)


def test_a_layer_refuses_nested_tensors():
    layer, x = AdditiveAttention(6, 8), torch.randn(2, 3, 6)
    nested = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)])
    assert layer(x, x)[0].shape == (2, 3, 6)
    with pytest.raises(TypeError, match="nested"):
        layer(x, nested)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("names", [("key", "value"), ("key",)], ids="-".join)
def test_padding_changes_no_bit(names, queries, poison):
    inputs = make((2,), queries, 40, 12, 9)
    bad = {name: x.clone() for name, x in inputs.items()}
    for name in names:
        inputs[name][:, 25:] = 0.0
        bad[name][:, 25:] = poison
    options = dict(lengths=torch.tensor([25, 17]))
    upstream = {name: torch.randn_like(x) for name, x in fused(inputs).items()}
    clean = gradients(lambda x: fused(x, **options), inputs, upstream)
    dirty = gradients(lambda x: fused(x, **options), bad, upstream)
    for ours, expected in zip(dirty, clean, strict=True):
        assert_all_same(ours, expected)


def test_what_comes_to_an_empty_row_stays_there():
    inputs = make((2,), 3, 8, 6, 4)
    lengths = torch.tensor([8, 0])
    upstream = {"out": torch.ones(2, 3, 4)}
    upstream["out"][1] = math.nan
    _, grads = gradients(
        lambda x: dict(out=additive_attention(*x.values(), lengths=lengths)), inputs, upstream
    )
    for name in grads:
        assert grads[name].isfinite().all(), name
    assert not grads["query"][1].any()


@pytest.mark.parametrize("queries", [1, 3])
def test_nan_in_an_empty_row_stays_there(queries):
    inputs = make((2,), queries, 8, 6, 4)
    inputs["key"][1] = math.nan
    lengths = torch.tensor([8, 0])
    results, grads = gradients(
        lambda x: dict(out=additive_attention(*x.values(), lengths=lengths)),
        inputs, {"out": torch.ones(2, queries, 4)},
    )  # fmt: skip
    assert results["out"].isfinite().all() and not results["out"][1].any()
    for name in grads:
        assert grads[name].isfinite().all(), name


def test_an_infinite_weight_reaches_no_masked_pair():
    inputs = make((2,), 3, 8, 6, 4)
    inputs["weight"][0] = math.inf
    lengths = torch.tensor([5, 0])
    _, grads = gradients(
        lambda x: dict(out=additive_attention(*x.values(), lengths=lengths)),
        inputs, {"out": torch.ones(2, 3, 4)},
    )  # fmt: skip
    assert not grads["query"][1].any() and not grads["key"][1].any()
    assert not grads["key"][0, 5:].any()


MASKINGS = {
    "causal": dict(is_causal=True),
    "lengths": dict(lengths=torch.tensor([7, 4])),
    "window": dict(window=(2, 1), lengths=torch.tensor([7, 4])),
    "starts": dict(starts=torch.tensor([[1], [3]]).expand(2, 5)),
}


@pytest.mark.parametrize("mask", MASKINGS)
def test_masks_first_used_in_inference_mode_serve_training(mask):
    """What is cached of a mask is no inference tensor, which autograd could not save. The call in
    inference mode changes no later result."""
    masks._kept_positions.cache_clear()
    masks._kept_window.cache_clear()
    masking._kept.clear()
    inputs = make((2,), 5, 7, 6, 4)
    call = lambda x: dict(out=additive_attention(*x.values(), **MASKINGS[mask]))  # noqa: E731
    upstream = {"out": torch.randn(2, 5, 4)}
    with torch.inference_mode():
        first = call(inputs)["out"]
    results, grads = gradients(call, inputs, upstream)
    assert_same(results["out"], first)
    again = gradients(call, inputs, upstream)
    assert_all_same(again[0], results)
    assert_all_same(again[1], grads)


@pytest.mark.parametrize("per_query", [False, True])
def test_lengths_may_be_written_to_between_calls(per_query):
    """The cached mask belongs to the numbers of the lengths, not to their tensor."""
    inputs = list(make((2,), 5, 7, 6, 4).values())
    lengths = torch.tensor([7, 4])
    lengths = lengths[:, None].repeat(1, 5) if per_query else lengths
    first = additive_attention(*inputs, lengths=lengths)
    for other in (lengths.flip(0), lengths - 1):
        lengths.copy_(other)
        found = additive_attention(*inputs, lengths=lengths)
        mask = torch.arange(7) < lengths.reshape(2, -1, 1)
        torch.testing.assert_close(found, additive_attention(*inputs, attn_mask=mask))
    assert not torch.equal(found, first)


def test_masks_of_many_lengths():
    """More than are cached, of several numbers of keys, and again."""
    tensors = list(make((2,), 3, 7, 6, 4).values())
    for first, keys in [*itertools.product(range(8), (5, 7))] * 2:
        query, key, value, weight = tensors
        inputs = query, key[:, :keys], value[:, :keys], weight
        lengths = torch.tensor([min(first, keys), keys - 1])
        found = additive_attention(*inputs, lengths=lengths)
        mask = torch.arange(keys) < lengths[:, None, None]
        torch.testing.assert_close(found, additive_attention(*inputs, attn_mask=mask))
        assert len(masking._kept) <= masking._KEPT_MASKS


def test_masks_first_used_under_fake_tensors_serve_real_ones():
    masks._kept_positions.cache_clear()
    masks._kept_window.cache_clear()
    call = lambda x: additive_attention(*x, is_causal=True, lengths=[7, 4])  # noqa: E731
    inputs = list(make((2,), 5, 7, 6, 4).values())
    with FakeTensorMode() as mode:
        call([mode.from_tensor(x) for x in inputs])
    torch.func.functionalize(lambda *x: call(x))(*inputs)
    kept = call(inputs)
    assert type(kept) is torch.Tensor
    masks._kept_window.cache_clear()
    assert_same(call(inputs), kept)


@pytest.mark.parametrize("keys", [(3,), ()], ids=["alike", "shared keys"])
def test_more_energies_are_kept_for_gradients(keys, part, monkeypatch):
    monkeypatch.setattr(whole, "ELEMENTS", -1 if part == "blocks" else 3 * 4 * 5 * 6)
    monkeypatch.setattr(whole, "_KEPT_ELEMENTS", 3 * 8 * 5 * 6)
    made = []
    for rows, differentiable in ((4, False), (5, False), (5, True), (8, True), (9, True)):
        inputs = torch.randn(3, rows, 6), torch.randn(*keys, 5, 6), torch.randn(5, 2)
        call = Call(*inputs, torch.randn(6).requires_grad_(differentiable))
        made.append(whole.prefers_formula(call))
        with torch.no_grad():
            assert whole.prefers_formula(call) is (part != "blocks" and rows == 4)
    additive_attention(*make((3,), 2, 5, 6, 2).values())  # what the fixture asks for
    monkeypatch.setattr(whole, "_KEPT_ELEMENTS", 10)
    monkeypatch.setattr(whole, "ELEMENTS", min(whole.ELEMENTS, 10))
    one = Call(torch.randn(3, 1, 6), torch.randn(*keys, 5, 6), torch.randn(5, 2), call.weight)
    assert whole.prefers_formula(one) is (part != "blocks" and bool(keys))
    with torch.no_grad():
        assert not whole.prefers_formula(one)
    assert made == ([False] * 5 if part == "blocks" else [True, False, True, True, False])


def test_dropout_of_both_parts_is_the_same(part, monkeypatch):
    inputs, lengths = make((2, 3), 5, 14, 6, 4), torch.tensor([14, 9])
    upstream = {"out": torch.randn(2, 3, 5, 4)}
    results = []
    for elements in (whole.ELEMENTS, 2**22, -1):
        monkeypatch.setattr(whole, "ELEMENTS", elements)
        torch.manual_seed(3)
        results.append(
            gradients(
                lambda x: dict(
                    out=additive_attention(*x.values(), dropout_p=0.4, lengths=lengths)
                ),
                inputs, upstream,
            )
        )  # fmt: skip
    for got, expected in zip(results[1], results[2], strict=True):
        for name in got:
            torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("shape", [(3, 4), (12, 11)], ids=str)
def test_gradcheck_to_second_order(shape):
    leaves = [x.requires_grad_() for x in make((2,), *shape, 3, 2, dtype=torch.float64).values()]
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    call = lambda *x: additive_attention(*x[:4], attn_mask=x[4])  # noqa: E731
    assert gradcheck(call, (*leaves, mask))
    if shape == (3, 4):
        assert gradgradcheck(call, (*leaves, mask))


def test_double_backward():
    leaves = [x.requires_grad_() for x in make((2,), 9, 10, 2, 2, dtype=torch.float64).values()]

    def second(function):
        out = function(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    def formula(query, key, value, weight):
        energy = torch.tanh(query[:, :, None] + key[:, None])
        return (energy @ weight).softmax(-1) @ value

    torch.testing.assert_close(second(additive_attention), second(formula))


def test_the_bias_of_the_energies_gets_zeros():
    layer = AdditiveAttention(6, 8)
    layer(torch.randn(2, 3, 6), torch.randn(2, 5, 6))[0].sum().backward()
    bias = layer.energy_layer.bias.grad
    assert_same(bias.abs(), torch.zeros_like(bias))


def test_a_bias_of_heads_beside_a_shared_weight_gets_zeros():
    query, key, value, weight = make((2, 3), 1, 5, 8, 6).values()
    bias = torch.randn(3, requires_grad=True)
    key = key.transpose(-1, -2).contiguous().transpose(-1, -2)  # any layout
    out = additive_attention(query, key, value, weight.requires_grad_(), bias=bias)
    assert_same(torch.autograd.grad(out.sum(), bias)[0], torch.zeros(3))


@pytest.mark.parametrize("queries", [1, 3])
def test_a_bias_beside_keys_of_no_features(queries):
    query, key, value, weight = make((2,), queries, 5, 0, 6).values()
    bias = torch.randn(1, requires_grad=True)
    out = additive_attention(query, key, value, weight.requires_grad_(), bias=bias)
    torch.testing.assert_close(out, value.mean(-2, keepdim=True).expand_as(out))
    assert_same(torch.autograd.grad(out.sum(), bias)[0].abs(), torch.zeros(1))


@pytest.mark.parametrize("mask", [{}, dict(lengths=torch.tensor([2, 5]))], ids=["none", "lengths"])
def test_queries_beside_one_sequence_have_their_scores_computed_once(mask, monkeypatch):
    calls, scored = [], whole._scored
    monkeypatch.setattr(whole, "_scored", lambda *a: calls.append(1) or scored(*a))
    _, key, value, weight = make((1,), 1, 5, 8, 6).values()
    additive_attention(torch.randn(2, 1, 8), key, value, weight, **mask)
    assert len(calls) == 1


def test_results_may_be_written_to():
    """The results own their memory, also in a call whose values alone have the whole batch."""
    query, key, value, weight = make((1,), 3, 5, 8, 6).values()
    results = fused(dict(query=query, key=key, value=value.repeat(2, 1, 1), weight=weight))
    for result in results.values():
        expected = 2 * result
        assert_same(result.mul_(2), expected)
