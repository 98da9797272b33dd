"""Plain PyTorch, a whole call at one time: the formula, differentiated by autograd.

Computes calls of few pairs on any device, where ``blocks`` would take more time for each operation
than for the arithmetic, and would compute the energies again in backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from additive_attn.spec.call import Call, lse_dtype
from additive_attn.spec.dropout import drawn_factors
from additive_attn.spec.formula import (
    add_bias,
    attended_pairs,
    energies,
    log_sum_exp,
    mask_scores,
    scores,
    softmax,
    weighted_sum,
)
from additive_attn.spec.masks import allowed_pairs, interval_mask

# Its metaclass creates `apply`, so type checkers do not find it.
SingleLevelFunction: Any = _SingleLevelFunction
# Calls of up to so many elements of (..., Lq, Lk, H) are computed whole; below 0, none.
ELEMENTS = 2**22
# Up to so many, so are calls with gradients: to compute the energies again would take longer.
_KEPT_ELEMENTS = 2**24
# Up to so many pairs, autograd's own derivative of the scores, a sum in one float, is used.
_SHORT_SUM = 128
# Up to so many elements of (..., Lq, Lk, H), the product that a Linear computes takes least time.
_AS_LINEAR = 2**16
# Of fewer keys or elements, the products of rows take longer than one product of all.
_SHORT_ROW, _FEW_ELEMENTS = 16, 2**17
# Up to so many pairs, positions and windows are kept for the next call.
_KEPT_PAIRS = 2**14
# Up to so many numbers, comparing each costs less than a sum.
_FEW_NUMBERS = 2**12
# A tensor, since PyTorch converts a number to one in every operation.
_MASKED = torch.tensor(-torch.inf, device="cpu")
_tanh_backward: Any = torch.ops.aten.tanh_backward


def prefers_formula(call: Call) -> bool:
    """Whether a call has so few pairs that ``attend`` is fastest."""
    query, key = call[:2]
    if query.numel() * key.numel() <= ELEMENTS:  # an upper bound of the number below
        return True
    rows, keys = query.shape, key.shape
    alike = rows[:-2] == keys[:-2]
    if alike:
        elements = query.numel() * keys[-2]
    else:
        batch = torch.broadcast_shapes(rows[:-2], keys[:-2])
        elements = math.prod(batch) * rows[-2] * keys[-2] * keys[-1]
    if elements <= ELEMENTS:
        return True
    if ELEMENTS < 0 or not (torch.is_grad_enabled() and _differentiable(*call[:4])):
        return False
    # Energies of one row are no larger than the keys.
    return elements <= _KEPT_ELEMENTS or (alike and rows[-2] == 1)


def attend(
    call: Call, need_lse: bool, score_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Any]:
    """Returns out, weights, and lse if needed, differentiable by autograd to any order.
    ``score_bias`` gets a gradient of zeros."""
    (query, key, value, weight, attn_mask, lengths, starts, table, _, left, right, seed,
     _, scale) = call  # fmt: skip
    differentiable = torch.is_grad_enabled() and _differentiable(query, key, weight, score_bias)
    attended = factors = None
    if not (attn_mask is lengths is starts is table is None) or left >= 0 or right >= 0:
        attended = _attended(call)
    careful, batch = False, query.shape[:-2]
    alike = batch == key.shape[:-2] == value.shape[:-2]
    if alike and not need_lse and query.dim() <= 3 and query.itemsize > 2:
        # The usual call. Every condition below would cost time in a small one.
        score = _scored(query, key, weight, None, differentiable, score_bias)
        if scale != 1.0:
            score = score * scale
        if attended is None:
            weights = torch.softmax(score, -1)
        else:
            weights = _weights(_masked(score, attn_mask, attended))
        if weights.shape[:-2] == batch:  # a weight may have more
            kept = weights if seed is None else weights * _factors(call, batch)
            out = torch.bmm(kept, value) if batch else kept.mm(value)
            if attended is None or _without_nan(out, weights, score):
                return out, weights, None
            careful = True
    if seed is not None:
        factors = _factors(call, batch if alike else call.batch())
    out, weights, lse = formula(
        call[:4], attn_mask, attended, factors, scale, need_lse, differentiable, score_bias,
        careful,
    )  # fmt: skip
    batch = out.shape[:-2]
    if weights.shape[:-2] != batch:
        # Copies, since a caller may write to them.
        weights = weights.expand(*batch, *weights.shape[-2:]).clone()
        lse = lse.expand(*batch, lse.shape[-1]).clone() if need_lse else None
    return out, weights, lse


def _factors(call: Call, batch: torch.Size) -> Tensor:
    rows, keys, dtype = call.query.shape[-2], call.key.shape[-2], lse_dtype(call.query.dtype)
    assert call.seed is not None
    return drawn_factors(call.seed, batch, (0, rows), (0, keys), call.dropout_p, dtype)


def _differentiable(*tensors: Tensor | None) -> bool:
    for x in tensors:  # a generator would cost as much as an operation
        if x is not None and x.requires_grad:
            return True
    return False


def score(call: Call) -> Tensor:
    """Returns the scores, ``-inf`` where a pair is masked, differentiable by autograd to any
    order."""
    query, key, _, weight = call.inputs
    dtype, attended = query.dtype, _attended(call)
    if dtype.itemsize == 2:
        query, key, weight = query.float(), key.float(), weight.float()
    differentiable = torch.is_grad_enabled() and _differentiable(query, key, weight)
    result = _scored(query, key, weight, None, differentiable)
    if attended is not None and not is_finite(result.sum()):
        result = _scored(query, key, weight, attended, differentiable)
    if call.scale != 1.0:
        result = result * call.scale
    return mask_scores(add_bias(result, call.attn_mask), attended).to(dtype)


def _attended(call: Call) -> Tensor | None:
    query, key, _, _, attn_mask, lengths, starts, table, _, left, right = call[:11]
    if lengths is starts is table is None and left < 0 and right < 0:
        return attended_pairs(attn_mask, None)
    rows, keys, device = query.shape[-2], key.shape[-2], query.device
    keep = rows * keys <= _KEPT_PAIRS and query.is_cpu
    if table is None:
        block = (0, rows), (0, keys), device, keep
        allowed = interval_mask(lengths, starts, left, right, *block)
    else:
        allowed = allowed_pairs(call.masking, (0, rows), (0, keys), device, keep)
    return allowed if attn_mask is None else attended_pairs(attn_mask, allowed)


def _scored(
    query: Tensor, key: Tensor, weight: Tensor, shield: Tensor | None, differentiable: bool,
    score_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns ``w . tanh(q + k)``, with 0 in place of q + k where ``shield`` masks a pair."""
    hidden, rows, keys = query.shape[-1], query.shape[-2], key.shape[-2]
    elements, one = query.numel() * keys, rows == 1
    few = elements <= _SHORT_SUM * hidden
    # For one row without a bias, the product below is that of the plain layer, with its error.
    as_layer = one and score_bias is None and weight.shape == (1, hidden) and query.dim() == 3
    as_layer = as_layer and elements <= _AS_LINEAR
    if differentiable and not few and not as_layer:
        result: Tensor = _Scores.apply(query, key, weight, shield, score_bias)
        return result
    energy = _of_one_row(query, key, shield) if one else energies(query, key, shield)
    bias = score_bias if differentiable else None
    if weight.numel() == hidden and weight.dim() <= 2:
        if bias is not None and bias.numel() == 1:
            # As an nn.Linear computes it: no other product is as fast in backward.
            bias = bias if bias.dtype == weight.dtype else bias.to(weight.dtype)
            if energy.dim() == 2:
                matrix = weight if weight.dim() == 2 else weight.unsqueeze(0)
                return torch.addmm(bias, matrix, energy.t(), beta=0)
            column = weight.t() if weight.dim() == 2 else weight.unsqueeze(1)
            score = torch.addmm(bias, energy.flatten(0, -2), column, beta=0)
            return score.view(*energy.shape[: one - 3], rows, keys)
        if bias is None and one and energy.dim() == 3:
            if weight.dim() == 2 and elements <= _AS_LINEAR:
                score = energy.flatten(0, 1).mm(weight.t())
                return score.view(energy.shape[0], 1, keys)
            if few:  # bmm costs least, above all in backward
                return torch.bmm(weight.expand(energy.shape[0], 1, -1), energy.mT)
    if bias is not None:
        weight = torch.add(weight, bias.to(weight.dtype), alpha=0)
    return scores_of(energy.unsqueeze(-3) if one else energy, weight)


