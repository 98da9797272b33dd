"""Numbers near the limits of a dtype, on every path: long sums, few features, overflow.

Results are judged as in exact.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from exact import inputs_of, judge
from oracle import INPUTS, OUTPUTS, assert_same, fused, generator, gradients, plain, plain_masked

from additive_attn import additive_attention

# A test has the marks ``core`` and ``interpreter`` where the other paths pass too.
pytestmark = pytest.mark.kernel
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


# Long sums.


@pytest.mark.parametrize("equal", [False, True], ids=["random", "equal"])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [((), 1, 4000), ((64,), 1, 20000), ((64,), 5, 4000)],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_long_sums_over_keys(batch, queries, keys, equal):
    cases = []
    for seed in range(1):
        inputs = inputs_of(seed, torch.float32, queries, keys, 2, 3, batch=batch, spread=0.5)
        if equal:
            for name in ("key", "value"):
                inputs[name] = inputs[name][..., :1, :].expand(*batch, keys, -1).contiguous()
        cases.append(inputs)
    judge(cases, ("lse",))


@pytest.mark.parametrize("equal", [False, True], ids=["random", "equal"])
def test_long_sums_over_rows(equal):
    cases = []
    for seed in range(2):
        inputs = inputs_of(seed, torch.float32, 20000, 70, 2, 3, spread=0.5)
        if equal:
            inputs["query"] = inputs["query"][:1].expand(20000, -1).contiguous()
        cases.append(inputs)
    judge(cases, ("out", "lse"))


@BOTH
@pytest.mark.parametrize("hidden", [1, 2, 3, 4])
def test_few_features(hidden, dtype):
    """The errors of one to four features do not average out. The difference form is tested up to
    its limit."""
    cases = [inputs_of(seed, dtype, 40, 70, hidden, spread=2.0, weight=1.0) for seed in range(20)]
    judge(cases)


@pytest.mark.parametrize("hidden", [8, 16, 32])
def test_few_features_keep_the_size_of_the_score(hidden):
    """The factored form rounds sums of size sum |w|; the plain layer rounds sums of the score's
    size."""
    worst = {name: [0.0, 0.0] for name in OUTPUTS}
    for seed in range(40):
        inputs = inputs_of(seed, torch.float32, 24, 40, hidden, weight=4 / hidden**0.5)
        want = plain(*(x.double() for x in inputs.values()))
        for which, got in enumerate((fused(inputs), plain(*inputs.values()))):
            for name, errors in worst.items():
                errors[which] = max(errors[which], float((got[name] - want[name]).abs().max()))
    bad = {name: errors for name, errors in worst.items() if errors[0] > 2 * errors[1]}
    assert not bad, bad


# Overflow and underflow.


@BOTH
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("split", [False, True], ids=["once", "split"])
def test_overflow_to_minus_infinity_is_not_a_mask(queries, split, dtype):
    """Rows whose attended scores all overflow are NaN, as in the plain layer; others are not."""
    inputs = inputs_of(0, dtype, queries, 4500 if split else 70, 4)
    largest = torch.finfo(dtype).max
    inputs["query"], inputs["key"] = inputs["query"].abs() + 5, inputs["key"].abs() + 5
    inputs["weight"] = torch.full((4,), -0.9 * largest, dtype=dtype)
    mask = torch.rand(queries, inputs["key"].shape[0], generator=generator(3)) > 0.3
    mask[-1] = False
    for masking in ({}, {"attn_mask": mask}):
        same_as_plain(inputs, masking)


def same_as_plain(inputs, masking, scale=1.0):
    """Asserts that outputs and gradients have NaN, Inf and zeros where the plain layer has
    them."""
    upstream = {name: torch.ones_like(x) for name, x in plain_masked(inputs, **masking).items()}
    theirs = gradients(lambda x: plain_masked(x, scale=scale, **masking), inputs, upstream)
    ours = gradients(lambda x: fused(x, scale=scale, **masking), inputs, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine:
            torch.testing.assert_close(
                mine[name],
                other[name],
                rtol=1e-3,
                atol=1e-4,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("queries", [1, 5])
def test_finite_bias_that_overflows(queries):
    """The sum of a finite mask value and a score overflows: the pair is attended, so the row is
    NaN."""
    inputs = inputs_of(0, torch.float32, queries, 70, 4)
    inputs["query"], inputs["key"] = inputs["query"].abs() + 0.5, inputs["key"].abs() + 0.5
    inputs["weight"] = torch.full((4,), -1e37)
    bias = torch.full((queries, 70), -3.4e38)
    bias[:, ::3] = -torch.inf
    for last in (-3.4e38, 0.0):
        bias[:, -1] = last
        same_as_plain(inputs, {"attn_mask": bias})


@BOTH
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("spread", [1.0, 9.0, 30.0])
@pytest.mark.parametrize("exponent", [-30, -26, -20, 20, 30])
def test_sizes_of_upstream_gradients(exponent, spread, queries, dtype):
    """Gradients are linear in the upstream gradient wherever the plain layer's are."""
    size = 10.0 ** (exponent * (1 if dtype == torch.float32 else 8))
    cases = [inputs_of(seed, dtype, queries, 70, 24, spread=spread) for seed in range(2)]
    for inputs in cases[:1]:  # tanh of all sizes beside large exponentials
        inputs["key"] = torch.cat(
            [inputs["key"][:64] - 0.9 * inputs["query"][:1], inputs["key"][64:]]
        )
    judge(cases, ("out",), upstream_size=size)


