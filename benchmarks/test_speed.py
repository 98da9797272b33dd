"""The same providers under pytest-benchmark, to save runs and compare them:

pytest benchmarks/test_speed.py --benchmark-autosave --benchmark-compare
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.measure import Reference, action
from benchmarks.providers import PROVIDERS, Provider, make_inputs
from benchmarks.shapes import LAYERS, SMALL, STEPS, Case, square

CASES = [SMALL[0], STEPS[0], STEPS[2], LAYERS[0], square(512)]


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_speed(benchmark: Any, provider: Provider, case: Case, mode: str) -> None:
    torch.compiler.reset()
    benchmark.group = f"{case} {mode}"
    inputs = make_inputs(case, torch.float32, torch.device("cpu"))
    runner = provider.runner(case, inputs)
    assert runner is not None
    if provider.additive:
        Reference(case, inputs).check(provider.name, runner, mode)
    with torch.set_grad_enabled(mode == "full"):
        call = action(runner, inputs, mode)
        call()
        benchmark(call)
