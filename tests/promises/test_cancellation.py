"""Cancellation: q is near c and k near -c, so that tanh is small while the exponentials are
not."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import paths
import pytest
import torch
from exact import inputs_of, judge
from oracle import SCORED, assert_all_same, fused, fused_scores, generator, plain_scores

pytestmark = pytest.mark.kernel
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@BOTH
@pytest.mark.parametrize("offset", [0.8, 3.0, 9.0, 30.0])
@pytest.mark.parametrize(
    ("deviation", "weight"), [(1e-3, 100.0), (1e-2, 10.0), (0.1, 1.0), (0.1, 10.0), (1.0, 1.0)]
)
def test_opposite_offsets(offset, deviation, weight, dtype):
    cases = []
    for seed in range(3):
        inputs = inputs_of(seed, torch.float64, 6, 140, 72, spread=deviation, weight=weight)
        g = generator(100 + seed)
        c = offset * (1 if seed == 0 else torch.randn(72, generator=g, dtype=torch.float64))
        inputs["query"] = inputs["query"] + c
        inputs["key"] = inputs["key"] - c
        cases.append({name: x.to(dtype) for name, x in inputs.items()})

    size = max(1.0, 2 * weight * deviation)  # of the terms of a score
    judge(cases, size=size)


# The keys that are far from cancelling, beside those that cancel: the ends of tiles, every third,
# all but two. With "alternate", half of the keys and rows cancel with the other sign.
MIXES = {
    "none": lambda j: j < 0,
    "ends": lambda j: (j % 30 == 0) | (j % 30 == 29),
    "third": lambda j: j % 3 == 0,
    "half": lambda j: j % 2 == 0,
    "most": lambda j: (j != 40) & (j != 77),
}


@BOTH
@pytest.mark.parametrize("mix", [*MIXES, "alternate"])
@pytest.mark.parametrize("hidden", [5, 72])
@pytest.mark.parametrize(
    ("deviation", "weight"), [(1e-3, 1.0), (1e-3, 10.0), (1e-3, 100.0), (0.03, 10.0)]
)
def test_opposite_offsets_among_others(deviation, weight, hidden, mix, dtype):
    """The weight of rows lies on cancelling keys, and their tiles contain other keys too."""
    cases = []
    for seed in range(3):
        inputs = inputs_of(seed, torch.float64, 12, 150, hidden, spread=deviation)
        g = generator(200 + seed)
        w = torch.randn(hidden, generator=g, dtype=torch.float64) / hidden**0.5
        inputs["weight"] = -weight * w.abs()  # other keys have lower scores
        inputs["query"] += 3.0
        inputs["key"] -= 3.0
        if mix == "alternate":  # here others have the higher scores for half of the rows
            inputs["weight"] *= min(1.0, 10 / weight)
            inputs["query"][::2] *= -1
            inputs["key"][::2] *= -1
        else:
            other = torch.randn(150, hidden, generator=g, dtype=torch.float64)
            inputs["key"] = torch.where(
                MIXES[mix](torch.arange(150))[:, None], other, inputs["key"]
            )
        cases.append({name: x.to(dtype) for name, x in inputs.items()})
    judge(cases, size=0.25)


def test_opposite_rows_of_a_later_block():
    """Each row is checked for cancellation, also one in a later block."""
    inputs = inputs_of(0, torch.float32, 300, 150, 72, spread=1e-3, weight=10.0)
    inputs["query"] += 3.0
    inputs["key"] -= 3.0
    inputs["query"][:200] += 1.0
    alone = {**inputs, "query": inputs["query"][200:]}
    assert_all_same({name: x[200:] for name, x in fused(inputs).items()}, fused(alone))


@pytest.mark.parametrize("masked", ["mask", "length", "window"])
def test_masked_keys_do_not_choose_the_form(masked):
    """Cancelling keys among masked ones change no bit of the result."""
    inputs = inputs_of(0, torch.float32, 40, 300, 72, weight=3.0)
    row, column = torch.arange(40)[:, None], torch.arange(300)
    allowed = {
        "mask": (column % 7 != 3).expand(40, 300),
        "length": (column < 200).expand(40, 300),
        "window": (column - row).abs() <= 20,
    }[masked]
    options = {
        "mask": {"attn_mask": allowed},
        "length": {"lengths": torch.tensor(200)},
        "window": {"window": (20, 20)},
    }[masked]
    expected = fused(inputs, **options)
    never = ~allowed.any(0)
    inputs["key"] = torch.where(never[:, None], -inputs["query"][0], inputs["key"])
    assert_all_same(fused(inputs, **options), expected)


@pytest.mark.parametrize("outlier", ["first", "last", "middle"])
def test_one_large_key_among_small_ones(outlier):
    """One key must not decide the accuracy of the others' scores."""
    cases = []
    for seed in range(3):
        inputs = inputs_of(seed, torch.float32, 12, 150, 72, spread=0.003, weight=30.0)
        inputs["key"][{"first": 0, "last": 149, "middle": 75}[outlier]] = -2.0
        inputs["weight"].abs_()
        cases.append(inputs)
    judge(cases)


