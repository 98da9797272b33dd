"""A decoder's steps share one memory: its gradients are made once, and are those of the plain
layer in every way to differentiate."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial

import paths
import pytest
import torch
from decoders import eventually
from oracle import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

from additive_attn import AdditiveAttention, PlainAdditiveAttention
from additive_attn.ops.decoding import attend_step
from additive_attn.ops.memory import lend

pytestmark = pytest.mark.usefixtures("steps_leave_records")


B, LK, D, H, DV, T = 3, 7, 5, 8, 4, 4
F64 = torch.float64


class Decoder(nn.Module):
    """Attends T times. Every query depends on the context and the weights before it."""

    def __init__(self, ours: bool, **options):
        super().__init__()
        torch.manual_seed(1)
        if ours:
            self.attention = AdditiveAttention(D, H, **options)
        else:
            self.attention = PlainAdditiveAttention(D, H)
        self.encoder = nn.Linear(D, D)
        self.cell = nn.Linear(DV + LK, D)
        self.to(F64)

    def step(self, query, key, value, lengths):
        """A step of the plain layer: a call with one query, whose empty rows are 0."""
        layer = self.attention
        energy = torch.tanh(layer.query_layer(query)[:, None] + layer.key_layer(key))
        score = layer.energy_layer(energy).squeeze(-1)
        attended = torch.arange(LK) < lengths[:, None]
        weights = torch.softmax(score.masked_fill(~attended, -1e300), -1) * attended
        return (weights[:, None] @ value)[:, 0], weights

    def forward(self, query, key, value, lengths, steps=T, reuse=False):
        key = self.encoder(key)
        memory = None
        if isinstance(self.attention, AdditiveAttention):
            memory = self.attention.project(key, value, lengths)
        total = query.new_zeros(())
        for _ in range(steps):
            if memory is not None:
                context, weights = self.attention.step(query, memory)
            else:
                context, weights = self.step(query, key, value, lengths)
            query = torch.tanh(self.cell(torch.cat([context, weights], -1))) + query
            total = total + query.square().sum() + weights.pow(3).sum()
        if reuse:  # the model uses keys and values elsewhere too
            projected = self.attention.key_layer(key) if memory is None else memory.key
            total = total + projected.sin().sum() + value.cos().sum()
        return total


def inputs():
    torch.manual_seed(2)
    shapes = (B, D), (B, LK, D), (B, LK, DV)
    tensors = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    return (*tensors, torch.tensor([LK, 4, 0]))


def begun():
    """Returns a decoder, its inputs, and their memory."""
    model = Decoder(True)
    query, key, value, lengths = inputs()
    return model, query, key, value, model.attention.project(model.encoder(key), value, lengths)


def pair(**options):
    ours, plain = Decoder(True, **options), Decoder(False)
    assert list(ours.state_dict()) == list(plain.state_dict())
    return ours, plain


def leaves(model, arguments):
    return [*arguments[:3], *model.parameters()]


def assert_gradients(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.core
@pytest.mark.interpreter
@pytest.mark.parametrize("reuse", [False, True], ids=["alone", "reused"])
def test_gradients_are_those_of_the_plain_layer(reuse, passes):
    arguments = inputs()
    ours, plain = pair()
    results = [
        torch.autograd.grad(model(*arguments, reuse=reuse), leaves(model, arguments))
        for model in (ours, plain)
    ]
    assert_gradients(*results)
    assert passes == [T], "the gradients were not made once"


def test_gradients_accumulate(passes):
    arguments = inputs()
    results = []
    for model in pair():
        for _ in range(2):
            model(*arguments).backward()
        results.append([x.grad for x in leaves(model, arguments)])
        for x in arguments[:3]:
            x.grad = None
    assert_gradients(*results)
    assert passes == [T, T]


def test_a_graph_that_is_kept_is_differentiated_again(passes):
    arguments = inputs()
    ours, plain = pair()
    total, expected = ours(*arguments), plain(*arguments)
    grads = torch.autograd.grad(expected, leaves(plain, arguments))
    for _ in range(2):
        assert_gradients(
            torch.autograd.grad(total, leaves(ours, arguments), retain_graph=True), grads
        )
    total.backward()
    assert passes == [T] * 3
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_gradients_of_a_part(passes):
    arguments = inputs()
    ours, plain = pair()
    total, expected = ours(*arguments), plain(*arguments)
    assert_gradients(
        torch.autograd.grad(total, arguments[0], retain_graph=True),
        torch.autograd.grad(expected, arguments[0], retain_graph=True),
    )
    assert passes == [], "shared gradients were made though they are not needed"
    for some in (arguments[1:2], arguments[2:3], [0]):
        a, b = ((model.attention.energy_layer.weight,) if some == [0] else some
                for model in (ours, plain))  # fmt: skip
        assert_gradients(
            torch.autograd.grad(total, a, retain_graph=True),
            torch.autograd.grad(expected, b, retain_graph=True),
        )
    assert passes == [T] * 3


def test_only_some_tensors_need_a_gradient():
    for frozen in range(8):
        arguments = inputs()
        ours, plain = pair()
        results = []
        for model in (ours, plain):
            every = leaves(model, arguments)
            for number, x in enumerate(every):
                x.requires_grad_(number % 8 != frozen)
            wanted = [x for x in every if x.requires_grad]
            results.append(torch.autograd.grad(model(*arguments), wanted, allow_unused=True))
        assert_gradients(*results)


def test_truncated_backpropagation(passes):
    """Chunks share the memory; the decoder's state is detached between them."""
    results = []
    for model in pair():
        query, key, value, lengths = inputs()
        layer, keys = model.attention, model.encoder(key)
        memory = layer.project(keys, value, lengths) if hasattr(layer, "project") else None
        for _ in range(3):
            total = query.new_zeros(())
            for _ in range(2):
                if memory is not None:
                    context, weights = layer.step(query, memory)
                else:
                    context, weights = model.step(query, keys, value, lengths)
                query = torch.tanh(model.cell(torch.cat([context, weights], -1))) + query
                total = total + query.square().sum()
            total.backward(retain_graph=True)
            query = query.detach()
        results.append([x.grad for x in (key, value, *model.parameters())])
    assert_gradients(*results)
    assert passes == [2, 2, 2]


