"""The same providers under pytest-benchmark, to save runs and compare them:

pytest benchmarks/test_speed.py --benchmark-autosave --benchmark-compare
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import SPEED, Case, make_inputs, square
from benchmarks.measure import Reference, action
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.rows import PYTORCH_PATH
from benchmarks.run import require_kernel

CASES = [SPEED[0], SPEED[2], SPEED[4], square(512)]
MEASURED = [provider for provider in PROVIDERS if provider.name != PYTORCH_PATH]


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("provider", MEASURED, ids=lambda provider: provider.name)
def test_speed(benchmark: Any, provider: Provider, case: Case, mode: str) -> None:
    require_kernel(torch.device("cpu"), None)
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
