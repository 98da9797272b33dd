"""A call that is repeated from its launch plan gives the same results, in Python and by the
compiled library. Kernels get addresses, in memory that several buffers share."""

from __future__ import annotations

import emulation
import pytest
import torch
from oracle import assert_same

pytest.importorskip("triton", minversion="3.6")

import emulated_libcuda
import test_plans

pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def planned():
    with emulation.running(), emulated_libcuda.plans_in_the_emulator():
        yield emulated_libcuda.plans


def check(plans, operator, *arguments):
    """Compares several calls of an operator, each with other numbers, and returns the last
    results."""
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
        expected = [expected] if single else expected
        for ours, theirs in zip([results] if single else results, expected, strict=True):
            assert_same(ours, theirs)
    number, stream, tensors = plans.begin(operator.__wrapped__, case)
    plan = plans._plans[plans._key(number, tensors)]
    assert isinstance(plan, plans.Plan)
    if plan.program is not None:  # the library has repeated the calls; here Python does
        assert plans._replay is None or plans._replay(number, stream, tensors)
        for ours, theirs in zip(plan.replay(tensors, stream), expected, strict=True):
            assert_same(ours, theirs)
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
