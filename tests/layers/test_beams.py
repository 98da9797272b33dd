"""Beams share the keys of their sequence: ``expand`` and ``reorder`` of memories and states."""

from __future__ import annotations

import pytest
import torch
from decoders import LK, B, D, H, K, build
from torch import nn
from torch.utils._pytree import tree_map

from additive_attn import AdditiveAttention, AttentionState, ProjectedMemory
from additive_attn.ops import dispatch

BEAMS = 3
LENGTHS = [LK, 4, 0]
KINDS = pytest.mark.parametrize("kind", ["content", "tacotron", "attloc", "pointer", "attcov"])


def made(kind, hidden=H):
    if kind == "content":
        return AdditiveAttention(D, hidden, key_dim=K, dtype=torch.float64)
    return build(kind, hidden, dtype=torch.float64)


def inputs(batch=B):
    key = torch.randn(batch, LK, K, dtype=torch.float64, requires_grad=True)
    value = torch.randn(batch, LK, 7, dtype=torch.float64, requires_grad=True)
    return key, value, torch.randn(batch * BEAMS, D, dtype=torch.float64, requires_grad=True)


def copied(memory, beams=BEAMS):
    """Copies a memory for each beam, as a beam search without ``expand`` does."""
    return ProjectedMemory(
        *(x if x is None else x.repeat_interleave(beams, dim=0) for x in memory)
    )


def steps(layer, query, memory, choices=()):
    """Contexts, weights and the last state. After each step the beams are reordered."""
    state, found = None, []
    if not isinstance(layer, AdditiveAttention):
        state = layer.initial_state(memory)
    for choice in choices:
        if state is None:
            context, weights = layer.step(query, memory)
        else:
            context, weights, state = layer.step(query, memory, state)
            state = state.reorder(choice)
        query = (query + context[:, :1])[choice]
        memory = memory.reorder(choice)
        found += [context, weights]
    return found + list(state or ())


def chosen(batch=B, number=3):
    """Returns the beam of its sequence that each beam continues."""
    first = BEAMS * torch.arange(batch)[:, None]
    return [(first + torch.randint(BEAMS, (batch, BEAMS))).flatten() for _ in range(number)]


