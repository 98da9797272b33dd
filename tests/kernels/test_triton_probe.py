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

    fused(make())  # without a call of Triton's kernels the path fails
    triton.probe(torch.device(DEVICE), blocks.forward, blocks.backward, warn_user)


def test_kernels_agree():
    probe()


def half_of_few_keys(splits, per_split):
    return 1, 20


def without_the_last_range(splits, per_split):
    return max(1, splits - 1), per_split


@pytest.mark.parametrize(
    ("module", "name", "broken", "what"),
    [
        ("one_pass", "pass_splits", half_of_few_keys, "out .* 5 queries and 40 keys"),
        ("decode_forward", "decode_inputs", None, "out .* 1 queries and 40 keys"),
        # Results of ranges of keys: few keys have a single range.
        ("one_pass", "pass_splits", without_the_last_range, "out .* 5 queries and 600"),
        ("feature_pass", "pass_splits", without_the_last_range, "grad .* 5 queries and 600"),
        ("decode_forward", "decode_splits", without_the_last_range, "out .* 1 queries and 600"),
        ("decode_backward", "key_splits", without_the_last_range, "grad .* 1 queries and 600"),
    ],
)
def test_a_broken_kernel_is_refused(module, name, broken, what, monkeypatch):
    """A broken kernel reads fewer keys, or the values as keys."""
    room = sys.modules[f"additive_attn.backends.triton.{module}"]
    right = getattr(room, name)

    def wrong(*arguments):
        results = right(*arguments)
        if broken is not None:
            return broken(*results)
        query, key, value, *others = results
        return (query, value, key, *others)

    monkeypatch.setattr(room, name, wrong)
    with pytest.raises(RuntimeError, match=f"another {what}"):
        probe()
