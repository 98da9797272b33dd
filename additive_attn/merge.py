"""Merges attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from additive_attn.ops.merge_checks import check_merge


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Combines attention over disjoint sets of keys (chunks, devices) into attention over their
    union.

    .. math::
        \mathrm{lse} = \log \sum_n e^{\mathrm{lse}_n}, \quad \mathrm{out} = \sum_n
        e^{\mathrm{lse}_n - \mathrm{lse}} \mathrm{out}_n

    Args:
        outs: tensors ``(..., Lq, Dv)``, one per set of keys, from calls without dropout or each
            with its own.
        lses: their log-sum-exps ``(..., Lq)``, from ``need_lse=True``. A set that a row may not
            attend to has ``-inf``. Shares are exact to the spacing of lse: in float32 2e-6 at 20,
            1e-3 at 1e4. Where all keys of a row, in all sets, are masked with a finite value
            (spacing 64 at -1e9), the number of keys is lost and the sets weigh the same: mask with
            bool, -inf or lengths.

    Returns:
        out ``(..., Lq, Dv)`` in the dtype of ``outs`` and lse ``(..., Lq)``, differentiable. A row
        that is empty in every set stays 0 and ``-inf``.

    Raises:
        TypeError: they are not sequences of floating tensors, or their dtypes do not fit.
        ValueError: the sequences are empty, differ in length, or their shapes do not fit.
        RuntimeError: tensors are on different devices.
    """
    check_merge(outs, lses)
    stacked = torch.stack(tuple(lses))
    # Rows that are empty everywhere are merged as zeros, so that no NaN enters their gradient, and
    # then cleared.
    occupied = (stacked != -torch.inf).any(dim=0)
    shares = torch.softmax(torch.where(occupied, stacked, 0.0), dim=0)
    lse = torch.where(occupied, torch.where(occupied, stacked, 0.0).logsumexp(dim=0), -torch.inf)
    merged = (shares[..., None] * torch.stack(tuple(outs))).sum(dim=0)
    return torch.where(occupied[..., None], merged, 0.0).to(outs[0].dtype), lse