def scores_of(energy: Tensor, weight: Tensor) -> Tensor:
    """Returns ``scores``. Rows are products of their own, since a library computes the product of
    one matrix and a vector in one thread."""
    keys, hidden = energy.shape[-2:]
    if weight.numel() != hidden or weight.dim() > 2:
        score = weight.unsqueeze(-2) @ energy.flatten(-3, -2).mT
        return score.squeeze(-2).unflatten(-1, energy.shape[-3:-1])
    if keys < _SHORT_ROW or energy.numel() < _FEW_ELEMENTS:
        return scores(energy, weight)
    count = math.prod(energy.shape[:-2])
    rows = energy.reshape(count, keys, hidden).mT
    return torch.bmm(weight.expand(count, 1, hidden), rows).view(energy.shape[:-1])


def _of_one_row(query: Tensor, key: Tensor, shield: Tensor | None) -> Tensor:
    """Returns ``energies`` of one row, (..., Lk, H)."""
    pair = query + key
    if shield is not None:
        shield = shield.unsqueeze(-1)
        pair = torch.where(shield.squeeze(-3) if shield.dim() > 2 else shield, pair, 0.0)
    return pair.tanh_()


def formula(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    attended: Tensor | None,
    factors: Tensor | None,
    scale: float,
    need_lse: bool,
    differentiable: bool = False,
    score_bias: Tensor | None = None,
    careful: bool = False,
    shield: Tensor | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """Computes equations 1 and 2. Masked pairs are computed too, and all rows are assumed to have
    an attended key. Where this gives a nonfinite number, a second attempt is ``careful`` with
    empty rows, and a third one also shields masked pairs."""
    query, key, value, weight = inputs
    dtype = query.dtype
    if dtype.itemsize == 2:
        query, key, value, weight = query.float(), key.float(), value.float(), weight.float()
    score = _scored(query, key, weight, shield, differentiable, score_bias)
    if scale != 1.0:
        score = score * scale
    if attended is None:
        biased, weights = score, torch.softmax(score, -1)
    elif careful:
        biased = add_bias(score, attn_mask)
        weights = softmax(biased, attended)
    else:
        biased = _masked(score, attn_mask, attended)
        weights = _weights(biased)
    kept = weights if factors is None else weights * factors
    out = product(kept, value) if shield is None else weighted_sum(kept, value, shield)
    if attended is not None and shield is None and not _without_nan(out, weights, score):
        return formula(
            inputs, attn_mask, attended, factors, scale, need_lse, differentiable, score_bias,
            True, attended if careful else None,
        )  # fmt: skip
    if careful and attended is not None and out.requires_grad:
        # Upstream gradients of an empty row, NaN too, are not propagated further.
        out = torch.where(attended.any(-1, keepdim=True), out, 0.0)
    lse = log_sum_exp(biased, attended if careful else None) if need_lse else None
    if dtype.itemsize == 2:
        out, weights = out.to(dtype), weights.to(dtype)
    return out, weights, lse


def _masked(score: Tensor, attn_mask: Tensor | None, attended: Tensor) -> Tensor:
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        score = add_bias(score, attn_mask)
    return torch.where(attended, score, _MASKED)


def _weights(masked: Tensor) -> Tensor:
    """Returns the weights of rows that are not empty; those of empty rows are NaN."""
    weights = torch.softmax(masked, -1)
    # Stops the gradients of weights of 0, as masked ones are: huge values make them infinite.
    return torch.relu(weights) if weights.requires_grad else weights


def _without_nan(out: Tensor, weights: Tensor, score: Tensor) -> bool:
    """Whether no row is empty, and no masked value, nor in backward a masked energy, is nonfinite
    in a way that a product with 0 would show."""
    return not (
        _holds_nan(out if out.numel() else weights)
        # Backward reads the energies of masked pairs too.
        or (weights.requires_grad and _holds_nan(score))
    )


def _holds_nan(numbers: Tensor) -> bool:
    """Whether there is a NaN, or the sum of large numbers is NaN."""
    if numbers.is_cpu and numbers.numel() <= _FEW_NUMBERS:
        return not torch.equal(numbers, numbers)  # a third of the time of a sum
    return math.isnan(numbers.detach().sum().item())


def is_finite(total: Tensor) -> bool:
    return math.isfinite(total.item())


def product(left: Tensor, right: Tensor) -> Tensor:
    """Returns ``left @ right``; bmm costs less than half of matmul where the call is small."""
    if left.dim() == 3 == right.dim() and left.shape[0] == right.shape[0]:
        return torch.bmm(left, right)
    return left @ right


class _Scores(SingleLevelFunction):
    """Computes scores. Autograd's own derivative of ``scores`` would sum the gradient of the
    weight over all pairs in one float, and takes more time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        weight: Tensor,
        shield: Tensor | None,
        score_bias: Tensor | None,
    ) -> Tensor:
        energy = energies(query, key, shield)
        ctx.save_for_backward(query, key, energy, weight, shield)
        ctx.score_bias = score_bias
        ctx.set_materialize_grads(False)
        return scores_of(energy, weight)

    @staticmethod
    def backward(ctx: Any, grad_score: Tensor | None) -> tuple[Tensor | None, ...]:
        """Equations 10 and 11."""
        if grad_score is None:
            return (None,) * 5
        query, key, energy, weight, shield = ctx.saved_tensors
        need_query, need_key, need_weight, _, need_bias = ctx.needs_input_grad
        again = torch.is_grad_enabled()  # the gradients are differentiated
        if again:
            energy = energies(query, key, shield)
        grad_query = grad_key = grad_weight = None
        features = weight
        if weight.numel() == energy.shape[-1] and weight.dim() <= 2:
            if need_weight:  # the usual case, in fewer operations
                # Batched gradients have a rule for reshape, and none for flatten.
                *batch, keys, width = energy.shape
                count = math.prod(batch)
                rows = grad_score.reshape(count, 1, keys), energy.reshape(count, keys, width)
                grad_weight = torch.bmm(*rows).sum(0 if weight.dim() == 2 else (0, 1))
        else:
            features = weight[..., None, None, :]
            if need_weight:
                grad_weight = _summed(weight_gradient(grad_score, energy), weight.shape)
        if need_query or need_key:
            slope = grad_score.unsqueeze(-1) * features
            if again or _is_batched(grad_score):
                slope = _tanh_backward(slope, energy)
            else:
                # In place: newly allocated memory of this size costs as much as the arithmetic.
                _tanh_backward.grad_input(slope, energy, grad_input=slope)
            if shield is not None:
                slope = shielded(slope, shield)
            if need_query:
                grad_query = _summed(slope.sum(-2), query.shape)
            if need_key:
                grad_key = slope.squeeze(-3) if slope.shape[-3] == 1 else slope.sum(-3)
                grad_key = _summed(grad_key, key.shape)
        grad_bias = torch.zeros_like(ctx.score_bias) if need_bias else None
        return grad_query, grad_key, grad_weight, None, grad_bias


def _is_batched(upstream: Tensor) -> bool:
    """Whether a tensor holds several gradients (``is_grads_batched=True``)."""
    return torch._C._functorch.is_legacy_batchedtensor(upstream)


def _summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def shielded(slope: Tensor, attended: Tensor) -> Tensor:
    """Returns slopes of 0 for masked pairs, also beside an infinite weight. Zeros keep their sign,
    which is that of a call whose numbers are all finite."""
    return torch.where(attended.unsqueeze(-1) | (slope == 0), slope, 0.0)


def weight_gradient(grad_score: Tensor, energy: Tensor) -> Tensor:
    """Returns equation 11 for each entry: a sum per row, then a sum over rows, never one long
    sum."""
    return (grad_score.unsqueeze(-2) @ energy).squeeze(-2).sum(-2)
