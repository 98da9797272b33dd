"""Promise 6: forward and backward repeat bit for bit, for any number of threads."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_all_same, fused, gradients, make, random_upstream

CASES = {
    "self-attention": (make((2,), 150, 200, 48, 33), {}),
    "one query, keys split": (make((), 1, 20000, 33, 20), {}),
    "few queries": (make((2,), 3, 5000, 16, 12), {}),
    "decoder step": (make((40,), 1, 90, 64, 48), {}),
    "many short": (make((300, 2), 5, 9, 16, 8, heads=True), {}),
    "causal": (make((3,), 260, 260, 24, 17), dict(is_causal=True)),
    "lengths": (make((6,), 40, 300, 24, 17), dict(lengths=torch.tensor([300, 1, 0, 77, 64, 65]))),
    "float mask": (make((2,), 140, 170, 24, 17), dict(attn_mask=torch.linspace(-3, 3, 170))),
    "rows beyond the workspace": (make((), 1500, 1600, 8, 8), {}),
    "double": (make((2,), 60, 130, 33, 20, dtype=torch.float64), {}),
    "bfloat16": (make((2,), 60, 130, 33, 20, dtype=torch.bfloat16), {}),
}


def run(case):
    inputs, options = case
    if "attn_mask" in options:
        inputs, options = {**inputs, **options}, {}

    def call(x):
        return fused(x, **options)

    outputs, grads = gradients(call, inputs, random_upstream(call(inputs)))
    return outputs | {f"gradient of {name}": grad for name, grad in grads.items()}


@pytest.mark.kernel  # torch's matmul, in the fallback, depends on the number of threads
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_thread_counts(case, threads):
    """Also with more threads than cores, results do not depend on which thread computes what."""
    threads(1)
    one = run(case)
    for count in (2, 3, 8):
        threads(count)
        assert_all_same(run(case), one)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_repeats(case, threads):
    threads(3)
    first = run(case)
    for _ in range(3):
        assert_all_same(run(case), first)


def test_many_repeats(threads):
    """A call of several tasks is repeated 100 times on more threads than cores, since races are
    rare."""
    threads(6)
    case = make((2,), 40, 200, 16, 12), {}
    first = run(case)
    for _ in range(100):
        assert_all_same(run(case), first)


def test_outputs_do_not_depend_on_what_is_returned():
    inputs = make((2,), 40, 170, 16, 12)
    everything = fused(inputs)
    from additive_attn import additive_attention

    out = additive_attention(*inputs.values())
    assert torch.equal(out, everything["out"])


def test_recording_gradients_changes_nothing():
    inputs = make((2,), 40, 170, 16, 12)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    assert_all_same({k: v.detach() for k, v in fused(leaves).items()}, fused(inputs))
    with torch.inference_mode():
        inside = fused(inputs)
    assert_all_same({k: v.clone() for k, v in inside.items()}, fused(inputs))


def test_deterministic_mode():
    """With torch's deterministic mode on, calls do not warn, and give the same bits."""
    case = CASES["self-attention"]
    expected = run(case)
    torch.use_deterministic_algorithms(True)
    try:
        assert_all_same(run(case), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_with_dropout():
    inputs = make((2,), 40, 170, 16, 12)
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        results.append(fused(inputs, dropout_p=0.3))
    assert_all_same(*results)


def test_a_row_does_not_depend_on_its_neighbours():
    """A row gives the same result up to rounding in a call of 1, 2, 64 or 150 rows."""
    inputs = make((), 150, 90, 16, 12)
    whole = fused(inputs)["out"]
    for count in (1, 2, 64):
        part = fused({**inputs, "query": inputs["query"][:count]})["out"]
        torch.testing.assert_close(part, whole[:count], atol=2e-6, rtol=1e-5)
