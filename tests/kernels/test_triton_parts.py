"""Kernels that take a row, or sums over ranges of keys, part by part, with parts so small that
short inputs have several."""

from __future__ import annotations

import pytest
import torch
from oracle import check_against_plain, generator, make

from additive_attn.backends.triton import arguments, tiles

pytestmark = pytest.mark.triton


def change(monkeypatch, name, **fields):
    kept = getattr(tiles, name)
    monkeypatch.setattr(tiles, name, lambda *sizes: {**kept(*sizes), **fields})


@pytest.mark.parametrize("processors", [1, 132], ids=["whole", "split"])
def test_long_rows(processors, monkeypatch):
    """G of rows of more keys than a thread holds; of few rows, split over programs."""
    monkeypatch.setattr(arguments, "processors", lambda device: processors)
    change(monkeypatch, "row_tile", BLOCK=32, WHOLE=False, ROWS=2, num_warps=1)
    monkeypatch.setattr(tiles, "row_pass_tile", lambda *sizes: None)
    mask = torch.rand(3, 300, generator=generator(1)) < 0.7
    case = make((1,) if processors > 1 else (4,), 3, 300, 8, 6)
    check_against_plain([case], upstream_of=["out", "weights", "lse"], attn_mask=mask)


def test_rows_in_parts(monkeypatch):
    """The same in one kernel with the scores."""
    change(monkeypatch, "row_pass_blocks", BLOCK=32, ROWS=2)
    mask = torch.rand(3, 150, generator=generator(1)) < 0.7
    upstream = ["out", "weights", "lse"]
    check_against_plain([make((4,), 3, 150, 8, 6)], upstream_of=upstream, attn_mask=mask)


def test_the_gradient_of_the_weight_from_ranges_of_keys(monkeypatch):
    monkeypatch.setattr(tiles, "SUMMED_KEYS", 110)
    check_against_plain([make((2,), 70, 70, 6, 5)])


@pytest.mark.parametrize("queries", [1, 3])
def test_more_ranges_than_are_merged_at_a_time(queries, monkeypatch):
    monkeypatch.setattr(arguments, "processors", lambda device: 132)
    change(monkeypatch, "merge_tile", CHUNK=1)
    change(monkeypatch, "sum_tile", CHUNK=1)
    case = make((2,), queries, 300, 8, 6)
    check_against_plain([case], upstream_of=["out", "weights", "lse"])
