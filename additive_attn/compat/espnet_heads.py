"""ESPnet's attention with several heads, all in one call: AttMultiHeadAdd, AttMultiHeadLoc.

ESPnet has a Linear per head. Their weights are concatenated once per sequence. Where it costs
less, values are not projected: a step sums the memory itself, and one product maps the sums of all
heads to the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from additive_attn.compat._base import (
    Lease,
    affine,
    features,
    leases,
    masks,
    vector,
)
from additive_attn.compat.espnet import STATES, Cached, Lengths, convolution, uniform
from additive_attn.nn.linear import energy_of
from additive_attn.ops.compat_checks import explained
from additive_attn.ops.decoding import attend_step
from additive_attn.ops.memory import lend
from additive_attn.ops.products import lend_weight, multiply

Affine = tuple[Tensor, Tensor | None]


class _Heads(Cached):
    kept = ("h_length", "enc_h", "pre_compute_k", "pre_compute_v", "mask", "_stacked")
    _values: list[Tensor] | None = None
    _stacked: Any = None
    mlp_o: nn.Module

    def __init__(
        self, eprojs: int, dunits: int, aheads: int, att_dim_k: int, att_dim_v: int,
        *location: int, han_mode: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mlp_q, self.mlp_k, self.mlp_v = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.gvec = nn.ModuleList()
        if location:
            self.loc_conv, self.mlp_att = nn.ModuleList(), nn.ModuleList()
        for _ in range(aheads):
            self.mlp_q.append(nn.Linear(dunits, att_dim_k))
            self.mlp_k.append(nn.Linear(eprojs, att_dim_k, bias=False))
            self.mlp_v.append(nn.Linear(eprojs, att_dim_v, bias=False))
            self.gvec.append(nn.Linear(att_dim_k, 1))
            if location:
                self.loc_conv.append(convolution(*location))
                self.mlp_att.append(nn.Linear(location[0], att_dim_k, bias=False))
        self.mlp_o = nn.Linear(aheads * att_dim_v, eprojs, bias=False)
        self.dunits, self.eprojs, self.aheads = dunits, eprojs, aheads
        self.att_dim_k, self.att_dim_v = att_dim_k, att_dim_v
        self.scaling = 1.0 / math.sqrt(att_dim_k)
        self.han_mode = han_mode
        self.reset()

    @property
    def pre_compute_v(self) -> list[Tensor] | None:
        """Projected values, a list of heads: those of the steps, or else computed when read."""
        if self._values is not None or self.enc_h is None:
            return self._values
        return list(_projected(self.mlp_v, self.enc_h).unbind(-2))

    @pre_compute_v.setter
    def pre_compute_v(self, heads: list[Tensor] | None) -> None:
        self._values = heads

    def begin(self, enc_hs_pad: Tensor) -> tuple[Tensor, Tensor, list[Affine] | None]:
        """Returns keys ``(B, heads, Lk, n)`` and projected values like them; or, as values, the
        memory ``(B, 1, Lk, eprojs)`` with the Linears to apply to its sums: those of the heads,
        then the output's. ESPnet's attributes hold lists of heads."""
        if (
            self.pre_compute_k is None
            or (self._values is None and self.enc_h is None)
            or self.han_mode
        ):
            self.remember(enc_hs_pad)
            k = _projected(self.mlp_k, enc_hs_pad).transpose(1, 2)
            self.pre_compute_k: Any = list(k.unbind(1))
            self.pre_compute_v = None
            self._stacked = self.pre_compute_k, None, k, enc_hs_pad.unsqueeze(1)
        products = None
        if self._values is None:
            products = _affine([*self.mlp_v, self.mlp_o])
            biased = products is None or any(bias is not None for _, bias in products)
            if biased or self.eprojs > 2 * self.att_dim_v:
                self.pre_compute_v, products = self.pre_compute_v, None
        lists = self.pre_compute_k, self._values
        stacked = self._stacked
        if stacked is None or stacked[0] is not lists[0] or stacked[1] is not lists[1]:
            keys, values = lists
            k = stacked[2] if stacked and stacked[0] is keys else torch.stack(keys, dim=1)
            v = self.enc_h.unsqueeze(1) if values is None else torch.stack(values, dim=1)
            stacked = self._stacked = (*lists, k, v)
        return stacked[2], stacked[3], products

    def attend(
        self, enc_hs_pad: Tensor, enc_hs_len: Lengths, dec_z: Tensor | None, scaling: float,
        inputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        key, value, products = self.begin(enc_hs_pad)
        query, padding = self.start(enc_hs_pad, dec_z), self.ignored(enc_hs_len)
        energies, queries = _affine(self.gvec), _affine(self.mlp_q)
        dense = term = None
        if inputs is not None:
            if len(inputs) != len(self.loc_conv):
                raise ValueError(
                    f"{type(self).__name__}.forward got att_prev of {len(inputs)} heads, but "
                    f"needs the weights of {len(self.loc_conv)}: a list of (B, Lk)."
                )
            dense = _affine(self.mlp_att)
            term = torch.stack(
                [features(f, x.unsqueeze(1)) for f, x in zip(self.loc_conv, inputs, strict=True)],
                dim=1,
            )  # (B, heads, F, Lk)
        owned = energies is not None
        if term is not None and dense is None:
            # Tools have changed these modules: they are called.
            rows = zip(self.mlp_att, term.mT.unbind(1), strict=True)
            key, term, owned = key + torch.stack([m(x) for m, x in rows], dim=1), None, False

        def build() -> Lease:
            pairs = energies or [energy_of(x, key.shape[-1], key) for x in self.gvec]
            lengths, attn_mask = masks(key, padding)
            query_weight, query_bias = (None, None) if queries is None else _beside(queries)
            lent = lend(
                key, value, torch.stack([vector(*x) for x in pairs]),
                lengths=None if lengths is None else lengths.unsqueeze(1),
                attn_mask=None if attn_mask is None else attn_mask.unsqueeze(1),
                scale=float(scaling), query_weight=query_weight, query_bias=query_bias,
            )  # fmt: skip
            weights = None if dense is None else torch.stack([x[0].t() for x in dense])
            return Lease(
                lent, weights, output=None if products is None else lend_weight(_product(products))
            )

        if owned:
            used = [x for pair in (*(energies or ()), *(queries or ())) for x in pair]
            used += [x[0] for x in (*(dense or ()), *(products or ()))]
            lease = leases(self).get((key, value, padding), used, scaling, build)
        else:
            lease = build()
        if queries is None:
            query = torch.stack([x(query) for x in self.mlp_q], dim=1)
        out, weights = attend_step(
            lease.lent, query, location=term,
            location_weight=None if term is None else lease.location_weight,
        )  # fmt: skip
        out = out.flatten(1)
        context = self.mlp_o(out) if lease.output is None else multiply(lease.output, out)
        return context, list(weights.unbind(1))


class AttMultiHeadAdd(_Heads):
    """Content only."""

    @explained()
    def __init__(
        self,
        eprojs: int,
        dunits: int,
        aheads: int,
        att_dim_k: int,
        att_dim_v: int,
        han_mode: bool = False,
    ) -> None:
        super().__init__(eprojs, dunits, aheads, att_dim_k, att_dim_v, han_mode=han_mode)

    @explained(**STATES)
    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Lengths,
        dec_z: Tensor | None,
        att_prev: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns context ``(B, eprojs)`` and a list of weights ``(B, Lk)``, one for each head;
        att_prev is not read."""
        return self.attend(enc_hs_pad, enc_hs_len, dec_z, self.scaling)


