"""The public functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from additive_attn.ops.attend import masked_attention, masked_scores, masked_step
from additive_attn.ops.checks import Integers
from additive_attn.ops.key_projection import project_keys

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Under torch.fx.symbolic_trace a call becomes a node.
fx.wrap("masked_attention")
fx.wrap("masked_scores")
fx.wrap("masked_step")
fx.wrap("project_keys")


def additive_attention(
    query: Tensor | None,
    key: Tensor,
    value: Tensor | None,
    weight: Tensor,
    *,
    attn_mask: Tensor | BlockMask | None = None,
    lengths: Integers | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float = 1.0,
    need_weights: bool = False,
    need_lse: bool = False,
    key_padding_mask: Tensor | None = None,
    starts: Integers | None = None,
    bias: Tensor | None = None,
    key_weight: Tensor | None = None,
) -> Any:
    r"""Additive attention (Bahdanau et al. 2015, arXiv:1409.0473) on projected queries and keys.

    .. math::
        s_{ij} = \mathrm{scale} \sum_h w_h \tanh(q_{ih} + k_{jh}) + \mathrm{mask}_{ij} + b, \quad
        p_i = \mathrm{softmax}_j(s_{ij}), \quad \mathrm{out}_i = \sum_j p_{ij} v_j

    query, key and value may be nested tensors of the layout jagged, ``(B, L, n)`` or ``(B, heads,
    L, n)``, or one of them dense. Then out has the lengths of query.

    Never builds the tensor (..., Lq, Lk, H). Differentiable twice in query, key, value, weight, a
    float mask and the bias.

    Args:
        query: ``(..., Lq, H)``, projected. float64, float32, bfloat16 or float16. None counts as
            zeros ``(..., 1, H)``, which pools the keys: no query is made or read.
        key: ``(..., Lk, H)``, projected; leading dims broadcast, as in PyTorch's attention.
        value: ``(..., Lk, Dv)``. None returns only the weights, for example to edit them.
        weight: ``(H,)``, or ``(heads, H)`` where dim -3 of query is heads; ``(1, H)`` broadcasts
            over it.
        attn_mask: broadcastable to ``(..., Lq, Lk)``: bool, **True = attend**; or the dtype of
            query, or float32 beside 16 bits, added to the scores, where ``-inf`` = do not attend.
            Or a BlockMask of ``torch.nn.attention.flex_attention``: time and memory grow with the
            number of blocks that it keeps.
        lengths: ``(B,)`` or ``(B, Lq)`` integers in [0, Lk], B the first leading dim (without
            leading dims: ``()`` or ``(Lq,)``), each dim also 1: the number of leading keys to
            attend to. A tensor, list, tuple or NumPy array; checked, or clamped on a GPU.
        is_causal: key j is attended to iff j <= i (upper left aligned).
        window: ``(left, right)``: keys i - left ... i + right; -1 = unbounded.
        dropout_p: probability of dropping a weight, in evaluation too: pass 0 there.
        scale: factor on the scores, before the mask.
        need_weights: also return the weights, before dropout.
        need_lse: also return the log-sum-exp of the scores, for :func:`merge_attention`.
        key_padding_mask: bool ``(B, Lk)``, or ``(Lk,)`` without leading dims: **True = ignore**,
            as in nn.MultiheadAttention. Prefer lengths where the padding is at the end.
        starts: integers like lengths: the first key to attend to. With lengths, the keys from
            starts to lengths - 1, none where starts >= lengths.
        bias: a number, ``()`` or ``(1,)``, or one per head, ``(heads,)``, added to all scores. It
            cancels in the softmax: only lse depends on it. It gets the gradient, of zeros, that
            DistributedDataParallel and optimizers expect.
        key_weight: ``(H, Dk)``, projects keys ``(..., Lk, Dk)`` first. Add a bias to the query.
            Faster where key and value are one tensor.

    Returns:
        out ``(..., Lq, Dv)``; then weights ``(..., Lq, Lk)`` if need_weights; then lse
        ``(..., Lq)`` if need_lse, float32 (float64 for float64). A row without a key to attend to
        has out 0, weights 0 and lse ``-inf``.
        With value=None there is no out: weights, whatever need_weights is; then lse if need_lse.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or a number does not fit.
        RuntimeError: tensors are on different devices.
    """
    if key_weight is not None:
        key, value = project_keys(key, value, key_weight)
    out, weights, lse = masked_attention(
        (query, key, value, weight),  # type: ignore[arg-type]
        attn_mask, lengths, is_causal, window, dropout_p, scale,
        True if value is None else need_weights, None, need_lse, key_padding_mask, starts, bias,
    )  # fmt: skip
    return _needed(out, weights, lse, value, need_weights, need_lse)


def additive_attention_step(
    query: Tensor | None,
    key: Tensor,
    value: Tensor | None,
    weight: Tensor,
    *,
    attn_mask: Tensor | None = None,
    lengths: Integers | None = None,
    dropout_p: float = 0.0,
    scale: float = 1.0,
    need_weights: bool = False,
    need_lse: bool = False,
    key_padding_mask: Tensor | None = None,
    starts: Integers | None = None,
    bias: Tensor | None = None,
    key_weight: Tensor | None = None,
) -> Any:
    """:func:`additive_attention` with one query per sequence, and no dim for it: a decoder step,
    or pooling.

    Args:
        query: ``(B, H)`` for keys ``(B, Lk, H)``, not ``(B, 1, H)``; ``(..., H)`` in general. None
            counts as zeros.
        key, value, weight: as in :func:`additive_attention`; leading dims broadcast, those of
            query included. A weight of heads ``(heads, H)`` goes with a query ``(B, heads, H)``.
        attn_mask: broadcastable to ``(..., Lk)``, that is ``(B, Lk)``.
        lengths, starts: integers ``(B,)``, or ``()`` without leading dims.
        dropout_p, scale, need_weights, need_lse, key_padding_mask, bias, key_weight: as in
            :func:`additive_attention`.

    Returns:
        out ``(B, Dv)``; then weights ``(B, Lk)`` if need_weights; then lse ``(B,)`` if need_lse.
        With value=None: weights, then lse if need_lse.

    Several queries of one sequence (beams) are rows of :func:`additive_attention`: query
    ``(B, beams, H)``, out ``(B, beams, Dv)``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`additive_attention`.
    """
    if key_weight is not None:
        key, value = project_keys(key, value, key_weight)
    out, weights, lse = masked_step(
        (query, key, value, weight),  # type: ignore[arg-type]
        attn_mask, lengths, dropout_p, scale, True if value is None else need_weights, need_lse,
        key_padding_mask, starts, bias,
    )  # fmt: skip
    return _needed(out, weights, lse, value, need_weights, need_lse)


def _needed(
    out: Tensor, weights: Tensor, lse: Tensor, value: Any, need_weights: bool, need_lse: bool
) -> Any:
    if value is None:
        return (weights, lse) if need_lse else weights
    if need_weights:
        return (out, weights, lse) if need_lse else (out, weights)
    return (out, lse) if need_lse else out


def additive_scores(
    query: Tensor | None,
    key: Tensor,
    weight: Tensor,
    *,
    attn_mask: Tensor | BlockMask | None = None,
    lengths: Integers | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float = 1.0,
    key_padding_mask: Tensor | None = None,
    starts: Integers | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Returns the scores of :func:`additive_attention` before the softmax: for pointer networks,
    losses on log-probabilities, or another normalisation.

    .. math::
        s_{ij} = \mathrm{scale} \sum_h w_h \tanh(q_{ih} + k_{jh}) + \mathrm{mask}_{ij} + b

    Never builds the tensor (..., Lq, Lk, H). Differentiable twice in query, key, weight, a float
    mask and the bias. All arguments are those of :func:`additive_attention`.

    Returns:
        scores ``(..., Lq, Lk)``, ``-inf`` where a query may not attend. Upstream gradients of
        these, whatever they are, count as 0. A row without a key to attend to is all ``-inf``, for
        which torch.softmax returns NaN.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`additive_attention`.
    """
    return masked_scores(
        query, key, weight, attn_mask, lengths, is_causal, window, scale, key_padding_mask,  # type: ignore[arg-type]
        starts, bias,
    )  # fmt: skip
