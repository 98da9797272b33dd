"""Promise 8: compile, export, opcheck, autocast, torch.func, checkpointing, DDP, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from oracle import DEVICE, assert_same, fused, generator, make, plain
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from additive_attn import AdditiveAttention, PlainAdditiveAttention, additive_attention
from additive_attn.backends.plain import blocks
from additive_attn.spec.call import Call


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def with_grads(function, inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    out = function(*leaves, **options)
    upstream = torch.randn(out.shape, generator=generator(3))
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def test_compile_with_inductor(dynamo):
    """Forward and backward with dynamic lengths compile once, to a full graph."""

    def attend(query, key, value, weight, lengths):
        out, weights, _ = additive_attention(
            query * 2, key, value, weight, lengths=lengths, is_causal=True, need_weights=True,
            need_lse=True,
        )  # fmt: skip
        return out.transpose(-1, -2).relu().transpose(-1, -2) + weights.sum(-1, True) * 0.5

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="inductor")
    for length in (7, 20, 33):
        inputs = make((2,), length, length + 3, 8, 6, seed=length)
        lengths = torch.tensor([length, 2])
        ours = with_grads(compiled, inputs, lengths=lengths)
        for got, expected in zip(ours, with_grads(attend, inputs, lengths=lengths), strict=True):
            torch.testing.assert_close(got, expected)
    assert dynamo() == 1


@pytest.mark.parametrize("train", [False, True])
def test_no_recompilation_per_length(dynamo, train):
    """Without dynamic=True the second length makes the graph dynamic, and later ones do not
    recompile."""
    layer = AdditiveAttention(6, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in range(5, 45):
        query, key = torch.randn(2, length, 6), torch.randn(2, 2 * length, 6)
        lengths = torch.tensor([length, 2 * length])
        with torch.set_grad_enabled(train):
            out, _ = compiled(query, key, lengths=lengths)
        if train:
            out.square().sum().backward()
        torch.testing.assert_close(out, layer(query, key, lengths=lengths)[0])
    assert dynamo() <= 2


def test_compile_a_decoder_loop(dynamo):
    layer, cell = AdditiveAttention(6, 8), nn.GRUCell(6, 6)

    def decode(memory, state):
        projected = layer.project(memory)
        for _ in range(3):
            context, _ = layer.step(state, projected)
            state = cell(context, state)
        return state

    memory, state = torch.randn(2, 9, 6), torch.randn(2, 6)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(memory, state), decode(memory, state))
    compiled(memory, state).sum().backward()
    assert layer.key_layer.weight.grad.abs().sum() > 0


def test_compile_with_dropout_and_masks(dynamo):
    inputs = make((2,), 6, 9, 8, 6)
    mask = torch.randn(6, 9)

    def attend(*tensors):
        return additive_attention(*tensors, attn_mask=mask, dropout_p=0.5, window=(3, 2))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    ours = with_grads(compiled, inputs)
    torch.manual_seed(4)
    for got, expected in zip(ours, with_grads(attend, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("need_lse", [False, True])
def test_compile_without_weights(dynamo, need_lse):
    """By default the weights are empty. They have no gradient, in any form that the compiler
    passes."""

    def attend(*tensors):
        outputs = additive_attention(*tensors, need_lse=need_lse)
        return outputs[0] + outputs[1][..., None] if need_lse else outputs

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    inputs = make((2,), 6, 9, 8, 6)
    for got, expected in zip(
        with_grads(compiled, inputs), with_grads(attend, inputs), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_compile_refuses_as_eager_does(dynamo):
    compiled = torch.compile(additive_attention, backend="eager")
    with pytest.raises(Exception, match="query has 8 features and key has 7"):
        compiled(torch.randn(3, 8), torch.randn(5, 7), torch.randn(5, 6), torch.randn(8))


def test_export(dynamo):
    layer = AdditiveAttention(6, 8).eval()
    dim = torch.export.Dim
    batch, queries, keys = dim("batch", min=2), dim("queries", min=2), dim("keys", min=2)
    program = torch.export.export(
        layer,
        (torch.randn(2, 5, 6), torch.randn(2, 7, 6)),
        {"lengths": torch.tensor([7, 3])},
        dynamic_shapes={
            "query": {0: batch, 1: queries},
            "key": {0: batch, 1: keys},
            "lengths": {0: batch},
        },
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for shape in ((2, 5, 7), (4, 9, 30)):
        query, key = torch.randn(shape[0], shape[1], 6), torch.randn(shape[0], shape[2], 6)
        lengths = torch.randint(0, shape[2] + 1, shape[:1])
        ours = loaded(query, key, lengths=lengths)
        for got, expected in zip(ours, layer(query, key, lengths=lengths), strict=True):
            torch.testing.assert_close(got, expected)


TILES = torch.rand(2, 3, 4) < 0.6
OP_CASES = {
    "plain": {},
    "bool mask": dict(attn_mask=torch.rand(1, 4, 6) < 0.7),
    "float mask": dict(attn_mask=torch.randn(4, 6)),
    "lengths": dict(lengths=torch.tensor([[6], [2]])),
    "starts": dict(starts=torch.tensor([[1], [3]])),
    "blocks": dict(block_table=torch.tensor([[[0, 2], [1, 3]]]).int(), block_tiles=TILES),
    "dropout": dict(seed=torch.tensor(3), dropout_p=0.5),
    "window": dict(left=2, right=0),
    "half": dict(dtype=torch.bfloat16),
}


def op_arguments(case):
    case = dict(case)
    inputs = make((2,), 4, 6, 5, 3, dtype=case.pop("dtype", torch.float32))
    defaults = Call._field_defaults | {"scale": 0.5}
    return inputs, list((defaults | case).values())


@pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES.keys())
@pytest.mark.parametrize("need_weights", [False, True])
def test_opcheck_forward(case, need_weights):
    inputs, options = op_arguments(case)
    forward = torch.ops.additive_attn.forward.default
    opcheck(forward, (*inputs.values(), *options, need_weights))


@pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES.keys())
@pytest.mark.parametrize("needs", [(True,) * 5, (False, True, False, True, False)], ids=str)
def test_opcheck_backward(case, needs):
    inputs, options = op_arguments(case)
    needs = list(needs)
    mask = options[0]
    needs[4] = needs[4] and mask is not None and mask.is_floating_point()
    out, _, lse = torch.ops.additive_attn.forward(*inputs.values(), *options, True)
    upstream = [torch.randn_like(out).transpose(0, 1).contiguous().transpose(0, 1), None]
    backward = torch.ops.additive_attn.backward.default
    arguments = (*upstream, torch.randn_like(lse), *inputs.values(), *options, lse)
    opcheck(backward, (*arguments, *needs))


@pytest.mark.core
@pytest.mark.interpreter
@pytest.mark.parametrize("need_mask", [False, True])
def test_a_mask_of_another_dtype_as_graphs_expect_it(need_mask):
    """A gradient that is not needed is empty, and has the expected dtype too."""
    inputs, options = op_arguments(OP_CASES["float mask"] | {"dtype": torch.bfloat16})
    out, _, lse = torch.ops.additive_attn.forward(*inputs.values(), *options, True)
    query, key, _, weight = inputs.values()
    scored = (query, key, weight, *options[:7], 0.5)
    needs = (False, True, False, need_mask)
    backward, *others = (getattr(torch.ops.additive_attn, name) for name in (
        "backward", "scores_backward", "tangent", "scores_tangent"))  # fmt: skip
    scores = torch.randn(2, 4, 6, dtype=torch.bfloat16)
    calls = {
        backward: (
            out, None, None, *inputs.values(), *options, lse, *needs[:2], False, *needs[2:],
        ),
        others[0]: (scores, *scored, *needs),
        others[1]: (
            out, None, None, *inputs.values(), *options, lse, None, None, None, query, None, None,
            None, None, True, False, False, *needs[:2], False, *needs[2:],
        ),
        others[2]: (scores, *scored, None, query, None, None, None, True, *needs),
    }  # fmt: skip
    for operator, arguments in calls.items():
        graphs = operator(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
        found = operator(*arguments)
        assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in graphs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The layer computes in the autocast dtype; parameters and their gradients stay float32."""
    layer, plain_layer = AdditiveAttention(12, 16), PlainAdditiveAttention(12, 16)
    plain_layer.load_state_dict(layer.state_dict())
    query, key = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    mask = torch.randn(5, 7)
    padding = torch.tensor([[False] * 7, [False] * 3 + [True] * 4])
    with torch.autocast(DEVICE, dtype):
        out, weights = layer(query, key)
        expected = plain_layer(query, key, key)[0]
        masked, _ = layer(query, key, attn_mask=mask, key_padding_mask=padding)
        stepped, _ = layer.step(query[:, 0], layer.project(key))
    assert out.dtype == weights.dtype == masked.dtype == stepped.dtype == dtype
    assert expected.dtype == dtype
    torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(stepped, out[:, 0], atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(
        masked.float(), layer(query, key, attn_mask=mask, key_padding_mask=padding)[0],
        atol=3e-2, rtol=3e-2,
    )  # fmt: skip
    out.float().square().sum().backward()  # outside of the context, as in training
    expected.float().square().sum().backward()
    for ours, theirs in zip(layer.parameters(), plain_layer.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, atol=5e-2, rtol=5e-2)


def test_autocast_of_the_function():
    """Mixed inputs are cast to the autocast dtype. float64 is not cast, and raises beside
    others."""
    inputs = make((2,), 3, 5, 8, 6)
    inputs["value"] = inputs["value"].bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert additive_attention(*inputs.values()).dtype == torch.bfloat16
        double = {name: x.double() for name, x in inputs.items()}
        assert additive_attention(*double.values()).dtype == torch.float64
        with pytest.raises(TypeError, match="float64"):
            additive_attention(double["query"], *list(inputs.values())[1:])
    with pytest.raises(TypeError):
        additive_attention(*inputs.values())


def test_plain_operators_narrow_nothing_under_autocast():
    """Inputs are cast before the operators are called. A compiled graph, and a backward under
    autocast, call the operators while autocast is on."""
    inputs = tuple(make((2,), 20, 40, 24, 5).values())
    options = (None, None, None, None, None, -1, -1, None, 0.0, 1.0)

    def run():
        out, weights, lse = blocks.forward(*inputs, *options, True)
        needs = (True, True, True, True, False)
        return out, weights, lse, *blocks.backward(out, None, lse, *inputs, *options, lse, *needs)

    expected = run()
    with torch.autocast(DEVICE, torch.bfloat16):
        for ours, full in zip(run(), expected, strict=True):
            torch.testing.assert_close(ours, full, atol=0.0, rtol=0.0)


def test_vmap_is_the_batched_call():
    inputs = make((4,), 5, 9, 8, 6)
    expected = fused(inputs)
    for in_dims in ((0, 0, 0, None), (1, 2, -1, None)):
        moved = [
            x if d is None else x.movedim(0, d)
            for x, d in zip(inputs.values(), in_dims, strict=True)
        ]
        call = lambda *t: additive_attention(*t, need_weights=True, need_lse=True)  # noqa: E731
        ours = torch.func.vmap(call, in_dims=in_dims)(*moved)
        for got, want in zip(ours, expected.values(), strict=True):
            torch.testing.assert_close(got, want)


def test_vmap_over_masks_lengths_and_weights():
    inputs = make((), 5, 9, 8, 6)
    lengths, mask = torch.tensor([9, 1, 0]), torch.randn(3, 5, 9)
    weight = torch.randn(3, 8)

    def call(weight, lengths, mask):
        tensors = (inputs["query"], inputs["key"], inputs["value"], weight)
        return additive_attention(*tensors, lengths=lengths, attn_mask=mask)

    ours = torch.func.vmap(call)(weight, lengths, mask)
    for n in range(3):
        torch.testing.assert_close(ours[n], call(weight[n], lengths[n], mask[n]))


def test_nested_vmap():
    inputs = make((2, 3), 5, 9, 8, 6)
    call = torch.func.vmap(torch.func.vmap(additive_attention, (0, 0, 0, None)), (0, 0, 0, None))
    torch.testing.assert_close(call(*inputs.values()), fused(inputs)["out"])


def test_per_sample_gradients():
    inputs = make((4,), 5, 9, 8, 6, dtype=torch.float64)
    lengths = torch.tensor([9, 2, 5, 0])

    def loss(weight, query, key, value, lengths):
        return additive_attention(query, key, value, weight, lengths=lengths).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))
    weight = inputs.pop("weight")
    ours = per_sample(weight, *inputs.values(), lengths)
    for n in range(4):
        leaf = weight.clone().requires_grad_()
        loss(leaf, *(x[n] for x in inputs.values()), lengths[n]).backward()
        torch.testing.assert_close(ours[n], leaf.grad)


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("shape", [(5, 9), (9,)], ids=str)
def test_per_sample_gradients_of_a_float_mask(shape, dim):
    """Each sample gets its own part of the gradient, for a mask per sample and for a shared
    one."""
    inputs = make((4,), 5, 9, 8, 6, dtype=torch.float64)
    weight = inputs.pop("weight")
    samples = torch.randn(4, *shape, dtype=torch.float64)
    mask = samples[0] if dim is None else samples.movedim(0, dim)

    def loss(mask, *tensors):
        return additive_attention(*tensors, weight, attn_mask=mask).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), (dim, 0, 0, 0))(mask, *inputs.values())
    for n in range(4):
        leaf = samples[0 if dim is None else n].clone().requires_grad_()
        loss(leaf, *(x[n] for x in inputs.values())).backward()
        torch.testing.assert_close(ours[n], leaf.grad)


