"""One memory in several threads, after a fork, in copies, and under torch.compile."""

from __future__ import annotations

import copy
import pickle
import threading

import fresh
import pytest
import torch
from decoders import LK, B, D, H, K, build, eventually
from oracle import DEVICE

from additive_attn import AdditiveAttention

F64 = torch.float64
KINDS = pytest.mark.parametrize("kind", ["content", "tacotron", "pointer"])


def made(kind):
    torch.manual_seed(3)
    return (
        AdditiveAttention(D, H, key_dim=K, dtype=F64)
        if kind == "content"
        else build(kind, dtype=F64)
    )


def inputs():
    torch.manual_seed(4)
    shapes = (B, LK, K), (B, LK, 7), (B, D)
    return [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]


def decode(layer, memory, query, steps=5):
    """The sum of all results of a decoder's steps."""
    total, state = 0.0, None
    if not isinstance(layer, AdditiveAttention):
        state = layer.initial_state(memory)
    for _ in range(steps):
        if state is None:
            context, weights = layer.step(query, memory)
        else:
            context, weights, state = layer.step(query, memory, state)
        query = query + context.sum(-1, keepdim=True)
        total = total + context.square().sum() + weights.pow(3).sum()
    return total


def in_threads(number, work):
    """Runs ``work`` in threads that start together, and returns their results."""
    results, barrier = [None] * number, threading.Barrier(number)

    def run(i):
        barrier.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


@KINDS
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_threads_decode_with_one_memory(kind, beams, mode):
    layer, (key, value, query) = made(kind), inputs()
    queries = [i * query.detach().repeat_interleave(beams, 0) for i in range(4)]
    with mode():
        expected = [decode(layer, layer.project(key, value).expand(beams), q) for q in queries]
        memory = layer.project(key, value).expand(beams)

        def work(i):
            with mode():  # each thread has its own mode
                return [decode(layer, memory, queries[i]) for _ in range(10)]

        for found, best in zip(in_threads(4, work), expected, strict=True):
            assert found is not None and all(torch.equal(x, best) for x in found)


@KINDS
@pytest.mark.parametrize("beams", [1, 2])
def test_threads_train_with_one_memory(kind, beams):
    """Each thread differentiates its own decoder. All pass back through the shared memory at the
    same time."""
    layer, (key, value, query) = made(kind), inputs()
    queries = [i * query.repeat_interleave(beams, 0) for i in range(4)]
    wanted = [key, value, query, *layer.parameters()]

    def gradients(memory, i):
        loss = decode(layer, memory, queries[i])
        return torch.autograd.grad(loss, wanted, retain_graph=True)

    expected = [gradients(layer.project(key, value).expand(beams), i) for i in range(4)]
    memory = layer.project(key, value).expand(beams)
    results = in_threads(4, lambda i: [gradients(memory, i) for _ in range(5)])
    for found, best in zip(results, expected, strict=True):
        assert found is not None
        for grads in found:
            torch.testing.assert_close(grads, best, rtol=1e-12, atol=1e-12)
    if memory.prepared is not None and memory.prepared.lent.node is not None:
        assert eventually(lambda: not memory.prepared.lent.node.passes)


FORKED = """
import os, torch
from additive_attn import AdditiveAttention, CoverageAttention
from additive_attn.ops import dispatch
torch.set_num_threads(2)

def same(found, expected):
    # The bits of products in PyTorch depend on the number of threads.
    if dispatch.cpu_is_plain:
        return all(torch.allclose(*each, 1e-4, 1e-4) for each in zip(found, expected))
    return all(map(torch.equal, found, expected))

for cls in (AdditiveAttention, CoverageAttention):
    layer = cls(64, 64) if cls is AdditiveAttention else cls(64, 64, 64)
    key, query = torch.randn(8, 300, 64, requires_grad=True), torch.randn(8, 64)

    def gradients(memory):
        given = [query, memory]
        if cls is CoverageAttention:
            given.append(layer.initial_state(memory))
        loss = layer.step(*given)[0].square().sum()
        return torch.autograd.grad(loss, [key, *layer.parameters()], retain_graph=True)

    memory = layer.project(key)
    expected = gradients(memory)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the others do not survive a fork
        kept, again = gradients(memory), gradients(layer.project(key))
        os._exit(0 if same(kept, expected) and same(again, expected) else 9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(gradients(memory), expected)
print("forked")
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="a process that uses a GPU cannot be forked")
def test_a_memory_in_a_forked_process():
    result = fresh.python(FORKED)
    assert result.returncode == 0 and result.stdout.strip() == "forked", result.stderr


@KINDS
@pytest.mark.parametrize("beams", [1, 2])
def test_copies_of_a_memory_and_a_state_in_a_graph(kind, beams):
    """Pickled copies are leaves with the same values. torch raises for a deepcopy of other
    tensors."""
    layer, (key, value, query) = made(kind), inputs()
    query = query.repeat_interleave(beams, 0)
    memory = layer.project(key, value, [LK, 4, 0]).expand(beams)
    given, cut = [query, memory], [query, memory]
    if kind != "content":
        state = layer.step(query, memory, layer.initial_state(memory))[2]
        given.append(state)
        cut.append(state.detach())  # a copy does not pass gradients back into this graph
    expected = layer.step(*cut)[0]
    given[1:] = pickle.loads(pickle.dumps(given[1:]))
    assert given[1].beams == beams and given[1].prepared is None
    found = layer.step(*given)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), [given[1].key, query]),
        torch.autograd.grad(expected.sum(), [memory.key, query]),
    )
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(memory)
    with torch.no_grad():
        memory = layer.project(key, value, [LK, 4, 0]).expand(beams)
        again = copy.deepcopy(memory)
        given[1] = again
        torch.testing.assert_close(layer.step(*given)[0], expected)
    assert again.beams == beams and again.prepared is None


@pytest.mark.skipif(DEVICE != "cpu", reason="compiles for the CPU")
@KINDS
def test_a_compiled_step_trains(kind):
    layer, (key, value, query) = made(kind), inputs()
    memory = layer.project(key, value, [LK, 4, 0])
    given = [query, memory]
    if kind != "content":
        given.append(layer.initial_state(memory))
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    results = []
    for step in (compiled, layer.step):
        context, weights, *_ = step(*given)
        loss = context.square().sum() + weights.pow(3).sum()
        wanted = [key, value, query, *layer.parameters()]
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
        results.append([context, weights, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
