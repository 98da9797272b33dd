"""How many kernels a call on a GPU starts, and with what. Counted without one, by a driver that
runs nothing (``tools/mock_driver.py``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import additive_attn
from additive_attn.backends import triton as operators
from additive_attn.spec.call import Call
from tools import mock_driver

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available()
    or torch.version.hip is not None
    or operators.interpreted()
    or shutil.which("cc") is None,
    reason="a mock driver needs a C compiler, and stands where a GPU's would",
)


@pytest.fixture(scope="module")
def driver() -> Iterator[mock_driver.MockDriver]:
    with mock_driver.installed() as driver:
        yield driver


def inputs(B: int, Lq: int, Lk: int, H: int, Dv: int) -> list[torch.Tensor]:
    return [torch.zeros(B, Lq, H), torch.zeros(B, Lk, H), torch.zeros(B, Lk, Dv), torch.zeros(H)]


# Shape: kernels of Triton and of torch that a forward may start, and a backward.
CALLS = {
    (1, 1, 10, 32, 20): ((1, 0), (2, 0)),
    (64, 1, 400, 512, 512): ((2, 0), (2, 2)),
    (1, 8, 10, 32, 20): ((6, 0), (7, 13)),
    (1, 16, 1500, 64, 64): ((6, 2), (7, 14)),
}


@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_a_call_starts_few_kernels(driver: mock_driver.MockDriver, shape: Any) -> None:
    call = Call(*inputs(*shape))

    def count(function: Any, *arguments: Any) -> tuple[tuple[int, int], Any, Any]:
        before = driver.launched
        with mock_driver.TorchKernels() as kernels:
            results = function(*arguments)
        return (driver.launched - before, len(kernels.names)), results, kernels.names

    forward, (out, _, lse), names = count(operators.forward, *call, False)
    most_forward, most_backward = CALLS[shape]
    assert forward[0] <= most_forward[0] and forward[1] <= most_forward[1], (forward, names)
    gradients = out, None, None, *call, lse, True, True, True, True, False
    backward, _, names = count(operators.backward, *gradients)
    assert backward[0] <= most_backward[0] and backward[1] <= most_backward[1], (backward, names)


def test_the_public_function_reaches_the_driver(driver: mock_driver.MockDriver) -> None:
    query, key, value, weight = inputs(3, 1, 20, 8, 4)
    before = driver.launched
    out = additive_attn.additive_attention(query, key, value, weight)
    (launched,) = driver.since(before)
    assert launched.name == "forward_kernel" and launched.grid == (3, 1, 1)
    addresses = [
        value
        for value, pointer in zip(launched.parameters, launched.pointers, strict=True)
        if pointer
    ]
    expected = [x.data_ptr() for x in (query, key, value, weight, out)]
    assert addresses[:5] == expected
