"""Tests the promises of attention on scores before the softmax."""

from __future__ import annotations

import io
import math

import pytest
import torch
from layouts import every_second_feature, offset, row_padded, surrounded, transposed
from oracle import (
    DEVICE,
    SCORED,
    assert_all_same,
    assert_layout_free,
    assert_same,
    check_against_plain,
    dense_mask,
    fused_scores,
    generator,
    gradients,
    make,
    plain_scores,
    random_upstream,
)
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functionalize, grad, hessian, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from additive_attn import additive_attention, additive_scores
from additive_attn.backends.plain import scores as blocks
from additive_attn.spec.call import Masking

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (batch, Lq, Lk, H): sizes lie on both sides of tiles of keys, rows and features.
SHAPES = [
    ((), 1, 1, 1),
    ((2,), 1, 40, 33),
    ((2, 3), 7, 32, 32),
    ((2,), 33, 64, 65),
    ((), 40, 127, 130),
    ((), 131, 67, 20),
]


def inputs_of(batch, queries=4, keys=7, hidden=8, **options):
    inputs = make(batch, queries, keys, hidden, 1, **options)
    del inputs["value"]
    return inputs


def check(cases, **options):
    check_against_plain(
        cases, upstream_of=["scores"], function=fused_scores, formula=plain_scores, **options
    )


@pytest.mark.interpreter(shape=[SHAPES[1], SHAPES[2]])
@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain(shape, dtype):
    check([inputs_of(*shape, dtype=dtype, seed=seed) for seed in range(3)], scale=0.7)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("spread", [1e-3, 5.0, 60.0])
def test_small_and_large_activations(spread, queries, dtype):
    cases = [
        inputs_of((2,), queries, 50, 40, dtype=dtype, seed=s, spread=spread) for s in range(3)
    ]
    check(cases, magnitude=min(spread, 1.0))


def masks(batch, queries, keys):
    """Returns masks of every kind, each with an empty row where it can have one."""
    g = generator(5)
    hidden = torch.rand(*batch, queries, keys, generator=g) < 0.3
    hidden[0, 0] = True
    bias = torch.randn(*batch, queries, keys, generator=g)
    lengths = torch.randint(0, keys + 1, batch[:1], generator=g)
    lengths[:1] = 0
    rows = torch.randint(0, keys + 1, (*batch[:1], queries), generator=g)
    return {
        "bool": dict(attn_mask=~hidden),
        "bool of keys": dict(attn_mask=~hidden[1, 0]),
        "float": dict(attn_mask=bias.masked_fill(hidden, -math.inf)),
        "float of keys": dict(attn_mask=bias[0, 0]),
        "float of rows": dict(attn_mask=bias[:1, :, :1]),
        "number": dict(attn_mask=bias[0, 0, 0]),
        "lengths": dict(lengths=lengths),
        "lengths of rows": dict(lengths=rows),
        "causal": dict(is_causal=True),
        "window": dict(window=(2, 3)),
        "all": dict(attn_mask=bias, lengths=rows, is_causal=True, window=(4, -1)),
    }


KINDS = list(masks((2,), 3, 5))


