"""The Triton path is chosen only where it agrees with plain PyTorch."""

from __future__ import annotations

import sys

import pytest
import torch
from oracle import DEVICE, fused, make

from additive_attn.backends.plain import blocks
from additive_attn.ops.checks import warn_user

pytestmark = pytest.mark.triton


def probe():
    from additive_attn.backends import triton

    fused(make())  # which says that Triton's kernels are what runs
    triton.probe(torch.device(DEVICE), blocks.forward, blocks.backward, warn_user)


def test_kernels_agree():
    probe()


@pytest.mark.parametrize(
    ("module", "name", "queries"),
    [("one_pass", "pass_splits", 5), ("decode_forward", "decode_inputs", 1)],
)
def test_a_broken_kernel_is_refused(module, name, queries, monkeypatch):
    """A kernel that is given half of the keys, or the values for the keys."""
    room = sys.modules[f"additive_attn.backends.triton.{module}"]
    right = getattr(room, name)

    def broken(*arguments):
        results = right(*arguments)
        if name == "pass_splits":
            return 1, arguments[1] // 2
        query, key, value, *others = results
        return (query, value, key, *others)

    monkeypatch.setattr(room, name, broken)
    with pytest.raises(RuntimeError, match=rf"another out than plain PyTorch.* {queries} queries"):
        probe()
