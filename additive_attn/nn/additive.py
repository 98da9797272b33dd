"""Additive attention as a layer, in place of the plain one and with its parameters."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from additive_attn.ops.attend import masked_attention
from additive_attn.ops.checks import (
    aligned_lengths,
    checked_probability,
    checked_scale,
    refuse_layouts,
    refuse_types,
    require_one_device,
)


class ProjectedMemory(NamedTuple):
    """Keys and values that are attended to again and again, prepared by
    :meth:`AdditiveAttention.project`."""

    key: Tensor
    """Projected keys ``(B, Lk, hidden_dim)``, or ``(Lk, hidden_dim)`` unbatched."""
    value: Tensor
    """Values ``(B, Lk, Dv)``, or ``(Lk, Dv)`` unbatched."""
    lengths: Tensor | None = None
    """Number of leading keys to attend to, int64 ``(B, 1)``, or ``()`` unbatched. Made by hand,
    also ``(B,)`` and of any integer dtype."""
    attn_mask: Tensor | None = None
    """Keys to attend to, bool ``(B, 1, Lk)``, or ``(1, Lk)`` unbatched; True = attend. Made by
    hand, also float, added to the scores."""


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

    Queries, keys and values have B sequences each, or 1, which is shared by all.

    Parameters in the state_dict: ``query_layer.weight (hidden_dim, query_dim)``,
    ``query_layer.bias``, ``key_layer.weight (hidden_dim, key_dim)``, ``key_layer.bias``,
    ``energy_layer.weight (1, hidden_dim)``, ``energy_layer.bias (1)``. The last shifts every score
    of a row alike, so it cancels in the softmax and its gradient is zero; it is kept so that
    state_dicts load. With normalize=True, v is ``energy_layer.weight``, g is ``energy_gain ()``, b
    is ``energy_offset (hidden_dim)``, and there is no ``energy_layer.bias``.

    ``query_layer`` and ``key_layer`` are called, with their hooks. Of ``energy_layer`` only the
    parameters are read: parametrizations of its weight work, its forward and hooks never run.

    Raises:
        TypeError: a dimension is no integer.
        ValueError: a dimension is below 1, dropout is no number in [0, 1], or scale is no finite
            number.
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
        self.query_dim = _features("query_dim", input_dim if query_dim is None else query_dim)
        self.key_dim = _features("key_dim", input_dim if key_dim is None else key_dim)
        self.hidden_dim = hidden_dim = _features("hidden_dim", hidden_dim)
        self.dropout = checked_probability("dropout", dropout)
        self.scale = checked_scale(scale)
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
            lengths: integers ``(B,)`` or ``(B, Lq)``, or unbatched ``()`` or ``(Lq,)``: number of
                leading keys to attend to.
            window: ``(left, right)``: keys i - left ... i + right; -1 = unbounded.

        Returns:
            out ``(B, Lq, Dv)`` and weights ``(B, Lq, Lk)``, or None. Unbatched inputs give ``(Lq,
            Dv)``, ``(Lq, Lk)``. A row without a key to attend to is 0 in both.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`additive_attention`.
        """
        if value is None:
            value = key
        if not (
            isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        ):
            refuse_types(query=query, key=key, value=value)
        rank = query.dim()
        if not (2 <= rank <= 3 and key.dim() == rank and value.dim() == rank):
            raise ValueError(
                f"AdditiveAttention got query {tuple(query.shape)}, key {tuple(key.shape)} and "
                f"value {tuple(value.shape)}, but all three must have 3 dims (batched) or all "
                "three 2 (unbatched). For one query (B, D) per sequence, use project and step."
            )
        projected_query = self._project_query(query)
        projected_key = _projected(self.key_layer, key, "key", self.key_dim)
        swap = rank == 3 and not self.batch_first
        if swap:
            projected_query = projected_query.transpose(0, 1)
            projected_key, value = projected_key.transpose(0, 1), value.transpose(0, 1)
        if key_padding_mask is not None:
            attn_mask = _with_padding(attn_mask, key_padding_mask, projected_key)
        energy_weight, energy_bias = self._energy(rank)
        out, weights, _ = masked_attention(
            projected_query,
            projected_key,
            value,
            energy_weight,
            energy_bias,
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

        Args:
            key: ``(B, Lk, key_dim)``, or ``(Lk, key_dim)`` unbatched.
            value: ``(B, Lk, Dv)``, or ``(Lk, Dv)``; the key itself by default.
            lengths: integers ``(B,)``, or ``()``: number of leading keys to attend to.
            key_padding_mask: bool ``(B, Lk)``, or ``(Lk,)``: **True = ignore**.

        Returns:
            The projected keys, the values, and lengths and mask in the form that :meth:`step`
            passes on.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`forward`.
        """
        if value is None:
            value = key
        if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
            refuse_types(key=key, value=value)
        if not (2 <= key.dim() <= 3 and value.dim() == key.dim()):
            raise ValueError(
                f"AdditiveAttention.project got key {tuple(key.shape)} and value "
                f"{tuple(value.shape)}, but both must have 3 dims (batched) or both 2 "
                "(unbatched)."
            )
        projected = _projected(self.key_layer, key, "key", self.key_dim)
        if projected.device != value.device:
            require_one_device(key=projected, value=value)
        if key.dim() == 3 and not self.batch_first:
            projected, value = projected.transpose(0, 1), value.transpose(0, 1)
        batch = _common_batch(projected.shape[:-2], value.shape[:-2])
        if batch is None or projected.shape[-2] != value.shape[-2]:
            raise ValueError(
                f"AdditiveAttention.project got key {tuple(key.shape)} and value "
                f"{tuple(value.shape)}, but each key belongs to one value: they may differ in "
                "the last dim only, or have a batch of 1."
            )
        if lengths is not None:
            if isinstance(lengths, Tensor) and lengths.dim() != len(batch):
                raise ValueError(
                    f"AdditiveAttention.project got lengths of shape {tuple(lengths.shape)}, but "
                    f"needs one length per sequence, {tuple(batch)}. Lengths per query are for "
                    "forward."
                )
            lengths = aligned_lengths(lengths, projected, batch, 1)
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
            memory: from :meth:`project`, of this layer; what ``_replace`` puts there is checked
                as :meth:`forward` checks its arguments.
            need_weights: whether to return the weights.

        Returns:
            context ``(B, Dv)`` and weights ``(B, Lk)``, or None. Unbatched: ``(Dv,)`` and
            ``(Lk,)``.

        Raises:
            TypeError, ValueError, RuntimeError: query and memory do not fit, or as
                :meth:`forward`.
        """
        if not isinstance(memory, ProjectedMemory):
            raise TypeError(
                f"AdditiveAttention.step got a memory that is a {type(memory).__name__}, but "
                "needs a ProjectedMemory. Prepare it with project."
            )
        key, value, lengths, attn_mask = memory
        if not (
            isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        ):
            refuse_types(query=query, key=key, value=value)
        rank = key.dim()
        if not (2 <= rank <= 3 and value.dim() == rank == query.dim() + 1):
            raise ValueError(
                f"AdditiveAttention.step got query {tuple(query.shape)} and a memory of "
                f"projected keys {tuple(key.shape)} and values {tuple(value.shape)}, but needs "
                "one query per sequence: (B, query_dim) for keys (B, Lk, hidden_dim) and values "
                "(B, Lk, Dv), or (query_dim,) for keys (Lk, hidden_dim) and values (Lk, Dv)."
            )
        energy_weight, energy_bias = self._energy(rank)
        # One row of queries per sequence: (B, 1, hidden_dim).
        out, weights, _ = masked_attention(
            self._project_query(query).unsqueeze(-2),
            key,
            value,
            energy_weight,
            energy_bias,
            attn_mask,
            lengths,
            False,
            None,
            self.dropout if self.training else 0.0,
            self.scale,
            need_weights,
        )
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
        projected = _projected(self.query_layer, query, "query", self.query_dim)
        return projected + self.energy_offset if self.normalize else projected

    def _energy(self, rank: int) -> tuple[Tensor, Tensor | None]:
        layer = self.energy_layer
        weight = layer.weight
        if self.normalize:
            weight = self.energy_gain * weight / weight.norm()
        # (1, hidden_dim) broadcasts over a batch; without one, its first dim would count as a
        # batch.
        return weight if rank > 2 else weight.squeeze(0), layer.bias


def _features(name: str, count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(
            f"{name} is {count!r}, a {type(count).__name__}, but must be an integer, the number "
            "of features."
        )
    if count < 1:
        raise ValueError(f"{name} is {count}, but a layer needs at least one feature.")
    return int(count)


def _projected(layer: nn.Module, tensor: Tensor, name: str, features: int) -> Tensor:
    try:
        if tensor.shape[-1] != features:
            raise ValueError(
                f"{name} has {tensor.shape[-1]} features, but this layer was made for "
                f"{name}_dim={features}."
            )
        projected: Tensor = layer(tensor)
    except RuntimeError:
        # Asked only now: autocast and layers put in by the user take more than their own dtype.
        if tensor.layout is not torch.strided or tensor.is_nested:
            refuse_layouts(**{name: tensor})
        for parameter in layer.parameters():
            if parameter.device != tensor.device:
                raise RuntimeError(
                    f"{name} is on {tensor.device}, but this layer is on {parameter.device}. Move "
                    "one of them with .to(device)."
                ) from None
            if parameter.dtype != tensor.dtype:
                raise TypeError(
                    f"{name} is {tensor.dtype}, but the parameters of this layer are "
                    f"{parameter.dtype}. Convert one of them with .to(dtype), or call under "
                    "torch.autocast."
                ) from None
        raise
    return projected


def _common_batch(first: torch.Size, second: torch.Size) -> torch.Size | None:
    """What two batches of at most one dim broadcast to, or None."""
    if first == second or second == (1,):
        return first
    return second if first == (1,) else None


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
    if key_padding_mask.device != key.device:
        require_one_device(key=key, key_padding_mask=key_padding_mask)
    if key_padding_mask.layout is not torch.strided:
        refuse_layouts(key_padding_mask=key_padding_mask)
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
