"""The public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from additive_attn.ops.attend import masked_attention
from additive_attn.spec.call import Inputs

# Under torch.fx.symbolic_trace a call becomes a node.
fx.wrap("masked_attention")


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    attn_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float = 1.0,
    need_weights: bool = False,
    need_lse: bool = False,
) -> Any:
    r"""Additive attention (Bahdanau et al. 2015, arXiv:1409.0473) on projected queries and keys,
    in one pass.

    .. math::
        s_{ij} = \mathrm{scale} \sum_h w_h \tanh(q_{ih} + k_{jh}) + \mathrm{mask}_{ij}, \quad
        p_i = \mathrm{softmax}_j(s_{ij}), \quad \mathrm{out}_i = \sum_j p_{ij} v_j

    Never builds the tensor (..., Lq, Lk, H). Differentiable twice in query, key, value, weight and
    a float mask.

    Args:
        query: ``(..., Lq, H)``, already projected. float64, float32, bfloat16 or float16.
        key: ``(..., Lk, H)``, already projected; leading dims broadcast as in
            ``F.scaled_dot_product_attention``.
        value: ``(..., Lk, Dv)``.
        weight: ``(H,)``, or ``(heads, H)`` where dim -3 of query is heads; ``(1, H)`` broadcasts
            over it.
        attn_mask: broadcastable to ``(..., Lq, Lk)``: bool, True = attend; or the dtype of query,
            or float32 beside 16 bits, added to the scores, where ``-inf`` = do not attend.
        lengths: ``(B,)`` or ``(B, Lq)`` integers in [0, Lk], B the first leading dim (without
            leading dims: ``()`` or ``(Lq,)``), each dim also 1: the number of leading keys to
            attend to. The range is checked on the CPU and clamped elsewhere.
        is_causal: key j is attended to iff j <= i (upper left aligned).
        window: ``(left, right)``: keys i - left ... i + right; -1 = unbounded.
        dropout_p: probability of dropping a weight; applied whenever it is above 0, so pass 0 in
            evaluation.
        scale: factor on the scores, before the mask.
        need_weights: also return the weights, before dropout.
        need_lse: also return the log-sum-exp of the scores, for :func:`merge_attention`.

    Returns:
        out ``(..., Lq, Dv)``; then weights ``(..., Lq, Lk)`` if need_weights; then lse
        ``(..., Lq)`` if need_lse, float32 (float64 for float64). A row without a key to attend to
        has out 0, weights 0 and lse ``-inf``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or a number does not fit.
        RuntimeError: tensors are on different devices.
    """
    inputs = Inputs(query, key, value, weight)
    out, weights, lse = masked_attention(
        inputs, attn_mask, lengths, is_causal, window, dropout_p, scale, need_weights,
        need_lse=need_lse,
    )  # fmt: skip
    if need_weights:
        return (out, weights, lse) if need_lse else (out, weights)
    return (out, lse) if need_lse else out
