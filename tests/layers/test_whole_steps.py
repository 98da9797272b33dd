"""Steps of small memories on plain PyTorch are ordinary calls, with the results of steps that
leave records."""

from __future__ import annotations

import math

import pytest
import torch
from decoders import LK, B, D, K, build
from oracle import make

from additive_attn import AdditiveAttention, MultiheadAdditiveAttention
from additive_attn.backends.plain import plan, steps, whole
from additive_attn.nn import additive
from additive_attn.ops import attend, decoding, dispatch
from additive_attn.ops import memory as engine

KINDS = ["content", "heads", "tacotron", "pointer"]


def on_plain_pytorch(monkeypatch):
    """Makes calls compute on plain PyTorch, also where a kernel or a GPU would compute."""
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
    """Returns a memory, and the results and gradients of two steps."""
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
    """A step with many energies leaves a record instead of saving them."""
    monkeypatch.setattr(engine, "WHOLE_ELEMENTS", elements)
    on_plain_pytorch(monkeypatch)
    memory = made("content").project(torch.randn(B, LK, K, dtype=torch.float64))
    assert (memory.prepared is None) == whole_step


def test_memories_of_16_bits_leave_records(monkeypatch):
    """The gradients of such memories are added up in float32."""
    on_plain_pytorch(monkeypatch)
    key = torch.randn(B, LK, K)
    assert made("content").float().project(key, dtype=torch.bfloat16).prepared


def test_the_kernel_prepares_small_memories(monkeypatch):
    if dispatch.cpu_is_plain:
        pytest.skip("there is no kernel")
    assert made("content").project(torch.randn(B, LK, K, dtype=torch.float64)).prepared


def counted(monkeypatch):
    """Records ordinary calls, and returns their list."""
    calls, ordinary = [], attend.masked_attention

    def count(*arguments, **options):
        calls.append(1)
        return ordinary(*arguments, **options)

    for module in (attend, decoding, additive):
        monkeypatch.setattr(module, "masked_attention", count)
    return calls


ONE_HEAD = pytest.mark.parametrize("kind", [k for k in KINDS if k != "heads"])


@ONE_HEAD
@pytest.mark.parametrize("batch", [(), (B,)], ids=["unbatched", "batched"])
def test_steps_use_what_project_has_checked(kind, batch, monkeypatch):
    on_plain_pytorch(monkeypatch)
    calls, layer = counted(monkeypatch), made(kind)
    key, query = torch.randn(*batch, LK, K).double(), torch.randn(*batch, D).double()
    expected = stepped(layer, key.requires_grad_(), query.requires_grad_(), {}, 1)[1]
    assert not calls
    layer.query_layer.register_forward_hook(lambda *_: None)
    found = stepped(layer, key, query, {}, 1)[1]
    assert len(calls) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_step_calls_replaced_modules_once(monkeypatch):
    """Also where a step finds out only after some checks that it is an ordinary call."""
    on_plain_pytorch(monkeypatch)
    layer, calls = made("tacotron"), []
    for name in ("location_conv", "location_layer"):
        getattr(layer, name).register_forward_hook(lambda *a: calls.append(type(a[0]).__name__))
        memory = layer.project(torch.randn(B, LK, K).double())
        calls.clear()
        layer.step(torch.randn(B, D).double(), memory, layer.initial_state(memory))
        assert calls == ["Conv1d", "Linear"][: 1 + (name == "location_layer")]


