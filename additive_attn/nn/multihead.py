"""Additive attention with several heads, in place of nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from additive_attn.nn.decoding import ProjectedMemory
from additive_attn.nn.head_steps import project_heads, step_heads
from additive_attn.nn.heads import (
    append_keys,
    attend_heads,
    is_causal_mask,
    merged_masks,
    nested_like,
    padded,
    split_blocks,
)
from additive_attn.nn.linear import projected, renew_parameters
from additive_attn.nn.symbolic import is_symbolic, symbolic_call
from additive_attn.ops.checks import (
    Integers,
    checked_probability,
    refuse_types,
)
from additive_attn.ops.head_checks import (
    check_division,
    check_heads,
    check_masks,
    check_memory,
    check_nested,
    check_replaced,
    check_step,
    explain_projections,
)
from additive_attn.ops.layer_checks import (
    check_factory,
    check_flags,
    checked_number,
    refuse_memory,
)
from additive_attn.ops.memory_checks import explain_conversion


class MultiheadAdditiveAttention(nn.Module):
    r"""Additive attention with several heads, in place of :class:`torch.nn.MultiheadAttention`:
    the same arguments, masks, outputs and parameter names, and another score.

    .. math::
        s^h_{ij} = w_h^\top \tanh(W^h_q q_i + b^h_q + W^h_k k_j + b^h_k), \quad
        \mathrm{out}_i = W_o \, [\textstyle\sum_j p^h_{ij} (W^h_v v_j + b^h_v)]_h + b_o

    One call computes all heads, without the tensor ``(N, heads, L, S, hidden_dim / heads)``.

    Args:
        embed_dim: features of queries and outputs, a multiple of num_heads.
        num_heads: heads, of ``embed_dim / num_heads`` values each.
        dropout: probability of dropping a weight, in training only.
        bias: whether the projections have biases.
        add_bias_kv: append a learned key and value, which every query may attend to.
        add_zero_attn: append a key and a value of zeros (after their projections).
        kdim, vdim: features of keys and of values, if they are not embed_dim.
        batch_first: inputs and outputs are (N, L, E) if True, (L, N, E) if False.
        device, dtype: of the parameters.
        hidden_dim: features in which the queries and keys of all heads are added, a multiple of
            num_heads; embed_dim by default.

    Parameters in the state_dict: ``in_proj_weight (2 * hidden_dim + embed_dim, embed_dim)`` holds
    the projections of queries, of keys and of values, in this order: ``(3 * embed_dim,
    embed_dim)`` by default. With kdim or vdim, ``q_proj_weight (hidden_dim, embed_dim)``,
    ``k_proj_weight (hidden_dim, kdim)`` and ``v_proj_weight (embed_dim, vdim)`` in its place.
    ``in_proj_bias (2 * hidden_dim + embed_dim)``, ``out_proj.weight``, ``out_proj.bias``,
    ``bias_k (1, 1, hidden_dim)``, ``bias_v (1, 1, embed_dim)``. All of these begin as those of
    nn.MultiheadAttention do. ``energy_weight (num_heads, hidden_dim / num_heads)`` begins as the
    weight of an nn.Linear of ``hidden_dim / num_heads`` features: uniform within one over the root
    of that number. ``load_state_dict`` of an nn.MultiheadAttention needs ``strict=False``, since
    it has no energy_weight.

    As ``self_attn`` of an nn.TransformerEncoderLayer, or ``self_attn`` and ``multihead_attn`` of
    an nn.TransformerDecoderLayer, it is called in evaluation too, because their fast path, which
    computes dot products, is switched off. For the same reason it is not an instance of
    nn.MultiheadAttention. Under FSDP2, ``fully_shard(layer)`` needs
    ``register_fsdp_forward_method(layer, "project")`` and ``(layer, "step")``.

    Raises:
        TypeError: a dimension is not an integer.
        ValueError: a dimension is below 1 or not a multiple of num_heads, or dropout is not a
            number in [0, 1].

    Example:
        >>> attention = MultiheadAdditiveAttention(32, num_heads=4, batch_first=True)
        >>> x = torch.randn(8, 9, 32)
        >>> out, weights = attention(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([8, 9, 32]), torch.Size([8, 9, 9]))
        >>> encoder = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> encoder.self_attn = attention
        >>> encoder(x).shape
        torch.Size([8, 9, 32])
    """

    # nn.TransformerEncoderLayer reads this before it computes dot products by itself.
    _qkv_same_embed_dim = False
    polarity_checked = False
    scale = 1.0
    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        hidden_dim: int | None = None,
    ) -> None:
        """Arguments are described in the docstring of the class."""
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim = checked_number("embed_dim", embed_dim)
        self.num_heads = num_heads = checked_number("num_heads", num_heads, "heads")
        hidden = embed_dim if hidden_dim is None else checked_number("hidden_dim", hidden_dim)
        self.hidden_dim = hidden
        self.kdim = embed_dim if kdim is None else checked_number("kdim", kdim)
        self.vdim = embed_dim if vdim is None else checked_number("vdim", vdim)
        check_division("embed_dim", embed_dim, num_heads)
        check_division("hidden_dim", hidden, num_heads)
        self.head_dim = embed_dim // num_heads
        self.dropout = checked_probability("dropout", dropout)
        check_flags(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn,
                    batch_first=batch_first)  # fmt: skip
        check_factory(**factory)
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn

        packed = self.kdim == embed_dim == self.vdim
        for name, wanted, *shape in (
            ("in_proj_weight", packed, 2 * hidden + embed_dim, embed_dim),
            ("q_proj_weight", not packed, hidden, embed_dim),
            ("k_proj_weight", not packed, hidden, self.kdim),
            ("v_proj_weight", not packed, embed_dim, self.vdim),
            ("in_proj_bias", bias, 2 * hidden + embed_dim),
            ("bias_k", add_bias_kv, 1, 1, hidden),
            ("bias_v", add_bias_kv, 1, 1, embed_dim),
        ):
            made = nn.Parameter(torch.empty(*shape, **factory)) if wanted else None
            self.register_parameter(name, made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.energy_weight = nn.Parameter(torch.empty(num_heads, hidden // num_heads, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters except ``out_proj.weight``, which ``out_proj`` does."""
        for weight in (
            self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        ):  # fmt: skip
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)
        bound = self.energy_weight.shape[1] ** -0.5
        nn.init.uniform_(self.energy_weight, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with every query to the keys of its sequence. The masks are those of
        nn.MultiheadAttention: **True = do not attend**, unlike in the rest of this package.

        Args:
            query: ``(L, N, embed_dim)``, or ``(N, L, embed_dim)`` with batch_first, or unbatched
                ``(L, embed_dim)``.
            key, value: ``(S, N, kdim)`` and ``(S, N, vdim)``, in the order of query. Queries that
                are keys, and keys that are values, are projected together.
            key_padding_mask: ``(N, S)``, unbatched ``(S,)``: bool, **True = ignore**; or float,
                added to the scores, where ``-inf`` = ignore.
            need_weights: whether to return the weights; the call is cheaper without.
            attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``: bool, **True = do not attend**; or
                float, to be added, ``-inf`` = do not attend; or a BlockMask (**True = attend**).
            average_attn_weights: whether the weights are the mean of all heads'.
            is_causal: says that attn_mask, which must be passed too, masks the keys after each
                query and changes nothing else. It is trusted where nn.MultiheadAttention trusts
                it: without key_padding_mask and need_weights. Elsewhere the mask is read.

        Returns:
            out, of query's shape, and weights ``(N, L, S)``, unbatched ``(L, S)``, with a dim of
            heads before L unless averaged; or None. The weights are those after dropout. Keys
            that add_bias_kv and add_zero_attn append are the last of S. A row without a key to
            attend to has weights 0, and 0 before out_proj: nn.MultiheadAttention gives NaN.

        With batch_first, all three may be nested tensors (strided or jagged) without masks: the
        output is nested, the weights are padded. The computation is on padded tensors.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`additive_attention`.
        """
        tensors: Any = {"query": query, "key": key, "value": value}
        if not all(isinstance(x, Tensor) for x in tensors.values()):
            if not is_symbolic(query, key, value):
                refuse_types(**tensors)
            masking = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return symbolic_call(self, "forward", query, key, value, *masking)
        flags = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        check_flags(**flags, is_causal=is_causal)
        nested, lengths = query.is_nested or key.is_nested or value.is_nested, None
        if nested:
            masked = attn_mask is not None or key_padding_mask is not None or is_causal
            check_nested(self, tensors, masked)
            tensors, rows, lengths = padded(tensors)
        check_heads(self, **tensors)
        q, k, v = self._projected(**tensors)
        batched = q.dim() == 3
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        scores = (q.shape[1], k.shape[1])
        blocks, attn_mask, is_causal = split_blocks(self, attn_mask, is_causal)
        if attn_mask is not None or key_padding_mask is not None:
            check_masks(self, attn_mask, key_padding_mask, q.shape[0], scores, batched)
        causal = is_causal and is_causal_mask(self, attn_mask, key_padding_mask, need_weights)
        attn_mask = None if causal else attn_mask
        mask = merged_masks(attn_mask, key_padding_mask, q.shape[0], self.num_heads)
        k, v, mask, lengths = append_keys(self, k, v, mask, lengths)
        out, weights = attend_heads(
            q, k, v, self.energy_weight, mask, lengths, causal,
            self.dropout if self.training else 0.0, need_weights, blocks=blocks,
        )  # fmt: skip
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        out = projected(self._modules["out_proj"], out.permute(order).flatten(-2))
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        out = out if batched else out.squeeze(0)
        return nested_like(out, query, rows) if nested else out, weights

    def project(
        self,
        key: Tensor,
        value: Tensor | None = None,
        lengths: Integers | None = None,
        key_padding_mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> ProjectedMemory:
        """Prepares what a decoder attends to, once per sequence, for :meth:`step`.

        Args:
            key, value: as :meth:`forward` takes them; the value is the key by default.
            lengths: integers ``(N,)``, or ``()`` unbatched: number of leading keys to attend to; a
                tensor, or a list.
            key_padding_mask: as :meth:`forward` takes it.
            dtype: of the memory, bfloat16 or float16 beside a float32 layer.

        Returns:
            The projected keys ``(N, S, hidden_dim)`` and values ``(N, S, embed_dim)``, heads side
            by side, with lengths and mask in the form that :meth:`step` passes on.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`forward`.
        """
        if value is None:
            value = key
        if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
            if not is_symbolic(key, value):
                refuse_types(key=key, value=value)
            return symbolic_call(self, "project", key, value, lengths, key_padding_mask, dtype)
        check_memory(self, key, value)
        if self._forward_pre_hooks:
            renew_parameters(self)
        return project_heads(self, key, value, lengths, key_padding_mask, dtype)

    def step(
        self,
        query: Tensor,
        memory: ProjectedMemory,
        need_weights: bool = True,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with one query per sequence and all heads: a decoder step.

        Args:
            query: ``(N, embed_dim)``, or ``(embed_dim,)`` with an unbatched memory; or several
                queries per sequence, ``(N, n, embed_dim)``; or ``(N * beams, embed_dim)`` with a
                memory that was expanded for beams.
            memory: from :meth:`project`, of this layer.
            need_weights: whether to return the weights.
            average_attn_weights: whether the weights are the mean of all heads'.

        Returns:
            out, of query's shape, and weights ``(N, S)``, or ``(N, num_heads, S)`` unless
            averaged, or ``(N, [num_heads,] n, S)`` for several queries; or None.

        The gradients of keys, values and parameters are computed once for all steps of a memory,
        as by :meth:`AdditiveAttention.step`.

        Raises:
            TypeError, ValueError, RuntimeError: query and memory do not fit, or as
                :meth:`forward`.
        """
        if not isinstance(memory, ProjectedMemory):
            if not is_symbolic(memory):
                refuse_memory(f"{type(self).__name__}.step", memory)
            return symbolic_call(self, "step", query, memory, need_weights, average_attn_weights)
        if not isinstance(query, Tensor):
            refuse_types(query=query)
        if self._forward_pre_hooks:
            renew_parameters(self)
        if memory._prepared() is None:
            check_replaced(memory)
        check_flags(need_weights=need_weights, average_attn_weights=average_attn_weights)
        check_step(self, query, memory.key, memory.value, memory._beams())
        try:
            return step_heads(self, query, memory, need_weights, average_attn_weights)
        except (RuntimeError, TypeError):
            explain_projections(self, query=query)
            explain_conversion(f"{type(self).__name__}.step", self, *memory[:2])
            raise

    def extra_repr(self) -> str:
        usual = {
            "dropout": 0.0, "kdim": self.embed_dim, "vdim": self.embed_dim, "add_zero_attn": False,
            "batch_first": False, "hidden_dim": self.embed_dim,
        }  # fmt: skip
        shown = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        shown += [f"{k}={getattr(self, k)!r}" for k, x in usual.items() if getattr(self, k) != x]
        return ", ".join(shown)

    def _projected(
        self, query: Tensor | None, key: Tensor | None = None, value: Tensor | None = None
    ) -> list[Any]:
        """Returns queries, keys and values of all heads. Equal neighbours share a product."""
        sizes, packed = (self.hidden_dim, self.hidden_dim, self.embed_dim), self.in_proj_weight
        bias = self.in_proj_bias
        if packed is not None and query is key is value is not None:
            runs: list[tuple[Tensor | None, list[int]]] = [(query, list(sizes))]
            weights: Any = [packed]
            biases: Any = [bias]
        else:
            runs = []
            for x, size in zip((query, key, value), sizes, strict=True):
                if runs and packed is not None and x is runs[-1][0]:
                    runs[-1][1].append(size)
                else:
                    runs.append((x, [size]))
            rows = [sum(parts) for _, parts in runs]
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            weights = weights if packed is None else packed.split(rows)
            biases = [None] * len(runs) if bias is None else bias.split(rows)
        made: list[Any] = []
        try:
            for (x, parts), weight, b in zip(runs, weights, biases, strict=True):
                if x is None:
                    made += [None] * len(parts)
                elif len(parts) == 1:  # also sharded by heads, which a split would gather
                    made.append(F.linear(x, weight, b))
                else:
                    made += torch.split_with_sizes(F.linear(x, weight, b), parts, -1)
        except RuntimeError:
            given = {"query": query, "key": key, "value": value}
            explain_projections(self, **{n: x for n, x in given.items() if x is not None})
            raise
        return made

    def _lent_parameters(self) -> tuple[nn.Parameter | None, ...] | None:
        """The parameters that a lent memory is made with; None where tools have replaced them."""
        names = "energy_weight", "in_proj_weight", "q_proj_weight", "in_proj_bias"
        missing = object()
        found: Any = tuple(self._parameters.get(name, missing) for name in names)
        plain = all(x is None or type(x) is nn.Parameter for x in found)
        return found if plain else None
