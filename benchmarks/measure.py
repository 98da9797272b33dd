"""Measures: a check against fp64 first, then interleaved timing and peak memory."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from benchmarks.providers.plain import plain_runner
from benchmarks.providers.runner import Runner

SAMPLE_SECONDS = 0.05
CHECKED_ELEMENTS = 2**25  # of the fp64 energy tensor
# Largest error allowed, relative to the largest element: this guards against timing something
# that computes something else. The tests check how accurate the layer is.
TOLERANCE = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def action(runner: Runner, inputs: Inputs, mode: str) -> Callable[[], object]:
    """The measured call. Forward alone must be called under ``torch.no_grad()``."""
    if mode == "forward":
        return runner.forward
    return lambda: runner.backward(runner.forward(), inputs.grad_out)


class Reference:
    """fp64 results for a few queries; the upstream gradient of all others is zero, so that the
    gradients of keys, values and weight are exact and affordable at any length."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        row_cost = case.key_len * case.hidden
        batches = min(case.batch, 4, max(1, CHECKED_ELEMENTS // row_cost))
        rows = min(case.query_len, max(1, CHECKED_ELEMENTS // (row_cost * batches)))
        device = inputs.query.device
        self.batches = torch.linspace(0, case.batch - 1, batches, device=device).long()
        self.rows = torch.linspace(0, case.query_len - 1, rows, device=device).long()

        few = inputs.pick(self.batches, self.rows).double()
        runner = plain_runner(case, few)
        out = runner.forward()
        self.expected = [out.detach(), *runner.backward(out, few.grad_out)]
        self.grad_out = inputs.grad_out
        if self.grad_out.dim() == 3:
            index = self.batches[:, None], self.rows
            self.grad_out = torch.zeros_like(inputs.grad_out)
            self.grad_out[index] = inputs.grad_out[index]

    def check(self, name: str, runner: Runner, mode: str) -> None:
        """Raises where the runner computes something else than the plain formula."""
        with torch.set_grad_enabled(mode == "full"):
            out = runner.forward()
            results: list[Tensor | None] = [out.detach()]
            if mode == "full":
                results += runner.backward(out, self.grad_out)
        for position, (actual, expected) in enumerate(zip(results, self.expected, strict=False)):
            if actual is None or expected is None:  # the bias of the energy layer cancels
                continue
            if actual.dim() == 3:
                actual = actual[self.batches]
                if position < 2:
                    actual = actual[:, self.rows]
            size = expected.abs().max().item()
            error = (actual.double() - expected).abs().max().item()
            if not error <= TOLERANCE[actual.dtype] * max(size, 1e-3):
                what = f"gradient {position}" if position else "the output"
                raise AssertionError(
                    f"{name} at {self.case}, {mode}: {what} is off by {error:.2e} "
                    f"(largest element {size:.2e}); nothing is timed."
                )


def interleave(
    actions: dict[str, Callable[[], object]], device: torch.device, budget: float, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of every action, one sample each per round, so that a slow minute of the
    machine affects all alike. A sample is a loop of enough calls to be timed well; an action that
    has used up its budget stops after three samples, or two if one call takes so long."""

    def sample(call: Callable[[], object], count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / count

    counts = {}
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for name, call in actions.items():
        once = sample(call, 1)
        if once > budget:
            samples[name] += [once]
        if once < SAMPLE_SECONDS:
            once = min(once, sample(call, 10))
        counts[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
    least = {name: 2 if samples[name] else 3 for name in actions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in actions.items():
                spent = sum(samples[name]) * counts[name]
                if len(samples[name]) < least[name] or spent < budget:
                    samples[name].append(sample(call, counts[name]))
    finally:
        gc.enable()
    return samples


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile, in milliseconds."""
    milliseconds = [1e3 * seconds for seconds in samples]
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return statistics.median(milliseconds), fifths[0], fifths[3]


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        match = re.search(rf"{field}:\s+(\d+) kB", status.read())
    assert match is not None
    return int(match[1]) * 1024


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Memory that one call needs beyond its inputs, results included.

    On a CPU this is the growth of the resident set as Linux counts it, so it covers every
    allocator, workspace and thread; None on systems that do not count it.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    # Memory that the allocator has kept from earlier calls would not be counted.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # reset the peak
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # torch's cache counts as used memory
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        with open("/proc/meminfo") as meminfo:
            match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read())
        if match is not None:
            return int(match[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
