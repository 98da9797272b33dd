"""Products by oneDNN are those of ``F.linear``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from additive_attn import AdditiveAttention
from additive_attn.ops import linear as module

pytestmark = pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Of any size and on any CPU; what oneDNN multiplied."""
    found, product = [], module._product
    monkeypatch.setattr(module, "_ENOUGH", 0)
    monkeypatch.setattr(module, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(module, "_product", lambda *x: found.append(x) or product(*x))
    return found


def leaves(*shape, bias=True):
    torch.manual_seed(0)
    tensors = torch.randn(*shape, 6), torch.randn(7, 6), torch.randn(7) if bias else None
    return [None if x is None else x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 1), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives(shape, bias, calls):
    given = leaves(*shape, bias=bias)
    used = [x for x in given if x is not None]
    found = []
    for function in (module.linear, F.linear):
        output = function(*given)
        first = torch.autograd.grad(output.sin().sum(), used, create_graph=True)
        second = torch.autograd.grad(sum(x.sin().sum() for x in first), used)
        plain = torch.autograd.grad(function(*given).sin().sum(), used)
        found.append([output, *first, *second, *plain])
    assert len(calls) == 4
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_strides_of_inputs_and_of_what_comes_from_upstream(calls):
    x, _, bias = leaves(4, 5)
    x = x.detach().transpose(0, 1).requires_grad_()
    wide = torch.randn(6, 7).t().requires_grad_()
    found = []
    for function in (module.linear, F.linear):
        output = function(x, wide, bias)
        upstream = torch.ones(5, 1, 1).expand(5, 4, 7)
        found.append([output, *torch.autograd.grad(output, (x, wide, bias), upstream)])
    assert len(calls) == 2
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_where_it_is_not_used(calls):
    x, weight, bias = (tensor.detach() for tensor in leaves(5))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.linear(x, weight, bias).dtype == torch.bfloat16
    torch.func.jacrev(module.linear)(x, weight, bias)
    torch.compile(module.linear, backend="eager", fullgraph=True)(x, weight, bias)
    module.linear(x.double(), weight.double(), bias.double())
    with pytest.raises(RuntimeError, match="shapes"):
        module.linear(x[:, :3], weight, bias)
    with torch.backends.mkldnn.flags(enabled=False):
        module.linear(x, weight, bias)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(module.linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(calls) == 1


def test_a_layer_projects_with_it(calls):
    layer, keys = AdditiveAttention(6, 8), torch.randn(2, 5, 6)
    layer.project(keys)
    assert len(calls) == 1


def test_batches_of_upstream_gradients(calls):
    given, upstream = leaves(5), torch.randn(3, 5, 7)
    found = [
        torch.autograd.grad(function(*given), given, upstream, is_grads_batched=True)
        for function in (module.linear, F.linear)
    ]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
