"""ESPnet's attention with one head: AttAdd, AttLoc, AttCov, AttCovLoc, AttLocRec.

As in ESPnet, a layer projects the encoder's states at the first call after ``reset()`` and keeps
them. ``enc_hs_len`` is a list or a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from additive_attn.compat._base import Modules, features, step
from additive_attn.ops.compat_checks import check_lengths, explained

Lengths = Sequence[int] | Tensor
STATES = {
    "enc_hs_pad": "(B, Lk, eprojs)", "enc_hs_len": "integers (B,), or a list",
    "dec_z": "(B, dunits) or None",
}  # fmt: skip


class Cached(nn.Module):
    """What a layer keeps of a sequence between its steps."""

    kept: tuple[str, ...] = ("h_length", "enc_h", "pre_compute_enc_h", "mask")
    enc_h: Any
    mask: Any
    dunits: int
    han_mode: bool

    def reset(self) -> None:
        """Drops what the layer keeps of the sequence."""
        for name in self.kept:
            setattr(self, name, None)

    def remember(self, enc_hs_pad: Tensor) -> None:
        self.enc_h, self.h_length = enc_hs_pad, enc_hs_pad.size(1)

    def start(self, enc_hs_pad: Tensor, dec_z: Tensor | None) -> Tensor:
        """Returns the query ``(B, dunits)``."""
        if dec_z is None:
            return enc_hs_pad.new_zeros(len(enc_hs_pad), self.dunits)
        return dec_z.view(len(enc_hs_pad), self.dunits)

    def ignored(self, enc_hs_len: Lengths) -> Tensor:
        """Returns the padding, True = ignore. It is computed once per sequence."""
        if self.mask is None:
            self.mask = _attended(self.enc_h, enc_hs_len)[0].logical_not()
        mask: Tensor = self.mask
        return mask


def uniform(enc_hs_pad: Tensor, enc_hs_len: Lengths) -> Tensor:
    """Returns the weights before the first step."""
    attended, lengths = _attended(enc_hs_pad, enc_hs_len)
    return attended.to(enc_hs_pad.dtype) / lengths.to(enc_hs_pad.dtype)


def _attended(enc_hs_pad: Tensor, enc_hs_len: Lengths) -> tuple[Tensor, Tensor]:
    listed = None if isinstance(enc_hs_len, Tensor) else "cpu"
    lengths = torch.as_tensor(enc_hs_len, device=listed).unsqueeze(-1)
    check_lengths("enc_hs_len", lengths, *enc_hs_pad.shape[:2])
    lengths = lengths.to(enc_hs_pad.device)
    return torch.arange(enc_hs_pad.size(1), device=enc_hs_pad.device) < lengths, lengths


def convolution(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(1, channels, (1, 2 * width + 1), padding=(0, width), bias=False)


class _Single(Cached):
    mlp_enc: nn.Module
    mlp_dec: nn.Module
    gvec: nn.Module

    def __init__(
        self, eprojs: int, dunits: int, att_dim: int, *location: int, han_mode: bool
    ) -> None:
        super().__init__()
        self.mlp_enc = nn.Linear(eprojs, att_dim)
        self.mlp_dec = nn.Linear(dunits, att_dim, bias=False)
        self.add_location(att_dim, *location)
        self.gvec = nn.Linear(att_dim, 1)
        self.dunits, self.eprojs, self.att_dim = dunits, eprojs, att_dim
        self.han_mode = han_mode
        self.reset()

    def add_location(self, att_dim: int, *location: int) -> None:
        """Registers the modules of the location term."""

    def modules_of(self) -> Modules:
        return Modules(self.gvec, self.mlp_dec)

    def begin(self, enc_hs_pad: Tensor, dec_z: Tensor | None) -> Tensor:
        """Keeps and projects the sequence at its first step, and returns the query."""
        if self.pre_compute_enc_h is None or self.han_mode:
            self.remember(enc_hs_pad)
            self.pre_compute_enc_h: Any = self.mlp_enc(enc_hs_pad)
        return self.start(enc_hs_pad, dec_z)

    def attend(
        self, query: Tensor, enc_hs_len: Lengths, scaling: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return step(
            self, self.modules_of(), query, self.pre_compute_enc_h, self.enc_h,
            padding=self.ignored(enc_hs_len), scale=float(scaling), **options,
        )  # fmt: skip


class _Content(_Single):
    @explained()
    def __init__(self, eprojs: int, dunits: int, att_dim: int, han_mode: bool = False) -> None:
        super().__init__(eprojs, dunits, att_dim, han_mode=han_mode)


class AttAdd(_Content):
    """Content only."""

    @explained(**STATES)
    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Lengths,
        dec_z: Tensor | None,
        att_prev: Any,
        scaling: float = 2.0,
    ) -> tuple[Tensor, Tensor]:
        """Returns context ``(B, eprojs)`` and weights ``(B, Lk)``; att_prev is not read."""
        return self.attend(self.begin(enc_hs_pad, dec_z), enc_hs_len, scaling)


class _Located(_Single):
    @explained()
    def __init__(
        self,
        eprojs: int,
        dunits: int,
        att_dim: int,
        aconv_chans: int,
        aconv_filts: int,
        han_mode: bool = False,
    ) -> None:
        super().__init__(eprojs, dunits, att_dim, aconv_chans, aconv_filts, han_mode=han_mode)

    def add_location(self, att_dim: int, *location: int) -> None:
        self.mlp_att = nn.Linear(location[0], att_dim, bias=False)
        self.loc_conv = convolution(*location)

    def modules_of(self) -> Modules:
        return Modules(self.gvec, self.mlp_dec, self.mlp_att, self.loc_conv)


class AttLoc(_Located):
    """Filters over the last weights (Chorowski et al. 2015, arXiv:1506.07503)."""

    @explained(**STATES, att_prev="(B, Lk) or None")
    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Lengths,
        dec_z: Tensor | None,
        att_prev: Tensor | None,
        scaling: float = 2.0,
        last_attended_idx: int | None = None,
        backward_window: int = 1,
        forward_window: int = 3,
    ) -> tuple[Tensor, Tensor]:
        """Returns context ``(B, eprojs)`` and weights ``(B, Lk)``. With last_attended_idx, of one
        sequence, only keys from ``last_attended_idx - backward_window`` to before
        ``last_attended_idx + forward_window`` are attended to."""
        query = self.begin(enc_hs_pad, dec_z)
        if att_prev is None:
            att_prev = uniform(enc_hs_pad, enc_hs_len)
        window = None
        if last_attended_idx is not None:
            if len(enc_hs_pad) != 1:
                raise NotImplementedError(
                    f"last_attended_idx is given with a batch of {len(enc_hs_pad)}; it is for "
                    "one sequence."
                )
            keys = torch.arange(enc_hs_pad.size(1), device=enc_hs_pad.device)
            start, stop = last_attended_idx - backward_window, last_attended_idx + forward_window
            window = ((keys >= start) & (keys < stop))[None, None]
        inputs = att_prev.view(len(enc_hs_pad), 1, enc_hs_pad.shape[1])
        return self.attend(query, enc_hs_len, scaling, inputs=inputs, window=window)


class _Covered:
    """The location is the sum of all earlier weights."""

    _last: Any = None

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._last = None

    @explained(**STATES, att_prev_list="a list of (B, Lk) or None")
    def forward(
        self: Any,
        enc_hs_pad: Tensor,
        enc_hs_len: Lengths,
        dec_z: Tensor | None,
        att_prev_list: list[Tensor] | None,
        scaling: float = 2.0,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns context ``(B, eprojs)`` and att_prev_list, to which this step's weights are
        appended."""
        query = self.begin(enc_hs_pad, dec_z)
        if att_prev_list is None:
            att_prev_list = [uniform(enc_hs_pad, enc_hs_len)]
        coverage = self._sum(att_prev_list)
        out, weights = self.attend(query, enc_hs_len, scaling, inputs=coverage.unsqueeze(1))
        self._last = tuple(att_prev_list), coverage
        att_prev_list += [weights]
        return out, att_prev_list

    def _sum(self, weights: list[Tensor]) -> Tensor:
        """Adds once per step, where the list has grown by the last step's weights."""
        if self._last is not None:
            earlier, coverage = self._last
            if len(weights) == len(earlier) + 1 and all(map(operator.is_, earlier, weights)):
                found: Tensor = coverage + weights[-1]
                return found
        return sum(weights[1:], weights[0])


