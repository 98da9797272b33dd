"""Counts the kernels that a call on a GPU launches, and checks their arguments. It needs no GPU,
but a driver that runs nothing (``tools/mock_driver.py``)."""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton
import triton.language as tl

import additive_attn
from additive_attn.backends import triton as operators
from additive_attn.backends.triton import compiled, tiles
from additive_attn.backends.triton.launch import kernel, launch
from additive_attn.backends.triton.parameters import Matrix, Row
from additive_attn.spec.call import Call
from tools import mock_driver


def inputs(B: int, Lq: int, Lk: int, H: int, Dv: int) -> list[torch.Tensor]:
    return [torch.zeros(B, Lq, H), torch.zeros(B, Lk, H), torch.zeros(B, Lk, Dv), torch.zeros(H)]


# Shape: the most kernels of Triton and of torch that a forward may launch, and a backward.
CALLS = {
    (1, 1, 10, 32, 20): ((1, 0), (2, 0)),
    (64, 1, 400, 512, 512): ((2, 0), (3, 0)),
    (1, 8, 10, 32, 20): ((2, 0), (3, 0)),
    (1, 16, 1500, 64, 64): ((2, 0), (4, 0)),
    (1, 1024, 1024, 64, 64): ((2, 0), (4, 0)),
    (2, 64, 64, 64, 64): ((2, 0), (3, 0)),
    (8, 512, 512, 64, 64): ((2, 0), (3, 0)),
    (32, 50, 50, 1024, 1024): ((2, 0), (3, 0)),
}


def count(driver: mock_driver.MockDriver, function: Any, *arguments: Any) -> Any:
    """Returns the numbers of kernels of Triton and torch that a function launches, and its
    results."""
    before = driver.launched
    with mock_driver.TorchKernels() as kernels:
        results = function(*arguments)
    return (driver.launched - before, len(kernels.names)), results, kernels.names


def forward_and_backward(driver: mock_driver.MockDriver, shape: Any, needs: Any) -> Any:
    call = Call(*inputs(*shape))
    forward, (out, _, lse), _ = count(driver, operators.forward, *call, False)
    backward, _, names = count(driver, operators.backward, out, None, None, *call, lse, *needs)
    return forward, backward, names


@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_a_call_starts_few_kernels(driver: mock_driver.MockDriver, shape: Any) -> None:
    forward, backward, names = forward_and_backward(driver, shape, (True,) * 4 + (False,))
    most_forward, most_backward = CALLS[shape]
    assert forward[0] <= most_forward[0] and forward[1] <= most_forward[1], forward
    assert backward[0] <= most_backward[0] and backward[1] <= most_backward[1], (backward, names)


@pytest.mark.parametrize("needed", range(4))
def test_fewer_gradients_start_fewer_kernels(driver: mock_driver.MockDriver, needed: int) -> None:
    before = driver.launched
    _, everything, _ = forward_and_backward(driver, (1, 8, 10, 32, 20), (True,) * 4 + (False,))
    programs = driver.since(before)[-1].grid[0]
    needs = tuple(i == needed for i in range(5))
    before = driver.launched
    _, backward, names = forward_and_backward(driver, (1, 8, 10, 32, 20), needs)
    assert sum(backward) <= sum(everything), (backward, names)
    *_, last = driver.since(before)  # some of its programs compute dV, the rest the others
    assert last.name == "feature_kernel" and last.grid[0] < programs


def test_pieces_add_up_in_a_bounded_number_of_kernels(
    driver: mock_driver.MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "WORKSPACE_ELEMENTS", 64 * 128)
    few, more = (
        sum(forward_and_backward(driver, (1, rows, 100, 16, 8), (True,) * 4 + (False,))[1])
        for rows in (128, 256)
    )
    assert more - few <= 2 * 10  # two pieces more


@pytest.mark.parametrize("queries", [1, 5])
def test_strides_beyond_int32_reach_the_kernels(
    driver: mock_driver.MockDriver, queries: int
) -> None:
    """Kernels are compiled for such strides. A few pages of 8 GB of addresses are touched."""
    # torch.empty is not used, since the tests fill its memory.
    room = torch.frombuffer(mmap.mmap(-1, 2**33 + 2**20), dtype=torch.float16)
    query, weight = torch.zeros(2, queries, 8).half(), torch.zeros(8).half()
    key = room.as_strided((2, 9, 8), (2**31 + 16, 8, 1))
    value = room.as_strided((2, 9, 5), (5, 2**28, 1))
    call = Call(query, key, value, weight)
    before = driver.launched
    out, _, lse = operators.forward(*call, False)
    operators.backward(out, None, None, *call, lse, True, True, True, True, False)
    launched = driver.since(before)
    assert len(launched) >= 3
    names = {launch.name for launch in launched if 2**31 + 16 in launch.parameters}
    assert len(names) >= 3, names


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


@kernel
def probe_kernel(x, pair, column, rows, N: tl.constexpr, GIVEN: tl.constexpr):
    if x is not None:
        tl.store(x, N)


class Pair(NamedTuple):
    first: Any
    second: Any


