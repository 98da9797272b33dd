"""The plain layer, which this package replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PlainAdditiveAttention(nn.Module):
    """Additive attention (Bahdanau et al. 2015, arXiv:1409.0473) in seven lines of plain PyTorch.

    ``query (..., Lq, input_dim)``, ``key (..., Lk, input_dim)``, ``value (..., Lk, Dv)``
    -> ``out (..., Lq, Dv)``, ``weights (..., Lq, Lk)``. Builds the tensor ``(..., Lq, Lk,
    hidden_dim)``. Takes ``query_dim``, ``key_dim``, ``bias``, ``device`` and ``dtype`` as
    :class:`AdditiveAttention` does.
    """

    def __init__(
        self, input_dim: int, hidden_dim: int, *, query_dim: int | None = None,
        key_dim: int | None = None, bias: bool = True, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        self.query_layer = nn.Linear(query_dim or input_dim, hidden_dim, bias, **factory)
        self.key_layer = nn.Linear(key_dim or input_dim, hidden_dim, bias, **factory)
        self.energy_layer = nn.Linear(hidden_dim, 1, bias, **factory)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.query_layer(query), self.key_layer(key)
        energy = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
        weights = torch.softmax(self.energy_layer(energy).squeeze(-1), dim=-1)
        return weights @ value, weights