@BOTH
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize(("scale", "weight", "spread"), [(1e20, 1e19, 1e-20), (1e20, 1e-20, 1.0),
    (1e-20, 1e20, 1.0), (1e-20, 1e19, 1.0), (1e36, 1e-36, 1.0), (1e-36, 1e36, 1.0)])  # fmt: skip
def test_order_of_factors(scale, weight, spread, queries, dtype):
    cases = [inputs_of(s, dtype, queries, 70, 24, spread=spread, weight=weight) for s in range(2)]
    slope = max(1.0, scale * weight)
    judge(cases, scale=scale, slope=slope)
    judge(cases, ("out",), scale=scale, upstream_size=1e-10, slope=slope)


@BOTH
@pytest.mark.parametrize("queries", [1, 6])
def test_scale_zero_with_huge_upstream(queries, dtype):
    inputs = inputs_of(0, dtype, queries, 300, 24)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    out = additive_attention(*leaves, scale=0.0)
    huge = torch.full_like(out, torch.finfo(dtype).max / 1e3)
    for x in torch.autograd.grad(out, [leaves[0], leaves[1], leaves[3]], huge):
        assert_same(x.abs(), torch.zeros_like(x))


@BOTH
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("queries", [1, 5])
def test_nonfinite_weight_leaves_empty_rows_and_padding(bad, queries, dtype):
    inputs = inputs_of(0, dtype, queries, 70, 24, batch=(2,))
    inputs["weight"][3] = bad
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    lengths = torch.tensor([0, 33])
    out, lse = additive_attention(*leaves, lengths=lengths, need_lse=True)
    grads = torch.autograd.grad((out, lse), leaves, [torch.ones_like(out), torch.ones_like(lse)])
    assert_same(out[0], torch.zeros_like(out[0]))
    assert_same(lse[0], torch.full_like(lse[0], -torch.inf))
    assert out[1].isnan().all() and lse[1].isnan().all()
    for x in (grads[0][0], grads[1][0], grads[2][0], grads[1][1, 33:], grads[2][1, 33:]):
        assert_same(x.abs(), torch.zeros_like(x))
    assert grads[0][1].isnan().all() and grads[1][1, :33].isnan().all()


@BOTH
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("how", ["underflow", "dropout"])
def test_nonfinite_value_reaches_query_and_key(how, queries, bad, dtype):
    """NaN propagates, since the plain layer multiplies the gradient of a weight by 0."""
    inputs = inputs_of(0, dtype, queries, 70, 4)
    options = {"lengths": torch.tensor(69)}
    if how == "underflow":
        inputs["attn_mask"] = torch.zeros(queries, 70, dtype=dtype)
        inputs["attn_mask"][:, 5] = -1e30
        inputs["attn_mask"][:, 6] = -torch.inf
    else:
        options["dropout_p"] = 1.0
    inputs["value"][5] = bad
    inputs["value"][[6, 69] if how == "underflow" else [69]] = math.nan  # masked
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out = additive_attention(
        *[leaves[n] for n in INPUTS], attn_mask=leaves.get("attn_mask"), **options
    )
    grads = torch.autograd.grad(out.sum(), [leaves["query"], leaves["key"]])
    assert grads[0].isnan().all() and grads[1][:5].isnan().all() and grads[1][5].isnan().all()
    masked = [6, 69] if how == "underflow" else [69]
    assert_same(grads[1][masked].abs(), torch.zeros_like(grads[1][masked]))
