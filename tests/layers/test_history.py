"""Attention with a state of earlier weights, in every way that PyTorch can call it."""

from __future__ import annotations

import copy
import pickle

import decoders
import paths
import pytest
import torch
from decoders import (
    EVERY,
    KINDS,
    LENGTHS,
    SOME,
    D,
    Decoder,
    H,
    K,
    assert_close,
    attended,
    build,
    inputs,
    results,
)
from oracle import DEVICE, error, generator
from torch import fx, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from additive_attn import AttentionState


@SOME
def test_autocast(kind, passes):
    decoder = Decoder(build(kind), torch.float32)
    tensors, found = inputs(torch.float32), []
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for options in ({}, {"ordinary": True}):
            found.append(results(decoder, decoder, tensors, lengths=LENGTHS, **options))
    assert found[0][0][0].dtype == torch.bfloat16
    assert found[0][0][-1].dtype == torch.float32, "a sum of many small weights"
    assert passes == [4]
    exact = results(decoder, decoder, tensors, lengths=LENGTHS)
    for ours in found:
        for mine, best in zip([*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True):
            assert error(mine, best.double()) <= 0.1 * max(1.0, best.abs().max().item())


@SOME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(kind, dtype):
    """The layer is in 16 bits, or the memory in 16 bits beside a layer in float32."""
    decoder, tensors = Decoder(build(kind), dtype), inputs(dtype)
    exact = copy.deepcopy(decoder).double()(*(x.double() for x in tensors), lengths=LENGTHS)
    found = decoder(*tensors, lengths=LENGTHS)
    assert found[0].dtype == dtype and found[-1].dtype == torch.float32
    assert_close(found, exact, 0.05)
    decoder, tensors = decoder.float(), [x.float() for x in tensors]
    found = decoder(*tensors, lengths=LENGTHS, dtype=dtype)
    assert found[0].dtype == torch.float32
    assert_close(found, exact, 0.05)


@pytest.mark.skipif(DEVICE != "cpu", reason="compiles for the CPU")
@SOME
def test_compiled(kind):
    decoder, tensors = Decoder(build(kind)), inputs()
    expected = results(decoder, decoder, tensors, lengths=torch.tensor(LENGTHS))
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    found = results(decoder, compiled, tensors, lengths=torch.tensor(LENGTHS))
    for ours, best in zip(found, expected, strict=True):
        assert_close(ours, best)
    # One step of a memory that was projected outside the graph.
    layer, (key, value, query) = decoder.layer, tensors
    memory = layer.project(key, value, LENGTHS)
    state = layer.initial_state(memory)
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        context, weights, after = step(query, memory, state)
        assert_close([context, weights, *after], _flat(layer.step(query, memory, state)))
        state = after


def _flat(step):
    return [*step[:2], *step[2]]


@SOME
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_hooks", "reentrant"])
def test_checkpointed(kind, reentrant):
    """The arguments of reentrant checkpoints are tensors, so those of memory and state are passed
    one by one."""
    decoder, tensors = Decoder(build(kind)), inputs()
    layer = decoder.layer

    def run(key, value, query, checkpointed):
        memory = layer.project(key, value, LENGTHS)
        state, found = layer.initial_state(memory), []

        def step(query, previous, cumulative, key, value):
            mine = memory if key is memory.key else memory._replace(key=key, value=value)
            return tuple(_flat(layer.step(query, mine, AttentionState(previous, cumulative))))

        for _ in range(3):
            given = query, *state, memory.key, memory.value
            if checkpointed:
                context, weights, *after = checkpoint(step, *given, use_reentrant=reentrant)
            else:
                context, weights, *after = step(*given)
            state = AttentionState(*after)
            query = torch.tanh(decoder.cell(torch.cat([context, query], -1)))
            found += [context, weights]
        return found

    ours, theirs = [], []
    for checkpointed, grads in ((True, ours), (False, theirs)):
        total = sum(x.square().sum() for x in run(*tensors, checkpointed))
        decoder.zero_grad()
        for x in tensors:
            x.grad = None
        total.backward()
        grads += [x.grad for x in (*tensors, *decoder.parameters())]
    assert_close(ours, theirs)


@SOME
def test_gradients_of_gradients(kind):
    decoder, tensors = Decoder(build(kind)), inputs()
    leaves, found = [*tensors, *decoder.parameters()], []
    for run, options in (
        (decoder, {"lengths": LENGTHS}),
        (decoder.plain, {"attended": attended()}),
    ):
        outputs = run(*tensors, steps=2, **options)
        total = sum(x.square().sum() for x in outputs[:-1])
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        again = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(again, leaves, materialize_grads=True))
    assert_close(*found, tolerance=1e-10)


