"""Fixtures of the layers' tests."""

from __future__ import annotations

import pytest

from additive_attn.ops import memory as engine


@pytest.fixture
def passes(monkeypatch):
    """The number of steps of each pass that made a memory's shared gradients."""
    found = []
    gradients = engine._shared_gradients

    def counted(shared, needs, running, *masking):
        found.append(len(running.records))
        return gradients(shared, needs, running, *masking)

    monkeypatch.setattr(engine, "_shared_gradients", counted)
    return found
