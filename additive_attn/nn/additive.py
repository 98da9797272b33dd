"""Additive attention as a layer that replaces the plain one and has its parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from additive_attn.nn.decoding import ProjectedMemory, step
from additive_attn.nn.linear import bare_parameters, energy_of, renew_parameters
from additive_attn.nn.projection import ProjectingAttention
from additive_attn.nn.symbolic import is_symbolic, symbolic_call
from additive_attn.nn.whole_steps import whole_step
from additive_attn.ops.attend import masked_attention
from additive_attn.ops.autograd import attend
from additive_attn.ops.checks import Integers, refuse_types
from additive_attn.ops.layer_checks import (
    checked_number,
    explain_shapes,
    refuse_memory,
    refuse_ranks,
)
from additive_attn.ops.projected import Sources, attend_projected, in_one_node, projections


class AdditiveAttention(ProjectingAttention):
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
    state_dicts load. With normalize=True, v is ``energy_layer.weight``, g is ``energy_gain (1)``,
    b is ``energy_offset (hidden_dim)``, and there is no ``energy_layer.bias``.

    ``query_layer`` and ``key_layer`` are called. ``energy_layer`` is a Linear whose weight is
    read. If it has hooks, or is replaced by another affine module (an adapter, a quantised or
    sharded Linear), it is called once per call, with the ``hidden_dim + 1`` rows of an identity
    matrix and zero. Such a module is checked at the first call, and at the first one after each
    change of its parameters or hooks: one that is not affine, or drops out, raises ValueError.
    Backward hooks raise it too. Under FSDP2, ``fully_shard(layer)`` needs
    ``register_fsdp_forward_method(layer, "project")`` and ``(layer, "step")``.

    Raises:
        TypeError: a dimension is not an integer.
        ValueError: a dimension is below 1, dropout is not a number in [0, 1], or scale is not a
            finite number.

    Example:
        >>> attention = AdditiveAttention(input_dim=20, hidden_dim=32)
        >>> query, memory = torch.randn(8, 5, 20), torch.randn(8, 9, 20)
        >>> out, weights = attention(query, memory, lengths=torch.full((8,), 9))
        >>> out.shape, weights.shape
        (torch.Size([8, 5, 20]), torch.Size([8, 5, 9]))
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
        """Arguments are described in the docstring of the class."""
        factory: Any = {"device": device, "dtype": dtype}
        if input_dim is not None or query_dim is None or key_dim is None:
            checked_number("input_dim", input_dim)
        super().__init__(
            input_dim if query_dim is None else query_dim,
            input_dim if key_dim is None else key_dim,
            hidden_dim, dropout, bias, normalize, scale, batch_first, factory,
        )  # fmt: skip
        self.normalize = normalize
        if normalize:
            self.energy_gain = nn.Parameter(torch.empty(1, **factory))  # FSDP2 shards no scalar
            self.energy_offset = nn.Parameter(torch.empty(hidden_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the layer's own parameters, which are those of normalize=True. Its Linears
        have their own ``reset_parameters``."""
        if self.normalize:
            nn.init.constant_(self.energy_gain, self.hidden_dim**-0.5)
            nn.init.zeros_(self.energy_offset)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        lengths: Integers | None = None,
        window: tuple[int, int] | None = None,
        starts: Integers | None = None,
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
                leading keys to attend to; a tensor, or a list.
            window: ``(left, right)``: keys i - left ... i + right; -1 = unbounded.
            starts: integers like lengths: the first key to attend to.

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
            if not is_symbolic(query, key, value):
                refuse_types(query=query, key=key, value=value)
            masking = key_padding_mask, need_weights, attn_mask, is_causal, lengths, window, starts
            return symbolic_call(self, "forward", query, key, value, *masking)
        rank = query.dim()
        if not (2 <= rank <= 3 and key.dim() == rank and value.dim() == rank):
            refuse_ranks(type(self).__name__, query=query, key=key, value=value)
        sources = self._sources(query, key) if in_one_node(query, key, value, attn_mask) else None
        q, k, v, weight = self._projected(query, key, value, sources)
        if attn_mask is not None or key_padding_mask is not None:
            self._check_polarity(attn_mask, key_padding_mask)
        swap = rank == 3 and not self.batch_first
        try:
            if swap:
                q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
            out, weights = self._attend(
                q, k, v, attn_mask, lengths, is_causal, window, need_weights, key_padding_mask,
                starts, attend if sources is None else partial(attend_projected, sources), weight,
            )  # fmt: skip
        except (RuntimeError, ValueError):
            explain_shapes(
                type(self).__name__, self.batch_first, lengths, query=query, key=key, value=value
            )
            raise
        return out.transpose(0, 1) if swap else out, weights

    def step(
        self, query: Tensor, memory: ProjectedMemory, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with one query per sequence: a decoder step.

        Args:
            query: ``(B, query_dim)``, or ``(query_dim,)`` with an unbatched memory; or several
                queries per sequence, ``(B, n, query_dim)``, or ``(n, query_dim)`` unbatched; or
                ``(B * beams, query_dim)`` with a memory that was expanded for beams.
            memory: from :meth:`project`, of this layer; fields that ``_replace`` has changed are
                checked as :meth:`forward` checks its arguments.
            need_weights: whether to return the weights.

        Returns:
            context ``(B, Dv)`` and weights ``(B, Lk)``, or None, with the leading dims of query.

        The gradients of keys, values and parameters are computed once for all steps of a memory,
        after the backward of all of them (math.md, eq. 16). Under ``create_graph``,
        ``torch.func``, autocast and tracing, and where hooks or tools have changed the layers or
        ``_replace`` the memory, every step computes its own.

        Raises:
            TypeError, ValueError, RuntimeError: query and memory do not fit, or as
                :meth:`forward`.
        """
        if not isinstance(memory, ProjectedMemory):
            if not is_symbolic(memory):
                refuse_memory(self._caller("step"), memory)
            return symbolic_call(self, "step", query, memory, need_weights)
        if self._forward_pre_hooks:
            renew_parameters(self)
        if memory._whole() is not None and type(need_weights) is bool:
            found = whole_step(self, query, memory)
            if found is not None:
                return found if need_weights else (found[0], None)
        return step(self, query, memory, need_weights)

    def _sources(self, query: Tensor, key: Tensor) -> Sources | None:
        """What projections and energy are computed from; None unless bare Linears compute them."""
        modules: Any = self._modules
        of_query = bare_parameters(modules["query_layer"])
        of_key = bare_parameters(modules["key_layer"])
        of_energy = bare_parameters(modules["energy_layer"])
        if (
            self.normalize
            or of_query is None
            or of_key is None
            or of_energy is None
            or of_energy[0].shape != (1, of_query[0].shape[0])
            or not of_energy[0].requires_grad
            or not (self.batch_first or query.dim() == 2)
        ):
            return None
        return Sources(query, *of_query, key, *of_key, *of_energy)

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, sources: Sources | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if sources is not None:
            try:
                q, k, weight = projections(sources)
                return q, k, value, weight
            except RuntimeError:
                pass  # _project raises an error that says why
        return self._project("query", query), *self._project_keys(key, value), None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
        lengths: Integers | None, is_causal: bool, window: tuple[int, int] | None,
        need_weights: bool, key_padding_mask: Tensor | None = None,
        starts: Integers | None = None, compute: Any = attend, weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attends with projected queries and keys, batch first. ``weight`` is the energy's vector
        where ``compute`` has its source."""
        bias = None
        if weight is None:
            # From _modules, since the cost of nn.Module's __getattr__ shows in a decoder step.
            energy_layer: Any = self._modules["energy_layer"]
            weight, bias = energy_of(energy_layer, query.shape[-1], query)
            if self.normalize:
                weight = self.energy_gain * weight / weight.norm()
            if query.dim() == 2:
                # The first dim of (1, hidden_dim) would count as heads, but there are no heads.
                weight = weight.squeeze(0)
        out, weights, _ = masked_attention(
            (query, key, value, weight), attn_mask, lengths, is_causal, window,
            self.dropout if self.training else 0.0, self.scale, need_weights, bias, False,
            key_padding_mask, starts, compute=compute,
        )  # fmt: skip
        return out, weights if need_weights else None