def test_several_memories_and_two_decoders_on_one(passes):
    """Two memories of one layer, one of which serves two decoders with queries of their own."""
    results = []
    for ours in (True, False):
        model = Decoder(ours)
        query, key, value, lengths = inputs()
        layer, total = model.attention, query.new_zeros(())
        memories = []
        for keys in (key, key.flip(1)):
            memories.append(layer.project(keys, value, lengths) if ours else (keys,))
        for number, start in ((0, query), (0, 2 * query), (1, query)):
            state = start
            for _ in range(T):
                if ours:
                    context, weights = layer.step(state, memories[number])
                else:
                    context, weights = model.step(state, memories[number][0], value, lengths)
                state = torch.tanh(model.cell(torch.cat([context, weights], -1))) + state
                total = total + state.square().sum()
        results.append(torch.autograd.grad(total, [query, key, value, *layer.parameters()]))
    assert_gradients(*results)
    assert sorted(passes) == [T, 2 * T]


def test_steps_that_never_reach_the_loss(passes):
    arguments = inputs()
    ours = Decoder(True)
    query, key, value, lengths = arguments
    memory = ours.attention.project(key, value, lengths)
    unused = [ours.attention.step(query * i, memory) for i in range(3)]
    context, _ = ours.attention.step(query, memory)
    alone, _ = ours.attention.step(query, ours.attention.project(key, value, lengths))
    wanted = [query, key, value, *ours.attention.parameters()]
    assert_gradients(
        torch.autograd.grad(context.sum(), wanted, retain_graph=True),
        torch.autograd.grad(alone.sum(), wanted),
    )
    assert passes == [1, 1] and len(unused) == 3
    # The loss depends on the weights alone, so the values have no gradient.
    _, weights = ours.attention.step(query, memory)
    grads = torch.autograd.grad(weights.square().sum(), [memory.key, value], allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1] is None


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_hooks", "reentrant"])
def test_checkpoint_of_a_step(reentrant):
    """The arguments of reentrant checkpoints are tensors, so those of the memory are passed one by
    one."""
    results = []
    for checkpointed in (True, False):
        model, query, key, value, memory = begun()
        layer = model.attention

        def step(query, key, value, layer=layer, memory=memory):
            if key is not memory.key:
                memory = memory._replace(key=key, value=value)
            return layer.step(query, memory)

        total = query.new_zeros(())
        for _ in range(T):
            given = (query, memory.key, memory.value)
            if checkpointed:
                context, weights = checkpoint(step, *given, use_reentrant=reentrant)
            else:
                context, weights = step(*given)
            query = torch.tanh(model.cell(torch.cat([context, weights], -1))) + query
            total = total + query.square().sum()
        total.backward()
        results.append([x.grad for x in (key, value, *model.parameters())])
    assert_gradients(*results)