@pytest.mark.interpreter(kind=["float", "lengths of rows", "all"], queries=[5])
@pytest.mark.core
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind, queries):
    """Scores and gradients, also those of a float mask, are right; empty rows are -inf."""
    check([inputs_of((2,), queries, 37, 12)], **masks((2,), queries, 37)[kind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_mask_beside_16_bits(dtype):
    mask = torch.randn(2, 5, 37)
    check([inputs_of((2,), 5, 37, 12, dtype=dtype)], attn_mask=mask)


@pytest.mark.core
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_pairs_have_no_influence(kind, queries):
    """NaN in keys that no row attends to, and in upstream gradients of masked pairs, changes no
    bit."""
    options = masks((2,), queries, 70)[kind]
    inputs = inputs_of((2,), queries, 70, 12)
    float_mask = "attn_mask" in options and options["attn_mask"].is_floating_point()
    if float_mask:
        inputs["attn_mask"] = options.pop("attn_mask")
    allowed = dense_mask({"value": inputs["key"], **inputs}, **options)
    if float_mask:
        allowed = allowed & (inputs["attn_mask"] > -math.inf) if options else (
            inputs["attn_mask"] > -math.inf
        )  # fmt: skip
    allowed = allowed.expand(2, queries, 70)
    unused = ~allowed.any(-2)
    upstream = random_upstream(fused_scores(inputs, **options), ["scores"])
    clean = {**inputs, "key": inputs["key"].masked_fill(unused[..., None], 0.0)}
    bad = {**inputs, "key": inputs["key"].masked_fill(unused[..., None], math.nan)}
    zeros = {"scores": upstream["scores"].masked_fill(~allowed, 0.0)}
    nans = {"scores": upstream["scores"].masked_fill(~allowed, math.nan)}
    expected = gradients(lambda x: fused_scores(x, **options), clean, zeros)
    ours = gradients(lambda x: fused_scores(x, **options), bad, nans)
    assert_all_same(ours[0], expected[0])
    assert_all_same(ours[1], expected[1])
    assert not ours[1]["key"][unused].any()
    assert (ours[0]["scores"] == -math.inf).equal(~allowed)


@pytest.mark.core
def test_attended_nan_propagates():
    inputs = inputs_of((2,), 5, 20, 12)
    inputs["key"][0, 3, 2] = math.nan
    scores = fused_scores(inputs)["scores"]
    assert scores.isnan().nonzero().unique(dim=0).tolist() == [[0, row, 3] for row in range(5)]


@pytest.mark.core
@pytest.mark.parametrize(
    "sizes", [(0, 4, 7, 8), (2, 0, 7, 8), (2, 4, 0, 8), (2, 4, 7, 0), (2, 1, 0, 8)], ids=str
)
def test_size_zero(sizes):
    batch, *rest = sizes
    check([inputs_of((batch,), *rest)])


@pytest.mark.parametrize("recipe", [transposed, row_padded, offset, surrounded])
@pytest.mark.parametrize("queries", [1, 6])
def test_strides(queries, recipe):
    """Inputs and upstream gradients have other strides."""
    inputs = inputs_of((3,), queries, 21, 13)
    upstream = random_upstream(fused_scores(inputs), ["scores"])
    expected = gradients(fused_scores, inputs, upstream)
    changed = {n: (recipe if x.dim() > 1 else offset)(x) for n, x in inputs.items()}
    leaves = [x.detach().requires_grad_() for x in changed.values()]
    scores = additive_scores(*leaves)
    assert_layout_free({"scores": scores.detach()}, expected[0])
    for layout in (recipe, every_second_feature):
        up = layout(upstream["scores"])
        ours = torch.autograd.grad(scores, leaves, up, retain_graph=True)
        assert_layout_free(dict(zip(SCORED, ours, strict=True)), expected[1])
    ours = torch.autograd.grad(scores, leaves, torch.ones(()).expand_as(scores))
    ones = {"scores": torch.ones_like(scores)}
    assert_layout_free(
        dict(zip(SCORED, ours, strict=True)), gradients(fused_scores, inputs, ones)[1]
    )


@pytest.mark.core
def test_heads_and_broadcast_inputs():
    g = generator(0)
    for shapes in (
        [(2, 1, 5, 12), (3, 20, 12), (1, 12)],
        [(2, 3, 5, 12), (1, 3, 20, 12), (3, 12)],
        [(5, 12), (4, 20, 12), (12,)],
    ):
        tensors = [torch.randn(shape, generator=g) for shape in shapes]
        check([dict(zip(SCORED, tensors, strict=True))])


@pytest.mark.core
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("hidden", [5, 66])
def test_gradcheck(hidden, queries):
    inputs = inputs_of((2,), queries, 4, hidden, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    mask = torch.randn(queries, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 2])

    def attended(query, key, weight, mask):
        scores = additive_scores(query, key, weight, attn_mask=mask, lengths=lengths, scale=0.7)
        return scores[0], scores[1, :, :2]

    assert gradcheck(attended, (*leaves, mask))
    assert gradgradcheck(attended, (*leaves, mask), fast_mode=True)
    assert gradgradcheck(additive_scores, leaves, fast_mode=True, gen_non_contig_grad_outputs=True)


def test_only_what_is_needed_is_computed():
    inputs = {**inputs_of((2,), 5, 20, 12), "attn_mask": torch.randn(5, 20)}
    upstream = random_upstream(fused_scores(inputs), ["scores"])
    together = gradients(fused_scores, inputs, upstream)[1]
    for name in inputs:
        leaf = inputs[name].clone().requires_grad_()
        scores = fused_scores({**inputs, name: leaf})["scores"]
        (alone,) = torch.autograd.grad(scores, leaf, upstream["scores"])
        assert_same(alone, together[name], name)


@pytest.mark.kernel
def test_repeatable(threads):
    inputs = inputs_of((3,), 50, 200, 33)
    upstream = random_upstream(fused_scores(inputs), ["scores"])
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(gradients(fused_scores, inputs, upstream))
    for outputs, grads in results[1:]:
        assert_all_same(outputs, results[0][0])
        assert_all_same(grads, results[0][1])


def test_softmax_of_the_scores_is_attention():
    inputs = make((2,), 5, 20, 12, 6)
    scores = additive_scores(*(inputs[n] for n in SCORED), lengths=[20, 7], is_causal=True)
    weights = additive_attention(
        *inputs.values(), lengths=[20, 7], is_causal=True, need_weights=True
    )[1]
    torch.testing.assert_close(scores.softmax(-1), weights)


@pytest.mark.core
def test_arguments_of_the_function():
    """Tests arguments that restrict a mask, lists, a bias, and a query that is left out."""
    query, key, weight = inputs_of((3, 2)).values()
    padding = torch.arange(7) >= torch.tensor([[5], [0], [7]])
    bias = torch.randn(2, requires_grad=True)
    ours = additive_scores(
        query, key, weight, key_padding_mask=padding, starts=[1, 2, 3], lengths=[6, 7, 5],
        bias=bias,
    )  # fmt: skip
    keys = torch.arange(7)
    allowed = ~padding & (keys >= torch.tensor([[1], [2], [3]]))
    allowed = (allowed & (keys < torch.tensor([[6], [7], [5]])))[:, None, None]
    expected = additive_scores(query, key, weight, attn_mask=allowed) + bias[:, None, None]
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    (got,) = torch.autograd.grad(ours, bias, upstream)
    torch.testing.assert_close(got, (upstream * allowed).sum((0, 2, 3)))
    zeros = torch.zeros(3, 2, 1, 8)
    assert_same(additive_scores(None, key, weight), additive_scores(zeros, key, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    query, key, weight = inputs_of((3,)).values()
    with torch.autocast(DEVICE, dtype):
        scores = additive_scores(query, key, weight.requires_grad_())
    assert scores.dtype == dtype
    scores.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(
        scores.float(), additive_scores(query, key, weight), atol=3e-2, rtol=3e-2
    )


# Transforms, each judged against the same transform of the plain formula.

INPUTS = tuple(inputs_of((2,), 3, 5, 4).values())
COTANGENT = torch.randn(2, 3, 5, generator=generator(1))


def formula(query, key, weight):
    return torch.tanh(query[..., :, None, :] + key[..., None, :, :]) @ weight


def loss_of(function, cotangent=COTANGENT):
    return lambda *inputs: (function(*inputs) * cotangent).square().sum()


EVERY = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f: grad(loss_of(f), EVERY)(*INPUTS),
    "vjp": lambda f: vjp(f, *INPUTS)[1](COTANGENT),
    "jvp": lambda f: jvp(f, INPUTS, INPUTS),
    "jacrev": lambda f: jacrev(f, EVERY)(*INPUTS),
    "vmap": lambda f: vmap(f, (0, 0, None))(*INPUTS),
    "per-sample gradients": lambda f: vmap(grad(loss_of(f, COTANGENT[0]), EVERY), (0, 0, None))(
        *INPUTS
    ),
    "grad of grad": lambda f: grad(lambda *x: grad(loss_of(f))(*x).square().sum(), EVERY)(*INPUTS),
    "jacrev of grad": lambda f: jacrev(grad(loss_of(f)), EVERY)(*INPUTS),
    "hessian": lambda f: hessian(loss_of(f))(*INPUTS),
    "functionalize": lambda f: functionalize(grad(loss_of(f), EVERY))(*INPUTS),
}


def assert_all_close(ours, expected):
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(ours), flat(expected), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    assert_all_close(TRANSFORMS[name](additive_scores), TRANSFORMS[name](formula))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "functionalize"])
def test_compiled_transforms(name):
    torch._dynamo.reset()
    transform = TRANSFORMS[name]
    compiled = torch.compile(lambda *inputs: transform(additive_scores), backend="aot_eager")
    assert_all_close(compiled(*INPUTS), transform(formula))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(mode):
    derivative = grad(loss_of(additive_scores), EVERY)
    graph = make_fx(derivative, tracing_mode=mode, _allow_non_fake_inputs=True)
    assert_all_close(graph(*INPUTS)(*INPUTS), grad(loss_of(formula), EVERY)(*INPUTS))


@pytest.mark.parametrize("shape", [(3, 5), (5,)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_per_sample_gradients_of_a_float_mask(shape, shared):
    query, key, weight = INPUTS
    mask = torch.randn(*(() if shared else (2,)), *shape)

    def loss(mask, query, key):
        return additive_scores(query, key, weight, attn_mask=mask).square().sum()

    ours = vmap(grad(loss), (None if shared else 0, 0, 0))(mask, query, key)
    for n in range(2):
        alone = grad(loss)(mask if shared else mask[n], query[n], key[n])
        torch.testing.assert_close(ours[n], alone)


def test_no_recompilation_per_length():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def function(query, key, weight, lengths):
        return additive_scores(query, key, weight, lengths=lengths, window=(3, 9))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in range(4, 16):
        query, key, weight = inputs_of((2,), length, 2 * length).values()
        arguments = query, key, weight.requires_grad_(), torch.tensor([length, 2 * length])
        results = []
        for call in (compiled, function):
            scores = call(*arguments)
            total = scores.masked_fill(scores == -math.inf, 0.0).square().sum()
            results.append((scores, *torch.autograd.grad(total, weight)))
        assert_all_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(INPUTS[2].clone())

    def forward(self, query, key, lengths):
        return additive_scores(query, key, self.weight, lengths=lengths).exp()


def saved_trace(model, arguments):
    traced = torch.jit.trace(model, arguments)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


PROGRAMS = {
    "export": lambda model, x: torch.export.export(
        model, x, dynamic_shapes=({1: torch.export.Dim.DYNAMIC},) * 2 + (None,)
    ).module(),
    "trace": saved_trace,
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "compile": lambda model, x: torch.compile(model, fullgraph=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_train(name):
    torch._dynamo.reset()
    lengths, results = torch.tensor([5, 2]), []
    program = PROGRAMS[name](Model(), (*INPUTS[:2], lengths))
    for model in (program, Model()):
        query, key = (x.clone().requires_grad_() for x in INPUTS[:2])
        model(query, key, lengths).square().sum().backward()
        (parameter,) = model.parameters()
        results.append([query.grad, key.grad, parameter.grad])
    assert_all_close(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    inputs, results = inputs_of((2,), 5, 9), []
    upstream = random_upstream(fused_scores(inputs), ["scores"])["scores"]

    def call(*tensors):
        return additive_scores(*tensors, attn_mask=torch.linspace(-1, 1, 9))

    for function in (lambda *t: checkpoint(call, *t, use_reentrant=use_reentrant), call):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        function(*leaves).backward(upstream)
        results.append([x.grad for x in leaves])
    for ours, expected in zip(*results, strict=True):
        assert_same(ours, expected)


OPTIONS = {
    "plain": Masking(),
    "bool mask": Masking(torch.rand(1, 4, 6) < 0.7),
    "float mask": Masking(torch.randn(4, 6), left=2, right=0),
    "ranges": Masking(lengths=torch.tensor([[6], [2]]), starts=torch.tensor([1])),
    "blocks": Masking(
        block_table=torch.tensor([[0, 2], [1, 1]]).int(), block_tiles=torch.rand(1, 3, 4) < 0.6
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_opcheck(options, dtype):
    inputs = tuple(inputs_of((2,), 4, 6, 5, dtype=dtype).values())
    operators = torch.ops.additive_attn
    opcheck(operators.scores.default, (*inputs, *options, 0.5))
    upstream = torch.randn(2, 4, 6).to(dtype)
    float_mask = options[0] is not None and options[0].is_floating_point()
    for needs in ((True, True, True, float_mask), (False, True, False, False)):
        opcheck(operators.scores_backward.default, (upstream, *inputs, *options, 0.5, *needs))


def test_meta_tensors_and_several_devices():
    arguments = [x.to("meta") for x in INPUTS]
    assert additive_scores(*arguments).shape == (2, 3, 5)
    mixed = [INPUTS[0], arguments[1], INPUTS[2], *Masking(), 1.0]
    with pytest.raises(RuntimeError, match=rf"query is on {DEVICE}.*key is on meta"):
        torch.ops.additive_attn.scores(*mixed)


def test_flops_are_those_of_the_plain_formula():
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    counts = []
    for function in (additive_scores, formula):
        with FlopCounterMode(display=False) as counter:
            function(*leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == 3 * 2 * 2 * 3 * 5 * 4
    assert counts[1] in (counts[0], 0)  # torch does not count a product of a matrix and a vector


@pytest.mark.parametrize("elements", [1, 40, 300])
def test_fallback_in_blocks(elements, monkeypatch):
    inputs = inputs_of((2,), 6, 11, 3, dtype=torch.float64)
    mask, lengths = torch.randn(6, 11, dtype=torch.float64), torch.tensor([[11], [4]])
    arguments = (*inputs.values(), *Masking(mask, lengths, left=4, right=2), 0.7)
    upstream, results = torch.randn(2, 6, 11, dtype=torch.float64), []
    for size in (elements, 2**20):
        monkeypatch.setattr("additive_attn.backends.plain.plan._BLOCK_ELEMENTS", size)
        grads = blocks.scores_backward(upstream, *arguments, *[True] * 4)
        results.append([blocks.scores(*arguments), *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
