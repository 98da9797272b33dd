"""Promise 4: NaN and Inf in masked keys and values change no bit; attended ones propagate."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import OUTPUTS, assert_same, fused, gradients, make, random_upstream

from additive_attn import AdditiveAttention

QUERIES, KEYS, LENGTH = 5, 70, 41
POISONS = [math.nan, math.inf, -math.inf, 3e38]


def by_lengths(queries):
    return dict(lengths=torch.tensor([LENGTH, LENGTH]))


def by_rows(queries):
    return dict(lengths=torch.randint(0, LENGTH + 1, (2, queries)))


def by_bool(queries):
    return dict(attn_mask=(torch.arange(KEYS) < LENGTH).expand(2, 1, KEYS))


def by_float(queries):
    mask = torch.randn(2, queries, KEYS)
    mask[..., LENGTH:] = -math.inf
    return dict(attn_mask=mask)


def by_window(queries):
    return dict(window=(3, LENGTH - queries))


KINDS = [by_lengths, by_rows, by_bool, by_float, by_window]


def poisoned(inputs, poison, where=("key", "value")):
    bad = {name: x.clone() for name, x in inputs.items()}
    for name in where:
        bad[name][..., LENGTH:, :] = poison
    return bad


def zeroed(inputs):
    return poisoned(inputs, 0.0)


def by_one_length(queries):
    return dict(lengths=torch.tensor(LENGTH))


@pytest.mark.core
def test_one_length_without_a_batch():
    inputs = make((), 5, KEYS, 12, 9)
    upstream = {name: torch.randn_like(x) for name, x in fused(inputs).items()}
    whole = gradients(lambda x: fused(x, **by_one_length(5)), poisoned(inputs, math.nan), upstream)
    rows = gradients(
        lambda x: fused(x, lengths=torch.full((5,), LENGTH)), zeroed(inputs), upstream
    )
    for ours, expected in zip(whole, rows, strict=True):
        for name in ours:
            assert_same(ours[name], expected[name], name)


@pytest.mark.interpreter(queries=[1, 3], poison=[math.nan], kind=[by_lengths, by_float])
@pytest.mark.core
@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_not_a_bit_changes(queries, kind, poison):
    options = kind(queries)
    inputs = make((2,), queries, KEYS, 12, 9)
    upstream = {name: torch.randn_like(x) for name, x in fused(inputs, **options).items()}
    clean, clean_grads = gradients(lambda x: fused(x, **options), zeroed(inputs), upstream)
    bad, bad_grads = gradients(lambda x: fused(x, **options), poisoned(inputs, poison), upstream)
    for name in OUTPUTS:
        assert_same(bad[name], clean[name], name)
    for name in bad_grads:
        assert_same(bad_grads[name], clean_grads[name], f"gradient of {name}")
    for name in ("key", "value"):
        hidden = bad_grads[name][:, LENGTH:]
        assert torch.equal(hidden, torch.zeros_like(hidden)), f"gradient of masked {name}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [by_lengths, by_bool])
def test_other_dtypes(kind, dtype):
    inputs = make((2,), 6, KEYS, 12, 9, dtype=dtype)
    upstream = {"out": torch.randn(2, 6, 9).to(dtype)}
    clean, clean_grads = gradients(lambda x: fused(x, **kind(6)), zeroed(inputs), upstream)
    bad, bad_grads = gradients(lambda x: fused(x, **kind(6)), poisoned(inputs, math.nan), upstream)
    for name in OUTPUTS:
        assert_same(bad[name], clean[name], name)
    for name in bad_grads:
        assert_same(bad_grads[name], clean_grads[name], f"gradient of {name}")


@pytest.mark.parametrize("where", [("key",), ("value",)], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_padding_that_differs_by_row(queries, where):
    """One row is masked from a NaN key that other rows attend to: these alone are NaN."""
    inputs = make((), queries + 1, KEYS, 12, 9)
    mask = torch.ones(queries + 1, KEYS, dtype=torch.bool)
    mask[:-1, LENGTH:] = False
    upstream = {name: torch.randn_like(x) for name, x in fused(inputs, attn_mask=mask).items()}
    clean = fused(zeroed(inputs), attn_mask=mask)
    bad, grads = gradients(
        lambda x: fused(x, attn_mask=mask), poisoned(inputs, math.nan, where), upstream
    )
    for name in OUTPUTS:
        assert_same(bad[name][:-1], clean[name][:-1], name)
    assert bad["out"][-1].isnan().all()
    _, clean_grads = gradients(lambda x: fused(x, attn_mask=mask), zeroed(inputs), upstream)
    assert_same(grads["query"][:-1], clean_grads["query"][:-1], "gradient of query")


def test_large_masked_keys_do_not_change_the_form():
    """The form that computes a tile depends on the attended keys of its rows alone."""
    inputs = make((2,), 20, KEYS, 12, 9, spread=0.3)
    upstream = {"out": torch.randn(2, 20, 9)}
    small = gradients(lambda x: fused(x, **by_bool(20)), zeroed(inputs), upstream)
    for size in (5.0, 30.0, 1e4):
        large = gradients(lambda x: fused(x, **by_bool(20)), poisoned(inputs, size), upstream)
        for ours, theirs in zip(small, large, strict=True):
            for name in ours:
                assert_same(ours[name], theirs[name], f"{name} beside keys of {size}")


def test_split_keys():
    inputs = make((2,), 1, 9000, 6, 4)
    bad = {name: x.clone() for name, x in inputs.items()}
    bad["key"][:, 4000:] = math.nan
    bad["value"][:, 4000:] = math.inf
    options = dict(lengths=torch.tensor([4000, 17]))
    upstream = {"out": torch.randn(2, 1, 4)}
    clean, clean_grads = gradients(lambda x: fused(x, **options), inputs, upstream)
    dirty, dirty_grads = gradients(lambda x: fused(x, **options), bad, upstream)
    for name in OUTPUTS:
        assert_same(dirty[name], clean[name], name)
    for name in dirty_grads:
        assert_same(dirty_grads[name], clean_grads[name], f"gradient of {name}")


@pytest.mark.parametrize("kind", [by_lengths, by_bool])
def test_dropout(kind):
    inputs = make((2,), 6, KEYS, 12, 9)
    results = []
    for poison in (0.0, math.nan):
        torch.manual_seed(3)
        results.append(
            gradients(
                lambda x: fused(x, dropout_p=0.4, **kind(6)),
                poisoned(inputs, poison),
                {"out": torch.ones(2, 6, 9)},
            )
        )
    for clean, bad in zip(*results, strict=True):
        for name in clean:
            assert_same(bad[name], clean[name], name)


@pytest.mark.parametrize("argument", ["lengths", "key_padding_mask"])
def test_module(argument):
    """NaN features are projected to NaN keys. The values are the same NaN features."""
    layer = AdditiveAttention(10, 8)
    query, memory = torch.randn(2, 5, 10), torch.randn(2, 9, 10)
    lengths = torch.tensor([9, 4])
    option = {
        "lengths": lengths,
        "key_padding_mask": torch.arange(9) >= lengths[:, None],
    }[argument]
    bad = memory.clone()
    bad[1, 4:] = math.nan
    clean_out, clean_weights = layer(query, memory, **{argument: option})
    out, weights = layer(query, bad, **{argument: option})
    assert_same(out, clean_out)
    assert_same(weights, clean_weights)
    context, _ = layer.step(query[:, 0], layer.project(bad, **{argument: option}))
    assert context.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("queries", [1, 6])
def test_attended_values_propagate(queries, poison):
    inputs = make((), queries, KEYS, 12, 9)
    inputs["value"][3, 2] = poison
    out = fused(inputs)["out"]
    assert torch.equal(out.isfinite(), (torch.arange(9) != 2).expand(queries, 9))
    if poison == math.inf:
        assert (out[:, 2] == math.inf).all()


@pytest.mark.parametrize("queries", [1, 6])
def test_attended_nan_keys_and_queries_propagate(queries):
    inputs = make((2,), queries, KEYS, 12, 9)
    bad = {**inputs, "key": inputs["key"].clone()}
    bad["key"][0, 3, 2] = math.nan
    outputs = fused(bad)
    for name in OUTPUTS:
        assert outputs[name][0].isnan().all(), name
        assert_same(outputs[name][1], fused(inputs)[name][1], name)

    bad = {**inputs, "query": inputs["query"].clone()}
    bad["query"][0, 0, 2] = math.nan
    outputs = fused(bad)
    for name in OUTPUTS:
        assert outputs[name][0, 0].isnan().all(), name
        assert_same(outputs[name][0, 1:], fused(inputs)[name][0, 1:], name)


@pytest.mark.core
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_of_nan_reaches_only_the_keys_that_it_attends_to(name, dtype):
    """There are two groups of rows and keys. NaN in the first changes no result of the second."""
    rows, keys = 4, 30
    inputs = make((2,), 10, KEYS, 24, 17, dtype=dtype)
    mask = (torch.arange(10) < rows)[:, None] == (torch.arange(KEYS) < keys)
    spoilt = {n: x.clone() for n, x in inputs.items()}
    spoilt[name][:, 1] = math.nan
    upstream = random_upstream(fused(inputs), ("out", "lse"))
    clean, found = (
        gradients(lambda x: fused(x, attn_mask=mask), x, upstream) for x in (inputs, spoilt)
    )
    assert not found[0]["weights"][:, ~mask].any()
    for ours, expected in zip(found, clean, strict=True):
        for n in (*OUTPUTS, "query", "key", "value"):
            if n in ours:
                first = keys if n in ("key", "value") else rows
                torch.testing.assert_close(ours[n][:, first:], expected[n][:, first:], msg=n)


@pytest.mark.core
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_upstream_that_is_not_finite_ends_at_the_keys_that_a_row_attends_to(queries, poison):
    """It does so in the plain layer too, since ``masked_fill`` gives masked pairs no gradient."""
    inputs = make((2,), queries, KEYS, 12, 9)
    upstream = {"out": torch.randn(2, queries, 9)}
    upstream["out"][0, 0] = poison
    lengths = torch.tensor([LENGTH, 60])
    _, grads = gradients(lambda x: fused(x, lengths=lengths), inputs, upstream)
    assert not grads["key"][0, :LENGTH].isfinite().all()
    assert grads["key"][0, LENGTH:].eq(0).all()
    assert grads["key"][1].isfinite().all()
    assert grads["query"][1].isfinite().all()
