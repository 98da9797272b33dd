"""Promise 5 for upstream gradients, since gradcheck and opcheck also pass if a backward ignores
strides."""

from __future__ import annotations

import pytest
import torch
from layouts import (
    batch_last,
    every_second_feature,
    every_third_row,
    offset,
    surrounded,
    transposed,
)
from oracle import (
    OUTPUTS,
    assert_layout_free,
    fused,
    generator,
    gradients,
    make,
)

from additive_attn import additive_attention
from additive_attn.ops import dispatch


def contiguous_first(grad: torch.Tensor) -> torch.Tensor:
    return grad.clone(memory_format=torch.contiguous_format)


RECIPES = [
    transposed, batch_last, every_second_feature, every_third_row, surrounded, offset
]  # fmt: skip


@pytest.mark.interpreter(dtype=[torch.float32], recipe=[transposed, every_second_feature])
@pytest.mark.core
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("which", OUTPUTS)
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_strided_upstream(which, recipe, queries, dtype):
    inputs = make((3,), queries, 21, 12, 10, dtype=dtype)
    shape = fused(inputs)[which].shape
    grad = torch.randn(shape).to(fused(inputs)[which].dtype)
    strided = recipe(grad)
    assert torch.equal(strided, grad)
    _, expected = gradients(fused, inputs, {which: contiguous_first(grad)})
    _, got = gradients(fused, inputs, {which: strided})
    assert_layout_free(got, expected)


@pytest.mark.interpreter(dims=[(0,), (-1,)])
@pytest.mark.parametrize("which", OUTPUTS)
@pytest.mark.parametrize("dims", [(0,), (1,), (-1,), (0, 1), (0, 1, 2)], ids=str)
def test_expanded_upstream(which, dims):
    """Any of the dims has stride 0, as the gradients of sum() and mean() have. The values are
    random."""
    inputs = make((3,), 5, 21, 12, 10)
    shape = list(fused(inputs)[which].shape)
    small = list(shape)
    for d in dims:
        if d < len(small):
            small[d] = 1
    strided = torch.randn(small).expand(shape)
    _, expected = gradients(fused, inputs, {which: contiguous_first(strided)})
    _, got = gradients(fused, inputs, {which: strided})
    assert_layout_free(got, expected)


def backward_of(function, inputs):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    function(leaves).backward()
    return {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize(
    "use",
    [
        lambda out: (out.transpose(-1, -2).contiguous() * MIX[0]).sum(),
        lambda out: (torch.cat([out, out[:, :2]], dim=1) * MIX[1]).sum(),
        lambda out: (torch.cat([out * 2, MIX[3]], dim=-1) * MIX[2]).sum(),
        lambda out: (out[:, ::2] * MIX[4]).sum(),
        lambda out: (out.permute(1, 2, 0).reshape(5, -1) * MIX[5]).sum(),
        lambda out: out.sum(),
        lambda out: out.mean(1).square().sum(),
    ],
    ids=["t", "cat rows", "cat features", "slice", "permute", "sum", "mean"],
)
def test_strides_from_common_ops(use):
    """Results are those with a clone in between, which passes a contiguous gradient to the
    backward."""
    inputs = make((3,), 5, 21, 12, 10)

    class Contiguous(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return contiguous_first(grad)

    direct = backward_of(lambda x: use(additive_attention(*x.values())), inputs)
    cleaned = backward_of(lambda x: use(Contiguous.apply(additive_attention(*x.values()))), inputs)
    assert_layout_free(direct, cleaned)


_g = generator(7)
MIX = [
    torch.randn(*shape, generator=_g)
    for shape in [(3, 10, 5), (3, 7, 10), (3, 5, 14), (3, 5, 4), (3, 3, 10), (5, 30)]
]


def test_operator_takes_strided_saved_tensors():
    """A compiled graph may pass tensors of any strides to the backward operator, also the saved
    lse."""
    inputs = make((4,), 6, 19, 8, 6)
    out, _, lse = dispatch.forward(
        *inputs.values(), None, None, None, None, None, -1, -1, None, 0.0, 1.0, False
    )
    grad = torch.randn_like(out)

    def backward(lse, inputs):
        return dispatch.backward(
            grad, None, None, *inputs, None, None, None, None, None, -1, -1, None, 0.0, 1.0, lse,
            True, True, True, True, False,
        )  # fmt: skip

    expected = backward(lse, inputs.values())
    strided = [transposed(inputs[name]) for name in ("query", "key", "value")]
    got = backward(lse.T.contiguous().T, (*strided, inputs["weight"]))
    names = ("query", "key", "value", "weight", "attn_mask")
    assert_layout_free(dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)))
