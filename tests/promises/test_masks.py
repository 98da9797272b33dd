"""Every kind of masking, and every intersection of kinds, gives the results of a dense mask."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import (
    OUTPUTS,
    assert_layout_free,
    check_against_plain,
    dense_mask,
    error,
    fused,
    generator,
    gradients,
    make,
    plain,
    random_upstream,
)

QUERIES, KEYS = 11, 21


def masks(kind, shape):
    g = generator(5)
    if kind == "bool":
        return torch.rand(shape, generator=g) < 0.7
    mask = torch.randn(shape, generator=g)
    return mask.masked_fill(torch.rand(shape, generator=g) < 0.3, -math.inf)


ATTN_MASKS = {
    "no mask": None,
    "bool": masks("bool", (QUERIES, KEYS)),
    "float": masks("float", (3, 1, KEYS)),
}
LENGTHS = {
    "no lengths": None,
    "(B,)": torch.tensor([21, 4, 0]),
    "(B, Lq)": torch.randint(0, KEYS + 1, (3, QUERIES), generator=generator(2)),
}
WINDOWS = [None, (0, 0), (2, 3), (-1, 1), (4, -1), (-1, -1), (100, 100)]


@pytest.mark.interpreter(window=[None, (2, 3)], is_causal=[False])
@pytest.mark.core
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("attn_mask", ATTN_MASKS.values(), ids=ATTN_MASKS.keys())
def test_intersections(attn_mask, lengths, window, is_causal):
    options = dict(attn_mask=attn_mask, lengths=lengths, window=window, is_causal=is_causal)
    inputs = make((3,), QUERIES, KEYS, 9, 6)
    outputs = fused(inputs, **options)
    allowed = dense_mask(inputs, **options)
    if allowed is not None:
        allowed = allowed.expand(3, QUERIES, KEYS)
        # Weights are exactly zero where masked, and positive elsewhere: roundings do not decide
        # which pairs are attended.
        assert torch.equal(outputs["weights"] != 0, allowed)
        assert torch.equal(outputs["lse"] == -math.inf, ~allowed.any(-1))
    bias = attn_mask if attn_mask is not None and attn_mask.is_floating_point() else None
    doubled = {name: x.double() for name, x in inputs.items()}
    upstream = random_upstream(outputs, ["out", "weights"])
    exact, exact_grads = gradients(
        lambda x: plain(*x.values(), bias=bias, allowed=allowed), doubled, upstream
    )
    _, grads = gradients(lambda x: fused(x, **options), inputs, upstream)
    for name in OUTPUTS:
        assert error(outputs[name], exact[name]) < 5e-6, name
    for name in grads:
        assert error(grads[name], exact_grads[name]) < 2e-4, f"gradient of {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "masking",
    [
        dict(is_causal=True),
        dict(window=(7, 3)),
        dict(lengths=torch.tensor([70, 33])),
        dict(attn_mask=torch.rand(40, 70, generator=generator(0)) < 0.6),
    ],
    ids=["causal", "window", "lengths", "bool"],
)
def test_accuracy_under_masks(masking, dtype):
    check_against_plain(
        [make((2,), 40, 70, 24, 12, dtype=dtype, seed=seed) for seed in range(3)],
        upstream_of=("out", "weights"),
        **masking,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_accuracy_of_the_gradient_of_a_float_mask(dtype):
    g = generator(0)
    for shape in [(40, 70), (70,), (2, 1, 70), (40, 1), (1, 40, 70), ()]:
        mask = torch.randn(shape, generator=g).to(dtype)
        cases = [make((2,), 40, 70, 24, 12, dtype=dtype, seed=seed) for seed in range(3)]
        # A mask that shifts a whole row has a zero gradient, since terms of size 10 cancel.
        check_against_plain(cases, attn_mask=mask, magnitude=10.0)


SHAPES = [
    (), (KEYS,), (1,), (1, KEYS), (QUERIES, 1), (1, 1), (QUERIES, KEYS), (3, 1, 1), (1, 1, KEYS),
    (3, QUERIES, KEYS), (2, 1, 1, KEYS), (2, 1, QUERIES, KEYS), (1, 3, 1, KEYS),
    (2, 3, QUERIES, 1),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_broadcast(shape, kind):
    inputs = make((2, 3), QUERIES, KEYS, 9, 6)
    inputs["attn_mask"] = masks(kind, shape)

    def call(x, expand):
        mask = x["attn_mask"]
        mask = mask.expand(2, 3, QUERIES, KEYS).contiguous() if expand else mask
        return fused({**x, "attn_mask": mask})

    upstream = random_upstream(call(inputs, True), ["out", "weights"])
    full, full_grads = gradients(lambda x: call(x, True), inputs, upstream)
    small, small_grads = gradients(lambda x: call(x, False), inputs, upstream)
    assert_layout_free(small, full)
    for name in small_grads:
        torch.testing.assert_close(small_grads[name], full_grads[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("queries", [1, 5, 70])
@pytest.mark.parametrize("stop", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 140])
def test_lengths_around_tiles(queries, stop):
    """A length gives the results of fewer keys."""
    inputs = make((), queries, 140, 12, 9)
    short = {n: x[:stop] if n in ("key", "value") else x for n, x in inputs.items()}
    upstream = {"out": torch.randn(queries, 9), "lse": torch.randn(queries)}
    masked, grads = gradients(lambda x: fused(x, lengths=torch.tensor(stop)), inputs, upstream)
    expected, expected_grads = gradients(fused, short, upstream)
    torch.testing.assert_close(masked["out"], expected["out"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(masked["lse"], expected["lse"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(masked["weights"][:, :stop], expected["weights"])
    assert not masked["weights"][:, stop:].any()
    for name in grads:
        ours = grads[name][:stop] if name in ("key", "value") else grads[name]
        torch.testing.assert_close(ours, expected_grads[name], atol=2e-5, rtol=1e-4)
        if name in ("key", "value"):
            assert not grads[name][stop:].any()


@pytest.mark.core
@pytest.mark.parametrize("queries,keys", [(150, 150), (40, 200), (200, 40), (1, 70), (300, 1)])
@pytest.mark.parametrize(
    "options",
    [dict(is_causal=True), *(dict(window=w) for w in ((10, 0), (0, 65), (64, 64)))],
    ids=str,
)
def test_bands_over_many_tiles(queries, keys, options):
    """Tiles without a pair of the band are skipped; tiles on its edge are not."""
    inputs = make((), queries, keys, 8, 5)
    allowed = dense_mask(inputs, **options)
    upstream = {"out": torch.randn(queries, 5), "weights": torch.randn(queries, keys)}
    ours, grads = gradients(lambda x: fused(x, **options), inputs, upstream)
    dense, dense_grads = gradients(lambda x: fused(x, attn_mask=allowed), inputs, upstream)
    assert torch.equal(ours["weights"] != 0, allowed)
    for name in OUTPUTS:
        torch.testing.assert_close(ours[name], dense[name], atol=2e-6, rtol=1e-5)
    for name in grads:
        torch.testing.assert_close(grads[name], dense_grads[name], atol=5e-5, rtol=1e-4)


def test_causal_is_upper_left_aligned():
    weights = fused(make((), 3, 5, 4, 2), is_causal=True)["weights"]
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(weights != 0, expected)


def test_window_counts_from_the_query():
    weights = fused(make((), 4, 6, 4, 2), window=(1, 2))["weights"]
    expected = torch.tensor(
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    ).bool()
    assert torch.equal(weights != 0, expected)


def test_true_means_attend_as_in_scaled_dot_product_attention():
    inputs = make((), 3, 4, 8, 5)
    mask = torch.tensor([True, False, True, False])
    ours = fused(inputs, attn_mask=mask)["weights"]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"], inputs["key"], torch.eye(4), attn_mask=mask
    )
    assert torch.equal(ours != 0, theirs != 0)


@pytest.mark.parametrize("big", [2**31 - 1, 2**31, 2**62, 2**63 - 1])
def test_windows_beyond_every_length(big):
    inputs = make((2,), 7, 30, 8, 5)
    upstream = {"out": torch.randn(2, 7, 5)}
    expected = gradients(fused, inputs, upstream)
    for window in [(big, big), (big, -1), (-1, big)]:
        got = gradients(lambda x, w=window: fused(x, window=w), inputs, upstream)
        for ours, theirs in zip(got, expected, strict=True):
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], msg=f"{window} {name}")


def test_causal_second_derivative_with_a_huge_window():
    inputs = make((), 3, 4, 3, 2, dtype=torch.float64)
    results = []
    for window in [(2**63 - 1, 2**63 - 1), None]:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out = fused(leaves, window=window)["out"]
        grad = torch.autograd.grad(out.square().sum(), leaves["query"], create_graph=True)[0]
        results.append(torch.autograd.grad(grad.square().sum(), leaves["key"])[0])
    torch.testing.assert_close(*results)


def test_integer_dtypes_of_lengths():
    inputs = make((3,), QUERIES, KEYS, 9, 6)
    expected = fused(inputs, lengths=torch.tensor([21, 4, 0]))
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        got = fused(inputs, lengths=torch.tensor([21, 4, 0], dtype=dtype))
        assert_layout_free(got, expected)


def test_lengths_of_heads_and_of_unbatched_inputs():
    inputs = make((2, 3), 4, KEYS, 9, 6)
    per_entry = fused(inputs, lengths=torch.tensor([5, 9]))
    per_row = fused(inputs, lengths=torch.tensor([[1, 5, 0, 2], [9, 9, 1, 3]]))
    for b, h in itertools.product(range(2), range(3)):
        alone = {n: x[b, h] if n != "weight" else x for n, x in inputs.items()}
        one = fused(alone, lengths=torch.tensor([5, 9][b]))
        torch.testing.assert_close(per_entry["weights"][b, h], one["weights"])
        rows = fused(alone, lengths=torch.tensor([[1, 5, 0, 2], [9, 9, 1, 3]][b]))
        torch.testing.assert_close(per_row["weights"][b, h], rows["weights"])


def test_masked_float_positions_get_no_gradient():
    inputs = make((), 6, 20, 9, 6)
    inputs["attn_mask"] = masks("float", (6, 20))
    hidden = inputs["attn_mask"] == -math.inf
    _, grads = gradients(fused, inputs, {"out": torch.randn(6, 6), "lse": torch.randn(6)})
    assert torch.equal(grads["attn_mask"] == 0, hidden)


@pytest.mark.core
@pytest.mark.parametrize(
    "batch,queries,keys,mask",
    [(1024, 32, 16, (16,)), (16, 1024, 16, (1, 16)), (512, 2, 16, (2, 16)), (512, 2, 16, (2, 1))],
    ids=str,
)
def test_gradient_of_a_mask_shared_by_many_rows(batch, queries, keys, mask):
    """A sum has tens of thousands of terms, as for a learned position bias."""
    g = generator(0)
    cases = [make((batch,), queries, keys, 4, 4, seed=seed) for seed in range(2)]
    check_against_plain(cases, upstream_of=["out"], attn_mask=torch.randn(mask, generator=g))
