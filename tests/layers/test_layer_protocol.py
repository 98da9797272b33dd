"""The layers support the protocol of nn.Module: initialising, copying, sharding, symbolic
tracing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from oracle import DEVICE
from torch import fx, nn

from additive_attn import AdditiveAttention, PlainAdditiveAttention, additive_attention

D, H = 6, 8


def build(kind, **factory):
    torch.manual_seed(3)
    if kind == "plain":
        return PlainAdditiveAttention(D, H, **factory)
    return AdditiveAttention(D, H, normalize=kind == "normalized", **factory)


KINDS = pytest.mark.parametrize("kind", ["plain", "fused", "normalized"])


@KINDS
def test_meta_and_reset_parameters_give_what_the_constructor_gives(kind):
    built, empty = build(kind), build(kind, device="meta")
    empty.to_empty(device=DEVICE)
    for parameter in empty.parameters():
        nn.init.constant_(parameter, 7.0)
    torch.manual_seed(3)
    for module in empty.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, ours), theirs in zip(empty.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@KINDS
def test_skip_init(kind):
    cls = PlainAdditiveAttention if kind == "plain" else AdditiveAttention
    options = {"normalize": True} if kind == "normalized" else {}
    layer = nn.utils.skip_init(cls, D, H, **options)
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    layer.load_state_dict(build(kind).state_dict())


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["deepcopy", "pickle", "save"],
)  # fmt: skip
@KINDS
def test_copies(kind, way, hooked):
    layer, x = build(kind), torch.randn(2, 5, D)
    if hooked:
        layer.energy_layer = nn.Sequential(layer.energy_layer)
    before = layer(x, x, x)
    other = way(layer)
    torch.testing.assert_close(other(x, x, x), before)
    with torch.no_grad():
        other.query_layer.weight.zero_()
    torch.testing.assert_close(layer(x, x, x), before)


def test_plain_takes_what_fused_takes():
    options = dict(query_dim=4, key_dim=5, bias=False, dtype=torch.float64)
    plain, layer = PlainAdditiveAttention(D, H, **options), AdditiveAttention(D, H, **options)
    layer.load_state_dict(plain.state_dict())
    q, k = (torch.randn(2, 3, n, dtype=torch.float64) for n in (4, 5))
    torch.testing.assert_close(layer(q, k), plain(q, k, k))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([AdditiveAttention(D, H)])

    def forward(self, x, lengths):
        out, weights = self.inner[0](x, x, lengths=lengths)
        return out + weights.sum(-1, keepdim=True)


class Decoder(Model):
    def forward(self, x, lengths):
        memory = self.inner[0].project(x, lengths=lengths)
        context, _ = self.inner[0].step(x[:, 0], memory)
        return self.inner[0].step(context, memory, need_weights=False)[0]


class Functional(Model):
    def forward(self, x, lengths):
        layer = self.inner[0]
        q, k, w = layer.query_layer(x), layer.key_layer(x), layer.energy_layer.weight
        return additive_attention(q, k, x, w, lengths=lengths, is_causal=True)


@pytest.mark.parametrize("model", [Model, Decoder, Functional])
def test_symbolic_trace(model):
    model, x, lengths = model(), torch.randn(2, 5, D), torch.tensor([5, 2])
    traced = fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x, lengths), model(x, lengths))
    traced(x, lengths).sum().backward()
    projection = traced.get_submodule("inner.0.query_layer")
    assert all(p.grad is not None for p in projection.parameters())
    other, short = torch.randn(3, 4, D), torch.tensor([1, 2, 4])
    torch.testing.assert_close(copy.deepcopy(traced)(other, short), model(other, short))


def test_symbolic_trace_of_the_layer_itself_says_what_to_do():
    with pytest.raises(TypeError, match="Trace a model that holds it"):
        fx.symbolic_trace(AdditiveAttention(D, H))


def test_a_replica_without_parameters_of_its_own():
    """nn.DataParallel makes replicas whose attributes are tensors."""
    layer, x = build("fused"), torch.randn(2, 5, D)
    replica = layer._replicate_for_data_parallel()
    for name, module in layer.named_children():
        child = module._replicate_for_data_parallel()
        child.weight, child.bias = module.weight * 1, module.bias * 1
        replica._modules[name] = child
    torch.testing.assert_close(replica(x, x), layer(x, x))


def test_a_decoder_compiles_with_dynamic_lengths():
    layer = build("fused")

    def decode(x, lengths, padding):
        memory = layer.project(x, lengths=lengths, key_padding_mask=padding)
        return layer.step(x[:, 0], memory)

    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, keys in ((2, 5), (3, 7), (4, 9)):
        x, lengths = torch.randn(batch, keys, D), torch.full((batch,), keys - 1)
        padding = torch.rand(batch, keys) < 0.3
        expected = decode(x, lengths, padding)
        torch.testing.assert_close(compiled(x, lengths, padding), expected)