@SOME
@pytest.mark.parametrize("sharing", ["beams", "batch"])
def test_gradients_of_gradients_of_shared_keys(kind, sharing):
    """The second backward passes through the steps, whose gradient of the keys has an entry per
    query, and through the nodes of the first backward."""
    layer = build(kind)
    layer = type(layer)(2, 2, 3, dtype=torch.float64, **KINDS[kind] | {"initial": "zeros"})
    key = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def loop(query, key):
        memory = layer.project(key)
        memory = memory.expand(2) if sharing == "beams" else memory
        state = layer.initial_state(memory)
        for _ in range(2):
            context, _, state = layer.step(query, memory, state)
            query = torch.tanh(query + context)
        return query

    assert torch.autograd.gradgradcheck(loop, (query, key), fast_mode=True)


@pytest.mark.kernel
@SOME
def test_gradcheck(kind, path):
    torch.manual_seed(0)
    kept = decoders.KINDS[kind] | ({} if kind == "pointer" else {"kernel_size": 3, "filters": 2})
    layer = type(build(kind))(2, 2, 3, dtype=torch.float64, **kept)

    def loop(query, key, value, *parameters):
        memory = layer.project(key, value, [3, 2])
        state = layer.initial_state(memory)
        for _ in range(3):
            context, _, state = layer.step(query, memory, state)
            query = query + context
        return context, *state

    tensors = [torch.randn(s, dtype=torch.float64).requires_grad_()
               for s in ((2, 2), (2, 3, 2), (2, 3, 2))]  # fmt: skip
    tensors += layer.parameters()
    assert torch.autograd.gradcheck(loop, tensors)
    if path == paths.native():  # made of ordinary calls, which are tested on every path
        assert torch.autograd.gradgradcheck(loop, tensors)


@SOME
def test_functional_transforms(kind):
    decoder, (key, value, query) = Decoder(build(kind)), inputs()

    def total(key, query):
        return sum(x.square().sum() for x in decoder(key, value, query, lengths=LENGTHS))

    expected = torch.autograd.grad(total(key, query), (key, query))
    found = torch.func.grad(total, (0, 1))(key.detach(), query.detach())
    assert_close(found, expected)
    parameters = {name: x.detach() for name, x in decoder.named_parameters()}
    called = torch.func.functional_call(decoder, parameters, (key, value, query))
    assert_close(called, decoder(key, value, query))


@SOME
def test_truncated_backpropagation(kind):
    """Chunks share the memory; the query and the state are detached between them."""
    decoder, found = Decoder(build(kind)), []
    layer = decoder.layer
    for ordinary in (False, True):
        key, value, query = inputs()
        decoder.zero_grad()
        memory = layer.project(key, value, LENGTHS)
        if ordinary:
            memory = memory._replace(key=memory.key)
        state = layer.initial_state(memory)
        for _ in range(3):
            total = 0.0
            for _ in range(2):
                context, weights, state = layer.step(query, memory, state)
                query = torch.tanh(decoder.cell(torch.cat([context, query], -1)))
                total = total + query.square().sum() + weights.pow(2).sum()
            total.backward(retain_graph=True)
            query, state = query.detach(), state.detach()
        found.append([x.grad for x in (key, value, *decoder.parameters())])
    assert_close(*found)


@EVERY
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("keys,batch", [(0, 3), (5, 0), (0, 0)])
def test_without_keys_or_sequences(kind, beams, keys, batch):
    """Without keys or sequences all results and gradients are zeros."""
    layer, value = build(kind), torch.randn(batch, keys, 7, requires_grad=True)
    memory = layer.project(torch.randn(batch, keys, K), value).expand(beams)
    query, state = torch.randn(beams * batch, D, requires_grad=True), layer.initial_state(memory)
    for _ in range(2):
        context, weights, state = layer.step(query, memory, state)
    assert context.shape == (beams * batch, 7) and weights.shape == (beams * batch, keys)
    (context.sum() + weights.square().sum()).backward()
    for x in (context, value.grad, query.grad, *(x.grad for x in layer.parameters())):
        assert x is None or not x.any()


