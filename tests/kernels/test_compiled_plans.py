"""A call that is repeated from its launch plan computes the same: kernels are given addresses, of
memory that several buffers share."""

from __future__ import annotations

import emulation
import pytest
import test_plans
import torch
from oracle import assert_same

pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """Calls on CPU tensors have plans, and all memory that plans make is known."""
    plans = pytest.importorskip("additive_attn.backends.triton.plans")

    def empty(*arguments, **options):
        x = torch.empty_strided(*arguments, **options)
        emulation.memory.append(x)
        return x

    def operate(*arguments):
        made = original(*arguments)
        emulation.memory.extend(x for _, x in made)
        return made

    original = plans._operate
    monkeypatch.setattr(plans, "on_cpu", True)
    monkeypatch.setattr(plans, "_empty", empty)
    monkeypatch.setattr(plans, "_operate", operate)
    plans.forget()
    with emulation.running():
        yield plans
    plans.forget()
    emulation.memory.clear()


def check(plans, operator, *arguments):
    """The results of one call after another, with other numbers each time."""
    results = None
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        case = tuple(
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(
                torch.randn(x.shape, generator=g)
            )
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for x in arguments
        )
        emulation.memory[:] = [x for x in case if isinstance(x, torch.Tensor)]
        expected = operator.__wrapped__(*case)
        results = operator(*case)
        single = isinstance(expected, torch.Tensor)
        pairs = [(results, expected)] if single else zip(results, expected, strict=True)
        for ours, theirs in pairs:
            assert_same(ours, theirs)
    number, _, tensors = plans.begin(operator.__wrapped__, arguments)
    assert isinstance(plans._plans[plans._key(number, tensors)], plans.Plan)
    return results


@pytest.mark.parametrize("name", test_plans.CALLS)
def test_forward_and_backward(planned, name):
    from additive_attn.backends import triton as operators

    call = test_plans.CALLS[name]
    out, weights, lse = check(planned, operators.forward, *call, True)
    check(planned, operators.backward, out, weights, lse, *call, lse, *(True,) * 5)


@pytest.mark.parametrize("located", [False, True])
def test_steps(planned, located):
    from additive_attn.backends import triton as operators

    location = (torch.randn(2, 3, 40), torch.randn(3, 36)) if located else (None, None)
    lengths = torch.tensor([[7], [40]])
    call = (*test_plans.inputs(1)[:4], None, *location, None, lengths, None, 0.0, 1.0)
    out, weights, lse = check(planned, operators.step, *call)
    check(planned, operators.step_backward, out, weights, None, *call, weights, lse, None)
