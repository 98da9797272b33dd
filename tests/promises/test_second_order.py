"""Promises 1 to 4 for second derivatives and forward mode: they are exact, need bounded memory,
and masked pairs contribute nothing."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from oracle import (
    DEVICE,
    INPUTS,
    OUTPUTS,
    PACKAGE_PARENT,
    SCORED,
    check_against_plain,
    fused,
    fused_scores,
    generator,
    make,
    plain,
    plain_masked,
    plain_scores,
)
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from additive_attn import AdditiveAttention, additive_attention, additive_scores
from additive_attn.ops.autograd import attend
from additive_attn.ops.scores import score
from additive_attn.spec.call import Call, Masking
from additive_attn.spec.dropout import keep_mask
from additive_attn.spec.masks import allowed_pairs


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes blocks so small that they have a few rows."""
    monkeypatch.setattr("additive_attn.backends.plain.plan._BLOCK_ELEMENTS", 2**9)


def fixed(like, number):
    """Returns the same random numbers in every dtype."""
    numbers = torch.randn(like.shape, generator=generator(number)).bfloat16()
    return numbers.to(like.dtype)


def differentiable(inputs):
    return {n: x if x.requires_grad else x.clone().requires_grad_() for n, x in inputs.items()}


def gradient_map(function):
    """Returns a function whose outputs are gradients, so that their gradients are second
    derivatives."""

    def run(inputs, **options):
        inputs = differentiable(inputs)
        outputs = [x for x in function(inputs, **options).values() if x.requires_grad]
        upstream = [fixed(x, i) for i, x in enumerate(outputs)]
        # Removes upstream gradients of an empty row's lse and of a masked pair's score.
        outputs = [torch.where(x.isinf(), 0.0, x) for x in outputs]
        found = torch.autograd.grad(
            outputs, list(inputs.values()), upstream, create_graph=True, materialize_grads=True
        )
        return {f"d{name}": grad for name, grad in zip(inputs, found, strict=True)}

    return run


def tangent_map(function):
    """Returns a function whose outputs are tangents, so that their gradients are second
    derivatives too."""

    def run(inputs, **options):
        inputs = differentiable(inputs)
        names = list(inputs)

        def positional(*tensors):
            outputs = function(dict(zip(names, tensors, strict=True)), **options)
            return {name: torch.where(x.isinf(), 0.0, x) for name, x in outputs.items()}

        primals = tuple(inputs.values())
        directions = tuple(fixed(x, i) for i, x in enumerate(primals))
        return torch.func.jvp(positional, primals, directions)[1]

    return run


def named(function, name):
    function.__name__ = name  # the key of stored results
    return function


MAPS = {"gradients": gradient_map, "tangents": tangent_map}
FUNCTIONS = {
    (kind, function): named(wrap(function), f"{kind} of {function.__name__}")
    for kind, wrap in MAPS.items()
    for function in (fused, fused_scores, plain_masked, plain_scores)
}
both = pytest.mark.parametrize("kind", MAPS)


def check(kind, cases, ours=fused, theirs=plain_masked, **options):
    names = OUTPUTS if ours is fused else ("scores",)
    if kind == "gradients":
        mask = options.get("attn_mask")
        masks = () if mask is None or mask.dtype == torch.bool else ("attn_mask",)
        names = [f"d{name}" for name in (*(INPUTS if ours is fused else SCORED), *masks)]
    check_against_plain(
        cases, upstream_of=names, function=FUNCTIONS[kind, ours], formula=FUNCTIONS[kind, theirs],
        magnitude=4.0, **options,  # the size of a score's tangent, a sum over features
    )  # fmt: skip


def scored(case):
    return {name: case[name] for name in SCORED}