@pytest.mark.parametrize("batched", [False, True])
def test_checkpoint_of_a_step_differentiated_twice(batched):
    """A backward may unpack a tensor that a checkpoint has saved only once."""
    results = []
    for checkpointed in (True, False):
        model, query, key, value, memory = begun()
        layer = model.attention
        step = layer.step
        if checkpointed:
            step = partial(checkpoint, layer.step, use_reentrant=False)
        context, _ = step(query, memory)
        context, _ = step(query * context.mean(-1, keepdim=True), memory)
        if batched:
            upstream = torch.stack([torch.ones_like(context), context.detach()])
            wanted = (query, key, value)
            grads = torch.autograd.grad(context, wanted, upstream, is_grads_batched=True)
        else:
            grads = torch.autograd.grad(context.sin().sum(), (query, key), create_graph=True)
            grads += torch.autograd.grad(sum(x.square().sum() for x in grads), (query, key, value))
        results.append(grads)
    assert_gradients(*results)


def test_hooks_get_the_whole_gradient():
    results = []
    for ours in (True, False):
        model = Decoder(ours)
        query, key, value, lengths = inputs()
        keys = model.attention.key_layer(key)
        seen = []
        if ours:
            memory = model.attention.project(key, value, lengths)
            keys = memory.key
        keys.retain_grad()
        keys.register_hook(lambda grad, seen=seen: seen.append(grad) or 2 * grad)
        total = query.new_zeros(())
        for _ in range(T):
            if ours:
                context, _ = model.attention.step(query, memory)
            else:
                layer = model.attention
                energy = torch.tanh(layer.query_layer(query)[:, None] + keys)
                attended = torch.arange(LK) < lengths[:, None]
                score = layer.energy_layer(energy).squeeze(-1).masked_fill(~attended, -1e300)
                context = ((torch.softmax(score, -1) * attended)[:, None] @ value)[:, 0]
            query = query + context.sum(-1, keepdim=True)
            total = total + query.square().sum()
        total.backward()
        assert len(seen) == 1
        results.append([seen[0], keys.grad, key.grad, model.attention.key_layer.weight.grad])
    assert_gradients(*results)


def test_anomaly_mode_and_other_threads():
    arguments = inputs()
    ours, plain = pair()
    expected = torch.autograd.grad(plain(*arguments), leaves(plain, arguments))
    with torch.autograd.detect_anomaly(check_nan=True):
        total = ours(*arguments)
        assert_gradients(
            torch.autograd.grad(total, leaves(ours, arguments), retain_graph=True), expected
        )
    found = []

    def work():
        found.append(torch.autograd.grad(total, leaves(ours, arguments), retain_graph=True))

    workers = [threading.Thread(target=work) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert len(found) == 4
    for grads in found:
        assert_gradients(grads, expected)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError("on purpose")


def test_an_exception_leaves_no_record(passes):
    query, key, value, lengths = inputs()
    layer = AdditiveAttention(D, H, dtype=F64)
    memory = layer.project(key, value, lengths)
    first, _ = layer.step(query, memory)
    second, _ = layer.step(Failing.apply(query + first.sum()), memory)
    with pytest.raises(ZeroDivisionError):
        torch.autograd.grad(second.sum(), [query, key], retain_graph=True)
    node = memory.prepared.lent.node
    gc.collect()
    assert eventually(lambda: not node.passes) and passes == []
    alone, _ = layer.step(query, layer.project(key, value, lengths))
    assert_gradients(
        torch.autograd.grad(first.sum(), [query, key]),
        torch.autograd.grad(alone.sum(), [query, key]),
    )


def test_the_memory_is_freed_with_the_graph():
    query, key, value, lengths = inputs()
    layer = AdditiveAttention(D, H, dtype=F64)
    memory = layer.project(key, value, lengths)
    for _ in range(T):
        context, _ = layer.step(query, memory)
    context.sum().backward()
    lent = memory.prepared.lent
    assert eventually(lambda node=lent.node: not node.passes)
    watched = [weakref.ref(x) for x in (lent.prepared, lent.shared.key)]
    gc.disable()
    try:
        del memory, lent, context, _
        assert not any(x() is not None for x in watched), "a reference cycle keeps the memory"
    finally:
        gc.enable()


def test_gradients_of_gradients():
    arguments = inputs()
    results = []
    for model in pair():
        grads = torch.autograd.grad(
            model(*arguments, steps=2), leaves(model, arguments), create_graph=True
        )
        total = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(total, leaves(model, arguments)))
    assert_gradients(*results)


