"""The operators ``additive_attn::forward`` and ``additive_attn::backward``: schemas, shapes, and
who computes them.

Every tensor argument broadcasts over leading dims. The plain PyTorch implementation serves every
device; a compiled library replaces it on the CPU, and Triton kernels on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from additive_attn.ops.checks import require_one_device
from additive_attn.spec.call import batch_shape, lse_dtype

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, "
    "Tensor? attn_mask, Tensor? lengths, Tensor? seed"
)
_OPTIONS = "int left, int right, float dropout_p, float scale"

torch.library.define(
    "additive_attn::forward",
    f"({_INPUTS}, {_OPTIONS}, bool need_weights) -> (Tensor out, Tensor weights, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "additive_attn::backward",
    f"(Tensor? grad_out, Tensor? grad_weights, Tensor? grad_lse, {_INPUTS}, Tensor lse, "
    f"{_OPTIONS}, bool need_query, bool need_key, bool need_value, bool need_weight, bool "
    "need_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# One meta tensor brings a call here although the others are real, and what is returned would be
# memory that nobody has written.
@torch.library.register_fake("additive_attn::forward")
def _forward_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require_one_device(
        query=query, key=key, value=value, weight=weight, attn_mask=attn_mask, lengths=lengths,
        seed=seed,
    )  # fmt: skip
    batch = batch_shape(query, key, value, weight, attn_mask, lengths, seed)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    return (
        query.new_empty((*batch, num_queries, value.shape[-1])),
        query.new_empty((*batch, num_queries, num_keys) if need_weights else (0,)),
        query.new_empty((*batch, num_queries), dtype=lse_dtype(query.dtype)),
    )


@torch.library.register_fake("additive_attn::backward")
def _backward_shapes(
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_weight: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require_one_device(
        grad_out=grad_out, grad_weights=grad_weights, grad_lse=grad_lse,
        query=query, key=key, value=value, weight=weight, attn_mask=attn_mask, lengths=lengths,
        seed=seed, lse=lse,
    )  # fmt: skip
    batch = batch_shape(query, key, value, weight, attn_mask, lengths, seed)
    mask_shape = attn_mask.shape if need_mask and attn_mask is not None else (0,)
    return (
        query.new_empty((*batch, *query.shape[-2:]) if need_query else (0,)),
        query.new_empty((*batch, *key.shape[-2:]) if need_key else (0,)),
        query.new_empty((*batch, *value.shape[-2:]) if need_value else (0,)),
        query.new_empty((*batch, weight.shape[-1]) if need_weight else (0,), dtype=lse.dtype),
        query.new_empty(mask_shape),
    )