class AttCov(_Covered, _Content):
    """Coverage (See et al. 2017, arXiv:1704.04368): the sum of all earlier weights."""

    def add_location(self, att_dim: int, *location: int) -> None:
        self.wvec = nn.Linear(1, att_dim)

    def modules_of(self) -> Modules:
        return Modules(self.gvec, self.mlp_dec, self.wvec)


class AttCovLoc(_Covered, _Located):
    """Filters over the sum of all earlier weights."""


class AttLocRec(_Located):
    """An LSTM over the largest response of each filter to the last weights."""

    def add_location(self, att_dim: int, *location: int) -> None:
        self.loc_conv = convolution(*location)
        self.att_lstm = nn.LSTMCell(location[0], att_dim, bias=False)

    def modules_of(self) -> Modules:
        return Modules(self.gvec, None)

    @explained(
        **STATES, att_prev_states="a list or tuple of (B, Lk) and the LSTM's states, or None"
    )
    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Lengths,
        dec_z: Tensor | None,
        att_prev_states: tuple[Tensor, tuple[Tensor, Tensor]] | None,
        scaling: float = 2.0,
    ) -> tuple[Tensor, tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Returns context ``(B, eprojs)``, and weights ``(B, Lk)`` with the LSTM's states."""
        query = self.begin(enc_hs_pad, dec_z)
        if att_prev_states is None:
            zeros = enc_hs_pad.new_zeros(len(enc_hs_pad), self.att_dim)
            att_prev_states = uniform(enc_hs_pad, enc_hs_len), (zeros, zeros)
        weights, states = att_prev_states
        responses = features(self.loc_conv, weights.view(len(enc_hs_pad), 1, enc_hs_pad.shape[1]))
        states = self.att_lstm(responses.relu().amax(-1), states)
        # The state is the same for all keys, so it is added to the query.
        out, weights = self.attend(self.mlp_dec(query) + states[0], enc_hs_len, scaling)
        return out, (weights, states)
