"""Keys that are projected inside the call give the outputs and derivatives of keys that were
projected before it. Where keys and values are one tensor, their gradient is one sum."""

from __future__ import annotations

import threading

import pytest
import torch
from oracle import (
    DEVICE,
    OUTPUTS,
    assert_same,
    check_against_plain,
    generator,
    make,
    plain_masked,
)
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from additive_attn import (
    AdditiveAttention,
    PlainAdditiveAttention,
    additive_attention,
    additive_attention_step,
)
from additive_attn.backends.plain import whole
from additive_attn.ops import key_projection

B, LQ, LK, H, D = 2, 3, 21, 8, 6  # both sequences together have more keys than a block of rows


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(key_projection, "LEAST", 0)


def inputs_of(batch=(B,), dtype=torch.float32, seed=0):
    """Returns the query, features that are keys and values, the weight, and the keys'
    projection."""
    inputs = make(batch, LQ, LK, H, D, dtype=dtype, seed=seed)
    del inputs["key"]
    key_weight = torch.randn(H, D, generator=generator(seed))
    return inputs | {"key_weight": key_weight.to(dtype)}


def leaves_of(*shape, dtype=torch.float64):
    inputs = inputs_of(*shape, dtype=dtype)
    return [x.requires_grad_() for x in inputs.values()]


def inside(query, x, weight, key_weight, **options):
    return additive_attention(query, x, x, weight, key_weight=key_weight, **options)


def before(query, x, weight, key_weight, **options):
    return additive_attention(query, linear(x, key_weight), x, weight, **options)


def all_inside(inputs, **options):
    query, x, weight, key_weight, *mask = inputs.values()
    if mask:
        options["attn_mask"] = mask[0]
    outputs = inside(query, x, weight, key_weight, need_weights=True, need_lse=True, **options)
    return dict(zip(OUTPUTS, outputs, strict=True))


def plain_projected(inputs, **options):
    key = linear(inputs["value"], inputs["key_weight"])
    return plain_masked(dict(inputs, key=key), **options)


@pytest.fixture
def one_node(monkeypatch):
    """Makes small calls one node of the graph on plain PyTorch too."""
    monkeypatch.setattr(whole, "ELEMENTS", -1)


def shares(out):
    """Whether keys and values are outputs of one node."""
    nodes = [node for node, _ in out.grad_fn.next_functions if node is not None]
    return any(nodes.count(node) > 1 for node in nodes)


MASKING = {
    "none": {},
    "lengths": dict(lengths=torch.tensor([21, 4])),
    "mask": dict(attn_mask=torch.arange(LQ * LK).view(LQ, LK) % 3 > 0),
    "float mask": dict(attn_mask=torch.linspace(-1, 1, LQ * LK).view(LQ, LK)),
    "causal": dict(is_causal=True),
    "window": dict(window=(1, 2), scale=0.5),
}


