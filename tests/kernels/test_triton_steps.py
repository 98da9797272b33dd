"""Compares the GPU's kernels of decoder steps, scores and location features with plain PyTorch in
float64: in Triton's interpreter, or on a GPU with ADDITIVE_ATTN_TEST_DEVICE=cuda."""

from __future__ import annotations

import pytest
import torch
from layouts import every_second_feature, surrounded, transposed
from oracle import DEVICE, assert_layout_free, assert_same, error, generator

from additive_attn.backends.plain import scores as plain_scores
from additive_attn.backends.plain import steps as plain_steps
from additive_attn.ops import dispatch  # noqa: F401  registers the operators

pytestmark = pytest.mark.triton
operators = torch.ops.additive_attn

RESULTS = ("out", "weights", "lse")
GRADIENTS = (
    "grad query", "grad scores", "kept", "grad location", "grad location weight", "grad weight",
    "grad key",
)  # fmt: skip


def make(
    batch=(2,), keys=20, hidden=9, values=5, filters=None, *, dtype=torch.float32, mask=None,
    lengths=None, dropout_p=0.0, scale=0.7,
):  # fmt: skip
    """Returns the arguments of ``step``, by name."""
    g = generator(0)

    def random(*shape):
        return torch.randn(shape, generator=g, device=DEVICE).to(dtype)

    located = filters is not None
    return dict(
        query=random(*batch, 1, hidden), key=random(*batch, keys, hidden),
        value=random(*batch, keys, values), weight=random(hidden), prepared=None,
        location=random(*batch, filters, keys) if located else None,
        location_weight=0.3 * random(filters, hidden) if located else None,
        attn_mask=mask, lengths=lengths, seed=torch.tensor(1234) if dropout_p else None,
        dropout_p=dropout_p, scale=scale,
    )  # fmt: skip


def upstream_of(case):
    g, query, value = generator(1), case["query"], case["value"]
    batch = query.shape[:-2]
    shapes = (*batch, 1, value.shape[-1]), (*batch, 1, value.shape[-2]), (*batch, 1)
    return [torch.randn(shape, generator=g, device=DEVICE).to(query.dtype) for shape in shapes]


def run(case, upstream, weights=None, step=None, step_backward=None):
    """Returns results and gradients. Those of the keys are added to ones."""
    step, step_backward = step or operators.step, step_backward or operators.step_backward
    arguments = list(case.values())
    results = step(*arguments)
    key = None
    if case["location"] is not None:
        key = torch.ones(*results[0].shape[:-2], *case["key"].shape[-2:], dtype=results[2].dtype)
    weights = results[1] if weights is None else weights
    lse = results[2]
    gradients = step_backward(*upstream, *arguments, weights, lse, key)
    gradients = [*gradients, torch.zeros(0) if key is None else key]
    return dict(zip((*RESULTS, *GRADIENTS), (*results, *gradients), strict=True))


