"""Location-sensitive attention: the features of the earlier weights, and the layer."""

from __future__ import annotations

import pytest
import torch
from decoders import (
    EVERY,
    LENGTHS,
    LK,
    SOME,
    B,
    D,
    Decoder,
    H,
    K,
    Plain,
    assert_close,
    attended,
    build,
    inputs,
    results,
)
from oracle import DEVICE, assert_same, error
from torch import nn
from torch.nn.functional import conv1d
from torch.utils._python_dispatch import TorchDispatchMode

from additive_attn import LocationSensitiveAttention
from additive_attn.backends.plain import steps
from additive_attn.ops.location import location_features

pytestmark = pytest.mark.usefixtures("steps_leave_records")


def _flat(step):
    return [*step[:2], *step[2]]


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


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *(x.numel() for x in tensors), 0)
        return made


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU plain PyTorch makes them")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_plain_pytorch_makes_no_windows_of_all_features(dtype):
    """Windows of all features have width times their elements; windows of the inputs have a tenth
    of that."""
    inputs, filters, grad = torch.randn(2, 2, 40), torch.randn(20, 2, 9), torch.randn(2, 20, 40)
    arguments = [x.to(dtype) for x in (grad, inputs, filters)]
    with _Largest() as largest:
        found = steps.location_features_backward(*arguments, True, True)
    assert largest.elements <= grad.numel()
    expected = steps.differentiable_features_backward(*arguments, True, True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


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


# The layers. Those of tests/layers/test_coverage.py are among the kinds.


@pytest.mark.core
@pytest.mark.interpreter(kind=["tacotron", "pointer"])
@EVERY
def test_outputs_and_gradients_are_those_of_the_plain_layer(kind, path, passes):
    decoder, tensors = Decoder(build(kind)), inputs()
    ours = results(decoder, decoder, tensors, lengths=LENGTHS)
    assert passes == [4], "the gradients were not made once"
    theirs = results(decoder, decoder.plain, tensors, attended=attended())
    for mine, plain in zip(ours, theirs, strict=True):
        assert_close(mine, plain)


@EVERY
def test_accuracy_in_single_precision(kind):
    found = []
    for dtype in (torch.float64, torch.float32):
        decoder = Decoder(build(kind))
        decoder.to(torch.float32).to(dtype)
        tensors = [x.detach().float().to(dtype).requires_grad_() for x in inputs()]
        runs = [(decoder.plain, {"attended": attended()})]
        if dtype == torch.float32:
            runs.append((decoder, {"lengths": LENGTHS}))
        found += [results(decoder, run, tensors, **options) for run, options in runs]
    for which, factor in ((0, 2), (1, 3)):
        exact, plain, ours = (each[which] for each in found)
        for best, theirs, mine in zip(exact, plain, ours, strict=True):
            floor = 16 * torch.finfo(torch.float32).eps * max(1.0, best.abs().max().item())
            assert error(mine, best) <= factor * error(theirs, best) + floor


@SOME
def test_padding_cannot_leak(kind):
    decoder = Decoder(build(kind))
    clean = inputs()
    dirty = [x.detach().clone() for x in clean]
    for x in dirty[:2]:
        x[1, 4:], x[2] = torch.nan, torch.inf
    dirty = [x.requires_grad_() for x in dirty]
    # A Linear multiplies the padding's gradient, 0, by the NaN of its input.
    decoder.layer.key_layer.requires_grad_(False)
    for options in ({"lengths": LENGTHS}, {"key_padding_mask": ~attended()}):
        expected, found = (results(decoder, decoder, x, **options) for x in (clean, dirty))
        for a, b in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
            assert_same(a, b)
        for weights in found[0][1:-2:2]:
            assert not weights[~attended()].any()
        for grad in found[1][:2]:
            assert not grad[1, 4:].any() and not grad[2].any()


@SOME
def test_unbatched_and_time_major(kind):
    decoder, (key, value, query) = Decoder(build(kind)), inputs()
    expected = decoder(key, value, query, lengths=LENGTHS)
    alone = decoder(key[1], value[1], query[1], lengths=4)
    assert_close(alone, [x[1] for x in expected])
    swapped = Decoder(build(kind, batch_first=False))
    swapped.load_state_dict(decoder.state_dict())
    turned = swapped(key.transpose(0, 1), value.transpose(0, 1), query, lengths=LENGTHS)
    assert_close(turned, expected)


@SOME
def test_a_memory_of_one_sequence_is_shared(kind):
    decoder, (key, value, query) = Decoder(build(kind)), inputs()
    for options in ({}, {"lengths": torch.tensor(LENGTHS)}):
        shared = decoder(key[:1], value[:1], query, **options)
        copied = decoder(key[:1].expand_as(key), value[:1].expand_as(value), query, **options)
        assert_close(shared, copied)


@SOME
def test_initial_state(kind):
    layer = build(kind)
    memory = layer.project(torch.randn(B, LK, K), lengths=LENGTHS)
    state = layer.initial_state(memory)
    expected = torch.zeros(B, LK)
    if kind == "attloc":
        expected[0], expected[1, :4] = 1 / LK, 1 / 4
    assert_same(state.previous, expected)
    assert_same(state.cumulative, expected)
    _, weights, after = layer.step(torch.randn(B, D), memory, state)
    assert after.previous is weights
    torch.testing.assert_close(after.cumulative, expected + weights)


@SOME
def test_dropout(kind):
    """Returned weights, and those in the state, are without dropout, whether gradients are
    deferred or not."""
    decoder = Decoder(build(kind, dropout=0.5))
    tensors, found = inputs(), []
    for options in ({}, {"ordinary": True}):
        torch.manual_seed(5)
        found.append(results(decoder, decoder, tensors, lengths=LENGTHS, **options))
    for ours, ordinary in zip(*found, strict=True):
        assert_close(ours, ordinary)
    decoder.eval()
    kept = decoder(*tensors, lengths=LENGTHS)
    assert (kept[0] - found[0][0][0]).abs().max() > 0.01
    assert_close(kept[1:2], found[0][0][1:2])  # weights of the first step
    assert_close(kept[1].sum(-1)[:2], torch.ones(2))


def test_state_dict():
    layer = build("tacotron")
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {
        "query_layer.weight": (H, D), "key_layer.weight": (H, K), "energy_layer.weight": (1, H),
        "location_conv.weight": (4, 2, 5), "location_layer.weight": (H, 4),
    }  # fmt: skip
    assert "filters=" not in repr(layer) and "Conv1d(2, 4, kernel_size=(5,)" in repr(layer)
    assert build("attloc").extra_repr() == (
        "query_dim=6, key_dim=5, hidden_dim=8, scale=2.0, inputs=('previous',), initial='uniform'"
    )


@pytest.mark.parametrize(
    "options, exception, sentence",
    [
        (dict(kernel_size=4), ValueError, "kernel_size is 4, but must be odd"),
        (dict(filters=0), ValueError, "filters is 0"),
        (dict(filters=2.0), TypeError, "filters is 2.0"),
        (dict(inputs="previous"), ValueError, r"inputs is 'previous', but must be \(.*\)"),
        (dict(inputs=()), ValueError, "inputs is"),
        (dict(inputs=["last"]), ValueError, "inputs is"),
        (dict(initial="ones"), ValueError, "initial is 'ones', but must be one of"),
    ],
)
def test_sentences_of_the_constructor(options, exception, sentence):
    with pytest.raises(exception, match=sentence):
        LocationSensitiveAttention(4, 5, 6, **options)


def step_cases():
    layer = build("attloc")
    key, query = torch.randn(2, LK, K), torch.randn(2, D)
    memory = layer.project(key)
    state = layer.initial_state(memory)
    other = layer.initial_state(layer.project(torch.randn(3, LK, K)))
    longer = layer.initial_state(layer.project(torch.randn(2, LK + 1, K)))
    beams = memory.expand(2)
    return {
        "state of another batch": ((query, memory, other), ValueError, r"a state of \(2, 11\)"),
        "state of another length": ((query, memory, longer), ValueError, "initial_state"),
        "state before the beams": ((torch.randn(4, D), beams, state), ValueError, "2 beam"),
        "no state": ((query, memory, None), TypeError, "state that is a NoneType.*initial_state"),
        "weights": ((query, memory, state.previous), TypeError, "state that is a Tensor"),
        "tuple": ((query, tuple(memory), state), TypeError, "memory that is a tuple.*project"),
        "query batch": ((torch.randn(3, D), memory, other), ValueError, "Sensitive.*the batch"),
        "query rank": ((query[:, None], memory, state), ValueError, "one query per sequence"),
        "query features": ((query[:, 1:], memory, state), ValueError, "5 features.*query_dim=6"),
        "query list": (([1.0], memory, state), TypeError, "query is a list"),
        "query dtype": ((query.double(), memory, state), TypeError, "query is torch.float64"),
        "beams": ((torch.randn(3, D), beams, state), ValueError, "needs 4 queries"),
    }  # fmt: skip


@pytest.mark.parametrize("name", step_cases())
def test_sentences_of_a_step(name):
    arguments, exception, sentence = step_cases()[name]
    with pytest.raises(exception, match=sentence):
        build("attloc").step(*arguments)


def test_calling_the_layer_is_a_step():
    layer, (key, value, query) = build("attloc").double(), inputs()
    memory = layer.project(key, value)
    state = layer.initial_state(memory)
    assert_close(_flat(layer(query, memory, state)), _flat(layer.step(query, memory, state)))


def test_plain_of_the_tests_is_not_ours():
    """The plain decoder must not call the package's operators."""
    decoder, tensors = Decoder(build("tacotron")), inputs()
    assert isinstance(Plain(decoder.layer), nn.Module)
    with torch.profiler.profile() as profile:
        decoder.plain(*tensors)
    assert not any("additive_attn" in event.key for event in profile.key_averages())
