"""Launch plans: the work of a call on the host is done once, and then repeated.

Batch dims, tiles, splits, views and the arguments of kernels follow from shapes, strides, dtypes,
alignment and flags, never from the contents of tensors or from their addresses. So the second call
of a kind is recorded while it runs: its allocations, launches and operations of torch. Later ones
do only these, with other addresses. Buffers that only kernels access share one allocation. A call
that reads a tensor on the host, or whose launches call a hook, is not recorded."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from additive_attn.backends.triton import compiled, programs
from additive_attn.backends.triton.compiled import TENSORS
from additive_attn.backends.triton.launch import matmul_precision
from additive_attn.backends.triton.recorder import (
    Buffer,
    Launch,
    NotPlanned,
    Operation,
    Part,
    Recorder,
)

enabled = True
on_cpu = False  # whether calls on CPU tensors have plans too, as with a driver that runs nothing
_MOST = 1024  # calls that are cached; the oldest is dropped
_ALIGNED = 256  # bytes, between buffers that share an allocation
_Allocation = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]
_empty, _modes = torch.empty_strided, torch._C._len_torch_dispatch_stack


class _Step(NamedTuple):
    """Allocations, then a launch or an operation, then the tensors that no later step reads."""

    allocations: tuple[_Allocation, ...]
    launch: tuple[Any, ...] | None
    operation: Operation | None
    dead: tuple[int, ...]


class Plan:
    """A recorded call. Tensors are numbered: the given ones, then the shared allocation, then all
    others."""

    def __init__(self, recorder: Recorder, results: Sequence[Tensor]) -> None:
        if recorder.reason is not None:
            raise NotPlanned(recorder.reason)
        parts = [recorder.part(x) for x in results]
        kept = [part.buffer for part in parts]
        if len(set(map(id, kept))) < len(kept) or any(x.born < 0 for x in kept):
            raise NotPlanned("results share memory, or are arguments")
        for n, buffer in enumerate(recorder.given):
            buffer.number = n
        self.count = len(recorder.given) + 1
        self.pool = self._share([x for x in recorder.allocated if not x.seen and x not in kept])
        # Kernels take addresses alone, so what only they have stored may have any shape.
        for part in parts:
            if part.fills and not part.buffer.seen and part.dtype == part.buffer.dtype:
                part.buffer.shape, part.buffer.stride = part.shape, part.stride
        own = [x for x in recorder.allocated if x.seen or x in kept]
        made = [x for step in recorder.steps if isinstance(step, Operation) for x in step.results]
        for buffer in (*own, *made):
            buffer.number = self.count
            self.count += 1
        dead = [x for x in (*own, *made) if x not in kept]
        self.steps = [
            _Step(
                tuple((x.number, x.shape, x.stride, x.dtype) for x in own if x.born == n),
                _launch(step) if isinstance(step, Launch) else None,
                step if isinstance(step, Operation) else None,
                tuple(x.number for x in dead if max(x.born, x.dies) == n),
            )
            for n, step in enumerate((*recorder.steps, None))
        ]
        self.results = [(x.buffer.number, None if x.is_whole else x) for x in parts]
        self.program = programs.program(recorder.steps, parts, own, self.pool)
        self.kernels = [x.found.kernel for x in recorder.steps if isinstance(x, Launch)]

    def _share(self, buffers: list[Buffer]) -> int:
        """Places buffers in one allocation, where those that are not alive at the same time may
        overlap. Returns its bytes."""
        placed: list[tuple[int, int, Buffer]] = []
        for buffer in buffers:
            size, begin = -(-buffer.bytes // _ALIGNED) * _ALIGNED, 0
            alive = [x for x in placed if x[2].dies >= buffer.born]
            for start, end, _ in sorted(alive, key=lambda x: x[:2]):
                if start - begin >= size:
                    break
                begin = max(begin, end)
            buffer.number, buffer.begin = self.count - 1, begin
            placed.append((begin, begin + size, buffer))
        return max((end for _, end, _ in placed), default=0)

    def replay(self, given: list[Tensor], stream: int) -> list[Tensor]:
        device, spare = given[0].device, self.count - len(given)
        tensors: list[Any] = [*given, *(None,) * spare]
        addresses = [x.data_ptr() for x in given] + [0] * spare
        if self.pool:
            x = tensors[len(given)] = _empty((self.pool,), (1,), dtype=torch.uint8, device=device)
            addresses[len(given)] = x.data_ptr()
        for allocations, launch, operation, dead in self.steps:
            for n, shape, stride, dtype in allocations:
                x = tensors[n] = _empty(shape, stride, dtype=dtype, device=device)
                addresses[n] = x.data_ptr()
            if launch is not None:
                run, programs, function, metadata, arguments, places, tuples = launch
                arguments = arguments.copy()
                for place, n, offset in places:
                    arguments[place] = addresses[n] + offset if n >= 0 else offset
                for place, several in tuples:
                    arguments[place] = tuple(
                        [addresses[n] + x if n >= 0 else x for n, x in several]
                    )
                run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
            elif operation is not None:
                for n, x in _operate(operation, tensors):
                    tensors[n], addresses[n] = x, x.data_ptr()
            for n in dead:
                tensors[n] = None
        return [tensors[n] if x is None else x.of(tensors[n]) for n, x in self.results]


def _launch(step: Launch) -> tuple[Any, ...]:
    """Returns a launch as the tuple that ``Plan.replay`` unpacks."""
    places, tuples, arguments = [], [], list(step.arguments)
    for n, x in enumerate(arguments):
        if isinstance(x, Part):
            places.append((n, *x.place))
        elif isinstance(x, tuple):
            tuples.append((n, [y.place if isinstance(y, Part) else (-1, y) for y in x]))
    found = step.found
    return found.run, step.programs, found.function, found.metadata, arguments, places, tuples


def _restored(x: Any, tensors: list[Any]) -> Any:
    if isinstance(x, Part):
        return x.of(tensors[x.buffer.number])
    return [_restored(y, tensors) for y in x] if isinstance(x, tuple) else x


def _operate(x: Operation, tensors: list[Any]) -> list[tuple[int, Tensor]]:
    with torch._C._DisableAutocast():
        options = {name: _restored(y, tensors) for name, y in x.options.items()}
        result = x.function(*[_restored(y, tensors) for y in x.arguments], **options)
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [(buffer.number, y) for buffer, y in zip(x.results, results, strict=False)]


class _Unplanned(NamedTuple):
    """A call without a plan: it has none yet, or cannot have one for a reason."""

    reason: str | None


_ONCE = _Unplanned(None)
_lock = threading.Lock()
_plans: dict[Any, Plan | _Unplanned] = {}
_states: dict[Any, int] = {}
_usual: dict[Any, int] = {}
_numbers = itertools.count()
_held: dict[int, Any] = {}  # kernels whose functions the library launches
_library = torch.ops.additive_attn if hasattr(torch.ops.additive_attn, "replay") else None
_replay: Any = None if _library is None else _library.replay.default._op
_replay_forward: Any = None if _library is None else _library.replay_forward.default._op


def forget() -> None:
    """Drops all plans, for tests that change what they depend on: tile sizes, the number of
    multiprocessors."""
    _plans.clear()
    if _library is not None:
        _library.forget_plans()


def begin(function: Any, arguments: tuple[Any, ...]) -> tuple[int, int, list[Tensor]] | None:
    """Returns a number for what a plan depends on besides its tensors, the stream, and the
    tensors. Returns None where a call must have no plan: a mode or a hook must be called."""
    where = compiled.settings() if enabled and _modes() == 0 else None
    if where is None:
        return None
    tensors: list[Tensor] = []
    rest = [function, matmul_precision(), where]
    for x in arguments:
        kind = type(x)
        if kind in TENSORS:
            tensors.append(x)
            rest.append(...)
        elif x is None or kind is int or kind is bool:
            rest.append(x)
        elif kind is float:
            rest.append(x or x.hex())  # zero has a sign
        else:
            return None
    key = tuple(rest)
    number = _states.get(key)
    if number is None:
        if len(_states) >= 4 * _MOST:
            _states.clear()
            _usual.clear()
        number = _states.setdefault(key, next(_numbers))
    return number, where[0].get_current_stream(where[1]), tensors


def _key(number: int, tensors: list[Tensor]) -> tuple[Any, ...]:
    """Returns what a plan depends on; the same as in csrc/bindings/plans.cpp."""
    key: list[Any] = [number]
    for x in tensors:
        key += (x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.device)
    return tuple(key)


def _on_gpu(arguments: tuple[Any, ...]) -> bool:
    """Whether a call is on a GPU. This is checked first: without a GPU there is no driver."""
    first = arguments[0]
    if first is None:
        first = next((x for x in arguments if x is not None), None)
    return on_cpu or (type(first) in TENSORS and first.is_cuda)


def planned(function: Callable[..., Any], single: bool = False) -> Callable[..., Any]:
    """Returns an operator whose calls are recorded and repeated. ``single``: it returns a
    tensor."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        found = begin(function, arguments) if _on_gpu(arguments) else None
        if found is None:
            return function(*arguments)
        results = None if _replay is None else _replay(*found)
        if not results:
            number, stream, tensors = found
            key = _key(number, tensors)
            plan = _plans.get(key)
            result = None
            if plan is _ONCE:
                result, plan = _written_down(function, arguments)
                _keep(key, plan)
            elif plan is None:
                _keep(key, _ONCE)
            if not isinstance(plan, Plan):
                return function(*arguments) if result is None else result
            if plan.program is not None and _library is not None:  # which may have dropped it
                _held.update((id(x), x) for x in plan.kernels)
                _library.keep_plan(number, tensors, plan.program)
            if result is not None:
                return result
            results = plan.replay(tensors, stream)
        return results[0] if single else tuple(results)

    return call


