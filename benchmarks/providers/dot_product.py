"""Dot-product attention of the same shape: another function, and the speed target."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs
from benchmarks.providers.runner import Provider, Runner


def dot_product_runner(case: Case, inputs: Inputs) -> Runner | None:
    if case.module:
        return None
    is_causal, dropout_p = case.is_causal, case.dropout_p
    allowed = None if inputs.blocked is None or is_causal else ~inputs.blocked[:, None]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The fused kernels need four dims, so a head dim is added.
        return F.scaled_dot_product_attention(
            query[:, None],
            key[:, None],
            value[:, None],
            attn_mask=allowed,
            is_causal=is_causal,
            dropout_p=dropout_p,
        )[:, 0]

    return Runner(attend, [inputs.query, inputs.key, inputs.value], [])


DOT_PRODUCT = Provider("dot product", dot_product_runner, additive=False)
