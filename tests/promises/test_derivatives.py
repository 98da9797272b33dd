"""The derivative is registered on the operator, so that every way to call it uses the same one.

Each way is judged against the plain formula that is called the same way.
"""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from oracle import generator
from torch import nn
from torch.func import functional_call, functionalize, grad, hessian, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from additive_attn import (
    AdditiveAttention,
    PlainAdditiveAttention,
    additive_attention,
    additive_scores,
)
from additive_attn.ops import dispatch
from additive_attn.spec.call import Call

G = generator(0)
X = torch.randn(2, 3, 4, generator=G)
KEY, VALUE = torch.randn(2, 5, 4, generator=G), torch.randn(2, 5, 6, generator=G)
WEIGHT = torch.randn(4, generator=G)
INPUTS = (X, KEY, VALUE, WEIGHT)
COTANGENT = torch.randn(2, 3, 6, generator=G)


def plain(query, key, value, weight):
    energy = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
    return torch.softmax(energy @ weight, dim=-1) @ value


def loss_of(attend, cotangent=COTANGENT):
    return lambda *inputs: (attend(*inputs) * cotangent).square().sum()


EVERY = (0, 1, 2, 3)
TRANSFORMS = {
    "grad": lambda f: grad(loss_of(f), EVERY)(*INPUTS),
    "vjp": lambda f: vjp(f, *INPUTS)[1](COTANGENT),
    "jvp": lambda f: jvp(f, INPUTS, INPUTS),
    "jacrev": lambda f: jacrev(f, EVERY)(*INPUTS),
    "vmap": lambda f: vmap(f, (0, 0, 0, None))(*INPUTS),
    "per-sample gradients": lambda f: vmap(grad(loss_of(f, COTANGENT[0]), EVERY), (0, 0, 0, None))(
        *INPUTS
    ),
    "grad of grad": lambda f: grad(lambda *x: grad(loss_of(f))(*x).square().sum(), EVERY)(*INPUTS),
    "jacrev of grad": lambda f: jacrev(grad(loss_of(f)), EVERY)(*INPUTS),
    "hessian": lambda f: hessian(loss_of(f))(*INPUTS),
    "functionalize": lambda f: functionalize(grad(loss_of(f), EVERY))(*INPUTS),
}


def flat(results):
    return torch.utils._pytree.tree_leaves(results)


def assert_all_close(ours, expected):
    for a, b in zip(flat(ours), flat(expected), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    transform = TRANSFORMS[name]
    assert_all_close(transform(additive_attention), transform(plain))


# torch compiles functionalize with the backend eager alone.
COMPILED = [(name, backend) for name in TRANSFORMS for backend in ("eager", "aot_eager")]
COMPILED.remove(("functionalize", "aot_eager"))


@pytest.mark.parametrize("name,backend", COMPILED)
def test_compiled_transforms(name, backend):
    transform = TRANSFORMS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: transform(additive_attention), backend=backend)
    assert_all_close(compiled(*INPUTS), transform(plain))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["grad", "grad of grad", "vmap", "functionalize"])
def test_traced_transforms(name, mode):
    transforms = {
        "grad": lambda f: grad(loss_of(f), EVERY),
        "grad of grad": lambda f: grad(lambda *x: grad(loss_of(f))(*x).square().sum(), EVERY),
        "vmap": lambda f: lambda q, k, v, w: vmap(f, (0, 0, 0, None))(q, k, v, w),
        "functionalize": lambda f: functionalize(grad(loss_of(f), EVERY)),
    }
    transform = transforms[name]
    graph = make_fx(transform(additive_attention), tracing_mode=mode, _allow_non_fake_inputs=True)
    assert_all_close(graph(*INPUTS)(*INPUTS), transform(plain)(*INPUTS))


@pytest.mark.parametrize("count", [64, 65])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_lengths_of_any_number_are_traced(count, mode):
    query, lengths = torch.randn(count, 2, 4), torch.randint(0, 4, (count,))
    key = torch.randn(count, 3, 4)

    def function(query, lengths):
        return additive_attention(query, key, key, WEIGHT, lengths=lengths)

    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)
    torch.testing.assert_close(graph(query, lengths)(query, lengths), function(query, lengths))


def gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return torch.autograd.grad((out * COTANGENT).square().sum(), leaves)