DATA = torch.zeros(64)
PROBES: dict[str, tuple[Any, ...]] = {  # x, pair, column, rows, options, programs
    "usual": (DATA, Pair(DATA, 5), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "other values": (DATA[8:], Pair(DATA[4:], 7), 5, 11, {"N": 1, "GIVEN": True}, 3),
    "x not aligned": (DATA[1:], Pair(DATA, 5), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "pair not aligned": (DATA, Pair(DATA[1:], 5), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "no x": (None, Pair(DATA, 5), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "no pair": (DATA, None, 3, 7, {"N": 1, "GIVEN": True}, 2),
    "nothing in the pair": (DATA, Pair(DATA, None), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "nothing before it": (DATA, Pair(None, DATA), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "a tensor in the pair": (DATA, Pair(DATA, DATA), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "a multiple of 16 in the pair": (DATA, Pair(DATA, 32), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "another dtype": (DATA.half(), Pair(DATA, 5), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "another dtype in the pair": (DATA, Pair(DATA.double(), 5), 3, 7, {"N": 1, "GIVEN": True}, 2),
    "column 1": (DATA, Pair(DATA, 5), 1, 7, {"N": 1, "GIVEN": True}, 2),
    "column 0": (DATA, Pair(DATA, 5), 0, 7, {"N": 1, "GIVEN": True}, 2),
    "column a multiple of 16": (DATA, Pair(DATA, 5), 48, 7, {"N": 1, "GIVEN": True}, 2),
    "column of 64 bits": (DATA, Pair(DATA, 5), 2**31, 7, {"N": 1, "GIVEN": True}, 2),
    "rows 1": (DATA, Pair(DATA, 5), 3, 1, {"N": 1, "GIVEN": True}, 2),
    "rows a multiple of 16": (DATA, Pair(DATA, 5), 3, 64, {"N": 1, "GIVEN": True}, 2),
    "rows of 64 bits": (DATA, Pair(DATA, 5), 3, -(2**31) - 1, {"N": 1, "GIVEN": True}, 2),
    "rows without a sign": (DATA, Pair(DATA, 5), 3, 2**63, {"N": 1, "GIVEN": True}, 2),
    "rows a number": (DATA, Pair(DATA, 5), 3, 7.0, {"N": 1, "GIVEN": True}, 2),
    "rows a bool": (DATA, Pair(DATA, 5), 3, True, {"N": 1, "GIVEN": True}, 2),
    "another constant": (DATA, Pair(DATA, 5), 3, 7, {"N": 2, "GIVEN": True}, 2),
    "more warps": (DATA, Pair(DATA, 5), 3, 7, {"N": 1, "GIVEN": True, "num_warps": 8}, 2),
    "few registers": (DATA, Pair(DATA, 5), 3, 7, {"N": 1, "GIVEN": True, "maxnreg": 64}, 2),
}


def test_a_kernel_found_again_is_the_one_that_triton_takes(
    driver: mock_driver.MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(name: str) -> mock_driver.Launched:
        *arguments, options, programs = PROBES[name]
        before = driver.launched
        launch(probe_kernel, programs, DATA, *arguments, **options)
        (launched,) = driver.since(before)
        return launched

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "settings", lambda: None)
        expected = {name: launched(name) for name in PROBES}
    assert len({x.kernel for x in expected.values()}) >= 20  # the probes need different kernels
    for _ in range(3):  # the kernels are compiled, then found, then found after all others
        assert {name: launched(name) for name in PROBES} == expected
    usual = expected["usual"]
    monkeypatch.setattr(driver, "stream", 5)
    assert launched("usual") == usual._replace(stream=5)
    monkeypatch.setattr(driver, "device", 1)  # each device loads its own binary
    assert launched("usual").kernel != usual.kernel
    monkeypatch.setattr(driver, "device", 0)
    assert launched("usual").kernel == usual.kernel


class Bundle(NamedTuple):
    x: Matrix
    weight: Row | None


@kernel
def bundle_kernel(bundle: Bundle, out, N: tl.constexpr):
    tl.store(out, tl.load(bundle.x.data + bundle.x.outer + bundle.x.column))
    if bundle.weight is not None:
        tl.store(out + N, tl.load(bundle.weight.data + bundle.weight.inner))


def test_a_kernel_takes_tuples_apart(driver: mock_driver.MockDriver) -> None:
    """Numbers in tuples may vary without a new compilation, which Triton itself would make."""

    def launched(outer: int, column: int, weight: Any, inner: int) -> mock_driver.Launched:
        before = driver.launched
        launch(bundle_kernel, 1, DATA, DATA, outer, 2, 3, column, weight, 0, inner, 1, DATA, N=1)
        (launched,) = driver.since(before)
        return launched

    usual = launched(1, 3, DATA, 5)
    assert usual.name == "bundle_kernel"
    address = DATA.data_ptr()
    assert usual.parameters == (address, 1, 2, 3, 3, address, 0, 5, address)
    for outer, inner in ((0, 0), (16, 1), (7, 48), (32, 32)):
        assert launched(outer, 3, DATA, inner).kernel == usual.kernel
    others = launched(1, 1, DATA, 5), launched(1, 16, DATA, 5), launched(1, 3, None, 5)
    assert len({x.kernel for x in (usual, *others)}) == 4


def test_a_debugging_kernel_is_another(
    driver: mock_driver.MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched() -> int:
        before = driver.launched
        launch(probe_kernel, 1, DATA, DATA, None, 3, 7, N=1, GIVEN=True)
        return driver.since(before)[0].kernel

    usual = launched()
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    assert launched() != usual
    monkeypatch.setattr(triton.knobs.runtime, "debug", False)
    assert launched() == usual


def test_hooks_of_launches_are_called(driver: mock_driver.MockDriver) -> None:
    seen = []
    hook = triton.knobs.runtime.launch_enter_hook

    def watch(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    call = (*Call(*inputs(3, 1, 20, 8, 4)), False)
    operators.forward(*call)
    hook.add(watch)
    try:
        operators.forward(*call)
    finally:
        hook.remove(watch)
    operators.forward(*call)
    assert seen == ["forward_kernel"]
