"""SpeechBrain's attention: ContentBasedAttention and LocationAwareAttention.

As in SpeechBrain, a layer projects the encoder's states at the first call after ``reset()`` and
keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from additive_attn.compat._base import Modules, step
from additive_attn.ops.compat_checks import explained


class ContentBasedAttention(nn.Module):
    """Content only; the context is projected to output_dim."""

    mask: Any
    precomputed_enc_h: Any

    @explained()
    def __init__(
        self, enc_dim: int, dec_dim: int, attn_dim: int, output_dim: int, scaling: float = 1.0
    ) -> None:
        super().__init__()
        self.mlp_enc = nn.Linear(enc_dim, attn_dim)
        self.mlp_dec = nn.Linear(dec_dim, attn_dim)
        self.mlp_attn = nn.Linear(attn_dim, 1, bias=False)
        self.mlp_out = nn.Linear(enc_dim, output_dim)
        self.scaling = scaling
        self.softmax = nn.Softmax(dim=-1)
        self.reset()

    def reset(self) -> None:
        """Drops what the layer keeps of the sequence."""
        self.enc_len = self.precomputed_enc_h = self.mask = None
        self._padding = None, None

    @explained(enc_states="(B, Lk, enc_dim)", enc_len="integers (B,)", dec_states="(B, dec_dim)")
    def forward(
        self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns context ``(B, output_dim)`` and weights ``(B, Lk)``.

        Args:
            enc_states: ``(B, Lk, enc_dim)``.
            enc_len: number of states to attend to, ``(B,)``.
            dec_states: the query, ``(B, dec_dim)``.
        """
        if self.precomputed_enc_h is None:
            self.begin(enc_states, enc_len)
        return self.attend(Modules(self.mlp_attn, self.mlp_dec), enc_states, dec_states)

    def begin(self, enc_states: Tensor, enc_len: Tensor) -> None:
        self.precomputed_enc_h = self.mlp_enc(enc_states)
        keys = torch.arange(enc_states.size(1), device=enc_len.device, dtype=enc_len.dtype)
        # 1 = attend, in the dtype of the lengths, for code that reads it.
        attended = (keys < enc_len.unsqueeze(1)).to(enc_states.device)
        self.mask = attended.to(enc_len.dtype)
        self._padding = self.mask, attended.logical_not()

    def attend(
        self, modules: Modules, enc_states: Tensor, dec_states: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if self._padding[0] is not self.mask:
            self._padding = self.mask, self.mask == 0
        context, weights = step(
            self, modules, dec_states, self.precomputed_enc_h, enc_states,
            padding=self._padding[1], scale=float(self.scaling), **options,
        )  # fmt: skip
        return self.mlp_out(context), weights

    _padding: Any = (None, None)  # the mask, and the same with True = ignore


class LocationAwareAttention(ContentBasedAttention):
    """Filters over the last weights, into which no gradient flows (Chorowski et al. 2015,
    arXiv:1506.07503)."""

    prev_attn: Any

    @explained()
    def __init__(
        self,
        enc_dim: int,
        dec_dim: int,
        attn_dim: int,
        output_dim: int,
        conv_channels: int,
        kernel_size: int,
        scaling: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        self.mlp_enc = nn.Linear(enc_dim, attn_dim)
        self.mlp_dec = nn.Linear(dec_dim, attn_dim)
        self.mlp_attn = nn.Linear(attn_dim, 1, bias=False)
        width = 2 * kernel_size + 1
        self.conv_loc = nn.Conv1d(1, conv_channels, width, padding=kernel_size, bias=False)
        self.mlp_loc = nn.Linear(conv_channels, attn_dim)
        self.mlp_attn = nn.Linear(attn_dim, 1, bias=False)
        self.mlp_out = nn.Linear(enc_dim, output_dim)
        self.scaling = scaling
        self.softmax = nn.Softmax(dim=-1)
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.prev_attn = None

    @explained(enc_states="(B, Lk, enc_dim)", enc_len="integers (B,)", dec_states="(B, dec_dim)")
    def forward(
        self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns context ``(B, output_dim)`` and weights ``(B, Lk)``, which stay in ``prev_attn``
        for the next step. Arguments as those of :class:`ContentBasedAttention`."""
        if self.precomputed_enc_h is None:
            self.begin(enc_states, enc_len)
            self.prev_attn = self.mask * (1 / enc_len.float()).unsqueeze(1)
        inputs = self.prev_attn.unsqueeze(1).to(enc_states.dtype)
        modules = Modules(self.mlp_attn, self.mlp_dec, self.mlp_loc, self.conv_loc)
        context, weights = self.attend(modules, enc_states, dec_states, inputs=inputs)
        self.prev_attn = weights.detach()
        return context, weights
