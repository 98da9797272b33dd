"""Tacotron 2: NVIDIA's attention and torchaudio's."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import loops
import pytest
import torch
from loops import SIZES, Inputs
from oracle import DEVICE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from additive_attn.compat import tacotron2

CLASSES = [tacotron2.Attention, tacotron2._Attention]


def make(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls(SIZES.query, SIZES.memory, SIZES.hidden, 4, 5)


class Plain(nn.Module):
    """The formula, with the parameters of ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"] = layer._modules

    def forward(self, query, memory, processed_memory, weights, mask):
        term = self.location_layer.location_dense(
            self.location_layer.location_conv(weights).transpose(1, 2)
        )
        weight = next(self.v.parameters()).squeeze(0)
        return loops.plain(self.query_layer(query), processed_memory + term, memory, weight, mask)


def decode(layer: nn.Module, given: Inputs, mask: Tensor | None = None, step=None) -> list[Tensor]:
    memory, outputs, context = given["memory"], [], None
    processed = layer.memory_layer(memory)
    weights = memory.new_zeros(memory.shape[:2])
    cumulative = weights
    step = layer if step is None else step
    for t in range(len(given["steps"])):
        query = loops.next_query(given, t, context)
        both = torch.stack([weights, cumulative], 1)
        context, weights = step(query, memory, processed, both, mask)
        cumulative = cumulative + weights
        outputs += [context, weights]
    return outputs


MASKS = {"none": None, "suffix": loops.padding(), "holes": loops.padding() | (
    torch.arange(SIZES.keys) == 0) & (torch.arange(SIZES.batch) == 0)[:, None]}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cls", CLASSES)
def test_formula(cls, mask):
    layer = make(cls)
    loops.check(layer, Plain(layer), lambda x, given: decode(x, given, MASKS[mask]))


@pytest.mark.usefixtures("steps_leave_records")
def test_the_memory_is_lent_once(monkeypatch):
    from additive_attn.compat import _base

    calls = []
    monkeypatch.setattr(_base, "lend", lambda *a, **k: calls.append(1) or lend(*a, **k))
    from additive_attn.ops.memory import lend

    layer, given = make(tacotron2.Attention).double(), loops.inputs()
    loops.run(layer, decode, given)
    assert len(calls) == 1
    with torch.no_grad():
        decode(layer, given)
    assert len(calls) == 2
    with torch.no_grad():
        layer.v.linear_layer.weight.add_(1)
        decode(layer, given)
    assert len(calls) == 3


def test_two_memories_in_turn():
    layer, reference = make(tacotron2.Attention), None
    reference = Plain(layer)

    def loop(x, given):
        one, two = given["memory"], given["memory"].flip(1) * 0.5
        keys = [x.memory_layer(one), x.memory_layer(two)]
        weights = one.new_zeros(one.shape[:2])
        outputs = []
        for t in range(4):
            for memory, key in zip((one, two), keys, strict=True):
                context, weights = x(
                    given["steps"][t], memory, key, torch.stack([weights, weights], 1), None
                )
                outputs += [context, weights]
        return outputs

    loops.check(layer, reference, loop)


def test_keys_and_values_are_freed():
    """The layer does not keep keys and values alive, with gradients and without."""
    layer, given = make(tacotron2.Attention).double(), loops.inputs()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            memory = given["memory"].clone()
            key = layer.memory_layer(memory)
            weights = torch.zeros(SIZES.batch, 2, SIZES.keys, dtype=torch.float64)
            outputs = layer(given["steps"][0], memory, key, weights, loops.padding())
            refs = [weakref.ref(memory), weakref.ref(key)]
            del outputs, memory, key
            gc.collect()
            assert [r() for r in refs] == [None, None]
            assert not grad or layer._leases._entry is None


def test_values_changed_in_place_are_used():
    layer, given = make(tacotron2.Attention).double(), loops.inputs()
    with torch.no_grad():
        memory = given["memory"].clone()
        key = layer.memory_layer(memory)
        weights = torch.zeros(SIZES.batch, 2, SIZES.keys, dtype=torch.float64)
        for change in (lambda: None, lambda: memory.mul_(2), lambda: key.mul_(-1)):
            change()
            arguments = given["steps"][0], memory, key, weights, loops.padding()
            for ours, plain in zip(layer(*arguments), Plain(layer)(*arguments), strict=True):
                torch.testing.assert_close(ours, plain)


def test_a_backward_pass_per_step():
    """With frozen keys the original allows a backward pass after each step."""
    layer, given = make(tacotron2.Attention).double(), loops.inputs()
    reference = Plain(copy.deepcopy(layer))
    memory = given["memory"]
    key = layer.memory_layer(memory).detach()
    weights = torch.zeros(SIZES.batch, 2, SIZES.keys, dtype=torch.float64)
    for x in (layer, reference):
        for t in range(3):
            context, _ = x(given["steps"][t], memory, key, weights, None)
            context.square().sum().backward()
    for ours, plain in zip(layer.parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (plain.grad is None)
        if plain.grad is not None:
            torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_steps(reentrant):
    layer = make(tacotron2.Attention)

    def loop(x, given):
        return decode(x, given, None, lambda *a: checkpoint(x, *a, use_reentrant=reentrant))

    if reentrant:  # reentrant checkpoints do not support autograd.grad
        layer.double()
        given = loops.inputs()
        grads = []
        for steps in (loop, decode):
            layer.zero_grad()
            sum(x.square().sum() for x in steps(layer, given)).backward()
            grads.append([x.grad for x in layer.parameters()])
        torch.testing.assert_close(*grads)
        return
    loops.check(layer, Plain(layer), loop, decode)


@pytest.mark.parametrize("change", ["hook", "parametrize", "conv"])
def test_modules_that_tools_have_changed_are_called(change):
    layer = make(tacotron2.Attention)
    reference = Plain(layer)
    if change == "hook":
        layer.query_layer.register_forward_hook(lambda m, a, out: out * 2)
        layer.v.linear_layer.register_forward_hook(lambda m, a, out: out * 3)

        class Scaled(Plain):
            def forward(self, query, memory, key, weights, mask):
                term = self.location_layer(weights)
                weight = 3 * self.v.linear_layer.weight.squeeze(0)
                return loops.plain(self.query_layer(query), key + term, memory, weight, mask)

        reference = Scaled(layer)
    elif change == "parametrize":
        nn.utils.parametrizations.weight_norm(layer.location_layer.location_dense.linear_layer)
        nn.utils.parametrizations.weight_norm(layer.query_layer.linear_layer)
    else:
        layer.location_layer.location_conv.register_forward_hook(lambda m, a, out: out * 2)
    loops.check(layer, reference, decode)


def test_copies():
    layer, given = make(tacotron2.Attention).double(), loops.inputs()
    expected = decode(layer, given)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(decode(copied, given), expected)


def test_autocast_and_compiled():
    layer, given = make(tacotron2.Attention), loops.inputs(dtype=torch.float32)
    expected = decode(layer, given)
    with torch.autocast(DEVICE, torch.bfloat16):
        for x, y in zip(decode(layer, given), expected, strict=True):
            torch.testing.assert_close(x.float(), y.float(), atol=0.1, rtol=0.1)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(decode(layer, given, None, compiled), expected)


def test_torchaudio_side_by_side():
    theirs = loops.project("torchaudio", "models/tacotron2.py")._Attention(
        SIZES.query, SIZES.memory, SIZES.hidden, 4, 5
    )
    ours = make(tacotron2._Attention)
    loops.exchange(ours, theirs)
    mask = loops.padding()
    loops.check(ours, theirs, lambda x, given: decode(x, given, mask))