@pytest.mark.kernel
def test_gradcheck(path):
    torch.manual_seed(0)
    layer = AdditiveAttention(3, 4, dtype=F64)
    lengths = torch.tensor([3, 2])

    def loop(query, key, value, *parameters):
        memory = layer.project(key, value, lengths)
        outputs = []
        for _ in range(3):
            context, weights = layer.step(query, memory)
            query = query + context
            outputs += [context, weights]
        return tuple(outputs)

    tensors = [
        torch.randn(s, dtype=F64, requires_grad=True) for s in ((2, 3), (2, 3, 3), (2, 3, 3))
    ]
    tensors += layer.parameters()
    assert torch.autograd.gradcheck(loop, tensors)
    if path == paths.native():  # made of ordinary calls, which are tested on every path
        assert torch.autograd.gradgradcheck(loop, tensors)


@pytest.mark.core
@pytest.mark.interpreter
def test_dropout_is_the_same_in_the_shared_pass():
    """Values and keys have zero gradients where steps have dropped all their weights."""
    torch.manual_seed(3)
    layer = AdditiveAttention(D, H, dropout=0.5, dtype=F64)
    query, key, value, lengths = inputs()
    seeds = [11, 12, 13]
    results = []
    for shared in (True, False):
        memory = layer.project(key, value, lengths)
        if not shared:
            memory = memory._replace(key=memory.key)
        total = query.new_zeros(())
        state = query
        for seed in seeds:
            torch.manual_seed(seed)
            context, weights = layer.step(state, memory)
            state = state + context.sum(-1, keepdim=True)
            total = total + state.square().sum() + weights.pow(2).sum()
        results.append(torch.autograd.grad(total, [query, key, value, *layer.parameters()]))
    assert_gradients(*results)


@pytest.mark.core
def test_upstream_nan_does_not_reach_masked_keys():
    layer = AdditiveAttention(D, H, dtype=F64)
    query, key, value, lengths = inputs()
    with torch.no_grad():
        key[1, 4:] = torch.nan
        value[1, 4:] = torch.inf
    memory = layer.project(key, value, lengths)
    context, _ = layer.step(query, memory)
    context, _ = layer.step(context.sum(-1, keepdim=True) + query, memory)
    upstream = torch.full_like(context, torch.nan)
    grads = torch.autograd.grad(context, [memory.key, value], upstream)
    for grad in grads:
        assert torch.equal(grad[1, 4:], torch.zeros_like(grad[1, 4:]))
        assert torch.equal(grad[2], torch.zeros_like(grad[2]))
        assert grad[0].isnan().any()


def test_queries_of_one_memory_count_as_its_rows():
    """A batch of queries, each with its own mask, shares a memory of one sequence."""
    layer = AdditiveAttention(D, H, dtype=F64)
    query, key, value, lengths = inputs()
    key, value = key[:1].detach().requires_grad_(), value[:1].detach().requires_grad_()
    padding = torch.arange(LK)[None] >= torch.tensor([5, 6, 7])[:, None]
    for options in ({}, {"lengths": lengths}, {"key_padding_mask": padding}):
        results = []
        for shared in (True, False):
            memory = layer.project(key, value, **options)
            if not shared:
                memory = memory._replace(key=memory.key)
            state, total = query, query.new_zeros(())
            for _ in range(T):
                context, weights = layer.step(state, memory)
                state = state + context.sum(-1, keepdim=True)
                total = total + state.square().sum() + weights.pow(2).sum()
            results.append(torch.autograd.grad(total, [query, key, value, *layer.parameters()]))
        assert_gradients(*results)


