"""The emulator of compiled kernels reports each fault, and does not report the repaired kernel."""

from __future__ import annotations

from typing import NamedTuple

import emulation
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton
import triton.language as tl
from triton.language.extra import libdevice

from additive_attn.backends.triton.merging import is_last

pytestmark = pytest.mark.compiled
THREADS = 128


class Pair(NamedTuple):
    first: torch.Tensor | None
    second: torch.Tensor | None
    count: int


@triton.jit
def turn_kernel(x, BARRIER: tl.constexpr):
    """Writes numbers, and rotates them by half of their length."""
    i = tl.arange(0, 128)
    tl.store(x + i, i)
    if BARRIER:
        tl.debug_barrier()
    y = tl.load(x + (i + 64) % 128)
    tl.debug_barrier()
    tl.store(x + i, y)


@triton.jit
def copy_kernel(x, y, count, sign):
    i = tl.arange(0, 128)
    value = tl.load(x + i, mask=i < count, other=0.0)
    tl.store(y + i, libdevice.copysign(value, sign), mask=i < count)


@triton.jit
def sum_kernel(pair, y):
    i = tl.arange(0, 128)
    total = tl.zeros([128], tl.float32)
    if pair.first is not None:
        total += tl.load(pair.first + i, mask=i < pair.count, other=0.0)
    if pair.second is not None:
        total += tl.load(pair.second + i, mask=i < pair.count, other=0.0)
    tl.store(y + i, total)


@triton.jit
def choice_kernel(x, first, second, third):
    """Stores an argument that each program chooses, from their addresses."""
    program = tl.program_id(0)
    number = tl.where(program > 0, tl.where(program > 1, third, second), first)
    tl.store(x + program, number)


@triton.jit
def last_kernel(parts, tickets, total, programs, TICKET: tl.constexpr):
    """One program adds up the numbers that all programs have stored."""
    i = tl.arange(0, 128)
    tl.store(parts + 128 * tl.program_id(0) + i, i)
    if TICKET:
        last = is_last(tickets, programs)
    else:
        tl.debug_barrier()
        last = tl.program_id(0) == programs - 1
    if last:
        sums = tl.zeros([128], tl.int32)
        for program in range(0, programs):
            sums += tl.load(parts + 128 * program + (i + 64) % 128)
        tl.store(total + i, sums)


def launch(kernel, *arguments, programs=1):
    kernel[(programs,)](*arguments, enable_fp_fusion=True)


def test_a_race_is_reported():
    x = torch.zeros(THREADS, dtype=torch.int32)
    with pytest.raises(AssertionError, match="race in global memory: turn_kernel"):
        with emulation.running():
            launch(turn_kernel, x, False)
    with emulation.running():
        launch(turn_kernel, x, True)
    assert torch.equal(x, (torch.arange(THREADS, dtype=torch.int32) + 64) % THREADS)


def test_a_ticket_orders_programs():
    """A program that has drawn the last ticket may read the stores of others; no other program
    may."""
    parts, total = torch.zeros(3, THREADS, dtype=torch.int32), torch.zeros(THREADS).int()

    def run(ticket):
        with emulation.running():
            launch(last_kernel, parts, torch.zeros(1).int(), total, 3, ticket, programs=3)

    run(True)
    assert torch.equal(total, 3 * ((torch.arange(THREADS, dtype=torch.int32) + 64) % THREADS))
    with pytest.raises(AssertionError, match="race between programs: last_kernel"):
        run(False)


@pytest.mark.parametrize("sign", [1.5, -1.5])
def test_an_access_beyond_a_tensor_is_reported(sign):
    x, y = torch.randn(100), torch.zeros(100)
    with pytest.raises(AssertionError, match="out of bounds: copy_kernel"):
        with emulation.running():
            launch(copy_kernel, x, y, 101, sign)
    with emulation.running():
        launch(copy_kernel, x, y, 100, sign)
    assert torch.equal(y, x.abs() * (1 if sign > 0 else -1))


def test_reads_of_unwritten_bytes_are_reported():
    """Unwritten bytes are reported if a kernel or torch reads them, or if they are in the
    result."""
    x = torch.randn(THREADS)

    def kernel_reads():
        y = torch.empty(THREADS)
        launch(copy_kernel, torch.empty(THREADS), y, THREADS, 1.0)
        return y

    with pytest.raises(AssertionError, match="uninitialised global memory: copy_kernel"):
        with emulation.running():
            emulation.tracked(kernel_reads)()

    def written(count):
        y = torch.empty(THREADS)
        launch(copy_kernel, x, y, count, 1.0)
        return y

    with pytest.raises(emulation.unwritten(), match="add"):
        emulation.tracked(lambda: written(THREADS - 1) + 1)()
    with pytest.raises(emulation.unwritten(), match="result 0 reads 1 of 128"):
        emulation.tracked(written)(THREADS - 1)
    assert torch.equal(emulation.tracked(written)(THREADS), x.abs())


def test_a_choice_among_arguments():
    x = torch.zeros(3, dtype=torch.int32)
    choice_kernel[(3,)](x, 7, -2, 2**31 - 1)
    assert x.tolist() == [7, -2, 2**31 - 1]


@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize("both", [True, False])
def test_tuples_are_arguments(count, both):
    """The tensors and numbers of a tuple are arguments; None and 1 are constants of the kernel."""
    x, y = torch.randn(THREADS), torch.zeros(THREADS)
    launch(sum_kernel, Pair(x if both else None, x, count), y)
    expected = torch.where(torch.arange(THREADS) < count, (1 + both) * x, 0.0)
    assert torch.equal(y, expected)
