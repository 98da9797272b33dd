"""Forward mode, and the derivatives of the derivatives: those of ``backward`` and of ``tangent``.

The pull-back of ``backward`` is the tangent of forward and backward in the direction of the
cotangents (math.md, eq. 28). So is the pull-back of a tangent of the outputs. Third derivatives
differentiate equations 22 to 27 themselves, which takes tensors (..., Lq, Lk, H).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from additive_attn.backends.plain import tangents
from additive_attn.backends.plain.whole import SingleLevelFunction as SingleLevelFunction
from additive_attn.ops import dispatch
from additive_attn.spec.call import Call

_functorch_active = torch._C._are_functorch_transforms_active
Arguments = tuple[Any, ...]
Results = tuple[Tensor, ...]


class Layout(NamedTuple):
    """Operators of one kind, and the order of their arguments. ``backward`` takes upstream
    gradients, the call with its lse, and which results are needed. ``tangent`` takes tangents of
    the upstream gradients and of the inputs before the last."""

    forward: Any
    backward: Any
    tangent: Any
    differentiable: Callable[..., Results]  # the tangent in operations that have derivatives
    outputs: int
    call: int
    inputs: tuple[int, ...]  # arguments of the call that have gradients

    def upstream_and_call(self, arguments: Arguments) -> tuple[Arguments, Arguments]:
        end = self.outputs + self.call
        return arguments[: self.outputs], arguments[self.outputs : end]

    def of_inputs(self, of_call: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(of_call[i] for i in self.inputs)


_FIELDS = len(Call._fields)
ATTENTION = Layout(
    dispatch.forward, dispatch.backward, dispatch.tangent, tangents.differentiable_tangent,
    outputs=3, call=_FIELDS + 1, inputs=(0, 1, 2, 3, 4),
)  # fmt: skip
SCORES = Layout(
    dispatch.scores, dispatch.scores_backward, dispatch.scores_tangent,
    tangents.differentiable_scores_tangent,
    outputs=1, call=_FIELDS - 3, inputs=(0, 1, 2, 3),
)  # fmt: skip


class AttentionBackward(SingleLevelFunction):
    """``additive_attn::backward``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Results:
        return _computed(ctx, dispatch.backward, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_pulled_back(ATTENTION, ctx, cotangents)

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_pushed_forward(ATTENTION, ctx, directions)


class AttentionTangent(SingleLevelFunction):
    """``additive_attn::tangent``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Results:
        return _computed(ctx, dispatch.tangent, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return _tangent_pulled_back(ATTENTION, ctx, cotangents)


class ScoresBackward(SingleLevelFunction):
    """``additive_attn::scores_backward``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Results:
        return _computed(ctx, dispatch.scores_backward, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_pulled_back(SCORES, ctx, cotangents)

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward_pushed_forward(SCORES, ctx, directions)


class ScoresTangent(SingleLevelFunction):
    """``additive_attn::scores_tangent``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Results:
        return _computed(ctx, dispatch.scores_tangent, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return _tangent_pulled_back(SCORES, ctx, cotangents)


def _computed(ctx: Any, operator: Any, arguments: Arguments) -> Results:
    results: Results = dispatch.below_autograd(operator, *arguments)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in arguments]
    tensors = [x if isinstance(x, Tensor) else None for x in arguments]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)
    return results


def _arguments(ctx: Any) -> Arguments:
    return tuple(
        number if tensor is None else tensor
        for tensor, number in zip(ctx.saved_tensors, ctx.numbers, strict=True)
    )


def _run(operator: Any, *arguments: Any) -> Results:
    if torch.is_grad_enabled() or _functorch_active():
        results: Results = operator(*arguments)
        return results
    return dispatch.below_autograd(operator, *arguments)


def _backward_pulled_back(
    layout: Layout, ctx: Any, cotangents: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The pull-back of ``backward``, by equation 28."""
    arguments, needs, n = _arguments(ctx), ctx.needs_input_grad, layout.outputs
    upstream, call = layout.upstream_and_call(arguments)
    cotangents = _of_needed(cotangents, arguments)
    grads: list[Tensor | None] = [None] * len(arguments)
    if all(cotangent is None for cotangent in cotangents):
        return tuple(grads)
    need_inputs = layout.of_inputs(needs[n:])
    results = _run(
        layout.tangent, *upstream, *call, *(None,) * n, *cotangents, *needs[:n], *need_inputs
    )
    places = *range(n), *(n + i for i in layout.inputs)
    return _placed(grads, arguments, places, needs, results)


def _tangent_pulled_back(
    layout: Layout, ctx: Any, cotangents: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The pull-back of ``tangent``: for tangents of outputs by equation 28, for tangents of
    gradients through equations 22 to 27."""
    arguments, needs, n = _arguments(ctx), ctx.needs_input_grad, layout.outputs
    _, call = layout.upstream_and_call(arguments)
    cotangents = _of_needed(cotangents, arguments)
    grads: list[Tensor | None] = [None] * len(arguments)
    if any(cotangent is not None for cotangent in cotangents[n:]):
        return _third_order(layout, arguments, needs, cotangents)
    if all(cotangent is None for cotangent in cotangents):
        return tuple(grads)
    first = n + layout.call + n
    last = first + len(layout.inputs)
    if any(needs[first:last]):
        results = _run(layout.backward, *cotangents[:n], *call, *needs[first:last])
        _placed(grads, arguments, range(first, last), needs, results)
    need_inputs = layout.of_inputs(needs[n:])
    if any(need_inputs):
        results = _run(
            layout.tangent, *cotangents[:n], *call, *(None,) * n, *arguments[first:last],
            *(False,) * n, *need_inputs,
        )  # fmt: skip
        _placed(grads, arguments, [n + i for i in layout.inputs], needs, results[n:])
    return tuple(grads)


def _of_needed(results: Sequence[Tensor | None], needs: Sequence[bool]) -> Any:
    """Replaces cotangents of results that are not needed by None: a compiled graph passes zeros
    for these empty tensors."""
    needed = needs[len(needs) - len(results) :]
    return tuple(x if need else None for x, need in zip(results, needed, strict=True))


def _placed(
    grads: list[Tensor | None], arguments: Arguments, places: Sequence[int], needs: Sequence[bool],
    results: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    for place, result in zip(places, results, strict=True):
        if needs[place]:
            grads[place] = reduced(result, arguments[place])
    return tuple(grads)


def _third_order(
    layout: Layout, arguments: Arguments, needs: Sequence[bool],
    cotangents: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    places = [i for i, need in enumerate(needs) if need]

    def results(*tensors: Tensor) -> list[Tensor]:
        replaced = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            replaced[place] = tensor
        found = layout.differentiable(*replaced)
        return [x for x, cotangent in zip(found, cotangents, strict=True) if cotangent is not None]

    pull_back = torch.func.vjp(results, *(arguments[i] for i in places))[1]
    grads: list[Tensor | None] = [None] * len(arguments)
    for place, grad in zip(
        places, pull_back([x for x in cotangents if x is not None]), strict=True
    ):
        grads[place] = grad
    return tuple(grads)


def has_tangents(arguments: Arguments) -> bool:
    # A compiled graph enters forward mode without forward_ad, so its level alone is not enough.
    return (_functorch_active() or forward_ad._current_level >= 0) and any(
        x is not None for _, x in map(_unpacked, arguments)
    )


def forward_mode_alone(arguments: Arguments) -> bool:
    """Whether forward mode alone records the operations: no gradient, mapped dim or tracer."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    forward = torch._C._functorch.TransformType.Jvp
    return (
        all(each.key() == forward for each in retrieve_all_functorch_interpreters())
        and not any(x.requires_grad for x in tensors)
        and not torch._C._len_torch_dispatch_stack()
    )


def _unpacked(argument: Any) -> tuple[Any, Tensor | None]:
    if isinstance(argument, Tensor) and argument.is_floating_point():
        primal, tangent = torch._VF._unpack_dual(argument, level=0)
        return primal, tangent
    return argument, None


@contextlib.contextmanager
def primals(arguments: Arguments) -> Iterator[Arguments]:
    """Yields the arguments of a Function without their tangents. A Function turns forward mode off
    for all transforms of ``torch.func``, so it is on again for the outer ones."""
    with _set_fwd_grad_enabled(True):
        yield tuple(_unpacked(x)[0] for x in arguments)


def outputs_pushed_forward(
    layout: Layout, call: Arguments, directions: Arguments, need_outputs: Sequence[bool]
) -> Results:
    """The tangents of the outputs, equations 22 and 23."""
    none = (None,) * layout.outputs
    with primals(call) as call:
        results = layout.tangent(
            *none, *call, *none, *layout.of_inputs(directions), *need_outputs,
            *(False,) * len(layout.inputs),
        )  # fmt: skip
    return results[: layout.outputs]


def _backward_pushed_forward(
    layout: Layout, ctx: Any, directions: tuple[Tensor | None, ...]
) -> Results:
    """The tangents of the gradients, equations 24 to 27."""
    with primals(_arguments(ctx)) as arguments:
        upstream, call = layout.upstream_and_call(arguments)
        upstream_directions, of_call = layout.upstream_and_call(directions)
        needs = arguments[-len(layout.inputs) :]
        results = layout.tangent(
            *upstream, *call, *upstream_directions, *layout.of_inputs(of_call),
            *(False,) * layout.outputs, *needs,
        )  # fmt: skip
    return results[layout.outputs :]


def reduced(grad: Tensor, tensor: Tensor) -> Tensor:
    """Sums a gradient over the whole batch to the dims and the dtype of ``tensor``, which was
    broadcast."""
    # Ranks first: a trace that compared unequal ranks would guard on sizes that happen to agree.
    if grad.dim() != tensor.dim() or grad.shape != tensor.shape:
        # A sum over dims of 1 costs as much as any sum, a view costs less. Traces have the sum.
        if type(grad) is Tensor and grad.numel() == tensor.numel():
            grad = grad.view_as(tensor)
        elif hasattr(grad, "device_mesh"):
            grad = _summed(grad, tensor.shape)
        else:
            grad = grad.sum_to_size(tensor.shape)
    return grad if grad.dtype == tensor.dtype else grad.to(tensor.dtype)


def _summed(grad: Tensor, shape: torch.Size) -> Tensor:
    """``sum_to_size`` of a DTensor, whose own compares the size of a shard with ``shape``."""
    first = grad.dim() - len(shape)
    ones = [i for i in range(first, grad.dim()) if shape[i - first] == 1 < grad.shape[i]]
    grad = grad.sum(ones, keepdim=True) if ones else grad
    return grad.sum(list(range(first))) if first else grad
