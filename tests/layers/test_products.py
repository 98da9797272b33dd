"""A weight that all steps share: its gradient is made once, and is that of a Linear in every way
to differentiate."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from decoders import eventually
from oracle import DEVICE
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from additive_attn.ops.memory import _Pass
from additive_attn.ops.products import lend_weight, multiply

B, N, M, T = 3, 5, 4, 3
F64 = torch.float64
SHAPE = (M, N)


@pytest.fixture(autouse=True, params=[(M, N), (B, M, N)], ids=["shared", "of each entry"])
def weight_shape(request, monkeypatch):
    monkeypatch.setitem(globals(), "SHAPE", request.param)


def direct(weight, x):
    return linear(x, weight) if weight.dim() == 2 else (weight @ x.unsqueeze(-1)).squeeze(-1)


def leaves():
    torch.manual_seed(0)
    return torch.randn(*SHAPE, dtype=F64, requires_grad=True), *(
        torch.randn(*shape, dtype=F64, requires_grad=True) for shape in [(B, N)] * T
    )


def loop(weight, inputs, product, lent, used=False):
    """Every input depends on the product before it."""
    total, last = weight.new_zeros(()), 0.0
    for x in inputs:
        out = product(lent, x + last)
        last = torch.tanh(out).mean()
        total = total + out.pow(3).sum()
    return total + weight.square().sum() if used else total


def plain(used=False):
    weight, *inputs = leaves()
    return loop(weight, inputs, direct, weight, used), weight, inputs


def ours(used=False):
    weight, *inputs = leaves()
    return loop(weight, inputs, multiply, lend_weight(weight), used), weight, inputs


def gradients(run, used=False, times=1):
    total, weight, inputs = run(used)
    for left in reversed(range(times)):
        total.backward(retain_graph=left > 0)
    return weight.grad, *(x.grad for x in inputs)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_gradients(used, times):
    torch.testing.assert_close(gradients(ours, used, times), gradients(plain, used, times))


def test_weight_of_a_graph():
    """The weight is computed from parameters, and another step follows after a backward pass."""
    results = []
    for lend, product in ((lend_weight, multiply), (lambda w: w, direct)):
        weight, *inputs = leaves()
        made = weight.tanh().sigmoid()
        lent = lend(made)
        loop(made, inputs, product, lent).backward(retain_graph=True)
        product(lent, inputs[0]).sum().backward()
        results.append((weight.grad, inputs[0].grad))
    torch.testing.assert_close(*results)


def test_a_part_of_the_inputs():
    total, weight, inputs = ours()
    wanted = plain()
    for pick in ([*inputs], [weight], [inputs[1], weight]):
        which = [next(i for i, x in enumerate([weight, *inputs]) if x is p) for p in pick]
        like = [[wanted[1], *wanted[2]][i] for i in which]
        found = torch.autograd.grad(total, pick, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(wanted[0], like, retain_graph=True))


def test_second_derivatives():
    results = []
    for run in (ours, plain):
        total, weight, inputs = run()
        first = torch.autograd.grad(total, [weight, *inputs], create_graph=True)
        second = sum(x.square().sum() for x in first)
        results.append(torch.autograd.grad(second, [weight, *inputs]))
    torch.testing.assert_close(*results)
    batch = torch.eye(2, dtype=F64)
    found = []
    for run in (ours, plain):
        total, weight, _ = run()
        both = torch.stack([total, 2 * total])
        found.append(torch.autograd.grad(both, weight, batch, is_grads_batched=True))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    weight, *inputs = leaves()
    lent = lend_weight(weight)
    outs = [checkpoint(multiply, lent, x, use_reentrant=reentrant).pow(3).sum() for x in inputs]
    sum(outs).backward()
    found, grad = [x.grad for x in inputs], weight.grad
    weight, *inputs = leaves()
    sum(direct(weight, x).pow(3).sum() for x in inputs).backward()
    torch.testing.assert_close([*found, grad], [*(x.grad for x in inputs), weight.grad])


def test_without_gradients_under_autocast_and_under_vmap():
    weight, *inputs = leaves()
    lent = lend_weight(weight)
    with torch.no_grad():
        assert not multiply(lent, inputs[0]).requires_grad
        assert lend_weight(weight).node is None
    x = torch.stack(inputs)
    torch.testing.assert_close(torch.vmap(lambda x: multiply(lent, x))(x), direct(weight, x))
    narrow = lend_weight(weight.detach().float().requires_grad_())
    with torch.autocast(DEVICE, torch.bfloat16):
        assert multiply(narrow, inputs[0].detach().float()).dtype == torch.bfloat16


def test_an_exception_leaves_no_record():
    total, weight, inputs = ours()

    def fail(_):
        raise RuntimeError("on purpose")

    hook = inputs[0].register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        total.backward(retain_graph=True)
    hook.remove()
    gc.collect()
    assert eventually(lambda: not any(type(x) is _Pass for x in gc.get_objects()))
    weight.grad = None
    for x in inputs:
        x.grad = None
    total.backward()
    torch.testing.assert_close((weight.grad, *(x.grad for x in inputs)), gradients(plain))


def test_backward_in_another_thread():
    total, weight, inputs = ours()
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    torch.testing.assert_close((weight.grad, *(x.grad for x in inputs)), gradients(plain))


def test_a_weight_that_is_written_to():
    weight, *inputs = leaves()
    lent = lend_weight(weight)
    out = multiply(lent, inputs[0])
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
