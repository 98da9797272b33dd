"""Kernels compute a row, or sums over ranges of keys, part by part. Here parts are so small that
short inputs have several."""

from __future__ import annotations

import pytest
import torch
from oracle import check_against_plain, fused, generator, make
from paths import DEVICE

from additive_attn import additive_attention
from additive_attn.backends.triton import arguments, feature_pass, one_pass, prepare, tiles

pytestmark = pytest.mark.triton


def change(monkeypatch, name, **fields):
    kept = getattr(tiles, name)
    monkeypatch.setattr(tiles, name, lambda *sizes: {**kept(*sizes), **fields})


def returned(monkeypatch, module, name):
    """Records the results of a function, and returns their list."""
    results, kept = [], getattr(module, name)

    def function(*arguments, **options):
        results.append(kept(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(module, name, function)
    return results


@pytest.mark.parametrize("processors", [1, 132], ids=["whole", "split"])
def test_long_rows(processors, monkeypatch):
    """G of rows with more keys than a thread stores; few rows are split over programs."""
    monkeypatch.setattr(arguments, "processors", lambda device: processors)
    change(monkeypatch, "row_tile", BLOCK=32, WHOLE=False, ROWS=2, num_warps=1)
    monkeypatch.setattr(tiles, "row_pass_tile", lambda *sizes: None)
    mask = torch.rand(3, 300, generator=generator(1)) < 0.7
    case = make((1,) if processors > 1 else (4,), 3, 300, 8, 6)
    check_against_plain([case], upstream_of=["out", "weights", "lse"], attn_mask=mask)


def test_rows_in_parts(monkeypatch):
    """A single kernel computes the scores and such rows of G."""
    change(monkeypatch, "row_pass_blocks", BLOCK=32, ROWS=2)
    mask = torch.rand(3, 150, generator=generator(1)) < 0.7
    upstream = ["out", "weights", "lse"]
    check_against_plain([make((4,), 3, 150, 8, 6)], upstream_of=upstream, attn_mask=mask)


@pytest.mark.parametrize("small", [True, False])
def test_sums_over_tiles_of_rows_and_ranges_of_keys(small, monkeypatch):
    """The last program of each sum adds it up, or separate kernels do."""
    plans = returned(monkeypatch, feature_pass, "feature_plan")
    if not small:
        monkeypatch.setattr(feature_pass, "ticket_count", lambda *sizes: 2**20)
    check_against_plain([make((2,), 70, 300, 6, 5)])
    assert plans
    assert all(plan.row_tiles > 1 and plan.ranges > 1 for plan in plans)


@pytest.mark.parametrize("hidden", [520, 1020])
def test_programs_that_prepare_several_groups_of_rows(hidden, monkeypatch):
    """Two entries have 3 groups of 8 rows of queries each, and 6 of keys. Programs compute 5
    groups or all, and write the bits that programs of one group write. Scores may not show a
    fault: if the size of a row is not written, it may read as too large for exponentials, and the
    row is computed without them."""
    case = make((2,), 21, 45, hidden, 1)
    prepared = returned(monkeypatch, arguments, "prepare")
    for processors in (2**20, 4, 1):
        monkeypatch.setattr(prepare, "processors", lambda device, n=processors: n)
        fused(case)
    single, *several = prepared
    for other in several:
        for rows, rows_of_other in zip(single, other, strict=True):
            for name, x, y in zip(rows._fields, rows, rows_of_other, strict=True):
                assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "hidden", "spread"),
    [
        ((2,), 5, 70, 256, 0.1), ((), 12, 70, 264, 1.0), ((), 25, 60, 300, 0.1),
        ((), 25, 60, 300, 3.0),
    ],
)  # fmt: skip
def test_features_shared_by_groups_of_threads(batch, queries, keys, hidden, spread, monkeypatch):
    """Threads share features where there are few tiles; with |q|, |k| <= 1 in the difference form,
    and with opposite pairs."""
    chosen = returned(monkeypatch, tiles, "attend_tile")
    monkeypatch.setattr(arguments, "processors", lambda device: 132)
    case = make(batch, queries, keys, hidden, 5, spread=spread)
    if spread == 0.1:
        case = {name: x.clamp(-1, 1) for name, x in case.items()}
    case["key"][..., 3, :] = -case["query"][..., 1, :]
    check_against_plain([case])
    assert chosen
    assert all(tile.SPLIT > 1 for tile in chosen)


@pytest.mark.parametrize("queries", [1, 3])
def test_more_ranges_than_are_merged_at_a_time(queries, monkeypatch):
    monkeypatch.setattr(arguments, "processors", lambda device: 132)
    change(monkeypatch, "merge_tile", CHUNK=1)
    change(monkeypatch, "sum_tile", CHUNK=1)
    case = make((2,), queries, 300, 8, 6)
    check_against_plain([case], upstream_of=["out", "weights", "lse"])


def some(queries, keys):
    """Returns a mask that leaves a row and a range of keys without attended pairs."""
    mask = torch.rand(queries, keys, generator=generator(1), device=DEVICE) < 0.7
    mask[1], mask[:, 128:256] = False, False
    return mask


RANGES = {  # batch, queries, keys, values, dtype, whether there is a mask
    "registers": ((2,), 5, 530, 5, torch.float32, True),
    "memory": ((), 20, 530, 150, torch.float32, True),
    "17 ranges": ((), 2, 17 * 256, 2, torch.float32, False),
    "rounded": ((2,), 5, 530, 70, torch.bfloat16, True),
    "float64": ((2,), 3, 150, 5, torch.float64, True),
    "scores overflow": ((), 5, 530, 5, torch.float32, True),
    "values that are not finite": ((2,), 5, 530, 5, torch.float32, True),
}


@pytest.mark.parametrize("kind", RANGES)
def test_the_last_program_merges_ranges_of_keys(kind, monkeypatch):
    """It does so if weights are not returned; otherwise another kernel merges."""
    batch, queries, keys, values, dtype, masked = RANGES[kind]
    monkeypatch.setattr(arguments, "processors", lambda device: 132)
    case = make(batch, queries, keys, 3, values, dtype=dtype)
    if kind == "scores overflow":
        case["weight"] *= torch.inf
    elif kind == "values that are not finite":
        case["value"][0, 300, 1], case["value"][1, 7, 2] = torch.nan, torch.inf
    options = dict(attn_mask=some(queries, keys) if masked else None)
    expected = fused(case, **options)
    monkeypatch.setattr(one_pass, "merge", None)
    out, lse = additive_attention(*case.values(), need_lse=True, **options)
    close = dict(rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps, equal_nan=True)
    torch.testing.assert_close(out, expected["out"], **close)
    torch.testing.assert_close(lse, expected["lse"], **close)
