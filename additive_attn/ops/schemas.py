"""The operators' schemas, and the shapes of their results for tracing.

Every tensor argument broadcasts over leading dims; ``spec.call`` describes the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from additive_attn.ops.checks import has_values, require_one_device
from additive_attn.spec.call import (
    Call,
    TangentCall,
    backward_arguments,
    call_of_scores,
    lse_dtype,
)
from additive_attn.spec.dropout import keep_mask

# SymInt: a window that depends on a size stays symbolic in a graph.
_MASKING = (
    "Tensor? attn_mask, Tensor? lengths, Tensor? starts, Tensor? block_table, "
    "Tensor? block_tiles, SymInt left, SymInt right"
)
_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, "
    f"{_MASKING}, "
    "Tensor? seed, float dropout_p, float scale"
)


def _registrations() -> torch.library.Library:
    """Replaces the registrations of an earlier import in this process, even of a failed one."""
    operators = torch.ops.additive_attn
    earlier = vars(operators).get("registrations")
    if earlier is not None:
        earlier._destroy()
    library = torch.library.Library("additive_attn", "FRAGMENT")
    setattr(operators, "registrations", library)  # noqa: B010  operators have no types for mypy
    return library


registrations = _registrations()
registrations.define(
    f"forward({_CALL}, bool need_weights) -> (Tensor out, Tensor weights, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
registrations.define(
    f"backward(Tensor? grad_out, Tensor? grad_weights, Tensor? grad_lse, {_CALL}, Tensor lse, "
    "bool need_query, bool need_key, bool need_value, bool need_weight, bool "
    "need_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
registrations.define(
    "keep_mask(Tensor seed, SymInt[] batch, SymInt rows, SymInt keys, float dropout_p) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_SCORED = f"Tensor query, Tensor key, Tensor weight, {_MASKING}, float scale"
registrations.define(f"scores({_SCORED}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
registrations.define(
    f"scores_backward(Tensor grad_scores, {_SCORED}, bool need_query, bool need_key, "
    "bool need_weight, bool need_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Forward mode and second derivatives: tangents of the outputs, and of the gradients.
_TANGENTS = "Tensor? query_tangent, Tensor? key_tangent, "
registrations.define(
    f"tangent(Tensor? grad_out, Tensor? grad_weights, Tensor? grad_lse, {_CALL}, Tensor lse, "
    "Tensor? grad_out_tangent, Tensor? grad_weights_tangent, Tensor? grad_lse_tangent, "
    f"{_TANGENTS}Tensor? value_tangent, Tensor? weight_tangent, Tensor? mask_tangent, "
    "bool need_out, bool need_weights, bool need_lse, bool need_query, bool need_key, "
    "bool need_value, bool need_weight, bool need_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
registrations.define(
    f"scores_tangent(Tensor? grad_scores, {_SCORED}, Tensor? grad_scores_tangent, {_TANGENTS}"
    "Tensor? weight_tangent, Tensor? mask_tangent, bool need_scores, bool need_query, "
    "bool need_key, bool need_weight, bool need_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The sums over features in these, of tensors (entries, ...).
_PAIRS = (
    "Tensor query, Tensor key, Tensor weight, Tensor query_tangent, Tensor key_tangent, "
    "Tensor weight_tangent"
)
registrations.define(f"pair_scores({_PAIRS}) -> (Tensor, Tensor)")
registrations.define(
    f"pair_gradients(Tensor grad, Tensor grad_tangent, {_PAIRS}, bool need_query, bool need_key, "
    "bool need_weight) -> (Tensor, Tensor, Tensor)"
)
# Only ops.decoding, ops.memory and ops.location call these, and they implement the derivatives.
_STEP = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? prepared, Tensor? location, "
    "Tensor? location_weight, Tensor? attn_mask, Tensor? lengths, Tensor? seed, float dropout_p, "
    "float scale"
)
registrations.define("prepare_keys(Tensor key, Tensor? weight=None) -> Tensor")
registrations.define(f"step({_STEP}) -> (Tensor out, Tensor weights, Tensor lse)")
registrations.define(
    f"step_backward(Tensor? grad_out, Tensor? grad_weights, Tensor? grad_lse, {_STEP}, "
    "Tensor weights, Tensor lse, Tensor(a!)? grad_key) -> (Tensor grad_query, Tensor grad_scores, "
    "Tensor kept, Tensor grad_location, Tensor grad_location_weight, Tensor grad_weight)"
)
registrations.define("location_features(Tensor inputs, Tensor filters) -> Tensor")
registrations.define(
    "location_features_backward(Tensor grad, Tensor inputs, Tensor filters, bool need_inputs, "
    "bool need_filters) -> (Tensor, Tensor)"
)


def _keep_mask(
    seed: Tensor, batch: Sequence[int], rows: int, keys: int, dropout_p: float
) -> Tensor:
    if seed.is_cpu and has_values(seed):
        seeds = seed.expand(list(batch)).reshape(-1)
        kept: Tensor = torch.ops.additive_attn.keep_entries(seeds, rows, keys, dropout_p)
        return kept.reshape(*batch, rows, keys)
    return keep_mask(seed, batch, (0, rows), (0, keys), dropout_p)


registrations.impl("keep_mask", _keep_mask, "CompositeExplicitAutograd")
registrations.define("keep_entries(Tensor seed, int rows, int keys, float dropout_p) -> Tensor")


# A single meta argument dispatches the whole call here. Without require_one_device, results on the
# device of query would be uninitialised memory.
@torch.library.register_fake("additive_attn::forward", lib=registrations)
def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, need_weights = Call(*arguments[:14]), arguments[14]
    query, key, value, _ = call.inputs
    require_one_device(**_tensors(call))
    batch = call.batch()
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    return (
        query.new_empty((*batch, num_queries, value.shape[-1])),
        query.new_empty((*batch, num_queries, num_keys) if need_weights else (0,)),
        query.new_empty((*batch, num_queries), dtype=lse_dtype(query.dtype)),
    )


@torch.library.register_fake("additive_attn::backward", lib=registrations)
def _backward_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    upstream, call, lse, needs = backward_arguments(arguments)
    query, _, value, _ = call.inputs
    require_one_device(**upstream.named(), **_tensors(call), lse=lse)
    batch = call.batch()
    return (
        *_gradient_shapes(call, batch, needs.query, needs.key),
        query.new_empty((*batch, *value.shape[-2:]) if needs.value else (0,)),
        *_other_gradient_shapes(call, batch, needs.weight, needs.mask),
    )


@torch.library.register_fake("additive_attn::scores", lib=registrations)
def _scores_shape(*arguments: Any) -> Tensor:
    call = call_of_scores(*arguments)
    require_one_device(**_tensors(call))
    return call.query.new_empty((*call.batch(), call.query.shape[-2], call.key.shape[-2]))


@torch.library.register_fake("additive_attn::scores_backward", lib=registrations)
def _scores_backward_shapes(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call, needs = call_of_scores(*arguments[:11]), arguments[11:]
    require_one_device(grad_scores=grad, **_tensors(call))
    batch = grad.shape[:-2]
    return (
        *_gradient_shapes(call, batch, *needs[:2]),
        *_other_gradient_shapes(call, batch, *needs[2:]),
    )


@torch.library.register_fake("additive_attn::tangent", lib=registrations)
def _tangent_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    made = TangentCall.of(arguments)
    call, batch, needs = made.call, made.call.batch(), made.needs
    query, key, value, _ = call.inputs
    require_one_device(**_tensors(call))
    sizes = (query.shape[-2], value.shape[-1]), (query.shape[-2], key.shape[-2])
    out, weights = (
        query.new_empty((*batch, *size) if need else (0,))
        for size, need in zip(sizes, made.need_outputs[:2], strict=True)
    )
    shape = (*batch, query.shape[-2]) if made.need_outputs[2] else (0,)
    return (
        out,
        weights,
        query.new_empty(shape, dtype=lse_dtype(query.dtype)),
        *_gradient_shapes(call, batch, needs.query, needs.key),
        query.new_empty((*batch, *value.shape[-2:]) if needs.value else (0,)),
        *_other_gradient_shapes(call, batch, needs.weight, needs.mask),
    )


@torch.library.register_fake("additive_attn::scores_tangent", lib=registrations)
def _scores_tangent_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    made = TangentCall.of_scores(arguments)
    call, batch, needs = made.call, made.call.batch(), made.needs
    require_one_device(**_tensors(call))
    shape = (*batch, call.query.shape[-2], call.key.shape[-2])
    return (
        call.query.new_empty(shape if made.need_outputs[0] else (0,)),
        *_gradient_shapes(call, batch, needs.query, needs.key),
        *_other_gradient_shapes(call, batch, needs.weight, needs.mask),
    )


def _gradient_shapes(
    call: Call, batch: torch.Size, need_query: bool, need_key: bool
) -> tuple[Tensor, Tensor]:
    query, key = call.query, call.key
    return (
        query.new_empty((*batch, *query.shape[-2:]) if need_query else (0,)),
        query.new_empty((*batch, *key.shape[-2:]) if need_key else (0,)),
    )


def _other_gradient_shapes(
    call: Call, batch: torch.Size, need_weight: bool, need_mask: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of a mask."""
    query, weight, attn_mask = call.query, call.weight, call.attn_mask
    shape = (*batch, weight.shape[-1]) if need_weight else (0,)
    grad_mask = query.new_empty(0)
    if need_mask and attn_mask is not None and attn_mask.is_floating_point():
        grad_mask = torch.empty_like(attn_mask, memory_format=torch.contiguous_format)
    return query.new_empty(shape, dtype=lse_dtype(query.dtype)), grad_mask