ATTENDS = {
    "attention": additive_attention,
    "one query": lambda q, *others: additive_attention(q[:, :1], *others),
    "heads": lambda q, k, v, w: additive_attention(
        *(x.unsqueeze(1) for x in (q, k, v)), w.unsqueeze(0)
    ),
    "lengths": lambda *inputs: additive_attention(*inputs, lengths=[2, 5]),
    "scores": lambda q, k, v, w: additive_scores(q, k, w) + v.sum(),
}


@pytest.mark.core
@pytest.mark.parametrize("name", ATTENDS)
def test_batches_of_upstream_gradients(name):
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    out = ATTENDS[name](*leaves)
    upstream = torch.randn(3, *out.shape)

    def pulled_back(cotangent, **options):
        return torch.autograd.grad(out, leaves, cotangent, retain_graph=True, **options)

    batched = pulled_back(upstream, is_grads_batched=True)
    for i, cotangent in enumerate(upstream):
        for ours, single in zip(batched, pulled_back(cotangent), strict=True):
            torch.testing.assert_close(ours[i], single)


def test_raw_operator():
    def raw(*inputs):
        return torch.ops.additive_attn.forward(*inputs, *Call._field_defaults.values(), False)[0]

    assert_all_close(gradients(raw, *INPUTS), gradients(plain, *INPUTS))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_same_tensor_twice(backend):
    """Tests self-attention, and keys that are the values."""
    torch._dynamo.reset()
    w = WEIGHT
    for case in (
        lambda f, x: f(x, x, x, w),
        lambda f, x: f(x, KEY[:, :3], x, w),
        lambda f, x: f(KEY[:, :3], x, x, w),
    ):
        compiled = torch.compile(lambda x, c=case: c(additive_attention, x), fullgraph=True,
                                 backend=backend)  # fmt: skip
        results = []
        for function in (compiled, lambda x, c=case: c(plain, x)):
            leaf = X.clone().requires_grad_()
            results.append(torch.autograd.grad(function(leaf).square().sum(), leaf))
        assert_all_close(*results)


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        self.attention = kind(4, 7)

    def forward(self, query, key):
        out, weights = self.attention(query, key, key)
        return torch.cat([out.flatten(1), weights.flatten(1)], dim=1)


def saved_trace(model, no_grad):
    with torch.set_grad_enabled(not no_grad):
        traced = torch.jit.trace(model, (X, KEY))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


PROGRAMS = {
    "export": lambda model: torch.export.export(model, (X, KEY)).module(),
    "export strict": lambda model: torch.export.export(model, (X, KEY), strict=True).module(),
    "export of any length": lambda model: torch.export.export(
        model, (X, KEY), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},) * 2
    ).module(),
    "trace": lambda model: saved_trace(model, False),
    "trace under no_grad": lambda model: saved_trace(model, True),
    "compile": lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_train(name):
    """Every parameter and input of a saved program has the plain layer's gradient."""
    torch._dynamo.reset()
    expected = Model(PlainAdditiveAttention)
    program = PROGRAMS[name](Model(AdditiveAttention))
    results = []
    for model in (program, expected):
        query, key = X.clone().requires_grad_(), KEY.clone().requires_grad_()
        model(query, key).square().sum().backward()
        grads = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()}
        assert all(g is not None for g in grads.values()), name
        results.append([query.grad, key.grad, *(grads[n] for n, _ in expected.named_parameters())])
    assert_all_close(*results)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_functional_call(backend):
    torch._dynamo.reset()
    results = []
    for kind in (AdditiveAttention, PlainAdditiveAttention):
        model = Model(kind)
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def loss(parameters, model=model):
            return functional_call(model, parameters, (X, KEY)).square().sum()

        derivative = grad(loss)
        if backend is not None and kind is AdditiveAttention:
            derivative = torch.compile(derivative, backend=backend)
        results.append(derivative(parameters))
    assert_all_close(*results)


@pytest.mark.skipif(dispatch.cpu_is_plain, reason="plain PyTorch computes small calls itself")
@pytest.mark.parametrize("needed", itertools.product([False, True], repeat=4), ids=str)
def test_flops_are_those_of_the_gradients_that_are_needed(needed):
    def attend(query, key, value, weight):
        energy = torch.tanh(query[:, :, None, :] + key[:, None, :, :])
        return torch.softmax((energy @ weight[:, None]).squeeze(-1), dim=-1) @ value

    def flops(function):
        inputs = [x.clone().requires_grad_(y) for x, y in zip(INPUTS, needed, strict=True)]
        with FlopCounterMode(display=False) as counter:
            out = function(*inputs)
            if any(needed):
                out.backward(COTANGENT)
        return counter.get_total_flops()

    assert flops(additive_attention) == flops(attend)