@pytest.mark.parametrize("masking", MASKING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_accuracy(dtype, masking):
    options = {
        k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in MASKING[masking].items()
    }
    if masking == "float mask":
        options["attn_mask"] = options["attn_mask"].to(dtype)
    check_against_plain(
        [inputs_of(dtype=dtype, seed=seed) for seed in range(3)],
        function=all_inside, formula=plain_projected, magnitude=4.0, **options,
    )  # fmt: skip


def results(function, leaves, **options):
    torch.manual_seed(0)
    outputs = function(*leaves, need_weights=True, need_lse=True, **options)
    total = sum((x * n).square().sum() for n, x in enumerate(outputs, 1))
    return [*outputs, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize(
    "options",
    [
        dict(dropout_p=0.4),
        dict(starts=[1, 3], lengths=[7, 9]),
        dict(key_padding_mask=torch.arange(B * LK, device=DEVICE).view(B, LK) % 4 == 1),
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options(options):
    leaves = leaves_of()
    torch.testing.assert_close(
        results(inside, leaves, **options), results(before, leaves, **options)
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the addition costs little")
@pytest.mark.usefixtures("one_node")
def test_the_gradient_is_made_in_one():
    leaves = leaves_of()
    assert shares(inside(*leaves)) and not shares(before(*leaves))
    query, x, weight, key_weight = leaves
    step = additive_attention_step(query[:, 0], x, x, weight, key_weight=key_weight)
    torch.testing.assert_close(step, before(query[:, :1], *leaves[1:]).squeeze(1))
    key_projection.LEAST = x.numel() + 1
    assert not shares(inside(*leaves))


@pytest.mark.parametrize("shape", [(), (3, 2)], ids=str)
def test_leading_dims(shape):
    leaves = leaves_of(shape)
    torch.testing.assert_close(results(inside, leaves), results(before, leaves))


def test_features_shared_by_the_batch_and_without_a_query():
    query, x, weight, key_weight = leaves_of()
    leaves = [query, x.detach()[:1].requires_grad_(), weight, key_weight]
    torch.testing.assert_close(results(inside, leaves), results(before, leaves))
    leaves = [x, weight, key_weight]
    found = [
        results(lambda *y, call=call, **options: call(None, *y, **options), leaves)
        for call in (inside, before)
    ]
    torch.testing.assert_close(*found)


def test_other_values_and_none():
    query, x, weight, key_weight = leaves_of()
    key = x.detach().clone().requires_grad_()
    found = additive_attention(query, key, x, weight, key_weight=key_weight)
    torch.testing.assert_close(found, before(query, x, weight, key_weight))
    assert not shares(found)
    weights = additive_attention(query, key, None, weight, key_weight=key_weight)
    torch.testing.assert_close(
        weights, additive_attention(query, linear(key, key_weight), None, weight)
    )


def test_derivatives():
    leaves = leaves_of()
    assert torch.autograd.gradcheck(inside, leaves)
    assert torch.autograd.gradgradcheck(inside, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [[1], [0, 3], [1, 2], [3]], ids=str)
def test_a_part_of_the_gradients(wanted):
    leaves = leaves_of()
    some = [leaves[n] for n in wanted]
    found = [torch.autograd.grad(call(*leaves).pow(3).sum(), some) for call in (inside, before)]
    torch.testing.assert_close(*found)


def test_a_part_of_the_outputs():
    """The loss depends on the weights alone, so that no gradient reaches the values."""
    leaves = leaves_of()
    found = []
    for call in (inside, before):
        weights = call(*leaves, need_weights=True)[1]
        found.append(torch.autograd.grad(weights.square().sum(), leaves))
    torch.testing.assert_close(*found)


def test_features_that_serve_elsewhere_too():
    """The gradients of the features are added up. Neither these nor the upstream gradient are
    written to."""
    found = []
    for call in (inside, before):
        _, x, weight, key_weight = leaves_of()
        kept = []
        features = x.tanh()
        features.register_hook(kept.append)
        query = linear(features, key_weight)
        out = call(query, features, weight, key_weight) + features
        upstream = torch.ones_like(out)
        out.backward(upstream, retain_graph=True)
        first = kept[0].clone()
        out.backward(upstream)
        torch.testing.assert_close(kept[0], first, rtol=0, atol=0)
        assert upstream.eq(1).all()
        found.append([x.grad, weight.grad, key_weight.grad, *kept])
    torch.testing.assert_close(*found)


def test_features_that_are_written_to():
    query, x, weight, key_weight = leaves_of()
    features = x + 0
    out = inside(query, features, weight, key_weight)
    features.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_transforms():
    leaves = [x.detach() for x in leaves_of()]
    axes = 0, 0, None, None
    for call in (torch.func.vmap, lambda f, _: torch.func.grad(lambda *x: f(*x).sum(), (0, 1, 3))):
        torch.testing.assert_close(call(inside, axes)(*leaves), call(before, axes)(*leaves))
    tangents = tuple(torch.randn_like(x) for x in leaves)
    found = [torch.func.jvp(f, tuple(leaves), tangents) for f in (inside, before)]
    torch.testing.assert_close(*found)


def test_several_upstream_gradients_at_once():
    leaves, found = leaves_of(dtype=torch.float32), []
    for call in (inside, before):
        out = call(*leaves)
        batch = torch.randn(4, *out.shape, generator=generator(0), dtype=out.dtype)
        found.append(torch.autograd.grad(out, leaves, batch, is_grads_batched=True))
    torch.testing.assert_close(*found)


def test_compiled():
    leaves = leaves_of(dtype=torch.float32)
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, leaves), results(before, leaves))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_threads(reentrant):
    leaves = leaves_of()
    out = checkpoint(inside, *leaves, use_reentrant=reentrant)
    thread = threading.Thread(target=out.pow(3).sum().backward)
    thread.start()
    thread.join()
    expected = torch.autograd.grad(before(*leaves).pow(3).sum(), leaves)
    torch.testing.assert_close([x.grad for x in leaves], [*expected])


def test_under_autocast():
    leaves = leaves_of(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, expected = (results(call, leaves) for call in (inside, before))
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, expected, strict=True):
        assert_same(a, b)


def layers(**options):
    layer, plain = AdditiveAttention(D, H, **options), PlainAdditiveAttention(D, H)
    layer.load_state_dict(plain.state_dict())
    return layer.to(DEVICE, torch.float64), plain.to(DEVICE, torch.float64)


def trained(layer, query, x):
    query, x = query.detach().requires_grad_(), x.detach().requires_grad_()
    outputs = layer(query, x, x)
    total = sum((y * n).square().sum() for n, y in enumerate(outputs, 1))
    return [*outputs, *torch.autograd.grad(total, [query, x, *layer.parameters()])]


@pytest.mark.usefixtures("one_node")
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_whose_values_are_its_keys(batch_first):
    layer, plain = layers(batch_first=batch_first)
    query, x = torch.randn(B, LQ, D).to(DEVICE).double(), torch.randn(B, LK, D).to(DEVICE).double()
    expected = trained(plain, query, x)
    if batch_first:
        found = trained(layer, query, x)
        assert shares(layer(query, x.requires_grad_())[0]) == (DEVICE == "cpu")
    else:
        found = trained(layer, query.transpose(0, 1), x.transpose(0, 1))
        for n in (0, 2, 3):
            found[n] = found[n].transpose(0, 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("one_node")
def test_symbolic_trace():
    class Pooling(nn.Module):
        def forward(self, query, x, weight, key_weight):
            pooled = additive_attention_step(None, x, x, weight, key_weight=key_weight)
            return inside(query, x, weight, key_weight) + pooled[:, None]

    leaves = leaves_of()
    graph = torch.fx.symbolic_trace(Pooling())
    assert shares(inside(*leaves)) == (DEVICE == "cpu")
    torch.testing.assert_close(graph(*leaves), Pooling()(*leaves))


def test_hooks_and_other_layers_get_the_keys():
    layer, plain = layers()
    query, x = torch.randn(B, LQ, D).to(DEVICE).double(), torch.randn(B, LK, D).to(DEVICE).double()
    seen = []
    layer.key_layer.register_forward_hook(lambda *given: seen.append(given[2]))
    torch.testing.assert_close(trained(layer, query, x), trained(plain, query, x))
    torch.testing.assert_close(seen, [plain.key_layer(x)])
    layer, plain = layers()
    layer.key_layer = nn.Sequential(layer.key_layer)
    torch.testing.assert_close(trained(layer, query, x), trained(plain, query, x))
