"""Launch plans while the process changes: settings of torch, streams, captures, devices, threads.
A driver that runs nothing records the launches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from test_launches import probe_kernel
from test_plans import BASE, CALLS, launched
from traffic import assert_same, inputs, replayed, traffic
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import BaseBackend
from triton.backends.nvidia.driver import CudaLauncher

from additive_attn import additive_attention
from additive_attn.backends import triton as operators
from additive_attn.backends.triton import compiled, plans
from additive_attn.backends.triton.launch import launch
from tools.mock_driver import MockDriver

pytestmark = pytest.mark.usefixtures("planning")
library = pytest.mark.skipif(plans._replay is None, reason="no compiled library")


def backward_of(name: str) -> tuple[Any, ...]:
    call = CALLS[name]
    out, weights, lse = operators.forward.__wrapped__(*call, True)
    return (*(torch.zeros_like(x) for x in (out, weights, lse)), *call, lse, *(True,) * 5)


def both_ways(name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    return [(operators.forward, (*CALLS[name], True)), (operators.backward, backward_of(name))]


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": default_dtype,
    "deterministic algorithms": deterministic,
    "inference mode": torch.inference_mode,
    "without gradients": torch.no_grad,
}


@pytest.mark.parametrize("name", ["several queries", "one query, float mask"])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("recorded_inside", [True, False])
def test_a_plan_does_not_depend_on_its_surroundings(
    driver: MockDriver, name: str, surroundings: str, recorded_inside: bool
) -> None:
    inside, outside = SURROUNDINGS[surroundings], contextlib.nullcontext
    first, then = (inside, outside) if recorded_inside else (outside, inside)
    for operator, arguments in both_ways(name):
        ordinary = traffic(driver, lambda: operator.__wrapped__(*arguments))  # noqa: B023
        with first():
            for _ in range(3):
                operator(*arguments)
        given = [x for x in arguments if isinstance(x, torch.Tensor)]
        with then():
            for repeated in replayed(driver, operator, arguments):
                assert_same(ordinary, repeated, given)


def test_operations_are_recorded_without_autocast(driver: MockDriver) -> None:
    @plans.planned
    def product(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x @ x, x.sum(0)

    x = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            product(x)
    assert any(isinstance(x, plans.Plan) for x in plans._plans.values())
    torch.testing.assert_close(product(x)[0], x @ x, rtol=0, atol=0)


@contextlib.contextmanager
def older_setting() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def newer_setting() -> Iterator[None]:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_precision_is_part_of_a_plan(driver: MockDriver) -> None:
    """Either way to set the precision works: reading the older setting raises once the newer one
    has been used."""

    def kernels() -> list[int]:
        before = driver.launched
        operators.forward(*CALLS["several queries"], False)
        return [x.kernel for x in driver.since(before)]

    usual = [kernels() for _ in range(4)]
    for setting in (older_setting, newer_setting):
        with setting():
            rounded = [kernels() for _ in range(4)]
        assert rounded[0] != usual[0] and usual == usual[:1] * 4 and rounded == rounded[:1] * 4
        assert kernels() == usual[0]


@pytest.mark.parametrize(("first", "then"), [(0, 7), (7, 0), (7, 9)])
def test_streams(driver: MockDriver, monkeypatch: Any, first: int, then: int) -> None:
    """The streams are those before, in and after a capture, which has its own stream."""
    for operator, arguments in both_ways("several queries"):
        monkeypatch.setattr(driver, "stream", first)
        for _ in range(3):
            operator(*arguments)
        monkeypatch.setattr(driver, "stream", then)
        ordinary = traffic(driver, lambda: operator.__wrapped__(*arguments))  # noqa: B023
        given = [x for x in arguments if isinstance(x, torch.Tensor)]
        for repeated in replayed(driver, operator, arguments):
            assert_same(ordinary, repeated, given)


@pytest.mark.parametrize("name", ["several queries", "one query", "one query, keys split"])
def test_repeated_calls_ask_only_for_launches(driver: MockDriver, name: str) -> None:
    """Repeated calls load nothing, also the second one, which records the plan: a capture would
    raise."""
    for operator, arguments in both_ways(name):
        for n in range(4):
            before = driver.others
            operator(*arguments)
            assert n == 0 or driver.others == before


def test_loaded_kernels_are_counted(driver: MockDriver) -> None:
    """Shows that the test above would fail if a call loaded kernels: a new call does."""
    before = driver.others
    call = inputs(9, 40, 35, 19)._replace(scale=0.3)
    operators.forward(*(x.half() if isinstance(x, torch.Tensor) else x for x in call), False)
    assert driver.others > before  # the driver counts what is loaded


def allocated(function: Callable[[], Any]) -> int:
    """Returns the bytes that are allocated and not freed."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    found = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert found
    return sum(found)


