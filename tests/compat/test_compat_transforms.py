"""The layers of other code bases under torch.func and torch.compile, and after them, when the
tensors that they keep of a sequence may come from a transform that has ended."""

from __future__ import annotations

import functools

import pytest
import torch
from test_compat_arguments import CALLS
from torch.autograd import forward_ad


def floats(arguments):
    return {
        name: x for name, x in arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }  # fmt: skip


def called(layer, arguments):
    """Returns the context of a step, which is called with copies of lists since it appends to
    them."""
    lists = {n: [*x] for n, x in arguments.items() if type(x) is list and n != "enc_hs_len"}
    if hasattr(layer, "init_states"):
        layer.init_states(arguments["inputs"])
    outputs = layer(**arguments | lists)
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def end_sequence(layer):
    """Ends a sequence. A layer without ``reset`` keeps the weights of its last step, as the
    original does."""
    if hasattr(layer, "init_states"):
        layer.attention_weights = layer.attention_weights_cum = None
    elif hasattr(layer, "reset"):
        layer.reset()


def of_gradients(function, x):
    context = []
    torch.func.grad(lambda x: context.append(function(x)) or context[0].sum())(x)


def of_tangents(function, x):
    torch.func.jvp(function, (x,), (torch.ones_like(x),))


def of_dual_numbers(function, x):
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("transform", [of_gradients, of_tangents, of_dual_numbers])
@pytest.mark.parametrize("name", CALLS)
def test_a_step_after_a_transform(name, transform):
    make, good = CALLS[name]
    for argument, x in floats(good).items():
        layer = make()
        expected = called(layer, good)
        if hasattr(layer, "reset"):
            layer.reset()
        transform(lambda x, n=argument, to=layer: called(to, good | {n: x}), x.clone())
        found = [called(layer, good)]
        with torch.no_grad():
            found.append(called(layer, good))
        if name != "LocationAwareAttention":  # it starts with the last step's weights
            for each in found:
                torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_gradients(name):
    """torch.compile raises for a tensor that a transform leaves in a module, so the loss ends the
    sequence."""
    make, good = CALLS[name]
    layer = make()

    def loss(given):
        outputs = [called(layer, good | given) for _ in range(2)]
        end_sequence(layer)
        return sum(x.square().sum() for x in outputs)

    given = floats(good)
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    wanted = functools.partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    expected = wanted(loss(leaves), list(leaves.values()))
    gradients = torch.func.grad(loss)
    for each in (gradients, torch.compile(gradients, backend="aot_eager")):
        torch.testing.assert_close(tuple(each(given).values()), expected)