SHAPES = [((), 1, 1, 1, 1), ((2,), 1, 20, 17, 5), ((2, 3), 7, 9, 8, 4), ((), 33, 40, 65, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.core
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain(kind, shape, dtype, small_blocks):
    batch, *sizes = shape
    cases = [make(batch, *sizes, dtype=dtype, seed=seed) for seed in range(4)]
    check(kind, cases, scale=0.7)
    check(kind, [scored(case) for case in cases], fused_scores, plain_scores, scale=0.7)


@both
@pytest.mark.parametrize("spread", [1e-3, 5.0, 30.0])
def test_small_and_large_activations(kind, spread):
    cases = [make((2,), 20, 30, 40, 6, seed=seed, spread=spread) for seed in range(2)]
    check(kind, cases)


ROWS = torch.tensor([3, 0, 5, 9, 2, 1])
HIDDEN = torch.rand(6, 9, generator=generator(5)) < 0.6
HIDDEN[2] = False
BIAS = torch.randn(4, 6, 9, generator=generator(6))
MASKING = {
    "bool": dict(attn_mask=HIDDEN),
    "float": dict(attn_mask=torch.where(HIDDEN, BIAS, -math.inf)),
    "float, of keys": dict(attn_mask=torch.randn(9, generator=generator(7))),
    "lengths": dict(lengths=torch.tensor([4, 0, 9, 7])),
    "lengths of rows": dict(lengths=torch.stack([ROWS, 9 - ROWS, ROWS // 2, ROWS])),
    "causal": dict(is_causal=True),
    "window": dict(window=(1, 0)),
    "all": dict(
        attn_mask=HIDDEN, lengths=torch.tensor([8, 5, 9, 6]), is_causal=True, window=(4, -1)
    ),
}  # fmt: skip


@pytest.mark.core
@both
@pytest.mark.parametrize("name", MASKING)
def test_masked(kind, name, small_blocks):
    cases = [make((4,), 6, 9, 12, 5, seed=seed) for seed in range(3)]
    check(kind, cases, **MASKING[name])
    check(kind, [scored(case) for case in cases], fused_scores, plain_scores, **MASKING[name])


@both
def test_heads_and_broadcast_inputs(kind):
    shapes = [(2, 3, 4, 5), (3, 6, 5), (2, 1, 6, 3), (3, 5)]
    case = {
        name: torch.randn(shape, generator=generator(i))
        for i, (name, shape) in enumerate(zip(INPUTS, shapes, strict=True))
    }
    check(kind, [case])


def everything(function, inputs, directions):
    """Returns tangents, gradients and second derivatives of all outputs, in one list."""
    primals, moved = tuple(inputs.values()), tuple(directions.values())
    outputs, tangents = torch.func.jvp(function, primals, moved)
    leaves = [x.detach().clone().requires_grad_() for x in primals]
    outputs = [x for x in function(*leaves) if x.requires_grad]
    upstream = [fixed(x, i).requires_grad_() for i, x in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, upstream, create_graph=True)
    second = torch.autograd.grad(grads, [*leaves, *upstream], [fixed(x, 9) for x in grads])
    return [*tangents, *grads, *second]


@pytest.mark.core
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_padding_cannot_leak(poison, small_blocks):
    """No bit depends on the inputs of masked keys or on their tangents."""
    lengths = torch.tensor([5, 0])
    padded = torch.arange(8) >= lengths[:, None]
    inputs, directions = make((2,), 6, 8, 12, 5), make((2,), 6, 8, 12, 5, seed=1)

    def function(*tensors):
        out, weights, lse = additive_attention(
            *tensors, lengths=lengths, need_weights=True, need_lse=True
        )
        score = additive_scores(*tensors[:2], tensors[3], lengths=lengths)
        return out, weights, lse[:1], torch.where(padded[:, None], 0.0, score)

    def filled(tensors, number):
        return {
            n: x.masked_fill(padded[..., None], number) if n in ("key", "value") else x
            for n, x in tensors.items()
        }

    clean = everything(function, filled(inputs, 0.5), filled(directions, 0.5))
    dirty = everything(function, filled(inputs, poison), filled(directions, poison))
    assert all(x.isfinite().all() for x in clean)
    for i, (a, b) in enumerate(zip(dirty, clean, strict=True)):
        assert torch.equal(a, b), f"result {i}"


def test_attended_nan_propagates():
    inputs, directions = make((), 3, 4, 5, 2), make((), 3, 4, 5, 2, seed=1)
    directions["key"][1] = math.nan
    results = everything(lambda *x: (additive_attention(*x, is_causal=True),), inputs, directions)
    assert results[0][0].isfinite().all() and results[0][1:].isnan().all()


def test_dropout():
    """Derivatives drop the weights that forward drops."""
    inputs, seed, p = make((2,), 5, 7, 6, 3, dtype=torch.float64), torch.tensor(77), 0.4
    directions = make((2,), 5, 7, 6, 3, dtype=torch.float64, seed=1)
    keep = keep_mask(seed, (2,), (0, 5), (0, 7), p)

    def ours(*tensors):
        return attend(Call(*tensors, seed=seed, dropout_p=p), need_weights=True)

    def theirs(*tensors):
        return tuple(plain(*tensors, keep=keep, dropout_p=p).values())

    expected = everything(theirs, inputs, directions)
    for a, b in zip(everything(ours, inputs, directions), expected, strict=True):
        torch.testing.assert_close(a, b)
    # A Jacobian maps one call over many tangents.
    by_columns = torch.func.jacfwd(ours, argnums=(0, 3))(*inputs.values())
    by_rows = torch.func.jacrev(theirs, argnums=(0, 3))(*inputs.values())
    torch.testing.assert_close(by_columns, by_rows)


def leaves(*sizes):
    return tuple(x.requires_grad_() for x in make(*sizes, dtype=torch.float64).values())


@pytest.mark.core
def test_forward_mode_by_differences():
    mask = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def call(*tensors):
        return additive_attention(
            *tensors[:4], attn_mask=tensors[4], need_weights=True, need_lse=True, scale=0.7
        )

    inputs = *leaves((2,), 3, 4, 3, 2), mask
    checks = dict(check_forward_ad=True, check_batched_forward_grad=True, fast_mode=True)
    assert gradcheck(call, inputs, **checks)
    assert gradgradcheck(call, inputs, check_fwd_over_rev=True, fast_mode=True)

    def scores(query, key, weight, mask):
        return additive_scores(query, key, weight, attn_mask=mask, scale=0.7)

    inputs = *inputs[:2], *inputs[3:]
    assert gradcheck(scores, inputs, **checks)
    assert gradgradcheck(scores, inputs, check_fwd_over_rev=True, fast_mode=True)


def loss(function):
    return lambda *tensors: (function(*tensors) ** 2).sum()


def of_plain(*tensors):
    return plain(*tensors)["out"]


HIGHER = {
    "jvp of jvp": lambda f: lambda *x: torch.func.jvp(
        lambda *y: torch.func.jvp(f, y, x)[1], x, x[:1] + x[1:]
    )[1],
    "jvp of grad": lambda f: lambda *x: torch.func.jvp(
        torch.func.grad(loss(f), (0, 1, 2, 3)), x, x
    )[1],
    "grad of jvp": lambda f: torch.func.grad(
        lambda *x: torch.func.jvp(loss(f), x, x)[1], (0, 1, 2, 3)
    ),
    "grad of grad of grad": lambda f: torch.func.grad(
        lambda *x: torch.func.grad(
            lambda *y: torch.func.grad(loss(f))(*y).square().sum(), 1
        )(*x).square().sum(), (0, 1, 2, 3),
    ),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(loss(f))),
    "jacrev of hessian": lambda f: torch.func.jacrev(torch.func.hessian(loss(f))),
    "jvp of hessian": lambda f: lambda *x: torch.func.jvp(torch.func.hessian(loss(f)), x, x)[1],
    "hvp": lambda f: lambda *x: torch.autograd.functional.hvp(loss(f), x, x)[1],
    "vhp": lambda f: lambda *x: torch.autograd.functional.vhp(loss(f), x, x)[1],
    "vmap of jvp": lambda f: lambda q, k, v, w: torch.func.vmap(
        lambda t: torch.func.jvp(lambda y: f(y, k, v, w), (q,), (t,))[1]
    )(torch.stack([q, -2 * q])),
}  # fmt: skip


@pytest.mark.parametrize("name", HIGHER)
def test_composed(name, small_blocks):
    inputs = tuple(make((), 2, 3, 3, 2, dtype=torch.float64).values())
    transform = HIGHER[name]
    ours, theirs = transform(additive_attention)(*inputs), transform(of_plain)(*inputs)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [*SCORED, "attn_mask"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(fused, plain_masked), (fused_scores, plain_scores)],
    ids=["out", "scores"],
)
def test_of_one_argument(ours, theirs, name):
    """Second derivatives are right for each argument, also those that are zero: scores are linear
    in weight and mask."""
    inputs = make((), 2, 3, 3, 2, dtype=torch.float64)
    inputs["attn_mask"] = fixed(inputs["query"] @ inputs["key"].mT, 0)

    def total(function):
        def run(x):
            outputs = function({**inputs, name: x}, lengths=torch.tensor(2)).values()
            return sum(torch.where(x.isinf(), 0.0, x).sin().sum() for x in outputs)

        return run

    for outer in (torch.func.jacrev, torch.func.jacfwd):
        for inner in (torch.func.jacrev, torch.func.jacfwd):
            found, expected = (outer(inner(total(f)))(inputs[name]) for f in (ours, theirs))
            torch.testing.assert_close(found, expected)


def test_gradient_penalty_in_training():
    """An optimiser trains with a penalty on the gradient of the input."""
    histories = []
    for function in (additive_attention, of_plain):
        torch.manual_seed(0)
        query, key, value, weight = make((2,), 5, 6, 8, 4, dtype=torch.float64).values()
        weight = torch.nn.Parameter(weight)
        optimiser = torch.optim.SGD([weight], lr=0.5)
        losses = []
        for _ in range(4):
            optimiser.zero_grad()
            x = query.clone().requires_grad_()
            out = function(x, key, value, weight)
            slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
            total = out.square().mean() + (slope.norm(dim=-1) - 1).square().mean()
            total.backward()
            optimiser.step()
            losses.append(total.item())
        histories.append(losses)
    assert histories[0] == pytest.approx(histories[1], rel=1e-9)
    assert histories[0][-1] < histories[0][0]


def test_forward_mode_of_the_layer():
    layer = AdditiveAttention(4, 5).double()
    query, key = torch.randn(2, 3, 4).double(), torch.randn(2, 6, 4).double()
    direction, step = torch.randn_like(query), 1e-6
    with forward_ad.dual_level():
        out, _ = layer(forward_ad.make_dual(query, direction), key)
        tangent = forward_ad.unpack_dual(out).tangent
    moved = layer(query + step * direction, key)[0] - layer(query - step * direction, key)[0]
    torch.testing.assert_close(tangent, (moved / (2 * step)).detach(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    "sizes", [(0, 3, 4, 2), (3, 0, 4, 2), (3, 4, 0, 2), (3, 4, 5, 0)], ids=str
)
def test_sizes_of_zero(sizes):
    inputs = make((2,), *sizes)

    def function(*tensors):
        return additive_attention(*tensors, need_weights=True)

    for x in everything(function, inputs, inputs):
        assert x.isfinite().all()


MEASURE = """
import sys, torch
from additive_attn import additive_attention, additive_scores
torch.set_num_threads(1)
length, hidden, what = int(sys.argv[1]), 128, sys.argv[2]

def run(length):
    shapes = (length, hidden), (length, hidden), (length, hidden), (hidden,)
    tensors = [torch.randn(s) for s in shapes]
    if what.startswith("jvp"):
        function, pair = additive_attention, (tuple(tensors), tuple(tensors))
        if what == "jvp of jvp":
            function = lambda *x: torch.func.jvp(additive_attention, x, pair[1])[1]
        tangent = torch.func.jvp(function, *pair)[1]
        assert tangent.isfinite().all()
        return
    leaves = [x.requires_grad_() for x in tensors]
    out = additive_attention(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out), create_graph=True)
    if what == "penalty":
        sum(x.square().sum() for x in grads).backward()
        assert all(x.grad.isfinite().all() for x in leaves)

def resident(which):
    with open("/proc/self/status") as f:
        return int(f.read().split(which + ":")[1].split()[0]) / 1e3

run(8)
before = resident("VmRSS")
run(length)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="measures the CPU")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to measure memory")
@pytest.mark.parametrize(
    "what", ["jvp", pytest.param("jvp of jvp", marks=pytest.mark.sweep), "penalty"]
)
def test_never_the_energies(what):
    """The energies, Lq x Lk x H, would take 134 MB here."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, "512", what],
        capture_output=True, text=True, check=False, cwd=PACKAGE_PARENT,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 70, f"{result.stdout} MB"


def test_starts_and_block_tables(small_blocks):
    """They give the results of the equivalent dense mask."""
    inputs, directions = make((2,), 6, 8, 7, 5), make((2,), 6, 8, 7, 5, seed=1)
    starts = torch.tensor([[2], [0]])
    table = torch.tensor([[1, 0, 2], [0, 3, 1], [1, 1, 0]], dtype=torch.int32)
    tiles = torch.rand(2, 2, 3, generator=generator(2)) < 0.5
    masking = Masking(starts=starts, block_table=table, block_tiles=tiles)
    dense = allowed_pairs(masking, (0, 6), (0, 8), inputs["query"].device)

    def calls(**masks):
        def call(*tensors):
            out, weights, _ = attend(Call(*tensors, **masks), need_weights=True)
            return out, weights, torch.where(dense, score(Call(*tensors, **masks))[0], 0.0)

        return call

    described = dict(starts=starts, block_table=table, block_tiles=tiles)
    expected = everything(calls(attn_mask=dense), inputs, directions)
    for a, b in zip(everything(calls(**described), inputs, directions), expected, strict=True):
        torch.testing.assert_close(a, b)
