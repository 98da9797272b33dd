"""Coqui TTS."""

from __future__ import annotations

import copy
import itertools

import loops
import pytest
import torch
from loops import SIZES, Inputs
from torch import Tensor, nn

from additive_attn.compat import coqui

OPTIONS = dict(windowing=False, norm="softmax", forward_attn=False, trans_agent=False,
               forward_attn_mask=False, location_attention=True)  # fmt: skip
CASES = [
    {},
    {"location_attention": False},
    {"norm": "sigmoid"},
    {"norm": "sigmoid", "location_attention": False},
    {"forward_attn": True},
    {"forward_attn": True, "trans_agent": True, "norm": "sigmoid"},
]
INFERENCE = [
    {"windowing": True, "norm": norm, "forward_attn": forward, "forward_attn_mask": forward}
    for norm, forward in itertools.product(("softmax", "sigmoid"), (False, True))
]


def make(cls: type[nn.Module] = coqui.OriginalAttention, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(query_dim=SIZES.query, embedding_dim=SIZES.memory, attention_dim=SIZES.hidden)
    filters = dict(attention_location_n_filters=4, attention_location_kernel_size=5)
    return cls(**sizes, **filters, **{**OPTIONS, **options})


class Plain(nn.Module):
    """The formulas in training, with the parameters of ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"] = layer._modules
        self.layer = layer

    def init_states(self, memory):
        zeros = memory.new_zeros(memory.shape[:2])
        self.attention_weights = self.sum = zeros
        self.alpha = torch.cat([zeros[:, :1] + 1, zeros[:, 1:] + 1e-7], 1)
        self.u = zeros[:, :1] + 0.5

    def preprocess_inputs(self, memory):
        return self.inputs_layer(memory)

    def forward(self, query, memory, key, mask):
        layer = self.__dict__.get("layer") or self._modules["layer"]
        if layer.location_attention:
            both = torch.stack([self.attention_weights, self.sum], 1)
            location = self.location_layer
            key = key + location.location_dense(location.location_conv1d(both).mT)
        energy = torch.tanh(self.query_layer(query)[:, None] + key)
        scores = self.v(energy).squeeze(-1).masked_fill(~mask, -torch.inf)
        if layer.norm == "softmax":
            weights = scores.softmax(-1)
        else:
            weights = scores.sigmoid() / scores.sigmoid().sum(1, keepdim=True)
        self.sum = self.sum + weights
        if layer.forward_attn:
            moved = nn.functional.pad(self.alpha[:, :-1], (1, 0))
            weights = ((1 - self.u) * self.alpha + self.u * moved + 1e-8) * weights
            self.alpha = weights = weights / weights.sum(1, keepdim=True)
        context = (weights[:, None] @ memory).squeeze(1)
        self.attention_weights = weights
        if layer.forward_attn and layer.trans_agent:
            self.u = torch.sigmoid(self.ta(torch.cat([context, query], -1)))
        return context


def decode(layer: nn.Module, given: Inputs) -> list[Tensor]:
    memory, outputs, context = given["memory"], [], None
    layer.init_states(memory)
    key, mask = layer.preprocess_inputs(memory), ~loops.padding()
    for t in range(len(given["steps"])):
        context = layer(loops.next_query(given, t, context), memory, key, mask)
        outputs += [context, layer.attention_weights]
    return outputs


@pytest.mark.parametrize("options", CASES)
def test_formula(options):
    layer = make(**options)
    plain = Plain.__new__(Plain)
    nn.Module.__init__(plain)
    plain.__dict__["_modules"], plain.__dict__["layer"] = layer._modules, layer
    loops.check(layer, plain, decode)


@pytest.mark.parametrize("options", [{"norm": "sigmoid"}, {"forward_attn": True}])
def test_the_gradient_of_the_values_is_made_once(options):
    """The gradient is made once for each of two sequences of one memory, and no record of it is
    kept."""
    layer, given = make(**options).double(), loops.inputs()
    memory = given["memory"] = given["memory"].requires_grad_()
    outputs = decode(layer, given)
    assert all(context.grad_fn.name() == "_ProductBackward" for context in outputs[::2])
    sum(x.square().sum() for x in outputs).backward()
    once, kept = memory.grad, layer.__dict__["_values"]
    assert kept.values is None and kept.lent is None
    memory.grad = None
    for outputs in (decode(layer, given), decode(layer, given)):
        sum(x.square().sum() for x in outputs).backward()
    torch.testing.assert_close(memory.grad, 2 * once)
    decode(layer, given)
    assert copy.deepcopy(layer.__dict__["_values"]).of(memory) is None


def test_a_window_moves_on():
    layer = make(windowing=True, location_attention=False).double().eval()
    given = loops.inputs(SIZES._replace(batch=1, keys=20))
    with torch.no_grad():
        memory = given["memory"]
        layer.init_states(memory)
        key = layer.preprocess_inputs(memory)
        for query in given["steps"]:
            before = layer.win_idx
            layer(query, memory, key, None)
            attended = layer.attention_weights[0].nonzero().flatten()
            assert attended.min() >= max(before - 2, 0) and attended.max() < before + 6
            assert layer.win_idx == layer.attention_weights.argmax() or before == -1


def test_an_unknown_norm():
    layer, given = make(norm="max"), loops.inputs(dtype=torch.float32)
    layer.init_states(given["memory"])
    with pytest.raises(ValueError, match="softmax"):
        layer(given["steps"][0], given["memory"], layer.preprocess_inputs(given["memory"]), None)


@pytest.fixture
def double_by_default():
    """The original's states are of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", CASES)
def test_side_by_side(options, double_by_default):
    module = loops.project("TTS", "tts/layers/tacotron/attentions.py")
    ours, theirs = make(**options), make(module.OriginalAttention, **options)
    loops.exchange(ours, theirs)
    for x, y in zip(
        loops.run(ours, decode, loops.inputs()),
        loops.run(theirs, decode, loops.inputs()),
        strict=True,
    ):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", INFERENCE)
def test_inference_side_by_side(options, double_by_default):
    module = loops.project("TTS", "tts/layers/tacotron/attentions.py")
    ours, theirs = make(**options).eval(), make(module.OriginalAttention, **options).eval()
    loops.exchange(ours, theirs)
    with torch.no_grad():
        expected, found = decode(theirs, loops.inputs()), decode(ours, loops.inputs())
    torch.testing.assert_close(found, expected, equal_nan=True)
