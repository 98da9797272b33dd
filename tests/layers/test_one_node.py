"""A small call of the layer is one node of autograd, with the results of the nodes that it
replaces."""

from __future__ import annotations

import pytest
import torch
from oracle import DEVICE

from additive_attn import AdditiveAttention, PlainAdditiveAttention
from additive_attn.ops import dispatch, projected

D, H, V = 6, 8, 5
CASES = {
    "unbatched": ((), {}, {}),
    "batched": ((3,), {}, {"lengths": [4, 0, 7]}),
    "one query for all": ((1, 3), {}, {"window": (2, 3)}),
    "one memory for all": ((3, 1), {}, {"attn_mask": torch.arange(28).view(4, 7) % 3 > 0}),
    "no biases": ((3,), {"bias": False}, {"is_causal": True}),
    "dropout": ((3,), {"dropout": 0.5}, {}),
    "scale": ((), {"scale": 0.3}, {"need_weights": False}),
}


def nodes(out):
    found, open_ = set(), [out.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in found:
            found.add(node)
            open_ += [following for following, _ in node.next_functions]
    return sorted(x.name() for x in found if x.name() != "torch::autograd::AccumulateGrad")


def made(batch, options):
    torch.manual_seed(0)
    layer = AdditiveAttention(D, H, device=DEVICE, dtype=torch.float64, **options)
    of_query, of_key = (batch[:1], batch[-1:]) if batch else ((), ())
    inputs = [
        torch.randn(*lead, *size, device=DEVICE, dtype=torch.float64, requires_grad=True)
        for lead, size in ((of_query, (4, D)), (of_key, (7, D)), (of_key, (7, V)))
    ]
    return layer, inputs


def results(layer, inputs, masking):
    """Returns outputs, gradients, and gradients of gradients."""
    torch.manual_seed(1)
    outputs = [x for x in layer(*inputs, **masking) if x is not None]
    leaves = [x for x in (*inputs, *layer.parameters()) if x.requires_grad]
    upstream = [torch.randn_like(x) for x in outputs]
    alone = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    first = torch.autograd.grad(outputs, leaves, upstream, create_graph=True)
    loss = sum(x.square().sum() for x in first)
    second = torch.autograd.grad(loss, leaves, allow_unused=True)
    return outputs, alone, first, [torch.zeros(()) if x is None else x for x in second]


@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
@pytest.mark.parametrize("frozen", ["", "query_layer.weight", "key_layer.bias", "inputs"])
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_nodes_apart(name, frozen, plain, monkeypatch):
    if plain:
        monkeypatch.setattr(dispatch, "cpu_is_plain", True)
    batch, options, masking = CASES[name]
    masking = {
        key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in masking.items()
    }
    layer, inputs = made(batch, options)
    for parameter, tensor in layer.named_parameters():
        tensor.requires_grad_(parameter != frozen)
    for tensor in inputs:
        tensor.requires_grad_(frozen != "inputs")
    together = results(layer, inputs, masking)
    monkeypatch.setattr(projected, "_ELEMENTS", -1)
    apart = results(layer, inputs, masking)
    for ours, expected in zip(together, apart, strict=True):
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(DEVICE != "cpu" or dispatch.cpu_is_plain, reason="tests the CPU's kernel")
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_small_call_is_one_node(batch):
    layer, inputs = made(batch, {})
    assert nodes(layer(*inputs)[0]) == ["ProjectedAttentionBackward"]
    several = torch.randn(2, *layer(*inputs)[0].shape, dtype=torch.float64)
    out, leaves = layer(*inputs)[0], (*inputs, *layer.parameters())
    both = torch.autograd.grad(out, leaves, several, is_grads_batched=True)
    each = [torch.autograd.grad(layer(*inputs)[0], leaves, x) for x in several]
    for x, *expected in zip(both, *each, strict=True):
        torch.testing.assert_close(x, torch.stack(expected))


@pytest.mark.skipif(DEVICE != "cpu", reason="tests plain PyTorch on the CPU")
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_plain_pytorch_records_fewer_nodes_than_the_plain_layer(batch, queries, monkeypatch):
    monkeypatch.setattr(dispatch, "cpu_is_plain", True)
    layer, inputs = made(batch, {})
    inputs[0] = inputs[0][..., :queries, :].detach().requires_grad_()
    plain = PlainAdditiveAttention(D, H, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    ours, theirs = (nodes(x(*inputs)[0]) for x in (layer, plain))
    assert len(ours) < len(theirs), (ours, theirs)
    assert not any(x.startswith("Squeeze") for x in ours), "the weight (1, H) is squeezed"


def hooked(layer):
    return layer.query_layer.register_forward_hook(lambda *_: None)


def normalized(layer):
    layer.normalize, layer.energy_gain = True, torch.ones(1, dtype=torch.float64)
    layer.energy_offset = torch.zeros(H, dtype=torch.float64)


def parametrized(layer):
    torch.nn.utils.parametrize.register_parametrization(
        layer.key_layer, "weight", torch.nn.Identity()
    )


@pytest.mark.parametrize("change", [hooked, normalized, parametrized])
def test_what_others_change_is_called(change):
    layer, inputs = made((3,), {})
    change(layer)
    assert "ProjectedAttentionBackward" not in nodes(layer(*inputs)[0])
