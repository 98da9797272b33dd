"""NVIDIA GNMT's BahdanauAttention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from additive_attn.compat._base import Lease, leases, masks
from additive_attn.functional import additive_attention
from additive_attn.nn.linear import bare_parameters
from additive_attn.ops.compat_checks import explained
from additive_attn.ops.decoding import attend_step
from additive_attn.ops.memory import lend


class BahdanauAttention(nn.Module):
    """Additive attention with a normalised energy (Salimans & Kingma 2016, arXiv:1602.07868),
    time-major unless batch_first. While single queries are passed with the same keys, as in
    decoding, these are projected once."""

    normalize_scalar: nn.Parameter | None
    normalize_bias: nn.Parameter | None

    @explained()
    def __init__(
        self,
        query_size: int,
        key_size: int,
        num_units: int,
        normalize: bool = False,
        batch_first: bool = False,
        init_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.normalize, self.batch_first, self.num_units = normalize, batch_first, num_units
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        for layer in (self.linear_q, self.linear_k):
            nn.init.uniform_(layer.weight, -init_weight, init_weight)
        self.linear_att = nn.Parameter(torch.empty(num_units))
        self.mask: Tensor | None = None
        self.normalize_scalar = nn.Parameter(torch.empty(1)) if normalize else None
        self.normalize_bias = nn.Parameter(torch.empty(num_units)) if normalize else None
        self.reset_parameters(init_weight)

    def reset_parameters(self, init_weight: float) -> None:
        nn.init.uniform_(self.linear_att, -init_weight, init_weight)
        if self.normalize_scalar is not None and self.normalize_bias is not None:
            nn.init.constant_(self.normalize_scalar, 1 / math.sqrt(self.num_units))
            nn.init.zeros_(self.normalize_bias)

    @explained(context_len="integers (B,)", context="(Lk, B, key_size)")
    def set_mask(self, context_len: Tensor, context: Tensor) -> None:
        """Sets ``mask``, bool ``(B, Lk)``, True = ignore, from lengths ``(B,)``."""
        keys = torch.arange(context.size(1 if self.batch_first else 0), device=context.device)
        self.mask = keys >= context_len.unsqueeze(1)

    @explained(query="(Lq, B, query_size) or (B, query_size)", keys="(Lk, B, key_size)")
    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Attends with queries ``(Lq, B, query_size)``, or ``(B, query_size)``, to keys
        ``(Lk, B, key_size)``; with batch_first, B is first.

        Returns:
            context ``(Lq, B, key_size)`` and weights ``(Lq, B, Lk)``, or without Lq; with
            batch_first, B is first.
        """
        value = keys if self.batch_first else keys.transpose(0, 1)
        swap = query.dim() == 3 and not self.batch_first
        queries = query.transpose(0, 1) if swap else query
        if queries.dim() == 2 or queries.size(1) == 1:
            single = queries if queries.dim() == 2 else queries.squeeze(1)
            context, weights = self._step(single, keys, value)
            if queries.dim() == 3:
                context, weights = context.unsqueeze(1), weights.unsqueeze(1)
        else:
            projected, (weight, bias) = self.linear_q(queries), self._energy()
            context, weights = additive_attention(
                projected if bias is None else projected + bias, self.linear_k(value), value,
                weight, need_weights=True, key_padding_mask=self.mask,
            )  # fmt: skip
        if swap:
            context, weights = context.transpose(0, 1), weights.transpose(0, 1)
        return context, weights

    def _energy(self) -> tuple[Tensor, Tensor | None]:
        if self.normalize_scalar is None:
            return self.linear_att, None
        return self.linear_att / self.linear_att.norm() * self.normalize_scalar, (
            self.normalize_bias
        )

    def _step(self, query: Tensor, keys: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        queries, projection = bare_parameters(self.linear_q), bare_parameters(self.linear_k)

        def build() -> Lease:
            weight, bias = self._energy()
            lengths, attn_mask = masks(value, self.mask)
            return Lease(
                lend(
                    self.linear_k(value), value, weight, lengths=lengths, attn_mask=attn_mask,
                    query_weight=None if queries is None else queries[0],
                    query_bias=None if queries is None else bias,
                )
            )  # fmt: skip

        if projection is None:
            lease = build()
        else:
            sources = (keys,) if self.mask is None else (keys, self.mask)
            used = [
                self.linear_att, self.normalize_scalar, self.normalize_bias, projection[0],
                None if queries is None else queries[0],
            ]  # fmt: skip
            lease = leases(self).get(sources, used, 1.0, build)
        if queries is None:
            query, bias = self.linear_q(query), self.normalize_bias
            query = query if bias is None else query + bias
        context, weights = attend_step(lease.lent, query)
        return context, weights
