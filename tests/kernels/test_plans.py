"""A repeated call on a GPU runs from a plan: it has the same launches, with other addresses. A
driver that runs nothing records them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from traffic import Traffic, assert_same, check, inputs, replayed, traffic

from additive_attn.backends import triton as operators
from additive_attn.backends.triton import plans
from additive_attn.spec.call import Call
from tools.mock_driver import MockDriver

pytestmark = pytest.mark.usefixtures("planning")
CALLS: dict[str, Call] = {
    "several queries": inputs(9),
    "one query": inputs(1),
    "one query, keys split": inputs(1, 2000),
    "float mask": inputs(9, attn_mask=torch.zeros(9, 40)),
    "one query, float mask": inputs(1, attn_mask=torch.zeros(2, 1, 40)),
    "lengths, dropout, window": inputs(
        9, lengths=torch.tensor([[5], [40]]), seed=torch.tensor(3), dropout_p=0.2, left=4, right=2
    ),
    "shared keys and values": inputs(9)._replace(value=torch.randn(1, 40, 20)),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(driver: MockDriver, name: str) -> None:
    call = CALLS[name]
    check(driver, operators.forward, *call, True)
    check(driver, operators.forward, *call, False)
    out, weights, lse = operators.forward(*call, True)
    upstream = torch.zeros_like(out), torch.zeros_like(weights), torch.zeros_like(lse)
    check(driver, operators.backward, *upstream, *call, lse, *(True,) * 5)
    check(driver, operators.backward, upstream[0], None, None, *call, lse, *(True,) * 4, False)


def test_scores(driver: MockDriver) -> None:
    for rows in (1, 9):
        query, key, _, weight, mask, lengths = inputs(rows, attn_mask=torch.zeros(rows, 40))[:6]
        call = query, key, weight, mask, lengths, None, None, None, -1, -1, 0.5
        check(driver, operators.scores, *call)
        check(driver, operators.scores_backward, torch.zeros(2, rows, 40), *call, *(True,) * 4)


@pytest.mark.parametrize("located", [False, True])
def test_steps(driver: MockDriver, located: bool) -> None:
    location = (torch.randn(2, 3, 40), torch.randn(3, 36)) if located else (None, None)
    call = (*inputs(1)[:4], None, *location, None, torch.tensor([[7], [40]]), None, 0.0, 1.0)
    check(driver, operators.step, *call)
    out, weights, lse = operators.step(*call)
    upstream = torch.zeros_like(out), torch.zeros_like(weights), None
    grad_key = torch.zeros(2, 40, 36) if located else None
    check(driver, operators.step_backward, *upstream, *call, weights, lse, grad_key)


def test_location_features(driver: MockDriver) -> None:
    x, filters = torch.randn(3, 2, 50), torch.randn(4, 2, 7)
    check(driver, operators.location_features, x, filters)
    gradient = torch.zeros(3, 4, 50)
    check(driver, operators.location_features_backward, gradient, x, filters, True, True)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:]
    return memory.view(x.shape).copy_(x)


BASE = inputs(1)
MASK = torch.zeros(2, 1, 40)
VARIATIONS: dict[str, tuple[Call, bool]] = {
    "fewer keys": (inputs(1, 39), False),
    "more features": (inputs(1, 40, 48), False),
    "more values": (inputs(1, 40, 36, 24), False),
    "a batch dim more": (BASE._replace(query=torch.randn(3, 2, 1, 36)), False),
    "query of another stride": (BASE._replace(query=torch.randn(2, 1, 72)[..., ::2]), False),
    "key transposed": (BASE._replace(key=torch.randn(2, 36, 40).mT), False),
    "value expanded": (BASE._replace(value=torch.randn(40, 20).expand(2, 40, 20)), False),
    "weight of another stride": (BASE._replace(weight=torch.randn(72)[::2]), False),
    "query not aligned": (BASE._replace(query=unaligned(BASE.query)), False),
    "value not aligned": (BASE._replace(value=unaligned(BASE.value)), False),
    "another dtype": (Call(*(x.half() for x in BASE[:4])), False),
    "a mask": (BASE._replace(attn_mask=MASK), False),
    "a mask of another dtype": (BASE._replace(attn_mask=MASK == 0), False),
    "lengths": (BASE._replace(lengths=torch.tensor([[3], [5]])), False),
    "starts": (BASE._replace(starts=torch.tensor([[3], [5]])), False),
    "a window": (BASE._replace(left=3), False),
    "a window on the right": (BASE._replace(right=3), False),
    "dropout": (BASE._replace(seed=torch.tensor(5), dropout_p=0.5), False),
    "more dropout": (BASE._replace(seed=torch.tensor(5), dropout_p=0.6), False),
    "another scale": (BASE._replace(scale=0.5), False),
    "a negative zero": (BASE._replace(scale=-0.0), False),
    "zero": (BASE._replace(scale=0.0), False),
    "weights": (BASE, True),
}


def test_a_plan_serves_only_its_own_kind_of_call(driver: MockDriver) -> None:
    """Calls run one after the other, and each also while the plans of all others exist."""

    def ordinary(call: Call, need_weights: bool) -> Traffic:
        function = operators.forward.__wrapped__
        return traffic(driver, lambda: function(*call, need_weights))

    cases = {"base": (BASE, False), **VARIATIONS}
    for _ in range(4):
        for call, need_weights in cases.values():
            operators.forward(*call, need_weights)
    assert len(plans._plans) == len(cases)
    for name, (call, need_weights) in cases.items():
        given = [x for x in call if isinstance(x, torch.Tensor)]
        found = replayed(driver, operators.forward, (*call, need_weights))
        if plans._replay is not None and name != "starts":  # torch packs the starts
            assert len(found) == 2, name
        for repeated in found:
            assert_same(ordinary(call, need_weights), repeated, given)


SEVERAL = inputs(5, 20)
OUT, LSE = torch.zeros(2, 5, 20), torch.zeros(2, 5)
ALL = (True, True, True, True, False)
# The gradients of out, weights and lse, the call, and the gradients that are needed.
GRADIENTS: dict[str, tuple[Any, ...]] = {
    "base": (OUT, None, None, SEVERAL, ALL),
    "dO transposed": (torch.zeros(2, 20, 5).mT, None, None, SEVERAL, ALL),
    "dO not aligned": (unaligned(OUT), None, None, SEVERAL, ALL),
    "dO of another dtype": (OUT.half(), None, None, SEVERAL, ALL),
    "no dO": (None, torch.zeros(2, 5, 20), None, SEVERAL, ALL),
    "dlse": (OUT, None, LSE, SEVERAL, ALL),
    "value not aligned": (
        OUT, None, None, SEVERAL._replace(value=unaligned(SEVERAL.value)), ALL
    ),
    "another scale": (OUT, None, None, SEVERAL._replace(scale=0.5), ALL),
    "no query": (OUT, None, None, SEVERAL, (False, *ALL[1:])),
    "value alone": (OUT, None, None, SEVERAL, (False, False, True, False, False)),
}  # fmt: skip


def test_a_plan_serves_only_its_own_kind_of_gradients(driver: MockDriver) -> None:
    cases = {
        name: (*upstream, *call, LSE, *needs)
        for name, (*upstream, call, needs) in GRADIENTS.items()
    }
    for _ in range(3):
        for case in cases.values():
            operators.backward(*case)
    assert len(plans._plans) == len(cases)
    for name, case in cases.items():
        ordinary = traffic(driver, lambda case=case: operators.backward.__wrapped__(*case))
        found = replayed(driver, operators.backward, case)
        assert len(found) == 1 + (plans._replay is not None and name != "no dO"), name
        for repeated in found:
            assert_same(ordinary, repeated, [x for x in case if isinstance(x, torch.Tensor)])


def launched(driver: MockDriver, call: Call) -> Any:
    before = driver.launched
    operators.forward(*call, False)
    (found,) = driver.since(before)
    return found


def test_a_tensor_given_twice(driver: MockDriver) -> None:
    keys = torch.randn(2, 40, 36)
    for _ in range(3):
        operators.forward(*BASE._replace(key=keys, value=keys), False)
    call = BASE._replace(key=keys, value=torch.randn(2, 40, 36))
    parameters = launched(driver, call).parameters
    assert call.key.data_ptr() in parameters and call.value.data_ptr() in parameters


def test_settings_of_the_process(
    driver: MockDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(3):
        usual = launched(driver, BASE)
    monkeypatch.setattr(driver, "stream", 7)
    assert launched(driver, BASE)[:5] == usual[:5] and launched(driver, BASE).stream == 7
    monkeypatch.setattr(driver, "device", 1)
    assert launched(driver, BASE).kernel != usual.kernel
    monkeypatch.setattr(driver, "device", 0)
    assert launched(driver, BASE).kernel == usual.kernel
    count = len(plans._plans)
    monkeypatch.setattr(plans, "matmul_precision", lambda: "medium")
    launched(driver, BASE)
    assert len(plans._plans) == count + 1


def test_what_reads_a_tensor_has_no_plan(driver: MockDriver) -> None:
    @plans.planned
    def reads(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum().item() > 0 else x + 2

    @plans.planned
    def returns(x: torch.Tensor) -> torch.Tensor:
        return x

    @plans.planned
    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        return x + numbers

    numbers = torch.ones(3)
    for n in range(4):
        x = torch.full((3,), float(n % 2))
        assert reads(x)[0] == 2
        assert returns(x).data_ptr() == x.data_ptr()
        assert elsewhere(x)[0] == n % 2 + 1
    assert not any(isinstance(x, plans.Plan) for x in plans._plans.values())


def test_a_planned_call_within_another(driver: MockDriver) -> None:
    @plans.planned
    def outer(*call: Any) -> tuple[torch.Tensor, ...]:
        first = operators.forward(*call, False)
        return (first[0] + 1, *operators.forward(*call, False)[1:])

    for _ in range(6):
        before = driver.launched
        outer(*BASE)
        assert driver.launched - before == 2


def test_operations_of_torch_are_repeated(driver: MockDriver) -> None:
    @plans.planned
    def function(x: torch.Tensor, y: torch.Tensor, n: int) -> tuple[torch.Tensor, ...]:
        total = x.new_zeros(2, 3)
        total[0] += x[:, 1]
        total += (x.mT @ y).sum(0)[None, :3]
        return total.view(3, 2).to(torch.float64), torch.cat([x, y], 1)[:, n:], y.t().contiguous()

    for seed in range(5):
        torch.manual_seed(seed)
        x, y = torch.randn(3, 4), torch.randn(3, 5)
        ours, expected = function(x, y, 2), function.__wrapped__(x, y, 2)
        for one, other in zip(ours, expected, strict=True):
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert any(isinstance(x, plans.Plan) for x in plans._plans.values())


def test_without_a_gpu_no_driver_is_used(
    driver: MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no driver with ADDITIVE_ATTN_CPU=triton and TRITON_INTERPRET=1, for example."""

    def refuse() -> None:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(plans, "on_cpu", False)
    monkeypatch.setattr(plans.compiled, "settings", refuse)
    x = torch.zeros(3)
    assert plans.planned(lambda *x: x)(None, x, 1) == (None, x, 1)


def test_known_calls_are_bounded(
    driver: MockDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plans, "_MOST", 3)
    for keys in range(2, 8):
        for _ in range(3):
            launched(driver, inputs(1, keys))
        assert len(plans._plans) <= 3
    launched(driver, inputs(1, 7))


def test_many_threads(driver: MockDriver) -> None:
    before = driver.launched
    failed = []

    def work(keys: int) -> None:
        try:
            for n in range(40):
                out, _, lse = operators.forward(*inputs(1, 2 + (keys + n) % 5), False)
                assert out.shape == (2, 1, 20) and lse.shape == (2, 1)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and driver.launched - before == 160
