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
    mask = torch.rand(3, 300, generator=generator(1)) < 0.7
    case = make((1,) if processors > 1 else (4,), 3, 300, 8, 6)
    check_against_plain([case], upstream_of=["out", "weights", "lse"], attn_mask=mask)


@pytest.mark.parametrize("queries", [1, 3])
def test_more_ranges_than_are_merged_at_a_time(queries, monkeypatch):
    monkeypatch.setattr(arguments, "processors", lambda device: 132)
    change(monkeypatch, "merge_tile", CHUNK=1)
    change(monkeypatch, "sum_tile", CHUNK=1)
    case = make((2,), queries, 300, 8, 6)
    check_against_plain([case], upstream_of=["out", "weights", "lse"])
