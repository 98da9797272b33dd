"""Promises 1 and 4 at the ends of the number range: results do not depend on the kernel's form."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import (
    INPUTS,
    OUTPUTS,
    assert_layout_free,
    assert_same,
    check_against_plain,
    error,
    fused,
    generator,
    gradients,
    make,
    plain,
    random_upstream,
)

# Sizes around the limits between the kernel's forms in float32 (1 and 10) and float64 (1 and 80),
# where four factors overflow (10.4 and 21.8), where e^2x overflows (44, 355), and far beyond.
FEATURES = [24, 72]  # the kernel sums few and many features differently
LIMITS = [0.1, 0.99, 1.01, 9.9, 10.1, 11.0, 15.0, 21.0, 23.0, 43.0, 45.0, 79.0, 81.0, 90.0, 200.0]


@pytest.mark.interpreter(size=[0.1, 11.0, 200.0], hidden=[72], dtype=[torch.float32])
@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", FEATURES)
@pytest.mark.parametrize("size", LIMITS)
def test_one_magnitude(size, hidden, dtype):
    """Signs are mixed, so that sums are near zero or have twice the size."""
    cases = []
    for seed in range(3):
        case = make((), 12, 40, hidden, 8, dtype=dtype, seed=seed)
        for name in ("query", "key"):
            case[name] = (case[name].sign() * size * (1 - 0.1 * torch.rand(case[name].shape))).to(
                dtype
            )
        cases.append(case)
    check_against_plain(cases)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", FEATURES)
@pytest.mark.parametrize("queries", [1, 24])
def test_all_magnitudes_in_one_call(queries, hidden, dtype):
    """Each row and each key has its own magnitude, 0.1 to 200, in every combination."""
    cases = []
    for seed in range(3):
        case = make((2,), queries, 150, hidden, 8, dtype=dtype, seed=seed)
        g = generator(seed)
        for name in ("query", "key"):
            count = case[name].shape[1]
            size = 10 ** (torch.rand(2, count, 1, generator=g) * 3.3 - 1)
            case[name] = (case[name] * size).to(dtype)
        cases.append(case)
    check_against_plain(cases)


@pytest.mark.parametrize("hidden", FEATURES)
def test_all_magnitudes_among_features(hidden):
    """One feature has size 200, the others 0.1."""
    cases = []
    for seed in range(3):
        case = make((2,), 24, 70, hidden, 8, seed=seed)
        size = 10 ** torch.linspace(-1, 2.3, hidden)
        case["query"] *= size
        case["key"] *= size.flip(0)
        cases.append(case)
    check_against_plain(cases)


@pytest.mark.parametrize("hidden", FEATURES)
def test_opposite_magnitudes_cancel(hidden):
    """With q = 60 and k = -60 + x the sum is small, and both factors are extreme."""
    cases = []
    for seed in range(3):
        for base in (8.0, 20.0, 60.0):
            case = make((), 20, 40, hidden, 8, seed=seed)
            case["query"] += base
            case["key"] -= base
            cases.append(case)
    check_against_plain(cases)


@pytest.mark.parametrize("hidden", FEATURES)
@pytest.mark.parametrize("other", [0.5, 5.0, 9.0, 12.0, 40.0, 100.0])
def test_one_large_row_changes_no_other(other, hidden):
    """The form is chosen per row, so a neighbour's magnitude changes no bit of this row."""
    inputs = make((), 20, 70, hidden, 8, spread=0.3)
    changed = {**inputs, "query": inputs["query"].clone()}
    changed["query"][11] = other
    ours, before = fused(changed), fused(inputs)
    rows = torch.arange(20) != 11
    assert_layout_free(
        {k: v[rows] for k, v in ours.items()}, {k: v[rows] for k, v in before.items()}
    )


@pytest.mark.parametrize("hidden", FEATURES)
def test_continuous_across_the_limits(hidden):
    """Results on both sides of a limit are those of float64: the forms agree."""
    for limit in (1.0, 10.0):
        inputs = make((), 6, 30, hidden, 5, spread=0.2)
        results = []
        for nudge in (-1e-5, 1e-5):
            case = {**inputs, "key": inputs["key"].clone()}
            case["key"][4, 3] = limit + nudge
            exact = plain(*(x.double() for x in case.values()))
            ours = fused(case)
            results.append(error(ours["lse"], exact["lse"]))
        assert max(results) < 2e-6, f"errors {results} around {limit}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_but_finite(dtype):
    """At 1e30 and the largest float, tanh is exactly 1 and gradients are 0."""
    for size in (1e4, 1e30, torch.finfo(dtype).max / 4):
        inputs = make((), 6, 40, 12, 5, dtype=dtype)
        inputs["query"][2] = size
        inputs["key"][7] = -size
        inputs["key"][8, 3] = size
        check_against_plain([inputs])