@KINDS
@pytest.mark.parametrize("masking", ["none", "lengths", "padding"])
@pytest.mark.parametrize("ordinary", [False, True])
def test_beams_give_what_copies_give(kind, masking, ordinary):
    layer, (key, value, query) = made(kind), inputs()
    options = {}
    if masking == "lengths":
        options = {"lengths": LENGTHS}
    if masking == "padding":
        options = {"key_padding_mask": torch.rand(B, LK) < 0.4}
    choices, results = chosen(), []
    for expand in (ProjectedMemory.expand, copied):
        memory = layer.project(key, value, **options)
        if ordinary:
            memory = memory._replace(key=memory.key)
        outputs = steps(layer, query, expand(memory, BEAMS), choices)
        total = sum(x.pow(2).sum() for x in outputs[:-1])
        grads = torch.autograd.grad(total, [key, value, query, *layer.parameters()])
        results.append([*outputs, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@KINDS
def test_without_gradients(kind):
    layer, (key, value, query) = made(kind), inputs()
    with torch.no_grad():
        memory = layer.project(key, value, LENGTHS)
        choices = chosen()
        ours = steps(layer, query, memory.expand(BEAMS), choices)
        theirs = steps(layer, query, copied(memory), choices)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@KINDS
@pytest.mark.skipif(
    dispatch.cpu_is_plain, reason="plain PyTorch makes the energies of small steps"
)
def test_keys_are_not_copied(kind):
    """A step of an expanded memory allocates no tensor of the size of its keys."""
    layer = made(kind, hidden=32)
    key = torch.randn(2, 300, K, dtype=torch.float64)
    query = torch.randn(2 * BEAMS, D, dtype=torch.float64)
    with torch.no_grad():
        memory = layer.project(key).expand(BEAMS)
        assert memory.key.shape[0] == 2
        arguments = [query, memory]
        if kind != "content":
            arguments.append(layer.initial_state(memory))
        layer.step(*arguments)
        with torch.profiler.profile(profile_memory=True) as profile:
            layer.step(*arguments)
    largest = max(event.cpu_memory_usage for event in profile.events())
    keys = 8 * 2 * 300 * 32
    assert largest < keys, f"{largest} bytes at once, and the keys take {keys}"


@KINDS
def test_one_sequence(kind):
    """One sequence is a batch of one, or has no batch dim."""
    layer, (key, value, query) = made(kind), inputs(1)
    choices = chosen(1)
    batched = steps(layer, query, layer.project(key, value, [5]).expand(BEAMS), choices)
    alone = steps(layer, query, layer.project(key[0], value[0], 5).expand(BEAMS), choices)
    expected = steps(layer, query, copied(layer.project(key, value, [5])), choices)
    torch.testing.assert_close(batched, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(alone, expected, rtol=1e-11, atol=1e-11)


@KINDS
def test_sequences_that_are_done_leave(kind):
    """``reorder`` also drops sequences, and moves them."""
    layer, (key, value, query) = made(kind), inputs()
    index = torch.tensor([7, 6, 6, 2, 2, 0])  # of the sequences 2 and 0
    results, choices = [], chosen(2)
    for memory in (
        layer.project(key, value, [9, 2, 4]).expand(BEAMS).reorder(index),
        layer.project(key[[2, 0]], value[[2, 0]], [4, 9]).expand(BEAMS),
    ):
        assert memory.beams == BEAMS
        results.append(steps(layer, query[index], memory, choices))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@KINDS
def test_plain_reorder(kind):
    """Reorders a memory with one query per sequence."""
    layer, (key, value, query) = made(kind), inputs()
    memory = layer.project(key, value, LENGTHS)
    assert memory.reorder(torch.arange(B)) is memory
    moved = memory.reorder(torch.tensor([1, 1, 0]))
    expected = layer.project(key[[1, 1, 0]], value[[1, 1, 0]], [4, 4, LK])
    index = [torch.arange(3)] * 2
    torch.testing.assert_close(
        steps(layer, query[:3], moved, index), steps(layer, query[:3], expected, index)
    )


@pytest.mark.parametrize("masking", ["none", "lengths", "padding", "dropout", "unbatched"])
@pytest.mark.parametrize("graph", [False, True])
def test_several_queries_of_one_memory(masking, graph):
    """The gradients of queries (B, n, query_dim) are deferred, as those of single queries are."""
    layer = AdditiveAttention(D, H, key_dim=K, dropout=0.4 * (masking == "dropout")).double()
    key, value, query = inputs()
    query = query.view(B, BEAMS, D)
    options = {}
    if masking == "lengths":
        options = {"lengths": LENGTHS}
    if masking == "padding":
        options = {"key_padding_mask": torch.rand(B, LK) < 0.4}
    given = (key, value, query) if masking != "unbatched" else (key[0], value[0], query[0])
    results = []
    for ordinary in (False, True):
        torch.manual_seed(3)
        memory = layer.project(*given[:2], **options)
        if ordinary and masking != "dropout":
            memory = memory._replace(key=memory.key)
        total, rows = 0.0, given[2]
        for _ in range(3):
            context, weights = layer.step(rows, memory)
            total = total + context.square().sum() + weights.square().sum()
            rows = rows + context[..., :1]
        assert context.shape == (*given[2].shape[:-1], 7)
        wanted = [key, value, query, *layer.parameters()]
        grads = torch.autograd.grad(total, wanted, create_graph=graph or ordinary)
        results.append([context, weights, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_state():
    previous = torch.arange(6.0).reshape(3, 2)
    state = AttentionState(previous.requires_grad_(), 2 * previous)
    moved = state.reorder(torch.tensor([2, 0]))
    assert torch.equal(moved.previous, previous[[2, 0]])
    assert torch.equal(moved.cumulative, 2 * previous[[2, 0]])
    assert not any(x.requires_grad for x in moved.detach())


def test_replaced_and_pickled_memories_keep_their_beams():
    import pickle

    memory = AdditiveAttention(D, H, key_dim=K).project(torch.randn(B, LK, K)).expand(BEAMS)
    assert memory._replace(key=memory.key).beams == BEAMS
    assert pickle.loads(pickle.dumps(memory)).beams == BEAMS


def cases():
    layer = AdditiveAttention(D, H, key_dim=K)
    memory = layer.project(torch.randn(2, LK, K))
    beams, alone = memory.expand(2), layer.project(torch.randn(LK, K))
    query = torch.randn(3, D)
    return {
        "no number": (lambda: memory.expand(2.0), TypeError, "beams is 2.0"),
        "zero": (lambda: memory.expand(0), ValueError, "expanded to 0"),
        "twice": (lambda: beams.expand(2), ValueError, "memory of 2 beams"),
        "floats": (lambda: beams.reorder(torch.zeros(4)), TypeError, "index is torch.float32"),
        "list": (lambda: beams.reorder([0, 1]), TypeError, "index is list"),
        "rank": (lambda: beams.reorder(torch.zeros(2, 2).long()), ValueError, "one dim"),
        "range": (lambda: beams.reorder(torch.tensor([0, 4])), ValueError, "0 to 4.* 4 queries"),
        "part": (lambda: beams.reorder(torch.tensor([0, 1, 2])), ValueError, "every beam"),
        "mixed": (lambda: beams.reorder(torch.tensor([0, 2])), ValueError, "different sequences"),
        "unbatched": (lambda: alone.reorder(torch.tensor([0, 0])), ValueError, "expand it"),
        "queries": (lambda: layer.step(query, beams), ValueError, "2 beams .* needs 4 queries"),
        "even": (lambda: layer.step(query[:2], beams), ValueError, "needs 4 queries"),
    }


@pytest.mark.parametrize("name", cases())
def test_sentences(name):
    call, exception, sentence = cases()[name]
    with pytest.raises(exception, match=sentence):
        call()


@KINDS
@pytest.mark.parametrize("frozen", ["memory", "layer"])
def test_steps_of_a_frozen_memory_train_the_layer(kind, frozen):
    """The memory was projected without gradients, or before the layer's parameters needed them."""
    layer, (key, _, query) = made(kind), inputs(2)
    query, results = query[:2], []
    layer.requires_grad_(frozen != "layer")
    with torch.set_grad_enabled(frozen != "memory"):
        memory = layer.project(key.detach())
    layer.requires_grad_(True)
    for each in (memory, memory._replace(key=memory.key)):
        outputs = steps(layer, query, each, [torch.arange(2)] * 3)
        wanted = [layer.query_layer.weight, layer.energy_layer.weight]
        results.append(torch.autograd.grad(outputs[-1].square().sum(), wanted))
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)


def test_expanded_memories_follow_a_changed_layer():
    layer = made("tacotron")
    key, value, query = inputs()
    memory = layer.project(key, value).expand(BEAMS)
    state = layer.initial_state(memory)
    layer.step(query, memory, state)
    layer.energy_layer = nn.Linear(H, 1, dtype=torch.float64)
    expected = layer.step(query, memory._replace(key=memory.key), state)
    ours = layer.step(query, memory, state)
    torch.testing.assert_close(ours[:2], expected[:2])


@pytest.mark.parametrize("field", ["lengths", "attn_mask"])
@pytest.mark.parametrize("size", [0, B + 1])
def test_fields_of_another_number_of_sequences_are_not_reordered(field, size):
    memory = made("content").project(inputs()[0])._replace(**{field: torch.zeros(size, 1)})
    with pytest.raises(ValueError, match=f"{field} has shape .{size}, 1.: dim 0 must be {B}"):
        memory.reorder(torch.arange(B - 1, -1, -1))
    one = memory._replace(**{field: torch.zeros(())})  # one for all sequences
    assert one.reorder(torch.arange(B - 1, -1, -1))[memory._fields.index(field)].dim() == 0


@KINDS
def test_what_takes_a_memory_apart_keeps_its_beams(kind):
    """FSDP2, torch.func and torch.export flatten and unflatten a memory."""
    layer, (key, value, query) = made(kind), inputs()
    memory = layer.project(key, value, lengths=LENGTHS).expand(BEAMS)
    again = tree_map(lambda x: x, memory)
    assert again.beams == BEAMS and isinstance(again, ProjectedMemory)
    choices = chosen(number=2)
    expected = steps(layer, query, memory, choices)
    for ours, theirs in zip(steps(layer, query, again, choices), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Expanding(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, key, value):
        return self.layer.project(key, value).expand(BEAMS)


class Stepping(Expanding):
    def forward(self, query, memory):
        return self.layer.step(query, memory)


def test_a_memory_between_two_programs():
    layer, (key, value, query) = made("content"), inputs()
    memory = layer.project(key, value).expand(BEAMS)
    expected = layer.step(query, memory)
    first = torch.export.export(Expanding(layer), (key, value)).module()
    second = torch.export.export(Stepping(layer), (query, memory)).module()
    torch.testing.assert_close(second(query, first(key, value)), expected)
