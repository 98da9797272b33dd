"""OpenNMT-py's GlobalAttention with ``attn_type="mlp"``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from additive_attn.compat._base import Lease, leases, masks, vector
from additive_attn.functional import additive_attention
from additive_attn.nn.linear import bare_parameters, energy_of
from additive_attn.ops.compat_checks import explained
from additive_attn.ops.decoding import attend_step
from additive_attn.ops.memory import lend


class GlobalAttention(nn.Module):
    """Additive attention, whose context and query are projected together (OpenNMT-py 3).

    While single queries are passed with the same ``enc_out``, it is projected once. The original
    projects it at every call.

    Raises:
        ValueError: attn_type is not "mlp", or attn_func is not "softmax".
    """

    @explained()
    def __init__(
        self,
        dim: int,
        coverage: bool = False,
        attn_type: str = "dot",
        attn_func: str = "softmax",
    ) -> None:
        super().__init__()
        if attn_type != "mlp":
            raise ValueError(
                f"attn_type is {attn_type!r}, but this class computes additive attention, 'mlp'. "
                "Keep OpenNMT-py's own class for 'dot' and 'general'."
            )
        if attn_func != "softmax":
            raise ValueError(
                f"attn_func is {attn_func!r}, but this class computes only 'softmax'. Keep "
                "OpenNMT-py's own class for 'sparsemax'."
            )
        self.dim, self.attn_type, self.attn_func = dim, attn_type, attn_func
        self.linear_context = nn.Linear(dim, dim, bias=False)
        self.linear_query = nn.Linear(dim, dim, bias=True)
        self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(dim * 2, dim, bias=True)
        if coverage:
            self.linear_cover = nn.Linear(1, dim, bias=False)

    @explained(
        src="(B, Lq, dim) or (B, dim)",
        enc_out="(B, Lk, dim)",
        src_len="integers (B,) or None",
        coverage="(B, Lk) or None",
    )
    def forward(
        self,
        src: Tensor,
        enc_out: Tensor,
        src_len: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attends with src ``(B, Lq, dim)``, or ``(B, dim)``, to enc_out ``(B, Lk, dim)``.

        Args:
            src_len: number of leading keys to attend to, ``(B,)``.
            coverage: ``(B, Lk)``. As in the original, its projection is **added to enc_out in
                place**, whose tanh is attended to.

        Returns:
            context and query, projected ``(B, Lq, dim)``; weights ``(B, Lq, Lk)``; or without Lq.
        """
        query = src if src.dim() == 3 else src.unsqueeze(1)
        padding = None
        if src_len is not None:
            keys = torch.arange(enc_out.size(1), device=src_len.device)
            padding = keys >= src_len.unsqueeze(1)
        if coverage is not None:
            enc_out += self.linear_cover(coverage.unsqueeze(-1))
            enc_out = torch.tanh(enc_out)
        if query.size(1) == 1 and coverage is None:
            context, weights = self._step(query.squeeze(1), enc_out, src_len, padding)
            context, weights = context.unsqueeze(1), weights.unsqueeze(1)
        else:
            context, weights = additive_attention(
                self.linear_query(query), self.linear_context(enc_out), enc_out,
                vector(*energy_of(self.v, self.dim, enc_out)), need_weights=True,
                key_padding_mask=padding,
            )  # fmt: skip
        out = self.linear_out(torch.cat([context, query], dim=2))
        if src.dim() == 2:
            return out.squeeze(1), weights.squeeze(1)
        return out, weights

    def _step(
        self, query: Tensor, enc_out: Tensor, src_len: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        modules = self.v, self.linear_query, self.linear_context
        energy, queries, projection = map(bare_parameters, modules)

        def build() -> Lease:
            lengths, attn_mask = masks(enc_out, padding)
            weight, bias = queries or (None, None)
            return Lease(
                lend(
                    self.linear_context(enc_out), enc_out,
                    vector(*(energy or energy_of(self.v, self.dim, enc_out))),
                    lengths=lengths, attn_mask=attn_mask, query_weight=weight, query_bias=bias,
                )
            )  # fmt: skip

        if energy is None or projection is None:
            lease = build()
        else:
            sources = (enc_out,) if src_len is None else (enc_out, src_len)
            used = [*energy, *(queries or ()), *projection]
            lease = leases(self).get(sources, used, 1.0, build)
        if queries is None:
            query = self.linear_query(query)
        context, weights = attend_step(lease.lent, query)
        return context, weights
