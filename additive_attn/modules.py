"""Additive attention as a layer, in place of the plain one and with its parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from additive_attn.autograd import attend
from additive_attn.dropout import draw_seed
from additive_attn.functional import aligned_lengths, autocasted, masked_attention


class ProjectedMemory(NamedTuple):
    """Keys and values that are attended to again and again, prepared by
    :meth:`AdditiveAttention.project`."""

    key: Tensor
    """Projected keys ``(B, Lk, hidden_dim)``, or ``(Lk, hidden_dim)`` unbatched."""
    value: Tensor
    """Values ``(B, Lk, Dv)``, or ``(Lk, Dv)`` unbatched."""
    lengths: Tensor | None = None
    """Number of leading keys to attend to, int64 ``(B, 1)``, or ``()`` unbatched."""
    attn_mask: Tensor | None = None
    """Keys to attend to, bool ``(B, 1, Lk)``, or ``(1, Lk)`` unbatched; True = attend."""


class AdditiveAttention(nn.Module):
    r"""Additive attention (Bahdanau et al. 2015, arXiv:1409.0473): projections, scores, softmax
    and weighted sum.

    .. math::
        s_{ij} = \mathrm{scale} \cdot w^\top \tanh(W q_i + b_q + U k_j + b_k), \quad
        p_i = \mathrm{softmax}_j(s_{ij}), \quad
        \mathrm{out}_i = \sum_j p_{ij} v_j

    Computes the same as :class:`PlainAdditiveAttention` and loads its state_dict, without the
    tensor ``(B, Lq, Lk, hidden_dim)``.

    Args:
        input_dim: features of queries and keys.
        hidden_dim: features in which they are added.
        query_dim, key_dim: features of queries or of keys where they differ from input_dim.
        dropout: probability of dropping a weight, in training only. The returned weights are
            before dropout.
        bias: whether the layers have biases.
        scale: factor on the scores.
        normalize: weight-normalise the energy (Salimans & Kingma 2016, arXiv:1602.07868, as in
            GNMT, arXiv:1609.08144): ``g v / |v| . tanh(query + key + b)``.
        batch_first: inputs and outputs are (B, L, D) if True, (L, B, D) if False; weights are
            (B, Lq, Lk) in both cases.
        device, dtype: of the parameters.

    Parameters in the state_dict: ``query_layer.weight (hidden_dim, query_dim)``,
    ``query_layer.bias``, ``key_layer.weight (hidden_dim, key_dim)``, ``key_layer.bias``,
    ``energy_layer.weight (1, hidden_dim)``, ``energy_layer.bias (1)``. The last shifts every score
    of a row alike, so it cancels in the softmax and its gradient is zero; it is kept so that
    state_dicts load. With normalize=True, v is ``energy_layer.weight``, g is ``energy_gain ()``, b
    is ``energy_offset (hidden_dim)``, and there is no ``energy_layer.bias``.

    Raises:
        ValueError: a dimension is below 1, dropout is outside [0, 1], or scale is not finite.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        query_dim: int | None = None,
        key_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        scale: float = 1.0,
        normalize: bool = False,
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_dim = input_dim if query_dim is None else query_dim
        self.key_dim = input_dim if key_dim is None else key_dim
        self.hidden_dim = hidden_dim
        for name in ("query_dim", "key_dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but a layer needs at least one feature."
                )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}, but a probability lies between 0 and 1.")
        if not math.isfinite(scale):
            raise ValueError(
                f"scale is {scale}, but the scores need a finite factor. The default is 1.0."
            )
        self.dropout = float(dropout)
        self.scale = float(scale)
        self.normalize = normalize
        self.batch_first = batch_first

        # The order is that of the plain layer, so that the same seed gives the same parameters.
        self.query_layer = nn.Linear(
            self.query_dim, hidden_dim, bias=bias, device=device, dtype=dtype
        )
        self.key_layer = nn.Linear(self.key_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.energy_layer = nn.Linear(
            hidden_dim, 1, bias=bias and not normalize, device=device, dtype=dtype
        )
        if normalize:
            self.energy_gain = nn.Parameter(
                torch.full((), hidden_dim**-0.5, device=device, dtype=dtype)
            )
            self.energy_offset = nn.Parameter(torch.zeros(hidden_dim, device=device, dtype=dtype))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lengths: Tensor | None = None,
        window: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with every query to the keys of its sequence.

        Args:
            query: ``(B, Lq, query_dim)``, or ``(Lq, query_dim)`` unbatched.
            key: ``(B, Lk, key_dim)``, or ``(Lk, key_dim)``.
            value: ``(B, Lk, Dv)``, or ``(Lk, Dv)``; the key itself by default.
            key_padding_mask: bool ``(B, Lk)``, or ``(Lk,)``: **True = ignore**, as in
                nn.MultiheadAttention. Prefer lengths where the padding is at the end.
            need_weights: whether to return the weights; the call is cheaper without.
            attn_mask: ``(Lq, Lk)`` or ``(B, Lq, Lk)``: bool, **True = attend**; or float, added to
                the scores.
            is_causal: key j is attended to iff j <= i.
            lengths: integers ``(B,)`` or ``(B, Lq)``: number of leading keys to attend to.
            window: ``(left, right)``: keys i - left ... i + right; -1 = unbounded.

        Returns:
            out ``(B, Lq, Dv)`` and weights ``(B, Lq, Lk)``, or None. Unbatched inputs give ``(Lq,
            Dv)``, ``(Lq, Lk)``. A row without a key to attend to is 0 in both.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`additive_attention`.
        """
        if value is None:
            value = key
        rank = query.dim()
        if not (2 <= rank <= 3 and key.dim() == rank and value.dim() == rank):
            raise ValueError(
                f"AdditiveAttention got query {tuple(query.shape)}, key {tuple(key.shape)} and "
                f"value {tuple(value.shape)}, but all three must have 3 dims (batched) or all "
                "three 2 (unbatched). For one query (B, D) per sequence, use project and step."
            )
        projected_query, projected_key = self._project_query(query), self._project_key(key)
        swap = rank == 3 and not self.batch_first
        if swap:
            projected_query = projected_query.transpose(0, 1)
            projected_key, value = projected_key.transpose(0, 1), value.transpose(0, 1)
        if key_padding_mask is not None:
            attn_mask = _with_padding(attn_mask, key_padding_mask, projected_key)
        out, weights, _ = masked_attention(
            projected_query,
            projected_key,
            value,
            self._energy_weight(rank),
            self.energy_layer.bias,
            attn_mask,
            lengths,
            is_causal,
            window,
            self.dropout if self.training else 0.0,
            self.scale,
            need_weights,
        )
        if swap:
            out = out.transpose(0, 1)
        return out, weights if need_weights else None

    def project(
        self,
        key: Tensor,
        value: Tensor | None = None,
        lengths: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> ProjectedMemory:
        """Prepares what a decoder attends to, once per sequence, for :meth:`step`.

        Takes key, value, lengths ``(B,)`` and key_padding_mask as :meth:`forward` does.
        """
        if value is None:
            value = key
        if not (2 <= key.dim() <= 3 and value.dim() == key.dim()):
            raise ValueError(
                f"AdditiveAttention.project got key {tuple(key.shape)} and value "
                f"{tuple(value.shape)}, but both must have 3 dims (batched) or both 2 "
                "(unbatched)."
            )
        projected = self._project_key(key)
        if key.dim() == 3 and not self.batch_first:
            projected, value = projected.transpose(0, 1), value.transpose(0, 1)
        if projected.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"AdditiveAttention.project got key {tuple(key.shape)} and value "
                f"{tuple(value.shape)}, but each key belongs to one value: they may differ in "
                "the last dim only."
            )
        if lengths is not None:
            lengths = aligned_lengths(
                lengths, projected, projected.shape[:-2], 1, projected.shape[-2]
            )
        attn_mask = None
        if key_padding_mask is not None:
            attn_mask = _with_padding(None, key_padding_mask, projected)
        return ProjectedMemory(projected, value, lengths, attn_mask)

    def step(
        self, query: Tensor, memory: ProjectedMemory, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with one query per sequence: a decoder step.

        Args:
            query: ``(B, query_dim)``, or ``(query_dim,)`` with an unbatched memory.
            memory: from :meth:`project`, of this layer.
            need_weights: whether to return the weights.

        Returns:
            context ``(B, Dv)`` and weights ``(B, Lk)``, or None. Unbatched: ``(Dv,)`` and
            ``(Lk,)``.

        Raises:
            ValueError: query and memory do not fit.
        """
        key = memory.key
        if query.dim() != key.dim() - 1 or query.shape[:-1] != key.shape[:-2]:
            raise ValueError(
                f"AdditiveAttention.step got query {tuple(query.shape)} and a memory of "
                f"projected keys {tuple(key.shape)}, but needs one query per sequence: (B, "
                "query_dim) for keys (B, Lk, hidden_dim), or (query_dim,) for keys (Lk, "
                "hidden_dim)."
            )
        # One row of queries per sequence: (B, 1, hidden_dim).
        projected = self._project_query(query).unsqueeze(-2)
        weight = self._energy_weight(projected.dim())
        projected, key, value, weight, attn_mask = autocasted(
            projected, key, memory.value, weight, memory.attn_mask
        )
        dropout_p = self.dropout if self.training else 0.0
        seed = draw_seed(query.device) if dropout_p > 0.0 else None
        out, weights, _ = attend(
            projected, key, value, weight, attn_mask, memory.lengths, seed, self.energy_layer.bias,
            -1, -1, dropout_p, self.scale, need_weights,
        )  # fmt: skip
        return out.squeeze(-2), weights.squeeze(-2) if need_weights else None

    def extra_repr(self) -> str:
        options = {
            "dropout": (self.dropout, 0.0),
            "scale": (self.scale, 1.0),
            "normalize": (self.normalize, False),
            "batch_first": (self.batch_first, True),
        }
        parts = [
            f"query_dim={self.query_dim}, key_dim={self.key_dim}, hidden_dim={self.hidden_dim}"
        ]
        parts += [
            f"{name}={value}" for name, (value, default) in options.items() if value != default
        ]
        return ", ".join(parts)

    def _project_query(self, query: Tensor) -> Tensor:
        if query.shape[-1] != self.query_dim:
            raise ValueError(
                f"query has {query.shape[-1]} features, but this layer was made for "
                f"query_dim={self.query_dim}."
            )
        projected: Tensor = self.query_layer(query)
        return projected + self.energy_offset if self.normalize else projected

    def _project_key(self, key: Tensor) -> Tensor:
        if key.shape[-1] != self.key_dim:
            raise ValueError(
                f"key has {key.shape[-1]} features, but this layer was made for "
                f"key_dim={self.key_dim}."
            )
        projected: Tensor = self.key_layer(key)
        return projected

    def _energy_weight(self, rank: int) -> Tensor:
        weight = self.energy_layer.weight
        if self.normalize:
            weight = self.energy_gain * weight / weight.norm()
        # (1, hidden_dim) broadcasts over a batch; without one, its first dim would count as a
        # batch.
        return weight if rank > 2 else weight.squeeze(0)


def _with_padding(attn_mask: Tensor | None, key_padding_mask: Tensor, key: Tensor) -> Tensor:
    """``attn_mask`` narrowed to the keys that are not padding."""
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        found = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
        raise TypeError(
            f"key_padding_mask is {found}, but must be a bool tensor (True = ignore). Convert a "
            "0/1 mask with .bool(); pass scores to be added as attn_mask."
        )
    if key_padding_mask.shape != key.shape[:-1]:
        raise ValueError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, but must have one "
            f"entry per key, {tuple(key.shape[:-1])}."
        )
    attended = key_padding_mask.logical_not().unsqueeze(-2)
    if attn_mask is None:
        return attended
    # What cannot be combined is passed on as it is, for masked_attention to refuse in words.
    if not isinstance(attn_mask, Tensor):
        return attn_mask
    try:
        if attn_mask.dtype == torch.bool:
            return attended & attn_mask
        if attn_mask.is_floating_point():
            return torch.where(attended, attn_mask, -torch.inf)
    except RuntimeError:
        pass
    return attn_mask
