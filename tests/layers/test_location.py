"""Location-sensitive attention: the features of the earlier weights, and the layer."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d

from additive_attn.ops.location import location_features


def features_arguments(dtype=torch.float64):
    inputs, filters = torch.randn(3, 2, 11, dtype=dtype), torch.randn(5, 2, 7, dtype=dtype)
    return inputs.requires_grad_(), filters.requires_grad_()


@pytest.mark.core
def test_features_are_a_convolution(path):
    inputs, filters = features_arguments()
    expected = conv1d(inputs, filters, padding=3)
    upstream = torch.randn_like(expected)
    ours = location_features(inputs, filters)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (inputs, filters), upstream),
        torch.autograd.grad(expected, (inputs, filters), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(location_features(inputs, filters), expected)


@pytest.mark.core
def test_features_gradcheck(path):
    arguments = features_arguments()
    assert torch.autograd.gradcheck(location_features, arguments)
    assert torch.autograd.gradgradcheck(location_features, arguments)


@pytest.mark.parametrize("which", [0, 1])
def test_features_give_the_gradients_that_are_needed(which):
    arguments = features_arguments()
    arguments[1 - which].requires_grad_(False)
    features = location_features(*arguments)
    (grad,) = torch.autograd.grad(features.square().sum(), arguments[which])
    assert grad.shape == arguments[which].shape


def test_features_under_transforms():
    inputs, filters = (x.detach() for x in features_arguments())

    def total(inputs, filters):
        return location_features(inputs, filters).square().sum()

    inputs.requires_grad_()
    (expected,) = torch.autograd.grad(total(inputs, filters), inputs)
    inputs.requires_grad_(False)
    torch.testing.assert_close(torch.func.grad(total)(inputs, filters), expected)
    one_by_one = torch.func.vmap(lambda x: location_features(x[None], filters)[0])(inputs)
    torch.testing.assert_close(one_by_one, location_features(inputs, filters))
    _, tangent = torch.func.jvp(lambda x: total(x, filters), (inputs,), (expected,))
    torch.testing.assert_close(tangent, expected.square().sum())
    compiled = torch.compile(location_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, filters), location_features(inputs, filters))