@ONE_HEAD
def test_unusual_steps_raise_the_sentences_of_ordinary_ones(kind, monkeypatch):
    on_plain_pytorch(monkeypatch)
    layer = made(kind)
    memory = layer.project(torch.randn(B, LK, K).double(), lengths=[LK, 4, 1])
    more = (layer.initial_state(memory),) if hasattr(layer, "initial_state") else ()
    query = torch.randn(B, D).double()
    for wrong, sentence in (
        (query.float(), "dtype"),
        (query[:, 1:], "query has 5 features"),
        (query[:2], "query"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            layer.step(wrong, memory, *more)
    memory.lengths.fill_(LK + 1)
    with pytest.raises(ValueError, match="lengths"):
        layer.step(query, memory, *more)
    memory.lengths.fill_(LK)
    layer.scale = math.inf
    with pytest.raises(ValueError, match="scale"):
        layer.step(query, memory, *more)


def test_the_energy_bias_gets_zeros_from_the_keys(monkeypatch):
    """The bias gets zeros once for all steps, for any number in it. If the keys have no gradient,
    each step gives it zeros."""
    on_plain_pytorch(monkeypatch)
    layer, query = made("content"), torch.randn(B, D).double()
    key, bias = torch.randn(B, LK, K).double(), layer.energy_layer.bias
    expected = layer.step(query, layer.project(key))[0].detach()
    for setting in ("usual", "infinite", "frozen keys", "projected before"):
        if setting == "infinite":
            torch.nn.init.constant_(bias, math.inf)
        if setting == "frozen keys":
            torch.nn.init.zeros_(bias)
            layer.key_layer.requires_grad_(False)
        with torch.set_grad_enabled(setting != "projected before"):
            memory = layer.project(key)
        carried = memory.whole.carried is bias
        assert carried == (setting in ("usual", "infinite")), setting
        for _ in range(2):
            out = layer.step(query, memory)[0]
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
            again = not carried
            found = torch.autograd.grad(out.sum(), bias, retain_graph=carried)[0]
            assert found.item() == 0.0, (setting, again)


def test_an_energy_bias_that_is_replaced_gets_zeros_from_the_steps(monkeypatch):
    """After ``project``, so that the keys cannot pass them on: of the same layer, or of another
    that steps through the memory."""
    on_plain_pytorch(monkeypatch)
    layer, query = made("content"), torch.randn(B, D).double()
    other = made("content")
    memory = layer.project(torch.randn(B, LK, K).double())
    assert memory.whole.carried is layer.energy_layer.bias
    layer.energy_layer.bias = torch.nn.Parameter(torch.ones(1).double())
    for stepping in (layer, other):
        out = stepping.step(query, memory)[0]
        (found,) = torch.autograd.grad(out.sum(), stepping.energy_layer.bias, retain_graph=True)
        assert found.item() == 0.0


def test_a_step_adds_its_gradient_of_the_keys_at_once(monkeypatch, request):
    """Plain PyTorch has the pairs' gradients in memory, which a kernel does not write there."""
    on_plain_pytorch(monkeypatch)
    library = torch.library.Library("additive_attn", "IMPL")
    request.addfinalizer(library._destroy)
    for name in ("step", "step_backward"):
        library.impl(name, getattr(steps, name), "CPU", allow_override=True)
    monkeypatch.setattr(engine, "WHOLE_ELEMENTS", -1)
    records, shared = [], engine._shared_gradients
    monkeypatch.setattr(
        engine, "_shared_gradients", lambda *a: records.extend(a[2].records) or shared(*a)
    )
    layer, key = made("content"), torch.randn(B, LK, K).double().requires_grad_()
    stepped(layer, key, torch.randn(B, D).double().requires_grad_(), {}, 1)
    assert len(records) == 2 and all(x.grad_scores is None for x in records)
    records.clear()
    # Of one sequence that several queries share it would take memory for each of them.
    memory = layer.project(key[:1])
    layer.step(torch.randn(B, D).double(), memory)[0].sum().backward()
    assert len(records) == 1 and records[0].grad_scores is not None


@ONE_HEAD
def test_small_steps_without_keys(kind, monkeypatch):
    on_plain_pytorch(monkeypatch)
    layer, query = made(kind), torch.randn(B, D).double()
    memory = layer.project(torch.randn(B, 0, K).double(), lengths=[0] * B)
    more = (layer.initial_state(memory),) if hasattr(layer, "initial_state") else ()
    context, weights = layer.step(query.requires_grad_(), memory, *more)[:2]
    assert weights.shape == (B, 0) and not context.any()
    assert not torch.autograd.grad(context.sum(), query)[0].any()


@pytest.mark.parametrize("mask", ["none", "lengths"])
@pytest.mark.parametrize("located", [False, True])
def test_blocks_of_a_step(located, mask, monkeypatch):
    """The gradients of a step are those of one block, in blocks of one entry or of a few keys."""
    query, key, value, weight = make((6,), 1, 9, 5, 4, dtype=torch.float64).values()
    location = torch.randn(6, 2, 9).double() if located else None
    location_weight = torch.randn(2, 5).double() if located else None
    lengths = torch.tensor([[9], [4], [1], [9], [0], [7]]) if mask == "lengths" else None
    inputs = query, key, value, weight, None, location, location_weight, None, lengths
    out, weights, lse = steps.step(*inputs, None, 0.0, 1.0)
    upstream = torch.randn_like(out), torch.randn_like(weights), torch.randn_like(lse)
    upstream = (*upstream[:2], upstream[2].masked_fill(lse.isinf(), 0.0))
    counts, results = [], []
    for elements in (plan._BLOCK_ELEMENTS, 1):
        monkeypatch.setattr(plan, "_BLOCK_ELEMENTS", elements)
        call, grad_key = steps.Call(*inputs[:4], None, lengths), torch.zeros_like(key)
        counts.append(len(list(plan.blocks_of(call, torch.Size((6,))))))
        more = (None, 0.0, 1.0, weights, lse, grad_key)
        results.append([*steps.step_backward(*upstream, *inputs, *more), grad_key])
    assert counts[0] == 1 and counts[1] >= 5
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert results[0][0].any() and results[0][-1].any()
