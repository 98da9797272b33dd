"""Records what a call launches on a GPU, by a driver that runs nothing, and compares two calls
apart from their addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from additive_attn.backends.triton import plans
from additive_attn.spec.call import Call
from tools.mock_driver import MockDriver


class Event(NamedTuple):
    """A launch, or an operation of torch, and the addresses that it is given."""

    what: tuple[Any, ...]
    addresses: tuple[int, ...]


class Traffic(TorchDispatchMode):
    """The events of a device in order, and the allocations, which are all kept alive."""

    def __init__(self, driver: MockDriver) -> None:
        super().__init__()
        self.driver = driver
        self.events: list[Event] = []
        self.storages: dict[int, tuple[int, Any]] = {}
        self.seen = driver.launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches()
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        for x in results:
            storage = x.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes(), storage
        name, given = func._schema.name, [x for x in args if isinstance(x, torch.Tensor)]
        writes = any(x.alias_info and x.alias_info.is_write for x in func._schema.arguments)
        storages = [x.untyped_storage()._cdata for x in given]
        made = [x for x in results if x.numel() and x.untyped_storage()._cdata not in storages]
        of_the_device = (writes or made) and "empty" not in name
        if of_the_device and name not in ("aten::copy_", "additive_attn::replay"):
            shapes = [(x.shape, x.stride(), x.dtype) for x in (*given, *results)]
            rest = [x for x in args if not isinstance(x, torch.Tensor)]
            addresses = [x.data_ptr() for x in (*given, *results)]
            self.events.append(Event((name, *shapes, *map(str, rest)), tuple(addresses)))
        return result

    def launches(self) -> None:
        for x in self.driver.since(self.seen):
            values = zip(x.parameters, x.pointers, strict=True)
            fixed = [value for value, pointer in values if not pointer]
            pointed = zip(x.parameters, x.pointers, strict=True)
            addresses = tuple(value for value, pointer in pointed if pointer)
            self.events.append(Event((x.name, x[1:5], x.stream, *fixed), addresses))
        self.seen = self.driver.launched


def traffic(driver: MockDriver, function: Callable[[], Any]) -> Traffic:
    result = Traffic(driver)
    with result:
        result.results = function()  # type: ignore[attr-defined]
    result.launches()
    return result


def replayed(driver: MockDriver, operator: Any, arguments: tuple[Any, ...]) -> list[Traffic]:
    """Repeats a call that has a plan: in Python, and by the library if it supports the plan."""
    found = plans.begin(operator.__wrapped__, arguments)
    assert found is not None
    number, stream, given = found
    plan = plans._plans[plans._key(number, given)]
    assert isinstance(plan, plans.Plan), plan
    results = [traffic(driver, lambda: plan.replay(given, stream))]
    if plan.program is not None and plans._replay is not None:
        results.append(traffic(driver, lambda: plans._replay(*found)))
        assert outputs(results[-1])
    return results


def assert_same(ordinary: Traffic, repeated: Traffic, given: list[torch.Tensor]) -> None:
    """Asserts that the events are the same. The given memory has the same addresses. Other memory
    has the same size, and overlaps with no memory that is used at the same time."""
    assert [x.what for x in ordinary.events] == [x.what for x in repeated.events]
    inputs = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in given}
    moved: dict[int, int] = {}  # by how much storages of the ordinary call have moved
    used: dict[int, list[int]] = {}  # the events that use each storage

    def storage(address: int, among: Any) -> int | None:
        inside = (start for start, size in among if start <= address < start + max(size, 1))
        return next(inside, None)

    sizes = {start: size for start, (size, _) in ordinary.storages.items()}
    for n, (one, other) in enumerate(zip(ordinary.events, repeated.events, strict=True)):
        for mine, theirs in zip(one.addresses, other.addresses, strict=True):
            if storage(mine, inputs.items()) is not None or mine == 0:
                assert mine == theirs, one.what
                continue
            start = storage(mine, sizes.items())
            assert start is not None, one.what
            assert moved.setdefault(start, theirs - mine) == theirs - mine, one.what
            assert theirs % 16 == mine % 16
            used.setdefault(start, []).append(n)
    places = [
        (start + moved[start], start + moved[start] + sizes[start], min(uses), max(uses))
        for start, uses in used.items()
    ]
    end = len(ordinary.events)
    given_places = [(start, start + size, 0, end) for start, size in inputs.items()]
    for n, (begin, end, first, last) in enumerate(places):
        for other_begin, other_end, other_first, other_last in places[:n] + given_places:
            apart = end <= other_begin or other_end <= begin
            assert apart or last < other_first or other_last < first
    results = zip(outputs(ordinary), outputs(repeated), strict=True)
    for one, other in results:
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        start = one.untyped_storage().data_ptr()
        if start in moved:
            assert other.data_ptr() - one.data_ptr() == moved[start]


def outputs(traffic: Traffic) -> list[torch.Tensor]:
    results = traffic.results  # type: ignore[attr-defined]
    return [results] if isinstance(results, torch.Tensor) else list(results)


def check(driver: MockDriver, operator: Any, *arguments: Any) -> None:
    """Asserts that the plan of a call launches what the call launches."""
    ordinary = traffic(driver, lambda: operator.__wrapped__(*arguments))
    for _ in range(3):
        operator(*arguments)
    given = [x for x in arguments if isinstance(x, torch.Tensor)]
    for repeated in replayed(driver, operator, arguments):
        assert_same(ordinary, repeated, given)
    # The same call again, with other tensors.
    others = tuple(
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
        if isinstance(x, torch.Tensor)
        else x
        for x in arguments
    )
    ordinary = traffic(driver, lambda: operator.__wrapped__(*others))
    given = [x for x in others if isinstance(x, torch.Tensor)]
    for repeated in replayed(driver, operator, others):
        assert_same(ordinary, repeated, given)


def inputs(rows: int, keys: int = 40, hidden: int = 36, values: int = 20, **more: Any) -> Call:
    made = torch.randn(2, rows, hidden), torch.randn(2, keys, hidden), torch.randn(2, keys, values)
    return Call(*made, torch.randn(hidden), **more)