@BOTH
@pytest.mark.parametrize("mix", ["none", "third", "most"])
@pytest.mark.parametrize(("hidden", "queries"), [(1, 12), (5, 200), (72, 12)])
@pytest.mark.parametrize("deviation", [1e-6, 1e-4, pytest.param(1e-2, marks=pytest.mark.sweep)])
def test_weight_gradient(deviation, hidden, queries, mix, dtype):
    """The gradient is a sum of small tanh, while the errors of exponentials are as large as the
    exponentials are. The weights of all rows lie on keys that cancel."""
    for size in (0.05, 0.5, 3.0):
        cases = []
        for seed in range(8 if hidden == 1 else 2):
            inputs = inputs_of(seed, torch.float64, queries, 150, hidden, spread=deviation)
            g = generator(300 + seed)
            c, other = (
                size * torch.randn(n, hidden, generator=g, dtype=torch.float64).abs()
                for n in (1, 150)
            )
            if mix != "none":
                inputs["weight"] = -30 - inputs["weight"].abs()  # other keys have lower scores
            inputs["query"] += c
            away = MIXES[mix](torch.arange(150))[:, None]
            inputs["key"] = torch.where(away, 1 + other, inputs["key"] - c)
            cases.append({name: x.to(dtype) for name, x in inputs.items()})
        judge(cases, ("out",), size=deviation, only="dweight")


@functools.lru_cache(maxsize=32)
def degree(seed, hidden, offset, deviation, opposite, signed, dtype):
    """Returns queries near an offset and keys near its negative, in a share of the features; their
    scores in a wider type; and the largest error of the plain formula."""
    inputs = inputs_of(seed, torch.float64, 6, 140, hidden, spread=deviation)
    g = generator(400 + seed)
    c = offset * (0.5 + torch.rand(hidden, generator=g, dtype=torch.float64))
    inputs["query"] += c
    inputs["key"] -= c
    other = torch.rand(hidden, generator=g) >= opposite
    inputs["key"][:, other] = torch.randn(140, int(other.sum()), generator=g, dtype=torch.float64)
    w = torch.randn(hidden, generator=g, dtype=torch.float64)
    inputs["weight"] = 8 * (w if signed else w.abs()) / w.norm()
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    wide = np.float64 if dtype == torch.float32 else np.longdouble
    q, k, w = (inputs[name].cpu().numpy().astype(wide) for name in SCORED)
    want = np.tanh(q[:, None] + k) @ w
    return inputs, want, abs(plain_scores(inputs)["scores"].cpu().numpy() - want).max()


@BOTH
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
@pytest.mark.parametrize("offset", [1.5, 6.0])
@pytest.mark.parametrize("hidden", [5, 72, 130])
def test_degrees_of_cancellation(hidden, offset, signed, dtype):
    """Scores err as the plain layer's, for pairs that are nearly opposite, ordinary, and
    between."""
    bad = []
    eps = torch.finfo(dtype).eps
    for deviation, opposite in itertools.product((0.01, 0.05, 0.1, 0.2, 0.4), (1.0, 0.8)):
        ours, theirs = 0.0, 0.0
        for seed in range(2):
            case = degree(seed, hidden, offset, deviation, opposite, signed, dtype)
            got = fused_scores(case[0])["scores"].cpu().numpy()
            ours = max(ours, abs(got - case[1]).max() - eps / 2 * abs(case[1]).max())
            theirs = max(theirs, case[2])
        if not ours <= 2 * theirs:
            bad.append(f"{deviation} {opposite}: {ours:.3g}, plain {theirs:.3g}")
    assert not bad, bad


@pytest.mark.parametrize("hidden", [72, 130, 256])
def test_equal_weights_near_cancellation(hidden):
    """With features of equal weight, their roundings are the whole error of a score. Fused
    multiply-add removes the roundings of products. The root mean square hardly varies over so many
    pairs, and stays near that of PyTorch's most exact sum."""
    ours = theirs = 0.0
    for seed in range(3):
        inputs = inputs_of(seed, torch.float64, 12, 140, hidden, spread=0.1)
        g = generator(500 + seed)
        c = 2 * (0.5 + torch.rand(hidden, generator=g, dtype=torch.float64))
        inputs |= {"query": inputs["query"] + c, "key": inputs["key"] - c}
        inputs["weight"] = torch.ones(hidden) if seed else torch.randn(hidden, generator=g).sign()
        inputs = {name: x.float() for name, x in inputs.items()}
        q, k, w = inputs["query"][:, None], inputs["key"], inputs["weight"]
        want = (torch.tanh(q.double() + k.double()) * w).sum(-1)
        ours += (fused_scores(inputs)["scores"] - want).square().mean().item()
        theirs += ((torch.tanh(q + k) * w).sum(-1) - want).square().mean().item()
    assert ours**0.5 <= (2.0 if paths.current() == "baseline" else 1.6) * theirs**0.5


