"""Promise 1: errors at most 2x (forward) and 3x (gradients) those of the plain layer."""

from __future__ import annotations

import pytest
import torch
from oracle import check_against_plain, fused, generator, make

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEEDS = range(3)

# (batch, Lq, Lk, H, Dv). Keys lie on both sides of every tile width of the kernel (8 to 128), rows
# on both sides of its blocks. Features and values do not fill whole vectors.
SHAPES = [
    ((), 1, 1, 1, 1),
    ((2,), 1, 40, 33, 17),
    ((2,), 2, 15, 3, 5),
    ((), 3, 16, 4, 16),
    ((3,), 4, 17, 5, 7),
    ((), 5, 31, 31, 33),
    ((2, 3), 7, 32, 32, 8),
    ((), 17, 63, 64, 48),
    ((2,), 33, 64, 65, 1),
    ((1,), 20, 65, 128, 31),
    ((), 40, 127, 130, 65),
    ((), 128, 129, 12, 9),
    ((), 131, 67, 20, 20),
]


@pytest.mark.interpreter(shape=[SHAPES[4], ((2,), 1, 40, 33, 17)])
@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain(shape, dtype):
    batch, *sizes = shape
    check_against_plain([make(batch, *sizes, dtype=dtype, seed=seed) for seed in SEEDS])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [40, 100])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 5.0])
def test_small_and_large_activations(spread, hidden, dtype):
    """Small sums have a small relative error, which 1 - 2/(1 + e^2x) would not have."""
    cases = [make((2,), 30, 50, hidden, 16, dtype=dtype, seed=s, spread=spread) for s in SEEDS]
    check_against_plain(cases, magnitude=min(spread, 1.0))


@pytest.mark.parametrize("hidden", [24, 80])
@pytest.mark.parametrize("upstream", ["out", "weights", "lse"])
def test_gradients_of_each_output(upstream, hidden):
    cases = [make((2,), 30, 70, hidden, 16, seed=seed) for seed in SEEDS]
    check_against_plain(cases, upstream_of=[upstream])


@pytest.mark.core
@pytest.mark.parametrize("keys", [4096, 5000])
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_many_keys(queries, keys):
    """The keys are split into pieces, which are merged."""
    check_against_plain([make((), queries, keys, 20, 12, seed=seed) for seed in SEEDS])


def test_many_rows_and_keys():
    """There are more pairs than the backward stores at one time, in ragged blocks."""
    check_against_plain([make((), 700, 3100, 5, 6)])


@pytest.mark.parametrize("scale", [0.125, -2.0, 0.0])
def test_scale(scale):
    check_against_plain([make((2,), 9, 21, 16, 8, seed=seed) for seed in SEEDS], scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("height", [-200.0, -88.8, 120.0, 1e4])
@pytest.mark.parametrize("keys", [33, 48, 65, 600])
def test_scores_far_from_zero(keys, height, dtype):
    """exp(lse) over- or underflows. At lse = -200, a tail beyond the keys that counted with score
    0 would change the results."""
    mask = torch.full((1, keys), height, dtype=dtype)
    cases = [make((8,), 6, keys, 12, 5, dtype=dtype)]
    # The weights are recomputed from an lse of this size, which is rounded.
    magnitude = abs(height) if dtype == torch.float64 else max(1.0, abs(height) / 50)
    check_against_plain(cases, attn_mask=mask, magnitude=magnitude)


def test_sharp_scores():
    """With weights of size 100 the softmax is nearly one-hot, and the running maximum changes
    along the keys."""
    cases = [make((2,), 20, 150, 16, 8, seed=seed) for seed in SEEDS]
    for case in cases:
        case["weight"] *= 100
    check_against_plain(cases, magnitude=300.0)


def test_rising_scores():
    """Every tile of keys raises the maximum, so the running sums are rescaled each time."""
    ramp = torch.linspace(-60, 60, 300).expand(1, 300)
    cases = [make((), 10, 300, 8, 8, seed=seed) for seed in SEEDS]
    check_against_plain(cases, attn_mask=ramp, magnitude=10.0)
    check_against_plain(cases, attn_mask=ramp.flip(1), magnitude=10.0)


@pytest.mark.parametrize("weight", [1e-30, 1e30, 1e38])
def test_weight_magnitudes(weight):
    case = make((), 8, 40, 12, 6)
    case["weight"] = torch.zeros(12)
    case["weight"][3] = weight
    case["query"][:, 3] = 0.0
    case["key"][:, 3] = torch.linspace(1.0, 2.0, 40)
    ours = fused(case)
    expected = torch.zeros(8, 40)
    if weight > 1:
        expected[:, -1] = 1.0  # the key of the largest tanh has all the weight
    else:
        expected[:] = 1 / 40
    torch.testing.assert_close(ours["weights"], expected)


def test_zero_weight_means_the_average():
    case = make((2,), 4, 37, 9, 5)
    case["weight"] = torch.zeros(9)
    torch.testing.assert_close(fused(case)["out"], case["value"].mean(1, True).expand(2, 4, 5))


def test_lse_of_sixteen_bit_inputs_is_float32():
    for dtype in (torch.bfloat16, torch.float16):
        outputs = fused(make(dtype=dtype))
        assert outputs["lse"].dtype == torch.float32
        assert outputs["out"].dtype == outputs["weights"].dtype == dtype


def test_weights_sum_to_one():
    weights = fused(make((3,), 20, 333, 16, 4))["weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 20))
    assert (weights >= 0).all()


@pytest.mark.core
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("keys", [400, 5000])
def test_large_values_do_not_overflow(queries, keys):
    """The average of the values is finite though their sum is not."""
    case = make((), queries, keys, 8, 3)
    case["value"] = torch.full((keys, 3), 3e36)
    expected = torch.full((queries, 3), 3e36)
    torch.testing.assert_close(fused(case)["out"], expected, rtol=1e-5, atol=0.0)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("reach", [0.0, 0.5, 15.9, 16.1, 40.0])
def test_scores_that_the_weights_bound(reach, dtype):
    """Up to a sum of |w| of 16 the kernel subtracts no maximum. Rows without keys stay empty."""
    cases = []
    for seed in range(2):
        inputs = make((2,), 6, 300, 16, 16, dtype=dtype, seed=seed)
        weight = inputs["weight"]
        inputs["weight"] = reach * weight / weight.abs().sum()
        cases.append(inputs)
    mask = torch.rand(6, 300, generator=generator(2)) < 0.7
    mask[1] = False
    check_against_plain(cases, attn_mask=mask, magnitude=max(1.0, reach))
