"""The compiled library repeats launch plans of calls of the public function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import triton
from traffic import Traffic, inputs

from additive_attn import additive_attention
from additive_attn.backends import triton as operators
from additive_attn.backends.plain import blocks
from additive_attn.backends.triton import plans
from additive_attn.ops.checks import warn_user
from tools.mock_driver import MockDriver, empty_launch, least

pytestmark = [
    pytest.mark.skipif(plans._replay is None, reason="no compiled library"),
    pytest.mark.usefixtures("planning"),
]

BASE = inputs(1)
MASK = torch.zeros(2, 1, 40)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_public_function_takes_the_plan(
    driver: MockDriver, masked: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = BASE._replace(query=BASE.query.clone().requires_grad_(grad))
    mask = MASK if masked else None

    def attend(scale: float = 1.0) -> Any:
        before = driver.launched
        out = additive_attention(*call[:4], attn_mask=mask, scale=scale)
        (found,) = driver.since(before)
        assert out.requires_grad == grad and out.shape == (2, 1, 20)
        assert out.data_ptr() in found.parameters
        moving = zip(found.parameters, found.pointers, strict=True)
        given = {x.data_ptr() for x in call if isinstance(x, torch.Tensor)}
        fixed = [x for x, pointer in moving if not pointer or x in given]
        return found._replace(parameters=fixed)

    with monkeypatch.context() as patch:
        patch.setattr(plans, "enabled", False)
        expected = attend()
        others = [attend(scale) for scale in (0.5, 0.0, -0.0)]
    for _ in range(4):
        assert attend() == expected
    # From now on Python must not look for its own plan.
    for name in ("_key", "_plans"):
        monkeypatch.setattr(plans, name, None)
    for _ in range(2):
        assert attend() == expected
    monkeypatch.undo()
    monkeypatch.setattr(plans, "on_cpu", True)
    for scale, other in zip((0.5, 0.0, -0.0), others, strict=True):
        for _ in range(4):
            assert attend(scale) == other
    assert attend() == expected


def test_gradients_take_the_plan(driver: MockDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward have five launches, and call neither Python's plan nor the
    operators."""
    call = [x.requires_grad_() for x in inputs(5, 20)[:4]]

    def names() -> list[str]:
        before = driver.launched
        additive_attention(*call).sum().backward()
        return [x.name for x in driver.since(before)]

    with monkeypatch.context() as patch:
        patch.setattr(plans, "enabled", False)
        expected = names()
    assert len(expected) == 5
    for _ in range(4):
        assert names() == expected
    for name in ("_key", "_plans"):
        monkeypatch.setattr(plans, name, None)
    assert names() == expected
    out, called = additive_attention(*call), []
    upstream = torch.ones(()).expand_as(out)
    sys.setprofile(
        lambda frame, event, _: called.append(frame.f_code) if event == "call" else None
    )
    try:
        torch.autograd.grad(out, call, upstream)
    finally:
        sys.setprofile(None)
    package = str(Path(plans.__file__).parents[2])
    ours = [x.co_name for x in called if x.co_filename.startswith(package)]
    assert len(ours) <= 8, ours
    monkeypatch.undo()


def test_modes_and_subclasses_get_the_operator(
    driver: MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        additive_attention(*BASE[:4])
    with Traffic(driver) as seen:
        additive_attention(*BASE[:4])
    assert any(event.what[0] == "additive_attn::forward" for event in seen.events)

    class Subclass(torch.Tensor):
        pass

    taken: list[Any] = []
    monkeypatch.setattr(plans, "_replay_forward", lambda *x: taken.append(x))
    additive_attention(BASE.query.as_subclass(Subclass), *BASE[1:4])
    assert not taken
    with pytest.raises(TypeError):  # the replaced function returns None
        additive_attention(*BASE[:4])
    assert taken


def test_a_repeated_call_costs_little_on_the_host(driver: MockDriver) -> None:
    """The cost is compared with that of a single launch with as many arguments: at most four times
    as much on an idle machine."""
    call = inputs(1)

    def attend() -> None:
        additive_attention(*call[:4])

    for _ in range(4):
        attend()
    assert least(attend) <= 5 * least(empty_launch(call.query))
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame) if event == "call" else None)
    try:
        attend()
    finally:
        sys.setprofile(None)
    assert len(calls) <= 20, [frame.f_code.co_name for frame in calls]


def test_the_library_refuses_what_is_no_plan(driver: MockDriver) -> None:
    library, x = torch.ops.additive_attn, torch.zeros(3)
    for program, problem in (
        ([], "ends early"),
        ([0, 1, 1, 6, 1, 3], "ends early"),
        ([-1, 0, 0], "counts -1"),
        ([0, 99, 0], "counts 99"),
        ([0, 0, 1, 1, 1, 128, 0, 1, 7, 0], "no tensor 7"),
        ([0, 0, 1, 1, 1, 99999, 0, 0], "counts 99999"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            library.keep_plan(-1, [x], program)
    with pytest.raises(RuntimeError, match="needs a tensor"):
        library.keep_plan(-1, [], [0, 0, 0])
    library.keep_plan(-1, [x], [0, 0, 0])
    with pytest.raises(RuntimeError, match="3 results"):
        for _ in range(2):
            library.keep_plan(-1, [x] * 4, [0, 0, 0])
            library.replay_forward(-1, 0, x, x, x, x)
    assert library.replay(-2, 0, [x]) == [] and library.replay(-1, 0, []) == []


def test_plans_that_the_library_dropped_are_kept_again(driver: MockDriver) -> None:
    for _ in range(3):
        operators.forward(*BASE, False)
    assert operators.repeated(BASE, False) is not None
    plans._library.forget_plans()
    assert operators.repeated(BASE, False) is None
    operators.forward(*BASE, False)
    assert operators.repeated(BASE, False) is not None


def test_plans_that_fail_are_not_used(driver: MockDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*_: Any) -> None:
        enabled.append(plans.enabled)
        if len(enabled) == 4:
            raise RuntimeError("another out")

    enabled: list[bool] = []
    monkeypatch.setattr(plans, "enabled", True)
    monkeypatch.setattr(operators, "_compare", compare)
    with pytest.warns(UserWarning, match="from launch plans.* another out"):
        operators.probe(torch.device("cpu"), blocks.forward, blocks.backward, warn_user)
    assert enabled == [False, True, True, True] and not plans.enabled
    before = driver.launched
    for _ in range(4):
        additive_attention(*BASE[:4])
    assert driver.launched == before + 4 and not plans._plans


def test_instrumented_kernels_are_not_repeated(
    driver: MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", "consan")
    assert plans.begin(operators.forward, (*BASE, False)) is None