def step_scores(query, key, weight):
    """Returns scores (keys,) of a decoder's step on prepared keys, as the lse of each key
    alone."""
    entries = len(key)
    operators = torch.ops.additive_attn
    keys, value = key[:, None], key.new_zeros(entries, 1, 0)
    prepared = operators.prepare_keys(keys, weight)
    call = prepared, None, None, None, None, None, 0.0, 1.0
    _, _, lse = operators.step(query.expand(entries, 1, -1), keys, value, weight, *call)
    return lse[:, 0]


@functools.lru_cache(maxsize=48)
def few(seed, hidden, offset, share, deviation, weights, dtype):
    """Returns a query and keys that are opposite but for a share of the features; their scores in
    a wider type; and the error of the plain formula."""
    g = generator(600 + seed)
    q, k, w, c, other = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((1, hidden), (50, hidden), (hidden,), (hidden,), (50, hidden))
    )
    c = offset * (0.5 + c.abs().clamp(max=1.5) / 1.5)
    others = torch.arange(hidden) < (share and max(1, int(share * hidden)))
    made = {"positive": w.abs(), "equal": torch.ones_like(w), "signs": w.sign()}
    w = made.get(weights, w)
    k = torch.where(others, other, deviation * k - c)
    q, k, w = (x.to(dtype) for x in (deviation * q + c, k, 8 * w / w.norm()))
    wide = np.float64 if dtype == torch.float32 else np.longdouble
    want = np.tanh(q.cpu().numpy().astype(wide) + k.cpu().numpy()) @ w.cpu().numpy().astype(wide)
    return q, k, w, want, (torch.tanh(q + k) @ w).cpu().numpy() - want


@BOTH
@pytest.mark.parametrize("weights", ["normal", "equal", "signs"])
@pytest.mark.parametrize("hidden", [5, 72, 512])
def test_steps_where_few_features_do_not_cancel(hidden, weights, dtype):
    """Beside a feature that is not small, any number of others keep their small rounding
    errors."""
    bad = []
    for offset, share, deviation in itertools.product(
        (0.12, 0.6, 4.0), (0.0, 1e-9, 0.1), (0.003, 0.1)
    ):
        ours = theirs = most = 0.0
        for seed in range(2):
            q, k, w, want, error = few(seed, hidden, offset, share, deviation, weights, dtype)
            ours += float(np.square(step_scores(q, k, w).cpu().numpy() - want).mean())
            theirs += float(np.square(error).mean())
            most = max(most, abs(want).max())
        floor = torch.finfo(dtype).eps / 2 * most
        if not ours**0.5 <= 2 * theirs**0.5 + floor:
            bad.append(f"{offset} {share} {deviation}: {ours**0.5:.3g}, plain {theirs**0.5:.3g}")
    assert not bad, bad


@pytest.mark.triton
@pytest.mark.parametrize("weights", ["normal", "positive", "equal", "signs"])
@pytest.mark.parametrize(
    ("hidden", "offset"),
    [
        (72, 2.0),
        (256, 2.0),
        *(pytest.param(*x, marks=pytest.mark.sweep) for x in (
            *itertools.product((4, 20, 64, 65, 72, 256), (0.6, 4.0)), (1100, 4.0)
        )),
    ],
)  # fmt: skip
def test_degrees_of_cancellation_on_a_gpu(hidden, offset, weights):
    """The pairs cancel too little for the direct form, with weights of all kinds."""
    bad = []
    for deviation, share in (
        (0.1, 0.0), (0.2, 0.0), (0.4, 0.0), (0.8, 0.0), (0.003, 1e-9), (0.2, 1e-9), (0.1, 0.1)
    ):  # fmt: skip
        ours = theirs = most = 0.0
        for seed in range(2):
            case = few(seed, hidden, offset, share, deviation, weights, torch.float32)
            q, k, w, want, error = case
            got = fused_scores({"query": q.expand(6, -1), "key": k, "weight": w})["scores"]
            ours += float(np.square(got.cpu().numpy() - want).mean())
            theirs += float(np.square(error).mean())
            most = max(most, abs(want).max())
        floor = torch.finfo(torch.float32).eps / 2 * most
        if not ours**0.5 <= 2 * theirs**0.5 + floor:
            bad.append(f"{deviation} {share}: {ours**0.5:.3g}, plain {theirs**0.5:.3g}")
    assert not bad, bad
