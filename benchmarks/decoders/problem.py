"""A problem that several providers solve, and its timing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import quantiles
from benchmarks.rows import Row


@dataclass(frozen=True)
class Problem:
    """``runs``: the timed functions, by provider; the first is right by definition. ``results``
    converts what a run returns to the tensors on which all providers must agree."""

    runs: Mapping[str, Callable[[], Any]]
    results: Callable[[Any], dict[str, Tensor]]
    tolerance: float = 2e-3  # relative to the largest element
    grad: bool = True

    def check(self) -> None:
        """Raises if the results of a provider differ from those of the first."""
        expected: dict[str, Tensor] = {}
        for name, run in self.runs.items():
            found = {key: tensor.double() for key, tensor in self.results(run()).items()}
            found = {key: tensor.clone() for key, tensor in found.items()}
            expected = expected or found
            if found.keys() != expected.keys():
                raise AssertionError(f"{name} has results of its own; nothing is timed.")
            for key, tensor in found.items():
                size = expected[key].abs().max().clamp(min=1e-2)
                error = (tensor - expected[key]).abs().max() / size
                if not error <= self.tolerance:
                    raise AssertionError(
                        f"{name}: {key} is off by {error:.2e} of its largest element; "
                        "nothing is timed."
                    )


def alternate(problem: Problem, budget: float, rounds: int) -> dict[str, Row]:
    """Returns milliseconds per call of every provider: CPU time of all threads together, and
    wall-clock time. Providers are timed round-robin; a round is one sample of each. Stops after
    ``rounds``, or after ``budget`` seconds, but not before three rounds."""
    cpu: dict[str, list[float]] = {name: [] for name in problem.runs}
    wall: dict[str, list[float]] = {name: [] for name in problem.runs}

    def sample(run: Callable[[], Any], count: int) -> tuple[float, float]:
        start = time.process_time(), time.perf_counter()
        for _ in range(count):
            run()
        return (time.process_time() - start[0]) / count, (time.perf_counter() - start[1]) / count

    counts = {}
    for name, run in problem.runs.items():
        once = sample(run, 1)[1]
        if once < 0.5:
            once = min(once, sample(run, 1)[1])
        counts[name] = max(1, round(0.05 / once))
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - begin > budget:
                break
            for name, run in problem.runs.items():
                used, passed = sample(run, counts[name])
                cpu[name].append(used)
                wall[name].append(passed)
    finally:
        gc.enable()

    rows: dict[str, Row] = {}
    for name in problem.runs:
        columns = [*quantiles(cpu[name]), quantiles(wall[name])[0]]
        names = ("cpu_ms", "q20_ms", "q80_ms", "wall_ms")
        rows[name] = {key: float(f"{x:.5g}") for key, x in zip(names, columns, strict=True)}
    return rows


def measured(problem: Problem, budget: float, rounds: int) -> dict[str, Row]:
    with torch.set_grad_enabled(problem.grad):
        problem.check()
        return alternate(problem, budget, rounds)