@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(jacobian):
    inputs = make((), 3, 4, 3, 2, dtype=torch.float64)

    def ours(*x):
        return additive_attention(*x, is_causal=True)

    def theirs(*x):
        allowed = torch.ones(3, 4, dtype=torch.bool).tril()
        return plain(*x, allowed=allowed)["out"]

    got = jacobian(ours, argnums=(0, 1, 2, 3))(*inputs.values())
    expected = torch.func.jacrev(theirs, argnums=(0, 1, 2, 3))(*inputs.values())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_hessian_and_double_backward():
    inputs = make((), 2, 3, 3, 2, dtype=torch.float64)
    ours = lambda q: additive_attention(q, *list(inputs.values())[1:]).square().sum()  # noqa: E731
    theirs = lambda q: plain(q, *list(inputs.values())[1:])["out"].square().sum()  # noqa: E731
    expected = torch.func.hessian(theirs)(inputs["query"])
    torch.testing.assert_close(
        torch.func.jacrev(torch.func.jacrev(ours))(inputs["query"]), expected
    )
    torch.testing.assert_close(torch.func.hessian(ours)(inputs["query"]), expected)
    torch.testing.assert_close(torch.autograd.functional.hessian(ours, inputs["query"]), expected)


def test_forward_mode():
    inputs = make((2,), 3, 4, 3, 2, dtype=torch.float64)
    tangents = [torch.randn_like(x) for x in inputs.values()]
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x, t) for x, t in zip(inputs.values(), tangents, strict=True)
        ]
        got = forward_ad.unpack_dual(additive_attention(*duals)).tangent
        expected = forward_ad.unpack_dual(plain(*duals)["out"]).tangent
    torch.testing.assert_close(got, expected)


