"""The features of a location: a correlation of earlier weights with filters, and its gradients."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_same, error, generator
from paths import DEVICE

from additive_attn.backends.plain import steps
from additive_attn.ops import dispatch  # noqa: F401  registers the operators

operators = torch.ops.additive_attn

# (batch, channels, keys, filters, width): those of Tacotron 2 and ESPnet; all 1; on both sides of
# vectors of 4, 8 and 16 and of blocks of four; filters wider than the keys; partial sums.
SHAPES = [
    (3, 2, 150, 32, 31), (2, 1, 400, 10, 201), (1, 1, 1, 1, 1), (2, 3, 5, 1, 11),
    (17, 1, 33, 3, 5), (2, 1, 64, 5, 3), (2, 5, 65, 6, 63), (2, 2, 63, 2, 65),
    (18, 4, 130, 1, 129), (1, 1, 700, 7, 15), (2, 1, 3, 4, 301),
]  # fmt: skip
EMPTY = [(0, 2, 5, 3, 3), (2, 0, 5, 3, 3), (2, 2, 0, 3, 3), (2, 2, 5, 0, 3)]


def make(batch, channels, keys, filters, width, dtype=torch.float32):
    g = generator(0)
    shapes = (batch, channels, keys), (filters, channels, width), (batch, filters, keys)
    return [torch.randn(shape, generator=g, device=DEVICE).to(dtype) for shape in shapes]


def fused(inputs, filters, grad):
    """The features and both gradients."""
    return (
        operators.location_features(inputs, filters),
        *operators.location_features_backward(grad, inputs, filters, True, True),
    )


def plain(inputs, filters, grad):
    """Computes them by definition, with a dense matrix of shifted filters, in the dtype of the
    arguments."""
    keys, width = inputs.shape[-1], filters.shape[-1]
    j = torch.arange(keys, device=inputs.device)
    tap = j[:, None] - j + width // 2  # [input position, output position]
    inside = (tap >= 0) & (tap < width)

    def features(inputs, filters):
        shifted = torch.where(inside, filters[..., tap.clamp(0, width - 1)], 0.0)
        return torch.einsum("bci,fcij->bfj", inputs, shifted)

    leaves = [inputs.detach().requires_grad_(), filters.detach().requires_grad_()]
    out = features(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def check(shape, dtype):
    """Asserts the accuracy rule."""
    arguments = make(*shape, dtype=dtype)
    exact = plain(*(x.double() for x in arguments))
    same, ours = plain(*arguments), fused(*arguments)
    for name, mine, theirs, best in zip(
        ("features", "inputs", "filters"), ours, same, exact, strict=True
    ):
        assert mine.dtype == dtype and mine.shape == best.shape
        # In float64 the oracle is no more exact than the judged results.
        roundings = 64 if dtype == torch.float64 else 4
        floor = roundings * torch.finfo(dtype).eps * best.abs().max().item()
        assert error(mine, best) <= 3 * error(theirs, best) + floor, name


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_accuracy(dtype, shape, path):
    check(shape, dtype)


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
def test_as_autograd_differentiates_them(shape):
    """Tests autograd's gradients of plain PyTorch, with few windows and with many."""
    inputs, filters, grad = (x.cpu() for x in make(*shape))
    leaves = inputs.clone().requires_grad_(), filters.clone().requires_grad_()
    out = steps.convolved(*leaves)
    found = out, *torch.autograd.grad(out, leaves, grad)
    with torch.no_grad():
        torch.testing.assert_close(steps.convolved(inputs, filters), out, rtol=1e-4, atol=1e-4)
    for mine, wanted in zip(found, plain(inputs, filters, grad), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.core
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing(shape, path):
    arguments = make(*shape)
    for mine, wanted in zip(fused(*arguments), plain(*arguments), strict=True):
        assert_same(mine, wanted)


@pytest.mark.core
def test_strides(path):
    """Transposed, sliced and expanded arguments give what their copies give."""
    inputs, filters, grad = make(3, 2, 37, 5, 7)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (inputs, filters, grad)]
    sliced = [torch.stack([x, x], dim=-1).flatten(-2)[..., ::2] for x in (inputs, filters, grad)]
    for mine, first, second in zip(
        fused(inputs, filters, grad), fused(*turned), fused(*sliced), strict=True
    ):
        torch.testing.assert_close(first, mine)
        torch.testing.assert_close(second, mine)
    same = inputs[:1, :1].expand(3, 2, 37), grad[:1, :1].expand(3, 5, 37)
    for mine, copied in zip(
        fused(same[0], filters, same[1]),
        fused(same[0].contiguous(), filters, same[1].contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(mine, copied)


@pytest.mark.core
@pytest.mark.parametrize("width", [3, 5, 7, 9])
@pytest.mark.parametrize("filters", [1, 3, 5])
def test_nan_reaches_only_its_windows(filters, width, path):
    inputs, taps, grad = make(1, 1, 40, filters, width)
    inputs[..., 20] = torch.nan
    features = operators.location_features(inputs, taps)
    reached = (torch.arange(40, device=DEVICE) - 20).abs() <= width // 2
    assert torch.equal(features.isnan(), reached.expand(features.shape))
    grad[..., 20] = torch.nan
    grad_inputs, _ = operators.location_features_backward(grad, inputs, taps, True, False)
    assert torch.equal(grad_inputs.isnan(), reached.expand(grad_inputs.shape))


@pytest.mark.core
def test_only_what_is_needed(path):
    inputs, filters, grad = make(2, 2, 20, 3, 5)
    both = operators.location_features_backward(grad, inputs, filters, True, True)
    first, none = operators.location_features_backward(grad, inputs, filters, True, False)
    assert_same(first, both[0])
    assert none.numel() == 0
    none, second = operators.location_features_backward(grad, inputs, filters, False, True)
    assert_same(second, both[1])
    assert none.numel() == 0


@pytest.mark.core
def test_repeatable(path):
    """The bits are the same on any number of threads."""
    arguments = make(9, 2, 150, 10, 31)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fused(*arguments)
        torch.set_num_threads(3)
        for mine, wanted in zip(fused(*arguments), alone, strict=True):
            assert_same(mine, wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.kernel
@pytest.mark.interpreter
def test_errors(path):
    """Arguments that could crash the process raise."""
    assert path != "pytorch"
    inputs, filters, grad = make(2, 2, 20, 3, 5)
    for bad in [
        (inputs[0], filters), (inputs, filters[0]), (inputs[:, :1], filters),
        (inputs, filters[..., :4]), (inputs.double(), filters),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=r"inputs|filters"):
            operators.location_features(*bad)
    with pytest.raises(RuntimeError, match=r"grad has (another )?shape"):
        operators.location_features_backward(grad[..., 1:], inputs, filters, True, True)