@pytest.mark.parametrize("sizes", [(), (1,), (3,), (2, 1), (1, 1), (1, 3), (2, 3)], ids=str)
def test_values_that_leading_dims_share(sizes):
    """Leading dims, such as heads, share values: their gradient is one product over these dims."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 3, LK, H, dtype=F64), torch.randn(*sizes, LK, DV, dtype=F64)
    weight, queries = torch.randn(3, H, dtype=F64), torch.randn(T, 2, 3, H, dtype=F64)
    leaves = [x.requires_grad_() for x in (key, value, weight, queries)]
    found = []
    for deferred in (False, True):
        lent = lend(key, value, weight, deferred=deferred)
        outputs = torch.stack([attend_step(lent, query)[0] for query in queries])
        found.append(torch.autograd.grad(outputs.sin().sum(), leaves))
    torch.testing.assert_close(found[1], found[0])


def test_unbatched():
    layer = AdditiveAttention(D, H, dtype=F64)
    query, key, value, _ = inputs()
    memory, batched = layer.project(key[0], value[0]), layer.project(key[:1], value[:1])
    outputs = [layer.step(query[0], memory), layer.step(query[:1], batched)]
    assert_gradients(outputs[0], [x[0] for x in outputs[1]])
    a, b = (torch.autograd.grad(x[0].sum(), [query, key, value]) for x in outputs)
    assert_gradients(a, b)


def test_changed_parameters_are_used():
    """A step after the parameters have changed is an ordinary call with the new ones."""
    layer = AdditiveAttention(D, H, dtype=F64)
    query, key, value, lengths = inputs()
    memory = layer.project(key, value, lengths)
    for change in (
        lambda: layer.energy_layer.weight.data.mul_(2),
        lambda: layer.query_layer.weight.data.add_(1),
        lambda: setattr(layer, "energy_layer", nn.Linear(H, 1, dtype=F64)),
        lambda: setattr(layer.query_layer, "weight", nn.Parameter(torch.randn(H, D, dtype=F64))),
        lambda: setattr(layer, "scale", 0.5),
        lambda: layer.query_layer.register_forward_hook(lambda *x: 2 * x[2]),
    ):
        change()
        expected = layer.step(query, memory._replace(key=memory.key))
        torch.testing.assert_close(layer.step(query, memory), expected)
    # A change between a step and its backward raises, as for the plain layer.
    layer = AdditiveAttention(D, H, dtype=F64)
    memory = layer.project(key, value, lengths)
    context, _ = layer.step(query, memory)
    with torch.no_grad():
        layer.query_layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.sum().backward()


def test_normalized_energy_and_other_biases():
    query, key, value, lengths = inputs()
    for options in ({"normalize": True}, {"bias": False}, {"scale": 0.3}):
        layer = AdditiveAttention(D, H, dtype=F64, **options)
        results = []
        for shared in (True, False):
            memory = layer.project(key, value, lengths)
            if not shared:
                memory = memory._replace(key=memory.key)
            state = query
            for _ in range(T):
                context, _ = layer.step(state, memory)
                state = state + context.sum(-1, keepdim=True)
            results.append(
                torch.autograd.grad(state.square().sum(), [query, key, *layer.parameters()])
            )
        assert_gradients(*results)


@pytest.mark.skipif(DEVICE != "cpu", reason="compiles for the CPU")
def test_transforms_and_compiled_steps_take_the_ordinary_gradient(passes):
    layer = AdditiveAttention(D, H, dtype=F64)
    query, key, value, lengths = inputs()

    def loss(query, key):
        memory = layer.project(key, value, lengths)
        context, _ = layer.step(query, memory)
        return layer.step(context.sum(-1, keepdim=True) + query, memory)[0].square().sum()

    expected = torch.autograd.grad(loss(query, key), (query, key))
    passes.clear()
    assert_gradients(torch.func.grad(loss, (0, 1))(query, key), expected)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_gradients(torch.autograd.grad(compiled(query, key), (query, key)), expected)
    assert passes == []


def test_memory_of_the_steps():
    """Records take O(Lk + H + Dv) per step, never (Lk, H), as counted in saved and new tensors."""
    layer = AdditiveAttention(16, 64)
    key = torch.randn(2, 512, 16)
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage())
        return tensor

    memory = layer.project(key)
    shared = {memory.key.untyped_storage().data_ptr(), key.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        state = torch.randn(2, 16)
        for _ in range(T):
            context, _ = layer.step(state, memory)
            state = state + context
    own = {x.data_ptr(): x.nbytes() for x in saved if x.data_ptr() not in shared}
    assert max(own.values()) <= 2 * 512 * 4, own


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_memory_in_sixteen_bits(dtype):
    """Steps compute in float32 with the rounded keys and values; gradients of the layer are
    float32."""
    layer = AdditiveAttention(D, H)
    query, key, value, lengths = (x.detach().to(torch.float32) for x in inputs())
    lengths = lengths.long()
    results = []
    for narrow in (True, False):
        if narrow:
            memory = layer.project(key, value, lengths, dtype=dtype)
            assert memory.key.dtype == memory.value.dtype == dtype
        else:
            memory = layer.project(key, value, lengths)
            memory = memory._replace(
                key=memory.key.to(dtype).float(), value=memory.value.to(dtype).float()
            )
        state, total = query, 0.0
        for _ in range(T):
            context, weights = layer.step(state, memory)
            assert context.dtype == torch.float32
            state = state + context.sum(-1, keepdim=True)
            total = total + state.square().sum() + weights.pow(2).sum()
        grads = torch.autograd.grad(total, list(layer.parameters()))
        several, _ = layer.step(query[:, None].expand(-1, 2, -1), memory)
        results.append([*grads, context, several])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=2e-2, atol=2e-3 * float(expected.abs().max())
        )
    with pytest.raises(TypeError, match="kept in their"):
        layer.project(key, dtype=torch.float64)


def test_autocast(passes):
    """Keys and values are cast once for all steps."""
    layer = AdditiveAttention(D, H)
    query, key, value, lengths = (x.detach().to(torch.float32) for x in inputs())
    lengths = lengths.long()
    results = []
    for shared in (True, False):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            memory = layer.project(key, value, lengths)
            if not shared:
                memory = memory._replace(key=memory.key)
            state, total = query, 0.0
            for _ in range(T):
                context, weights = layer.step(state, memory)
                assert context.dtype == torch.bfloat16
                state = state + context.sum(-1, keepdim=True)
                total = total + state.square().sum() + weights.pow(2).sum()
        results.append(torch.autograd.grad(total, list(layer.parameters())))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=5e-2, atol=2e-2 * float(expected.abs().max())
        )
    assert passes == [T]


@pytest.mark.parametrize("narrow", [None, torch.bfloat16], ids=str)
def test_a_memory_made_outside_autocast(narrow):
    layer = AdditiveAttention(D, H)
    query, key, value, _ = (x.detach().to(torch.float32) for x in inputs())
    memory = layer.project(key, value, dtype=narrow)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        context, weights = layer.step(query, memory)
        context, _ = layer.step(query + context.sum(-1, keepdim=True), memory)
    (context.float().sum() + weights.float().square().sum()).backward()
    assert all(x.grad.isfinite().all() for x in layer.parameters())


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_keys_changed_in_place_are_used(grad):
    layer = AdditiveAttention(D, H, dtype=F64)
    query, key, value, lengths = (x.detach() for x in inputs())
    with torch.set_grad_enabled(grad):
        memory = layer.project(key, value, lengths)
        with torch.no_grad():
            memory.key.add_(1.0)
        expected = layer.step(query, memory._replace(key=memory.key))
        torch.testing.assert_close(layer.step(query, memory), expected)


def test_frozen_keys_need_no_retained_graph():
    """Backward passes free nothing above the memory's node, so steps can be differentiated one by
    one."""
    layer = AdditiveAttention(D, H, dtype=F64)
    layer.key_layer.requires_grad_(False)
    query, key, value, lengths = (x.detach() for x in inputs())
    memory = layer.project(key, value, lengths)
    separate = [layer.step(i * query, memory)[0].square().sum() for i in (1, 2)]
    for loss in separate:
        loss.backward()
    layer.step(3 * query, memory)[0].square().sum().backward()
    found = [x.grad.clone() for x in layer.parameters() if x.requires_grad]
    layer.zero_grad()
    memory = layer.project(key, value, lengths)
    sum(layer.step(i * query, memory)[0].square().sum() for i in (1, 2, 3)).backward()
    assert_gradients(found, [x.grad for x in layer.parameters() if x.requires_grad])


def test_results_may_be_written_to():
    layer = AdditiveAttention(D, H, dtype=F64)
    query, key, value, lengths = inputs()
    results = []
    for in_place in (True, False):
        context, _ = layer.step(query, layer.project(key, value, lengths))
        context = context.mul_(2) if in_place else context * 2
        results.append(torch.autograd.grad(context.square().sum(), [query, key, value]))
    assert_gradients(*results)


def test_batches_of_upstream_gradients():
    layer = AdditiveAttention(D, H, dtype=F64)
    query, key, value, lengths = inputs()
    context, _ = layer.step(query, layer.project(key, value, lengths))
    upstream = torch.randn(4, *context.shape, dtype=F64)
    batched = torch.autograd.grad(
        context, [query, key], upstream, is_grads_batched=True, retain_graph=True
    )
    for i, grad in enumerate(upstream):
        single = torch.autograd.grad(context, [query, key], grad, retain_graph=True)
        assert_gradients([x[i] for x in batched], single)
