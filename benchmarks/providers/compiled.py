"""torch.compile of the plain layer, with its product with the weight as a matmul or as a sum."""

from __future__ import annotations

from torch import Tensor

from benchmarks.cases import Case, Inputs
from benchmarks.providers.plain import energy, plain_runner
from benchmarks.providers.runner import Provider, Runner


def score_matmul(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return energy(query, key) @ weight


def score_sum(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return (energy(query, key) * weight).sum(-1)


def matmul_runner(case: Case, inputs: Inputs) -> Runner:
    return plain_runner(case, inputs, score_matmul, compiled=True)


def sum_runner(case: Case, inputs: Inputs) -> Runner | None:
    return None if case.module else plain_runner(case, inputs, score_sum, compiled=True)


COPIES = {"forward": 0.0, "full": 2.0}
COMPILE_MATMUL = Provider("compile matmul", matmul_runner, energy_copies=COPIES)
COMPILE_SUM = Provider("compile sum", sum_runner, energy_copies=COPIES)