class AttMultiHeadLoc(_Heads):
    """Each head has filters over its last weights."""

    @explained()
    def __init__(
        self,
        eprojs: int,
        dunits: int,
        aheads: int,
        att_dim_k: int,
        att_dim_v: int,
        aconv_chans: int,
        aconv_filts: int,
        han_mode: bool = False,
    ) -> None:
        sizes = eprojs, dunits, aheads, att_dim_k, att_dim_v, aconv_chans, aconv_filts
        super().__init__(*sizes, han_mode=han_mode)

    @explained(**STATES, att_prev="a list of (B, Lk) or None")
    def forward(
        self,
        enc_hs_pad: Tensor,
        enc_hs_len: Lengths,
        dec_z: Tensor | None,
        att_prev: list[Tensor] | None,
        scaling: float = 2.0,
        **kwargs: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns context ``(B, eprojs)`` and a list of weights ``(B, Lk)``, one for each head."""
        if att_prev is None:
            att_prev = [uniform(enc_hs_pad, enc_hs_len)] * self.aheads
        return self.attend(enc_hs_pad, enc_hs_len, dec_z, scaling, att_prev)


def _affine(modules: Iterable[nn.Module]) -> list[Affine] | None:
    """Returns weights and biases of Linears; None unless all of them are bare."""
    found = [affine(x) for x in modules]
    bare = [x for x in found if x is not None]
    return bare if len(bare) == len(found) else None


def _beside(pairs: list[Affine]) -> tuple[Tensor, Tensor | None]:
    """Joins a Linear per head to one for all heads."""
    biases = [x for _, x in pairs if x is not None]
    return torch.cat([x for x, _ in pairs]), torch.cat(biases) if biases else None


def _projected(modules: nn.ModuleList, x: Tensor) -> Tensor:
    """Returns ``(..., heads, n)``, by one Linear per head."""
    pairs = _affine(modules)
    if pairs is None:
        return torch.stack([module(x) for module in modules], dim=-2)
    return linear(x, *_beside(pairs)).unflatten(-1, (len(pairs), -1))


def _product(pairs: list[Affine]) -> Tensor:
    """Returns ``(out, heads * in)``: a Linear per head times the Linear after them."""
    *heads, after = (weight for weight, _ in pairs)
    outputs = after.unflatten(1, (len(heads), -1)).transpose(0, 1)
    return torch.bmm(outputs, torch.stack(heads)).transpose(0, 1).flatten(1)
