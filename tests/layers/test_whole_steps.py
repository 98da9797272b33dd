"""Steps of small memories on plain PyTorch are ordinary calls: they give what steps that leave
records give."""

from __future__ import annotations

import pytest
import torch
from decoders import LK, B, D, K, build

from additive_attn import AdditiveAttention, MultiheadAdditiveAttention
from additive_attn.backends.plain import whole
from additive_attn.ops import dispatch
from additive_attn.ops import memory as engine

KINDS = ["content", "heads", "tacotron", "pointer"]


def on_plain_pytorch(monkeypatch):
    """From now on, also where a kernel, or a GPU, would compute."""
    monkeypatch.setattr(dispatch, "cpu_is_plain", True)
    monkeypatch.setattr(dispatch, "on_plain_path", lambda device: True)


def made(kind):
    torch.manual_seed(3)
    if kind == "content":
        return AdditiveAttention(D, 6, key_dim=K, dtype=torch.float64)
    if kind == "heads":
        return MultiheadAdditiveAttention(6, 2, kdim=K, vdim=K, batch_first=True).double()
    return build(kind, 6, dtype=torch.float64)


def stepped(layer, key, query, options, beams):
    """Two steps, with their gradients."""
    memory = layer.project(key, **options).expand(beams)
    state = layer.initial_state(memory) if hasattr(layer, "initial_state") else None
    found = []
    for x in (query, query.flip(-1)):
        more = () if state is None else (state,)
        context, weights, *state = layer.step(x, memory, *more)
        state = state[0] if state else None
        found += [context, weights]
    leaves = [key, query, *layer.parameters()]
    total = sum(x.pow(2).sum() for x in found)
    return memory, found + list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mask", ["none", "lengths", "padding"])
@pytest.mark.parametrize("batch", [(), (B,)], ids=["unbatched", "batched"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_and_without_records(kind, batch, mask, beams, monkeypatch):
    layer = made(kind)
    width = 6 if kind == "heads" else D
    key = torch.randn(*batch, LK, K, dtype=torch.float64, requires_grad=True)
    rows = batch if beams == 1 else (beams * (B if batch else 1),)
    query = torch.randn(*rows, width, dtype=torch.float64, requires_grad=True)
    options = {}
    if mask == "lengths":
        options["lengths"] = torch.tensor([LK, 4, 1])[:B] if batch else torch.tensor(4)
    if mask == "padding":
        options["key_padding_mask"] = torch.rand(*batch, LK) < 0.4
    with monkeypatch.context() as patch:
        patch.setattr(engine, "WHOLE_ELEMENTS", -1)
        _, expected = stepped(layer, key, query, options, beams)

    calls, attend = [], whole.attend
    monkeypatch.setattr(whole, "attend", lambda *a: calls.append(1) or attend(*a))
    on_plain_pytorch(monkeypatch)
    memory, found = stepped(layer, key, query, options, beams)
    assert memory.prepared is None and len(calls) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("field", ["key", "value", "lengths", "attn_mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_writes_before_backward_raise_or_change_nothing(kind, field, beams, monkeypatch):
    on_plain_pytorch(monkeypatch)
    layer = made(kind)
    padding = torch.arange(LK) >= torch.tensor([LK, 5, 1])[:, None]
    masking = {"key_padding_mask": padding} if field == "attn_mask" else {"lengths": [LK, 4, 2]}
    memory = layer.project(torch.randn(B, LK, K, dtype=torch.float64), **masking).expand(beams)
    assert memory.prepared is None
    query = torch.randn(B * beams, 6 if kind == "heads" else D, dtype=torch.float64)
    more = (layer.initial_state(memory),) if hasattr(layer, "initial_state") else ()
    total = layer.step(query.requires_grad_(), memory, *more)[0].square().sum()
    leaves = [query, *layer.parameters()]
    expected = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        getattr(memory, field).zero_()
    try:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(x is y or torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("elements,whole_step", [(B * LK * 6, True), (B * LK * 6 - 1, False)])
def test_large_memories_leave_records(elements, whole_step, monkeypatch):
    """A step whose energies are many does not keep them."""
    monkeypatch.setattr(engine, "WHOLE_ELEMENTS", elements)
    on_plain_pytorch(monkeypatch)
    memory = made("content").project(torch.randn(B, LK, K, dtype=torch.float64))
    assert (memory.prepared is None) == whole_step


def test_memories_of_16_bits_leave_records(monkeypatch):
    """Whose gradients are added up in float32."""
    on_plain_pytorch(monkeypatch)
    key = torch.randn(B, LK, K)
    assert made("content").float().project(key, dtype=torch.bfloat16).prepared


def test_the_kernel_prepares_small_memories(monkeypatch):
    if dispatch.cpu_is_plain:
        pytest.skip("there is no kernel")
    assert made("content").project(torch.randn(B, LK, K, dtype=torch.float64)).prepared
