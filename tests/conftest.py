"""What every test relies on: the kernel is what runs, and memory never starts out as zeros."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from oracle import DEVICE, ON_KERNEL

from additive_attn.ops import dispatch

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


def poison_memory() -> None:
    """Fills every fresh allocation with 0x7f: huge as float and double, NaN as half.

    Outputs and buffers that a kernel forgets to write usually read as zero, which hides the bug.
    """
    perturb, mmap_threshold = -6, -3
    try:
        libc = ctypes.CDLL(None)
        # Memory that comes fresh from mmap is not perturbed, so large blocks use the heap too.
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(perturb, 0x80)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


poison_memory()


def poison_device() -> None:
    """Gives back blocks full of NaN, small and large, which the allocator hands out next."""
    sizes = [2**9] * 64 + [2**14] * 16 + [2**19] * 8 + [2**25]
    blocks = [torch.full((size,), 255, dtype=torch.uint8) for size in sizes]
    blocks.clear()


@pytest.fixture(scope="session", autouse=True)
def kernel_under_test() -> str:
    """A suite that silently ran the fallback would prove nothing about the kernel."""
    if DEVICE != "cpu":
        assert ON_KERNEL, f"The tests would run on plain PyTorch: {dispatch.gpu_path()[1]}"
        return "triton"
    wanted = os.environ.get("ADDITIVE_ATTN_CPU")
    running = dispatch.cpu_path()
    assert running != "pytorch" or wanted == "pytorch", (
        f"The tests would run on plain PyTorch: {dispatch.cpu_reason}. Build the kernel, or set "
        "ADDITIVE_ATTN_CPU=pytorch to test the fallback."
    )
    assert wanted in (None, running) or wanted == "baseline", f"{running} runs instead of {wanted}"
    return running


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    if DEVICE != "cpu":
        poison_device()


@pytest.fixture
def threads():
    """Sets the number of threads; the old number is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_report_header() -> str:
    return f"additive_attn: on {DEVICE}; cpu path {dispatch.cpu_path()} ({dispatch.cpu_reason})"