@pytest.mark.parametrize("name", ["several queries", "one query, keys split"])
def test_plans_keep_no_memory(driver: MockDriver, name: str) -> None:
    for operator, arguments in both_ways(name):
        for n in range(4):  # the first call has no plan, the second one records it
            assert allocated(lambda: operator(*arguments) and None) == 0, n  # noqa: B023
        kept: list[Any] = []
        results = 4 * sum(x.numel() for x in operator(*arguments))
        assert allocated(lambda: kept.append(operator(*arguments))) >= results  # noqa: B023


@pytest.mark.parametrize("address", [4, 8, 12])
def test_alignment_of_what_lies_within_an_argument(driver: MockDriver, address: int) -> None:
    """A slice of an argument may be aligned where that of another argument is not."""

    @plans.planned
    def second(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(1)
        launch(probe_kernel, 1, x, x[2:], None, 3, 7, N=1, GIVEN=True)
        return y

    memory = torch.zeros(64)
    begin = -memory.data_ptr() % 16 // 4
    for offset in (address, 8, 4, 12, 0):
        x = memory[begin + offset // 4 :][:32]
        before = driver.launched
        second.__wrapped__(x)
        for _ in range(4):
            second(x)
        assert len({launch.kernel for launch in driver.since(before)}) == 1


def test_shapes_that_numbers_decide_and_other_devices_have_no_plan(driver: MockDriver) -> None:
    @plans.planned
    def positive(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]

    @plans.planned
    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(3, device="meta")

    for n in range(5):
        assert elsewhere(torch.zeros(3)).is_meta
        assert positive(torch.arange(5.0) - n).numel() == 4 - n
    assert not any(isinstance(x, plans.Plan) for x in plans._plans.values())


# Devices. Tensors are on the CPU, which replaces the current device.


def on_device(number: int, x: torch.Tensor) -> Any:
    """Returns an object with a device, which decides where a kernel is launched."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", number))


def test_a_launch_on_another_device_than_the_current_one(
    driver: MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def device(where: torch.device) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(driver, "device", where.index)
            patch.setattr(driver, "stream", 100 + where.index)
            yield

    @plans.planned
    def function(x: torch.Tensor, number: int) -> torch.Tensor:
        y = torch.empty(1)
        launch(probe_kernel, 1, on_device(number, x), x, None, 3, 7, N=1, GIVEN=True)
        return y

    def kernel(number: int) -> tuple[int, int]:
        before = driver.launched
        function(torch.zeros(4), number)
        (found,) = driver.since(before)
        return found.kernel, found.stream

    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.device)
    monkeypatch.setattr(torch.cuda, "device", device)
    here, there = kernel(0), kernel(1)
    assert here[0] != there[0] and (here[1], there[1]) == (0, 101)
    for _ in range(4):
        assert (kernel(0), kernel(1)) == (here, there)
    with device(torch.device("cuda", 1)):
        for _ in range(4):
            assert (kernel(0), kernel(1)) == ((here[0], 100), there)
    for _ in range(2):
        assert (kernel(0), kernel(1)) == (here, there)


@library
def test_a_thread_enters_the_device_of_the_tensors(driver: MockDriver) -> None:
    """The thread may have no context yet, or that of another device. Another context of the same
    device is kept."""
    for _ in range(3):
        launched(driver, BASE)
    own, others = 1, 2
    green = own + 4  # another context of the same device
    seen: list[int] = []

    def work() -> None:
        for context in (None, others, None, own, green, None):
            if context is not None:
                driver.enter(context)
            seen.append(launched(driver, BASE).context)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [own, own, own, own, green, green]


def test_threads_write_plans_down_and_repeat_them_together(
    driver: MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread has its own stream and tensors. All start at once, without plans."""
    own = threading.local()
    monkeypatch.setattr(
        type(driver), "stream", property(lambda self: getattr(own, "stream", 0), lambda *_: None),
        raising=False,
    )  # fmt: skip
    start, failed = threading.Barrier(4), []
    calls = {
        1000 + n: [inputs(rows, 30 + m) for rows in (1, 9) for m in range(3)] for n in range(4)
    }

    def work(stream: int) -> None:
        try:
            own.stream = stream
            start.wait()
            for n in range(36):
                call = calls[stream][n % 6]
                out, _, lse = operators.forward(*call, False)
                assert out.shape == (*call.query.shape[:2], 20) and lse.shape == out.shape[:2]
        except Exception as error:
            failed.append(error)

    before = driver.launched
    threads = [threading.Thread(target=work, args=(stream,)) for stream in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = driver.since(before)
    assert not failed and {x.stream for x in found} == calls.keys()
    given = {
        x.data_ptr(): stream
        for stream, several in calls.items() for call in several
        for x in call if isinstance(x, torch.Tensor)
    }  # fmt: skip
    for x in found:
        owners = {given[address] for address in x.parameters if address in given}
        assert owners <= {x.stream}
    per_stream = [sum(x.stream == stream for x in found) for stream in calls]
    assert len(set(per_stream)) == 1


# AMD.


class HIPLauncher(CudaLauncher):
    """Has the name of the other backend's launcher."""


def test_other_launchers_are_called_from_python(
    driver: MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launcher(self: MockDriver, source: Any, metadata: Any) -> Any:
        made(self, source, metadata)
        return HIPLauncher(source, metadata)

    made = MockDriver.launcher_cls
    monkeypatch.setattr(MockDriver, "launcher_cls", launcher)
    monkeypatch.setattr(driver, "device", 2)  # each device loads its own kernels
    for operator, arguments in both_ways("one query"):
        ordinary = traffic(driver, lambda: operator.__wrapped__(*arguments))  # noqa: B023
        for _ in range(3):
            operator(*arguments)
        given = [x for x in arguments if isinstance(x, torch.Tensor)]
        repeated = replayed(driver, operator, arguments)
        assert len(repeated) == 1  # the library does not repeat it
        assert_same(ordinary, repeated[0], given)


@pytest.mark.parametrize("backend", [BaseBackend, HIPBackend])
def test_kinds_of_tensors_are_those_of_triton(backend: Any) -> None:
    """A kernel for AMD is compiled for memory that 31 bits can address, or for larger memory."""
    kind = compiled._kind if backend is BaseBackend else compiled._kind_on_amd
    sizes = 2**20, 2**31 - 1, 2**31, 2**31 + 2**20
    tensors = [torch.empty(n, dtype=torch.uint8, device="meta") for n in sizes]
    tensors += [x[:100] for x in tensors] + [torch.zeros(64)[n:] for n in range(5)]
    own: dict[Any, set[Any]] = {}
    for x in tensors:
        own.setdefault(kind(x), set()).add(backend.get_tensor_specialization(x, align=True))
    assert all(len(each) == 1 for each in own.values()), own
    assert len(set().union(*own.values())) >= (2 if backend is BaseBackend else 3)


@pytest.mark.sweep
def test_compiled_graphs_repeat_from_plans(driver: MockDriver) -> None:
    """Tracing records no plan."""
    query, key, value, weight = (x.clone().requires_grad_() for x in BASE[:4])

    def attend() -> torch.Tensor:
        return additive_attention(query, key, value, weight, scale=0.7)

    def launches(function: Callable[[], torch.Tensor]) -> list[Any]:
        before = driver.launched
        out = function()
        torch.autograd.grad(out, query, torch.ones_like(out))
        return [(x.kernel, x.grid, x.parameters[:2]) for x in driver.since(before)]

    expected = launches(attend)
    compiled_attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    plans.forget()
    compiled_attend()
    assert not any(isinstance(x, plans.Plan) for x in plans._plans.values())
    for _ in range(3):
        assert launches(compiled_attend) == expected
    assert sum(isinstance(x, plans.Plan) for x in plans._plans.values()) == 2
