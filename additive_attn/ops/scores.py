"""The derivative of ``additive_attn::scores``, registered on it as that of ``forward`` is."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from additive_attn.backends.plain import whole
from additive_attn.ops import dispatch
from additive_attn.ops.autograd import allowed, expanded, in_graph, register, serves_whole
from additive_attn.ops.second_order import (
    SCORES,
    ScoresBackward,
    ScoresTangent,
    SingleLevelFunction,
    outputs_pushed_forward,
    reduced,
)
from additive_attn.spec.call import Call
from additive_attn.spec.formula import plain_additive_scores

_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active


def score(call: Call, *_: Any) -> tuple[Tensor, ...]:
    """``additive_attn::scores`` as the only output, differentiable in query, key, weight and a
    float mask. Replaces ``attend``, whose other arguments have no meaning here."""
    if type(call.query) is not Tensor and hasattr(call.query, "device_mesh"):
        call = importlib.import_module("additive_attn.ops.sharding").with_masks(call)
    query, key, _value, weight, attn_mask = call[:5]
    arguments = query, key, weight, *call[4:11], call.scale
    if torch.onnx.is_in_onnx_export():
        return (_formula(call),)
    if in_graph() or forward_ad._current_level >= 0:
        return (dispatch.scores(*arguments),)
    if (dispatch.cpu_is_plain or not query.is_cpu) and serves_whole(call):
        return (whole.score(call),)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, weight, attn_mask)
    ):
        return (Scores.apply(*arguments),)
    with _below_autograd():
        return (dispatch.scores_directly(*arguments),)


def _formula(call: Call) -> Tensor:
    query, key, _, weight = expanded(call)
    return plain_additive_scores(
        query, key, weight, call.attn_mask, attended=allowed(call), scale=call.scale
    )


class Scores(SingleLevelFunction):
    """``additive_attn::scores``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        scores: Tensor = dispatch.below_autograd(dispatch.scores_directly, *arguments)
        ctx.save_for_backward(*arguments[:8])
        ctx.numbers = arguments[8:]
        ctx.set_materialize_grads(False)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        tensors = ctx.saved_tensors
        arguments = (grad, *tensors, *ctx.numbers, *needs[:4])
        if torch.is_grad_enabled() or _functorch_active():
            grads = dispatch.scores_backward(*arguments)
        else:
            with _below_autograd():
                grads = dispatch.scores_backward_directly(*arguments)
        return (
            *(reduced(grads[i], tensors[i]) if needs[i] else None for i in range(3)),
            grads[3] if needs[3] else None,
            *(None,) * 7,
        )  # fmt: skip


class DirectedScores(Scores):
    """``Scores`` of inputs that may have tangents."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        scores = Scores.forward(ctx, *arguments)
        ctx.save_for_forward(*ctx.to_save)
        return scores

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> Tensor | None:
        call = *ctx.saved_tensors, *ctx.numbers
        return outputs_pushed_forward(SCORES, call, directions, (True,))[0]


register(dispatch.scores, DirectedScores.apply, SCORES)
register(dispatch.scores_backward, ScoresBackward.apply, SCORES)
register(dispatch.scores_tangent, ScoresTangent.apply, SCORES)