def test_vmap_with_dropout():
    inputs = make((40,), 5, 9, 8, 6)
    call = lambda *t: additive_attention(*t, dropout_p=0.5)  # noqa: E731
    different = torch.func.vmap(call, (0, 0, 0, None), randomness="different")
    same_inputs = [x[:1].expand_as(x) if x.dim() == 3 else x for x in inputs.values()]
    outs = different(*same_inputs)
    assert not torch.equal(outs[0], outs[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call, (0, 0, 0, None), randomness="same")(*inputs.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    inputs = make((2,), 5, 9, 8, 6)
    call = lambda *t: additive_attention(*t, is_causal=True)  # noqa: E731
    through = lambda *t: checkpoint(call, *t, use_reentrant=use_reentrant)  # noqa: E731
    for a, b in zip(with_grads(through, inputs), with_grads(call, inputs), strict=True):
        assert_same(a, b)


def test_copies_and_pickles():
    layer = AdditiveAttention(6, 8, dropout=0.3, scale=0.5, normalize=True, batch_first=False)
    x = torch.randn(5, 2, 6)
    layer.eval()
    expected = layer(x, x)[0]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(x, x)[0], expected)
        assert repr(twin) == repr(layer)
    memory = layer.project(x)
    twin = copy.deepcopy(pickle.loads(pickle.dumps(memory)))
    # The copy belongs to no graph, so its steps are ordinary calls.
    torch.testing.assert_close(layer.step(x[0], twin), layer.step(x[0], memory))


def test_meta_and_fake_tensors():
    """Meta tensors give shapes without numbers, for model summaries and deferred
    initialisation."""
    with torch.device("meta"):
        layer = AdditiveAttention(6, 8)
        out, weights = layer(torch.empty(2, 5, 6), torch.empty(2, 7, 6))
    assert out.shape == (2, 5, 6) and weights.shape == (2, 5, 7) and out.is_meta
    with torch._subclasses.FakeTensorMode():
        shapes = (2, 5, 8), (2, 7, 8), (2, 7, 3), (8,)
        lengths = torch.ones(2, dtype=torch.int64)
        out = additive_attention(*(torch.empty(shape) for shape in shapes), lengths=lengths)
    assert out.shape == (2, 5, 3)


def test_functional_call_and_parametrised_models():
    layer = AdditiveAttention(6, 8)
    x = torch.randn(2, 5, 6)
    other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    twin = AdditiveAttention(6, 8)
    twin.load_state_dict(other)
    assert torch.equal(torch.func.functional_call(layer, other, (x, x))[0], twin(x, x)[0])


def test_no_graph_where_none_is_needed():
    inputs = make((2,), 5, 9, 8, 6)
    assert not additive_attention(*inputs.values()).requires_grad
    leaves = [x.requires_grad_() for x in inputs.values()]
    with torch.no_grad():
        assert not additive_attention(*leaves).requires_grad
    assert additive_attention(*leaves).requires_grad
