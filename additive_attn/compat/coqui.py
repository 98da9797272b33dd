"""Coqui TTS's OriginalAttention."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from additive_attn.compat._base import Linear, Modules, affine, features, saving, step
from additive_attn.functional import additive_scores
from additive_attn.nn.linear import energy_of
from additive_attn.ops.compat_checks import explained
from additive_attn.ops.memory import eager
from additive_attn.ops.products import LentWeight, lend_weight, multiply


class LocationLayer(nn.Module):
    """Filters over the last weights and their sum, and a dense layer: ``(B, 2, Lk)`` to
    ``(B, Lk, H)``."""

    @explained()
    def __init__(
        self,
        attention_dim: int,
        attention_n_filters: int = 32,
        attention_kernel_size: int = 31,
    ) -> None:
        super().__init__()
        width = attention_kernel_size
        self.location_conv1d = nn.Conv1d(
            2, attention_n_filters, width, padding=(width - 1) // 2, bias=False
        )
        self.location_dense = Linear(attention_n_filters, attention_dim, False, "tanh")

    def forward(self, attention_cat: Tensor) -> Tensor:
        term: Tensor = self.location_dense(self.location_conv1d(attention_cat).mT)
        return term


class LentValues:
    """The values of the steps of a sequence, until their backward pass. A copy of the layer has
    none."""

    __slots__ = ("__weakref__", "lent", "values", "version")

    lent: LentWeight | None
    values: Tensor | None

    def __init__(self, values: Tensor | None = None) -> None:
        self.values, self.lent = values, None
        if values is None:
            return
        self.version, lent = values._version, lend_weight(values.mT)
        self.lent, owner = lent, ref(self)

        def end(_: Tensor) -> None:
            if (kept := owner()) is not None:
                kept.values = kept.lent = None

        lent.source.register_hook(end)

    def __reduce__(self) -> tuple[type[LentValues], tuple[()]]:
        return LentValues, ()

    def of(self, values: Tensor) -> LentWeight | None:
        """Returns what was lent of these values; None if they have changed."""
        same = self.values is values and self.version == values._version
        return self.lent if same else None


class OriginalAttention(nn.Module):
    """Additive attention, with a location term (Shen et al. 2018, arXiv:1712.05884), forward
    attention (Zhang et al. 2018, arXiv:1807.06736) and windowing in evaluation.

    ``norm="softmax"`` is one fused call per step. ``"sigmoid"`` and windowing need the scores,
    which are then computed on their own.
    """

    @explained()
    def __init__(
        self,
        query_dim: int,
        embedding_dim: int,
        attention_dim: int,
        location_attention: bool,
        attention_location_n_filters: int,
        attention_location_kernel_size: int,
        windowing: bool,
        norm: str,
        forward_attn: bool,
        trans_agent: bool,
        forward_attn_mask: bool,
    ) -> None:
        super().__init__()
        self.query_layer = Linear(query_dim, attention_dim, False, "tanh")
        self.inputs_layer = Linear(embedding_dim, attention_dim, False, "tanh")
        self.v = Linear(attention_dim, 1)
        if trans_agent:
            self.ta = nn.Linear(query_dim + embedding_dim, 1)
        if location_attention:
            self.location_layer = LocationLayer(
                attention_dim, attention_location_n_filters, attention_location_kernel_size
            )
        self._mask_value = -float("inf")
        self.windowing, self.norm = windowing, norm
        self.win_idx: int | None = None
        self.forward_attn, self.trans_agent = forward_attn, trans_agent
        self.forward_attn_mask = forward_attn_mask
        self.location_attention = location_attention

    def init_win_idx(self) -> None:
        self.win_idx, self.win_back, self.win_front = -1, 2, 6

    def init_forward_attn(self, inputs: Tensor) -> None:
        self.alpha = torch.full_like(inputs[:, :, 0], 1e-7)
        self.alpha[:, 0] = 1.0
        self.u = torch.full_like(inputs[:, 0, :1], 0.5)

    def init_location_attention(self, inputs: Tensor) -> None:
        self.attention_weights_cum = inputs.new_zeros(inputs.shape[:2])

    @explained(inputs="(B, Lk, embedding_dim)")
    def init_states(self, inputs: Tensor) -> None:
        """Starts a sequence: ``inputs (B, Lk, embedding_dim)``."""
        self.attention_weights = inputs.new_zeros(inputs.shape[:2])
        if self.location_attention:
            self.init_location_attention(inputs)
        if self.forward_attn:
            self.init_forward_attn(inputs)
        if self.windowing:
            self.init_win_idx()

    @explained(inputs="(B, Lk, embedding_dim)")
    def preprocess_inputs(self, inputs: Tensor) -> Tensor:
        keys: Tensor = self.inputs_layer(inputs)
        return keys

    def update_location_attention(self, alignments: Tensor) -> None:
        self.attention_weights_cum += alignments

    def apply_windowing(self, attention: Tensor, inputs: Tensor) -> Tensor:
        """Masks the scores outside of a window around the last largest one, and moves the window
        to the largest score within."""
        assert self.win_idx is not None, "call init_states() first"
        keys = torch.arange(inputs.shape[1], device=attention.device)
        start, stop = self.win_idx - self.win_back, self.win_idx + self.win_front
        attention = attention.masked_fill((keys < start) | (keys >= stop), -torch.inf)
        if self.win_idx == -1:
            # The first key gets the largest score of the first window.
            attention[:, 0] = attention.max()
        self.win_idx = int(attention[0].argmax())
        return attention

    def apply_forward_attention(self, alignment: Tensor) -> Tensor:
        """Returns weights that move on by one key with probability ``u``, or stay."""
        shifted = pad(self.alpha[:, :-1], (1, 0))
        alpha = ((1 - self.u) * self.alpha + self.u * shifted + 1e-8) * alignment
        if not self.training and self.forward_attn_mask:
            largest = alpha.amax(1)
            for row, n in enumerate(shifted.argmax(1).tolist()):
                alpha[row, n + 3 :] = 0
                alpha[row, : n - 1] = 0
                alpha[row, n - 2] = 0.01 * largest[row]
        return alpha / alpha.sum(dim=1, keepdim=True)

    @explained(
        query="(B, query_dim)",
        inputs="(B, Lk, embedding_dim)",
        processed_inputs="(B, Lk, attention_dim)",
        mask="bool (B, Lk) or None",
    )
    def forward(
        self, query: Tensor, inputs: Tensor, processed_inputs: Tensor, mask: Tensor | None
    ) -> Tensor:
        """One step; its weights stay in ``attention_weights``.

        Args:
            query: ``(B, query_dim)``.
            inputs: ``(B, Lk, embedding_dim)``.
            processed_inputs: ``preprocess_inputs(inputs)``. With inputs, keep it the same tensor
                for all steps of a sequence.
            mask: bool ``(B, Lk)``, **True = attend**.

        Returns:
            context ``(B, embedding_dim)``.
        """
        if self.norm not in ("softmax", "sigmoid"):
            raise ValueError(f"norm is {self.norm!r}; it must be 'softmax' or 'sigmoid'.")
        weighs = None
        if self.location_attention:
            weighs = torch.stack([self.attention_weights, self.attention_weights_cum], dim=1)
        windowed = self.windowing and not self.training
        if self.norm == "softmax" and not windowed:
            context, alignment = self._fused(query, inputs, processed_inputs, mask, weighs)
        else:
            scores = self._scores(query, processed_inputs, mask, weighs)
            if windowed:
                scores = self.apply_windowing(scores, inputs)
            if self.norm == "softmax":
                alignment = scores.softmax(-1)
            else:
                alignment = scores.sigmoid()
                total = alignment.sum(dim=1, keepdim=True)
                alignment = alignment / total.masked_fill(total == 0, 1.0)
            context = None
        if self.location_attention:
            self.update_location_attention(alignment)
        if self.forward_attn:
            alignment = self.alpha = self.apply_forward_attention(alignment)
            context = None
        if context is None:
            context = self._weighted_sum(alignment, inputs)
        self.attention_weights = alignment
        if self.forward_attn and self.trans_agent:
            self.u = torch.sigmoid(self.ta(torch.cat([context, query.squeeze(1)], dim=-1)))
        return context

    def _fused(
        self, query: Tensor, inputs: Tensor, processed_inputs: Tensor, mask: Tensor | None,
        weighs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        modules = Modules(self.v, self.query_layer)
        if weighs is not None:
            location = self.location_layer
            modules = modules._replace(
                dense=location.location_dense, filters=location.location_conv1d
            )
        # Forward attention computes another context, from other weights.
        return step(
            self, modules, query, processed_inputs, inputs, attended=mask, inputs=weighs,
            need_context=not self.forward_attn,
        )  # fmt: skip

    def _weighted_sum(self, alignment: Tensor, inputs: Tensor) -> Tensor:
        """Sums the inputs. Their gradient, which all steps share, is computed once."""
        if (
            not (inputs.requires_grad and torch.is_grad_enabled())
            or not eager((alignment, inputs), inputs)
            or saving() is not None
        ):
            return torch.bmm(alignment.unsqueeze(1), inputs).squeeze(1)
        kept: LentValues = self.__dict__.get("_values") or LentValues()
        if (lent := kept.of(inputs)) is None:
            kept = self.__dict__["_values"] = LentValues(inputs)
            lent = kept.lent
        assert lent is not None
        return multiply(lent, alignment)

    def _scores(
        self, query: Tensor, key: Tensor, mask: Tensor | None, weighs: Tensor | None
    ) -> Tensor:
        if weighs is not None:
            location = self.location_layer
            found = features(location.location_conv1d, weighs).mT
            dense = affine(location.location_dense)
            if dense is None:
                key = key + location.location_dense(found)
            else:
                # A Linear is slow on few channels.
                key = torch.baddbmm(key, found, dense[0].t().expand(len(key), -1, -1))
        pair = affine(self.v)
        if pair is None:
            weight, bias = (
                energy_of(self.v, key.shape[-1], key)[0],
                self.v(torch.zeros_like(key[0, 0])),
            )
        else:
            weight, bias = pair
        attn_mask = None if mask is None else mask.unsqueeze(1)
        rows = self.query_layer(query).unsqueeze(1)
        scores = additive_scores(rows, key, weight.squeeze(0), attn_mask=attn_mask).squeeze(1)
        return scores if bias is None else scores + bias
