"""The layer replaces the plain one, and its other methods agree with ``forward``."""

from __future__ import annotations

import pytest
import torch
from oracle import DEVICE, assert_same, error, plain
from torch import nn

from additive_attn import AdditiveAttention, PlainAdditiveAttention, ProjectedMemory

B, LQ, LK, D, H = 3, 5, 9, 12, 16


def layers(**options):
    plain_layer = PlainAdditiveAttention(D, H)
    layer = AdditiveAttention(D, H, **options)
    layer.load_state_dict(plain_layer.state_dict())
    return layer, plain_layer


def tensors(values=7):
    return torch.randn(B, LQ, D), torch.randn(B, LK, D), torch.randn(B, LK, values)


def test_state_dict_of_the_plain_layer_loads():
    layer, plain_layer = layers()
    ours, theirs = layer.state_dict(), plain_layer.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
    plain_layer.load_state_dict(ours)


def test_same_seed_same_parameters():
    torch.manual_seed(3)
    layer = AdditiveAttention(D, H)
    torch.manual_seed(3)
    plain_layer = PlainAdditiveAttention(D, H)
    for ours, theirs in zip(layer.parameters(), plain_layer.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_and_gradients_are_those_of_the_plain_layer(dtype):
    layer, plain_layer = layers()
    layer.to(dtype), plain_layer.to(dtype)
    query, key, value = (x.to(dtype).requires_grad_() for x in tensors())
    upstream = torch.randn(B, LQ, 7, dtype=dtype), torch.randn(B, LQ, LK, dtype=dtype)
    results = []
    for each in (layer, plain_layer):
        outputs = each(query, key, value)
        leaves = [query, key, value, *each.parameters()]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_energy_bias_gets_the_zero_gradient_of_the_plain_layer():
    """The gradient is not None, so that DDP and optimizers treat the parameter as used."""
    layer, _ = layers()
    query, key, value = tensors()
    layer(query, key, value)[0].sum().backward()
    assert torch.equal(layer.energy_layer.bias.grad, torch.zeros(1))
    layer.zero_grad()
    layer.step(query[:, 0], layer.project(key))[0].sum().backward()
    assert torch.equal(layer.energy_layer.bias.grad, torch.zeros(1))


def test_the_value_is_the_key_by_default():
    layer, _ = layers()
    query, key, _ = tensors()
    for ours, theirs in zip(layer(query, key), layer(query, key, key), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_on_request():
    layer, _ = layers()
    query, key, value = tensors()
    out, weights = layer(query, key, value, need_weights=False)
    assert weights is None
    assert torch.equal(out, layer(query, key, value)[0])


def test_unbatched():
    layer, plain_layer = layers()
    query, key, value = (x[0] for x in tensors())
    out, weights = layer(query, key, value)
    assert out.shape == (LQ, 7) and weights.shape == (LQ, LK)
    expected = plain_layer(query, key, value)
    torch.testing.assert_close((out, weights), expected)
    padding = torch.arange(LK) > 5
    masked, _ = layer(query, key, value, key_padding_mask=padding)
    short, _ = layer(query, key, value, lengths=torch.tensor(6))
    torch.testing.assert_close(masked, short)
    torch.testing.assert_close(masked, plain_layer(query, key[:6], value[:6])[0])


def test_batch_first():
    layer, _ = layers()
    swapped, _ = layers(batch_first=False)
    swapped.load_state_dict(layer.state_dict())
    query, key, value = tensors()
    options = dict(lengths=torch.tensor([9, 2, 0]), is_causal=True)
    out, weights = layer(query, key, value, **options)
    turned = [x.transpose(0, 1) for x in (query, key, value)]
    for given in (turned, [x.contiguous() for x in turned]):
        ours, same_weights = swapped(*given, **options)
        torch.testing.assert_close(ours, out.transpose(0, 1))
        torch.testing.assert_close(same_weights, weights)
    memory = swapped.project(turned[1], turned[2], lengths=options["lengths"])
    stepped, _ = swapped.step(query[:, 0], memory)
    expected, _ = layer(query[:, :1], key, value, lengths=options["lengths"])
    torch.testing.assert_close(stepped, expected[:, 0])
    unbatched = swapped(query[0], key[0], value[0])[0]
    torch.testing.assert_close(unbatched, layer(query[0], key[0], value[0])[0])


def test_dims_of_queries_and_keys():
    layer = AdditiveAttention(D, H, query_dim=4, key_dim=6)
    assert layer.query_layer.weight.shape == (H, 4) and layer.key_layer.weight.shape == (H, 6)
    out, weights = layer(torch.randn(B, LQ, 4), torch.randn(B, LK, 6), torch.randn(B, LK, 5))
    assert out.shape == (B, LQ, 5) and weights.shape == (B, LQ, LK)


def test_polarity_is_that_of_multihead_attention():
    """key_padding_mask: True = ignore."""
    layer, _ = layers()
    mha = nn.MultiheadAttention(D, 1, batch_first=True)
    query, key, _ = tensors()
    padding = torch.rand(B, LK) < 0.4
    padding[:, 0] = False
    _, ours = layer(query, key, key_padding_mask=padding)
    _, theirs = mha(query, key, key, key_padding_mask=padding)
    assert torch.equal(ours == 0, theirs == 0)
    assert torch.equal(ours == 0, padding[:, None].expand(B, LQ, LK))


def oracle(layer, query, key, value, allowed=None, bias=None, scale=1.0):
    return plain(
        layer.query_layer(query), layer.key_layer(key), value, layer.energy_layer.weight[0],
        allowed=allowed, bias=bias, scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "float", "batched float"])
def test_padding_and_attn_mask_intersect(kind):
    layer, _ = layers(scale=0.5)
    query, key, value = tensors()
    padding = torch.rand(B, LK) < 0.3
    attended = ~padding[:, None]
    if kind == "bool":
        mask, bias = torch.rand(LQ, LK) < 0.8, None
        allowed = attended & mask
    else:
        mask = torch.randn(B, LQ, LK) if kind == "batched float" else torch.randn(LQ, LK)
        mask = mask.masked_fill(torch.rand(LQ, LK) < 0.2, -torch.inf)
        bias, allowed = mask, attended & (mask != -torch.inf)
    causal = torch.ones(LQ, LK, dtype=torch.bool).tril()
    out, weights = layer(
        query, key, value, key_padding_mask=padding, attn_mask=mask, is_causal=True
    )
    expected = oracle(layer, query, key, value, allowed & causal, bias, 0.5)
    torch.testing.assert_close((out, weights), (expected["out"], expected["weights"]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masking", ["none", "lengths", "padding", "both"])
def test_project_and_step_equal_forward(masking, normalize):
    layer = AdditiveAttention(D, H, normalize=normalize, scale=0.7)
    query, key, value = (x.requires_grad_() for x in tensors())
    options = {}
    if masking in ("lengths", "both"):
        options["lengths"] = torch.tensor([9, 3, 0])
    if masking in ("padding", "both"):
        options["key_padding_mask"] = torch.rand(B, LK) < 0.4
    out, weights = layer(query, key, value, **options)
    memory = layer.project(key, value, **options)
    assert isinstance(memory, ProjectedMemory)
    steps = [layer.step(query[:, i], memory) for i in range(LQ)]
    contexts = torch.stack([context for context, _ in steps], 1)
    torch.testing.assert_close(contexts, out)
    torch.testing.assert_close(torch.stack([w for _, w in steps], 1), weights)
    assert layer.step(query[:, 0], memory, need_weights=False)[1] is None
    upstream = torch.randn_like(out)
    leaves = [query, key, value, *layer.parameters()]
    ours = torch.autograd.grad(contexts, leaves, upstream, allow_unused=True)
    theirs = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_step_unbatched():
    layer, _ = layers()
    query, key, value = (x[0] for x in tensors())
    memory = layer.project(key, value, lengths=torch.tensor(4))
    context, weights = layer.step(query[0], memory)
    assert context.shape == (7,) and weights.shape == (LK,)
    expected = layer(query[:1], key[:4], value[:4])
    torch.testing.assert_close(context, expected[0][0])
    torch.testing.assert_close(weights[:4], expected[1][0])


@pytest.mark.parametrize("sizes", [(1, B, B), (B, 1, 1), (B, 1, B), (B, B, 1)], ids=str)
def test_a_batch_of_one_is_shared(sizes):
    layer, _ = layers()
    query, key, value = (x[:size] for x, size in zip(tensors(), sizes, strict=True))
    out, weights = layer(query, key, value)
    full = (x.expand(B, -1, -1) for x in (query, key, value))
    torch.testing.assert_close((out, weights), layer(*full))
    context, step_weights = layer.step(query[:, 0], layer.project(key, value))
    torch.testing.assert_close((context, step_weights), (out[:, 0], weights[:, 0]))


def test_normalize():
    """The scores are g v / |v| . tanh(query + key + b), computed by hand in float64."""
    layer = AdditiveAttention(D, H, normalize=True, dtype=torch.float64)
    assert "energy_layer.bias" not in layer.state_dict()
    assert layer.energy_gain.item() == pytest.approx(H**-0.5)
    nn.init.normal_(layer.energy_offset)
    nn.init.constant_(layer.energy_gain, 1.7)
    query, key, value = (x.double() for x in tensors())
    v = layer.energy_layer.weight[0]
    weight = layer.energy_gain * v / v.square().sum().sqrt()
    energy = torch.tanh(
        layer.query_layer(query)[:, :, None] + layer.key_layer(key)[:, None] + layer.energy_offset
    )
    weights = torch.softmax((energy * weight).sum(-1), -1)
    ours = layer(query, key, value)
    torch.testing.assert_close(ours, (weights @ value, weights))
    ours[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert layer.energy_gain.grad.abs() > 0 and layer.energy_offset.grad.abs().sum() > 0


def test_without_bias():
    layer = AdditiveAttention(D, H, bias=False)
    assert set(layer.state_dict()) == {
        "query_layer.weight", "key_layer.weight", "energy_layer.weight"
    }  # fmt: skip
    query, key, value = tensors()
    expected = oracle(layer, query, key, value)
    torch.testing.assert_close(layer(query, key, value)[0], expected["out"])


def test_dtype_and_device_arguments():
    layer = AdditiveAttention(D, H, dtype=torch.bfloat16, device=DEVICE)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in layer.parameters()} == {DEVICE}
    query, key, value = (x.bfloat16() for x in tensors())
    assert layer(query, key, value)[0].dtype == torch.bfloat16


def test_extra_repr():
    assert repr(AdditiveAttention(4, 6)).startswith(
        "AdditiveAttention(\n  query_dim=4, key_dim=4, hidden_dim=6\n"
    )
    text = AdditiveAttention(
        4, 6, key_dim=5, dropout=0.1, scale=0.5, normalize=True, batch_first=False
    ).extra_repr()
    assert text == (
        "query_dim=4, key_dim=5, hidden_dim=6, dropout=0.1, scale=0.5, normalize=True, "
        "batch_first=False"
    )


def test_it_trains_as_the_plain_layer_does():
    """With thirty steps of Adam on the same data, the two have equal losses."""
    torch.manual_seed(1)
    layer, plain_layer = layers()
    layer, plain_layer = layer.double(), plain_layer.double()
    query, key, value = (x.double() for x in tensors())
    target = torch.randn(B, LQ, 7, dtype=torch.float64)
    losses = []
    for each in (layer, plain_layer):
        optimizer = torch.optim.Adam(each.parameters(), 0.05)
        history = []
        for _ in range(30):
            loss = (each(query, key, value)[0] - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(torch.tensor(history))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-8)
    assert losses[0][-1] < losses[0][0]


def test_inputs_are_not_changed():
    layer, _ = layers()
    given = tensors()
    before = [x.clone() for x in given]
    out, _ = layer(*given, key_padding_mask=torch.zeros(B, LK, dtype=torch.bool))
    for now, then in zip(given, before, strict=True):
        assert_same(now, then)
    assert error(out, oracle(layer, *given)["out"].double()) < 1e-5
