"""The GPU's kernels, feature by feature, against the plain formula in float64: in Triton's
interpreter (``test_isa.py`` starts it), or on a GPU with ADDITIVE_ATTN_TEST_DEVICE=cuda."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    DEVICE,
    assert_same,
    check_against_plain,
    fused,
    gradients,
    make,
    random_upstream,
)

from additive_attn import additive_attention, chunked, gpu, ops
from additive_attn.dropout import draw_seed

pytestmark = pytest.mark.skipif(
    ops.cpu_path() != "triton" and DEVICE == "cpu",
    reason="runs in the interpreter, which test_isa.py starts, or on a GPU",
)


def test_the_kernels_run():
    """Not the fallback."""
    assert ops.cpu_path() == "triton" if DEVICE == "cpu" else gpu.path()[0] is not None


SHAPES = [
    ((), 1, 1, 1, 1),
    ((2,), 1, 40, 33, 17),
    ((1, 2), 2, 15, 3, 5),
    ((2,), 5, 65, 4, 16),
    ((), 33, 64, 65, 1),
    ((), 65, 31, 100, 70),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_around_tiles(shape):
    batch, *sizes = shape
    check_against_plain([make(batch, *sizes)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 6])
def test_dtypes(queries, dtype):
    check_against_plain([make((2,), queries, 19, 9, 5, dtype=dtype)])


@pytest.mark.parametrize("hidden", [10, 70])
@pytest.mark.parametrize("spread", [1e-3, 0.3, 8.0, 100.0])
def test_magnitudes(spread, hidden):
    cases = [make((), 6, 20, hidden, 5, spread=spread)]
    check_against_plain(cases, magnitude=min(spread, 1.0))


@pytest.mark.parametrize("hidden", [10, 70])
def test_all_magnitudes_in_one_call(hidden):
    case = make((), 9, 20, hidden, 5)
    case["query"] *= 10 ** torch.linspace(-1, 2.3, 9)[:, None]
    case["key"] *= 10 ** torch.linspace(2.3, -1, 20)[:, None]
    check_against_plain([case])


MASKING = {
    "bool": dict(attn_mask=torch.rand(2, 9, 21, generator=torch.Generator().manual_seed(1)) > 0.4),
    "float": dict(attn_mask=torch.randn(9, 21, generator=torch.Generator().manual_seed(1))),
    "float per key": dict(attn_mask=torch.randn(21, generator=torch.Generator().manual_seed(1))),
    "float per entry": dict(attn_mask=torch.randn(2, 9, 1)),
    "lengths": dict(lengths=torch.tensor([5, 21])),
    "lengths per row": dict(lengths=torch.arange(18).view(2, 9)),
    "causal": dict(is_causal=True),
    "window": dict(window=(3, 2)),
}


@pytest.mark.parametrize("masking", MASKING.values(), ids=MASKING)
def test_masks(masking):
    check_against_plain([make((2,), 9, 21, 9, 5)], scale=0.5, **masking)


@pytest.mark.parametrize(
    "mask", [(20, 9), (2, 1, 1, 9), (2, 2, 20, 9), None], ids=["rows", "entries", "all", "none"]
)
def test_a_workspace_smaller_than_the_problem(mask, monkeypatch):
    """Rows and entries in several parts; the last rows' window lies beyond the last key."""
    triton_configs = pytest.importorskip("additive_attn.triton.configs")
    monkeypatch.setattr(triton_configs, "WORKSPACE_ELEMENTS", 64)
    masking = dict(window=(3, 2)) if mask is None else dict(attn_mask=torch.randn(mask))
    batch = () if mask is None else (2, 2)
    check_against_plain([make(batch, 40 if mask is None else 20, 9, 7, 5)], **masking)


def test_heads():
    check_against_plain([make((2, 2), 3, 5, 7, 5, heads=True)])


def test_keys_shared_by_heads():
    case = make((2, 2), 3, 5, 7, 5, heads=True)
    case["key"], case["value"] = case["key"][:, :1], case["value"][:1]
    check_against_plain([case])


def test_an_empty_row():
    case = make((2,), 3, 9, 7, 5)
    lengths = torch.tensor([[0, 9, 4], [3, 0, 0]])
    outputs = fused(case, lengths=lengths)
    empty = lengths == 0
    assert (outputs["out"][empty] == 0).all() and (outputs["weights"][empty] == 0).all()
    assert (outputs["lse"][empty] == -torch.inf).all()


@pytest.mark.parametrize("queries", [1, 5])
def test_padding_changes_no_bit(queries):
    clean = make((2,), queries, 20, 9, 5)
    lengths = torch.tensor([20, 6])
    dirty = {name: x.clone() for name, x in clean.items()}
    dirty["key"][1, 6:] = torch.nan
    dirty["value"][1, 6:] = torch.inf
    upstream = random_upstream(fused(clean, lengths=lengths))

    def run(inputs):
        return gradients(lambda x: fused(x, lengths=lengths), inputs, upstream)

    (ours, grads), (expected, expected_grads) = run(dirty), run(clean)
    for name in ours:
        assert_same(ours[name], expected[name], name)
    for name in grads:
        assert_same(grads[name], expected_grads[name], name)
    assert (grads["key"][1, 6:] == 0).all() and (grads["value"][1, 6:] == 0).all()


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_at_attended_positions(name):
    case = make((), 4, 9, 7, 5)
    case[name][1, 2] = torch.nan
    out = fused(case)["out"].isnan()
    assert out[1].all() if name == "query" else out.any(-1).all()
    assert name != "query" or not out[[0, 2, 3]].any()


def test_dropout_is_that_of_every_backend():
    seed = draw_seed(torch.device("cpu"))
    case = make((2,), 5, 21, 9, 5)
    arguments = (*case.values(), None, None, seed, -1, -1, 0.4, 1.0)
    expected = chunked.forward(*arguments, True)
    there = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    for ours, theirs in zip(ops.forward(*there, True), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


def test_strides():
    case = make((2,), 5, 21, 9, 6)
    strided = {
        "query": case["query"].mT.contiguous().mT,
        "key": case["key"].repeat_interleave(2, -1)[..., ::2],
        "value": torch.cat([case["value"]] * 2, -1)[..., :6],
        "weight": case["weight"][:, None].expand(9, 3)[:, 0],
    }
    for (name, ours), expected in zip(fused(strided).items(), fused(case).values(), strict=True):
        assert_same(ours, expected, name)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "hidden", "values"])
def test_size_zero(empty):
    sizes = {"batch": 2, "queries": 3, "keys": 5, "hidden": 4, "values": 6} | {empty: 0}
    batch, *rest = sizes.values()
    inputs = make((batch,), *rest)
    upstream = random_upstream(fused(inputs))
    outputs, grads = gradients(fused, inputs, upstream)
    assert outputs["out"].shape == (batch, sizes["queries"], sizes["values"])
    assert all(grads[name].shape == inputs[name].shape for name in grads)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_gradcheck():
    inputs = [
        x.to(DEVICE).requires_grad_() for x in make((), 2, 3, 3, 2, dtype=torch.float64).values()
    ]
    assert torch.autograd.gradcheck(
        lambda *x: additive_attention(*x, need_weights=True, need_lse=True), inputs, fast_mode=True
    )