def assert_same_kind(ours, theirs, name):
    """Asserts that numbers are finite, NaN and infinite in the same places. A nonfinite lse may be
    NaN where the plain one is infinite, since both make the row's weights NaN."""
    if name == "lse":
        ours, theirs = ours.isfinite(), theirs.isfinite()
    else:
        ours, theirs = (
            x.isnan() * 1 + (x == math.inf) * 2 + (x == -math.inf) * 3 for x in (ours, theirs)
        )
    assert torch.equal(ours, theirs), f"{name}: {ours} instead of {theirs}"


PLACES = [("query", (1, 3)), ("key", (4, 2)), ("value", (4, 1)), ("weight", (2,))]


@pytest.mark.interpreter(queries=[2], dtype=[torch.float32])
@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name,place", PLACES, ids=[name for name, _ in PLACES])
@pytest.mark.parametrize("queries,hidden", [(2, 6), (7, 6), (7, 70)])
def test_special_values_as_in_the_plain_layer(queries, hidden, name, place, poison, dtype):
    """Outputs and gradients are NaN, Inf or finite where those of the plain layer are."""
    inputs = make((), queries, 40, hidden, 5, dtype=dtype)
    inputs[name][place] = poison
    theirs_out = plain(*(x.double() for x in inputs.values()))
    upstream = random_upstream(theirs_out)
    theirs = gradients(
        lambda x: plain(*x.values()), {k: v.double() for k, v in inputs.items()}, upstream
    )
    ours = gradients(fused, inputs, upstream)
    for label, mine, other in (("", ours[0], theirs[0]), ("gradient of ", ours[1], theirs[1])):
        for key in mine:
            assert_same_kind(mine[key], other[key], label + key)
    for key in OUTPUTS:
        finite = theirs[0][key].isfinite()
        torch.testing.assert_close(
            ours[0][key][finite].double(), theirs[0][key][finite], atol=2e-2, rtol=2e-2
        )


@pytest.mark.interpreter
def test_special_values_with_one_query():
    for name, place in (("query", (0, 3)), *PLACES[1:]):
        for poison in (math.nan, math.inf, -math.inf):
            inputs = make((), 1, 40, 6, 5)
            inputs[name][place] = poison
            theirs, ours = plain(*inputs.values()), fused(inputs)
            for key in OUTPUTS:
                assert_same_kind(ours[key], theirs[key], key)


def test_infinities_that_cancel_are_nan():
    inputs = make((), 3, 20, 6, 5)
    inputs["query"][1, 2] = math.inf
    inputs["key"][4, 2] = -math.inf
    ours, theirs = fused(inputs), plain(*inputs.values())
    for key in OUTPUTS:
        assert_same_kind(ours[key], theirs[key], key)
    assert ours["out"][1].isnan().all() and ours["out"][[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_special_mask_values(value):
    inputs = make((), 3, 20, 6, 5)
    mask = torch.zeros(3, 20)
    mask[1, 4] = value
    ours, theirs = fused(inputs, attn_mask=mask), plain(*inputs.values(), bias=mask)
    for key in OUTPUTS:
        assert_same_kind(ours[key], theirs[key], key)


@pytest.mark.interpreter(fill=[-1e9])
@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e30, -1e9])
@pytest.mark.parametrize("queries", [1, 4])
def test_finite_masking_values(queries, fill):
    """Many models mask with a large negative number. It outweighs the scores, and a row that is
    all masked averages the values, as in the plain layer. Added to -1e9, the logarithm of a sum is
    lost."""
    inputs = make((2,), queries, 40, 6, 5)
    mask = torch.zeros(2, queries, 40)
    mask[0, :, 25:] = fill
    mask[1, 0] = fill
    upstream = random_upstream(plain(*inputs.values(), bias=mask), ("out", "weights"))
    ours = gradients(lambda x: fused(x, attn_mask=mask), inputs, upstream)
    theirs = gradients(lambda x: plain(*x.values(), bias=mask), inputs, upstream)
    for name in ("out", "weights"):
        torch.testing.assert_close(ours[0][name], theirs[0][name])
    for name in INPUTS:
        torch.testing.assert_close(ours[1][name], theirs[1][name])


def test_denormals_and_zeros():
    inputs = make((), 5, 30, 9, 4)
    tiny = {**inputs, "query": inputs["query"] * 1e-42, "key": inputs["key"] * 0}
    check_against_plain([tiny])
    negative = {**tiny, "key": -tiny["key"], "query": inputs["query"] * 0}
    for name, x in fused(negative).items():
        expected = fused({**negative, "key": negative["key"].abs()})[name]
        assert_same(x.abs(), expected.abs(), name)