def _tensors(call: Call) -> dict[str, Tensor | None]:
    return {
        **call.inputs._asdict(),
        **dict(zip(Call._fields[4:9], call[4:9], strict=True)),
        "seed": call.seed,
    }


@register_flop_formula(torch.ops.additive_attn.forward)
def _forward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Counts the products with the weight and the values, as torch counts the plain layer's."""
    query, key = shapes[:2]
    *batch, rows, values = out_shape[0]
    return 2 * math.prod(batch) * rows * key[-2] * (query[-1] + values)


@register_flop_formula(torch.ops.additive_attn.backward)
def _backward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    query, key, value = shapes[3:6]
    *needs, need_value, need_weight, need_mask = shapes[-5:]
    batch = torch.broadcast_shapes(query[:-2], key[:-2], value[:-2])
    of_energies = query[-1] * (any(needs) + need_weight)
    of_values = value[-1] * (any((*needs, need_weight, need_mask)) + need_value)
    return 2 * math.prod(batch) * query[-2] * key[-2] * (of_energies + of_values)


@register_flop_formula(torch.ops.additive_attn.scores)
def _scores_flops(query: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(out_shape) * query[-1]


@register_flop_formula(torch.ops.additive_attn.scores_backward)
def _scores_backward_flops(grad: Any, query: Any, *shapes: Any, **_: Any) -> int:
    *needs, need_weight, _mask = shapes[-4:]
    return 2 * math.prod(grad) * query[-1] * (any(needs) + need_weight)
