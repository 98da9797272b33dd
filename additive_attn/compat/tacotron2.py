"""Attention of Tacotron 2: NVIDIA's ``Attention``, torchaudio's ``_Attention``."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from additive_attn.compat._base import Linear, Modules, step
from additive_attn.ops.compat_checks import explained


class _Filters(nn.Module):
    """A convolution under the name ``conv``, as NVIDIA's code has it."""

    def __init__(self, filters: int, width: int) -> None:
        super().__init__()
        self.conv = _convolution(filters, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(x)
        return output


def _convolution(filters: int, width: int) -> nn.Conv1d:
    conv = nn.Conv1d(2, filters, width, padding=(width - 1) // 2, bias=False)
    nn.init.xavier_uniform_(conv.weight)
    return conv


def _linear(in_features: int, out_features: int, gain: str) -> nn.Linear:
    linear = Linear(in_features, out_features, False, gain).linear_layer
    assert isinstance(linear, nn.Linear)
    return linear


class LocationLayer(nn.Module):
    """Filters over the last weights and their sum, and a dense layer: ``(B, 2, Lk)`` to
    ``(B, Lk, H)``."""

    location_conv: nn.Module
    location_dense: nn.Module

    @explained()
    def __init__(
        self, attention_n_filters: int, attention_kernel_size: int, attention_dim: int
    ) -> None:
        super().__init__()
        self.location_conv = _Filters(attention_n_filters, attention_kernel_size)
        self.location_dense = Linear(attention_n_filters, attention_dim, False, "tanh")

    def forward(self, attention_weights_cat: Tensor) -> Tensor:
        term: Tensor = self.location_dense(self.location_conv(attention_weights_cat).mT)
        return term


class _LocationLayer(LocationLayer):
    """The same, with torchaudio's names of its parts."""

    def __init__(
        self, attention_n_filter: int, attention_kernel_size: int, attention_hidden_dim: int
    ) -> None:
        nn.Module.__init__(self)
        self.location_conv = _convolution(attention_n_filter, attention_kernel_size)
        self.location_dense = _linear(attention_n_filter, attention_hidden_dim, "tanh")


class _Stepwise(nn.Module):
    query_layer: nn.Module
    v: nn.Module
    location_layer: LocationLayer

    @explained(
        attention_hidden_state="(B, attention_rnn_dim)",
        memory="(B, Lk, embedding_dim)",
        processed_memory="(B, Lk, attention_dim)",
        attention_weights_cat="(B, 2, Lk)",
        mask="bool (B, Lk) or None",
    )
    def forward(
        self,
        attention_hidden_state: Tensor,
        memory: Tensor,
        processed_memory: Tensor,
        attention_weights_cat: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            attention_hidden_state: ``(B, attention_rnn_dim)``.
            memory: ``(B, Lk, embedding_dim)``.
            processed_memory: ``memory_layer(memory)``, ``(B, Lk, H)``. With memory, keep it the
                same tensor for all steps of a sequence.
            attention_weights_cat: the last weights and their sum, ``(B, 2, Lk)``.
            mask: bool ``(B, Lk)``, True = ignore.

        Returns:
            context ``(B, embedding_dim)`` and weights ``(B, Lk)``.
        """
        location = self.location_layer
        modules = Modules(
            self.v, self.query_layer, location.location_dense, location.location_conv
        )
        return step(
            self, modules, attention_hidden_state, processed_memory, memory, padding=mask,
            inputs=attention_weights_cat,
        )  # fmt: skip


class Attention(_Stepwise):
    """NVIDIA's location-sensitive attention (Shen et al. 2018, arXiv:1712.05884)."""

    @explained()
    def __init__(
        self,
        attention_rnn_dim: int,
        embedding_dim: int,
        attention_dim: int,
        attention_location_n_filters: int,
        attention_location_kernel_size: int,
    ) -> None:
        super().__init__()
        self.query_layer = Linear(attention_rnn_dim, attention_dim, False, "tanh")
        self.memory_layer = Linear(embedding_dim, attention_dim, False, "tanh")
        self.v = Linear(attention_dim, 1, False)
        self.location_layer = LocationLayer(
            attention_location_n_filters, attention_location_kernel_size, attention_dim
        )
        self.score_mask_value = -float("inf")


class _Attention(_Stepwise):
    """torchaudio's location-sensitive attention."""

    _size_names: ClassVar[dict[str, str]] = {
        "encoder_embedding_dim": "embedding_dim", "attention_hidden_dim": "attention_dim"
    }  # fmt: skip

    @explained()
    def __init__(
        self,
        attention_rnn_dim: int,
        encoder_embedding_dim: int,
        attention_hidden_dim: int,
        attention_location_n_filter: int,
        attention_location_kernel_size: int,
    ) -> None:
        super().__init__()
        self.query_layer = _linear(attention_rnn_dim, attention_hidden_dim, "tanh")
        self.memory_layer = _linear(encoder_embedding_dim, attention_hidden_dim, "tanh")
        self.v = _linear(attention_hidden_dim, 1, "linear")
        self.location_layer = _LocationLayer(
            attention_location_n_filter, attention_location_kernel_size, attention_hidden_dim
        )
        self.score_mask_value = -float("inf")