def repeated_forward(function: Any, call: tuple[Any, ...], need_weights: bool) -> Any:
    """Returns the results of a forward whose plan is in the library, else None. Calls whose
    masking and options hold no tensors take a shorter way there."""
    query, key, value, weight = call[:4]
    if not (on_cpu or query.is_cuda) or _replay is None:
        return None
    where = compiled.settings() if enabled and _modes() == 0 else None
    if where is None:
        return None
    rest = call[4:], need_weights, matmul_precision(), where
    number = _usual.get(rest)
    if number is None:
        found = begin(function, (*call, need_weights))
        if found is None:
            return None
        results = _replay(*found)
        if not results:
            return None
        if len(found[2]) == 4 and call[-1] != 0.0:  # zero has a sign
            _usual[rest] = found[0]
        return tuple(results)
    if not (
        type(query) in TENSORS
        and type(key) in TENSORS
        and type(value) in TENSORS
        and type(weight) in TENSORS
    ):
        return None
    stream = where[0].get_current_stream(where[1])
    results = _replay_forward(number, stream, query, key, value, weight)
    return None if results[0] is None else results


def repeated_backward(function: Any, *arguments: Any) -> Any:
    """Returns the results of a backward whose plan is in the library, else None."""
    if _replay is None or not (on_cpu or arguments[3].is_cuda):
        return None
    found = begin(function, arguments)
    return (found and _replay(*found)) or None


def _keep(key: Any, plan: Plan | _Unplanned) -> None:
    with _lock:
        _plans.pop(key, None)
        if len(_plans) >= _MOST:
            del _plans[next(iter(_plans))]
        _plans[key] = plan


def _written_down(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, Plan | _Unplanned]:
    """Records a call. Returns its result and its plan."""
    # Each argument gets a tensor of its own: one that is given twice may be two the next time.
    arguments = tuple(x.detach() if type(x) in TENSORS else x for x in arguments)
    recorder = Recorder([x for x in arguments if isinstance(x, Tensor)])
    with compiled.recorded(recorder), torch._C._DisableAutocast(), recorder:
        result = function(*arguments)
    try:
        return result, Plan(recorder, (result,) if isinstance(result, Tensor) else result)
    except NotPlanned as error:
        return result, _Unplanned(str(error))