@EVERY
def test_one_sequence_without_a_batch_dim(kind):
    layer, key, value = build(kind), torch.randn(5, K), torch.randn(5, 7)
    results = []
    for index in (slice(None), None):  # unbatched, and as a batch of one
        query = torch.randn(D, generator=generator(0)).requires_grad_()
        memory = layer.project(key[index], value[index])
        state = layer.initial_state(memory)
        for _ in range(2):
            context, weights, state = layer.step(query[index], memory, state)
        wanted = (query, *layer.parameters())
        total = context.sum() + weights.square().sum()
        grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        results.append([context.view(7), weights.view(5), *grads])
    torch.testing.assert_close(*results)


@SOME
def test_copies(kind):
    decoder, tensors = Decoder(build(kind)), inputs()
    expected = decoder(*tensors)
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert_close(other(*tensors), expected)
    memory = decoder.layer.project(*tensors[:2])
    state = decoder.layer.initial_state(memory)
    step = decoder.layer.step(tensors[2], memory, state)
    again = decoder.layer.step(tensors[2], *pickle.loads(pickle.dumps((memory, state))))
    assert_close(_flat(again), _flat(step))


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("change", ["hook", "weight_norm", "adapter", "bias", "convolution"])
def test_what_tools_have_made_of_the_layers(change, deferred):
    decoder, tensors = Decoder(build("tacotron")), inputs()
    layer = decoder.layer
    if change == "hook":
        layer.location_layer.register_forward_hook(lambda module, args, out: 2 * out)
        layer.location_conv.register_forward_hook(lambda module, args, out: out + 1)
    elif change == "weight_norm":
        weight_norm(layer.location_layer)
    elif change == "adapter":
        low = nn.Sequential(layer.location_layer, nn.Linear(H, H), nn.Tanh(), nn.Linear(H, H))
        layer.location_layer = low.double()
    elif change == "bias":
        layer.location_layer = nn.Linear(4, H, dtype=torch.float64)
    else:
        layer.location_conv = nn.Conv1d(2, 4, 3, padding=2, dilation=2, dtype=torch.float64)
    if not deferred:
        layer.energy_layer.register_forward_hook(lambda module, args, out: 1 * out)
    found = results(decoder, decoder, tensors, lengths=LENGTHS)
    expected = results(decoder, decoder.plain, tensors, attended=attended())
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@SOME
def test_traced_and_exported(kind):
    decoder, tensors = Decoder(build(kind)), inputs()
    layer, (key, value, query) = decoder.layer, tensors
    lengths = torch.tensor(LENGTHS)

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, key, value, query, lengths):
            memory = self.layer.project(key, value, lengths)
            state = self.layer.initial_state(memory)
            for _ in range(2):
                context, weights, state = self.layer.step(query, memory, state)
            return context, weights

    model = Steps()
    given = key, value, query, lengths
    expected = model(*given)
    assert_close(fx.symbolic_trace(model)(*given), expected)
    assert_close(torch.export.export(model, given).module()(*given), expected)
    assert_close(torch.jit.trace(model, given)(*given), expected)


@EVERY
@pytest.mark.usefixtures("steps_leave_records")
def test_memory_of_the_steps(kind):
    """Steps save O(Lk + H + Dv) numbers per sequence: no (Lk, H), and no (F, Lk) of features."""
    layer = build(kind, hidden=64)
    if kind != "pointer" and kind != "attcov":
        layer = type(layer)(D, K, 64, **KINDS[kind] | {"filters": 32})
    memory = layer.project(torch.randn(2, 512, K))
    shared = {x.untyped_storage().data_ptr() for x in (memory.key, memory.value)}
    shared |= {x.untyped_storage().data_ptr() for x in layer.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            saved[storage.data_ptr()] = storage
        return tensor

    query, state, steps = torch.randn(2, D), layer.initial_state(memory), 8
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for _ in range(steps):
            context, _, state = layer.step(query, memory, state)
            query = query + context.sum(-1, keepdim=True)
    kept = sum(storage.nbytes() for storage in saved.values())
    # The weights, their sum, and both once more as the inputs of the filters.
    assert kept <= steps * 2 * 4 * (4 * 512 + 4 * (64 + K)), kept


@EVERY
def test_batches_of_upstream_gradients(kind):
    decoder, tensors = Decoder(build(kind)), inputs()
    outputs = decoder(*tensors, lengths=LENGTHS)
    leaves = [*tensors, decoder.layer.query_layer.weight, decoder.layer.energy_layer.weight]
    upstream = [torch.randn(2, *x.shape, dtype=x.dtype) for x in outputs]

    def pulled_back(cotangents, **options):
        return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, **options)

    batched = pulled_back(upstream, is_grads_batched=True)
    for i in range(2):
        assert_close([x[i] for x in batched], pulled_back([x[i] for x in upstream]))