def widened(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(case, upstream=None):
    """Asserts the rule of ``oracle``: errors are at most twice those of plain PyTorch in the same
    dtype, three times for gradients."""
    upstream = upstream_of(case) if upstream is None else upstream
    plain = (plain_steps.step, plain_steps.step_backward)
    ours = run(case, upstream)
    weights = ours["weights"]
    wide = {name: widened(x) for name, x in case.items()}
    exact = run(wide, [widened(x) for x in upstream], widened(weights), *plain)
    same = run(case, upstream, weights, *plain)
    eps = torch.finfo(case["query"].dtype).eps
    for name, mine in ours.items():
        assert mine.shape == exact[name].shape, name
        if not mine.numel():
            continue
        assert mine.dtype == same[name].dtype, name
        finite = exact[name][exact[name].isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        floor = (8 if eps > 1e-10 else 64) * eps * (1 + largest)
        allowed = (2 if name in RESULTS else 3) * error(same[name], exact[name]) + floor
        assert error(mine, exact[name]) <= allowed, name


SHAPES = [
    ((), 1, 1, 1), ((2,), 15, 3, 5), ((1, 2), 17, 33, 17), ((2,), 64, 16, 16), ((), 300, 40, 7),
    ((3, 1, 2), 16, 5, 1),
]  # fmt: skip


@pytest.mark.parametrize("filters", [None, 1, 3, 17])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps(shape, filters):
    check(make(*shape, filters))


@pytest.mark.parametrize("filters", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_steps(dtype, filters):
    check(make((2,), 33, 34, 6, filters, dtype=dtype))


@pytest.mark.parametrize("filters", [None, 2])
@pytest.mark.parametrize("kind", ["bool", "float", "lengths", "both", "dropped", "all dropped"])
def test_masks_of_steps(kind, filters):
    g = generator(2)
    mask = torch.rand(2, 1, 40, generator=g, device=DEVICE) > 0.4
    options = {
        "bool": dict(mask=mask),
        "float": dict(mask=torch.randn(40, generator=g, device=DEVICE)),
        "lengths": dict(lengths=torch.tensor([[7], [40]])),
        "both": dict(lengths=torch.tensor([[0], [33]]), mask=mask, dropout_p=0.3),
        "dropped": dict(dropout_p=0.4),
        "all dropped": dict(dropout_p=1.0),
    }[kind]
    check(make((2,), 40, 9, 5, filters, **options))


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (), (0, 2)], ids=str)
@pytest.mark.parametrize("filters", [None, 2])
def test_some_upstream_gradients(filters, given):
    case = make(filters=filters, dropout_p=0.2)
    check(case, [x if i in given else None for i, x in enumerate(upstream_of(case))])


@pytest.mark.parametrize("filters", [None, 2])
@pytest.mark.parametrize("sizes", [((2,), 0, 3, 4), ((0,), 5, 3, 4), ((2,), 5, 3, 0)], ids=str)
def test_sizes_of_zero(sizes, filters):
    check(make(*sizes, filters))


def test_padding_of_steps_cannot_leak():
    """Upstream gradients at padding do not leak either, and its gradients are 0."""
    case = make((2,), 40, 20, 5, 3, lengths=torch.tensor([[7], [23]]), dropout_p=0.3)
    upstream = upstream_of(case)
    clean = run(case, upstream)
    for n, length in enumerate((7, 23)):
        for name in ("key", "value"):
            case[name][n, length:] = torch.nan
        case["location"][n, :, length:] = torch.inf
        upstream[1][n, :, length:] = torch.nan
    found = run(case, upstream)
    for name in found:
        assert_same(found[name], clean[name], name)
    for n, length in enumerate((7, 23)):
        for name in ("weights", "grad scores", "kept", "grad location"):
            assert not found[name][n, :, length:].any(), name
        assert (found["grad key"][n, length:] == 1).all()


def test_attended_nan_propagates():
    case = make((2,), 20, 9, 5, 2)
    case["location"][0, 1, 3] = torch.nan
    found = run(case, upstream_of(case))
    for name in ("out", "weights", "grad query", "grad scores"):
        assert found[name][0].isnan().all(), name
        assert found[name][1].isfinite().all(), name


@pytest.mark.parametrize("recipe", [transposed, every_second_feature, surrounded])
def test_strides_of_steps(recipe):
    case = make((2,), 33, 20, 5, 3)
    upstream = upstream_of(case)
    expected = run(case, upstream)
    names = ("query", "key", "value", "location", "location_weight")
    case.update({name: recipe(case[name]) for name in names})
    assert_layout_free(run(case, [recipe(x) for x in upstream[:2]] + upstream[2:]), expected)


@pytest.mark.parametrize("batch", [(2, 3), (2, 1, 3)])
def test_keys_shared_by_beams(batch):
    """The keys' gradient is summed over the entries that share them, in a tensor of any
    strides."""
    case = make(batch, 20, 9, 5, 2)
    leading = (*batch[:-1], 1)
    case["key"] = case["key"][..., :1, :, :].clone()
    upstream = upstream_of(case)
    arguments = list(case.values())
    outputs = operators.step(*arguments)
    expected = torch.ones(*leading, 20, 9)
    found = surrounded(expected)
    for step_backward, grad_key in (
        (operators.step_backward, found), (plain_steps.step_backward, expected),
    ):  # fmt: skip
        step_backward(*upstream, *arguments, outputs[1], outputs[2], grad_key)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("filters", [None, 20])
def test_steps_repeat_to_the_bit(filters):
    case = make((2,), 150, 20, 5, filters, dropout_p=0.2)
    upstream = upstream_of(case)
    first, second = run(case, upstream), run(case, upstream)
    for name in first:
        assert_same(first[name], second[name], name)


@pytest.mark.parametrize("window", [(-1, -1), (4, 2)])
@pytest.mark.parametrize("queries", [1, 6])
def test_scores_in_pieces(queries, window, monkeypatch):
    """Upstream gradients of masked pairs may be any numbers: they are ignored."""
    triton_tiles = pytest.importorskip("additive_attn.backends.triton.tiles")
    monkeypatch.setattr(triton_tiles, "WORKSPACE_ELEMENTS", 900)
    g = generator(0)
    shapes = (2, queries, 9), (2, 30, 9), (9,), (queries, 30), (2, queries, 30)
    query, key, weight, mask, grad = (
        torch.randn(shape, generator=g, device=DEVICE) for shape in shapes
    )
    mask[:, 3] = -torch.inf
    lengths = torch.tensor([[5], [28]])
    arguments = (query, key, weight, mask, lengths, None, None, None, *window, 0.7)
    expected = plain_scores.scores(*arguments)
    torch.testing.assert_close(operators.scores(*arguments), expected)
    grad[expected == -torch.inf] = torch.nan
    arguments = (grad, *arguments, True, True, True, True)
    expected = plain_scores.scores_backward(*arguments)
    for ours, other in zip(operators.scores_backward(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 5])
def test_scores_that_overflow(queries):
    query, key = torch.ones(queries, 4), torch.ones(6, 4)
    weight = torch.tensor([-3e38, -3e38, -3e38, 1.0])
    scores = operators.scores(query, key, weight, None, None, None, None, None, -1, -1, 1.0)
    assert (scores == -torch.inf).all()
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((queries, 6), lowest)
    scores = operators.scores(
        query, key, torch.zeros(4), mask, None, None, None, None, -1, -1, 1.0
    )
    assert scores.isfinite().all()
