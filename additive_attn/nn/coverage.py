"""Coverage attention, and its loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from additive_attn.nn.history import AttentionState, HistoryAttention
from additive_attn.nn.linear import bare_parameters
from additive_attn.ops.layer_checks import check_coverage


class CoverageAttention(HistoryAttention):
    r"""Attention with coverage (See et al. 2017, arXiv:1704.04368): a key's score also depends on
    the sum of the weights that earlier steps gave to it.

    .. math::
        s_{tj} = \mathrm{scale} \cdot w^\top \tanh(W q_t + b_q + U k_j + b_k + c_{tj} m), \quad
        c_{tj} = \sum_{u<t} a_{uj}

    No step computes a tensor ``(B, Lk, hidden_dim)``.

    Args:
        query_dim, key_dim: features of queries and of keys.
        hidden_dim: features in which they are added.
        initial: the coverage before the first step: "zeros", or "uniform" over the keys of each
            sequence, as in ESPnet's AttCov.
        dropout: probability of dropping a weight, in training only.
        bias: whether the layers of queries, keys and energies have biases. The layer of the
            coverage never has one, which would only add to those.
        scale: factor on the scores.
        batch_first: keys and values are (B, Lk, D) if True, (Lk, B, D) if False.
        device, dtype: of the parameters.

    Parameters in the state_dict, beside those of :class:`AdditiveAttention`:
    ``coverage_layer.weight (hidden_dim, 1)``.

    Raises:
        TypeError: a dimension is not an integer.
        ValueError: a dimension is below 1, initial is another string, dropout is not a number in
            [0, 1], or scale is not a finite number.

    Example:
        >>> attention = CoverageAttention(20, 16, 32)
        >>> memory = attention.project(torch.randn(8, 9, 16), lengths=[9] * 8)
        >>> state, loss = attention.initial_state(memory), torch.zeros(8)
        >>> for query in torch.randn(5, 8, 20):
        ...     context, weights, new = attention.step(query, memory, state)
        ...     loss, state = loss + coverage_loss(weights, state.cumulative), new
        >>> loss.shape
        torch.Size([8])
    """

    _term_layer = "coverage_layer"
    _usual: ClassVar[dict[str, Any]] = {**HistoryAttention._usual, "initial": "zeros"}

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        initial: str = "zeros",
        dropout: float = 0.0,
        bias: bool = True,
        scale: float = 1.0,
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Arguments are described in the docstring of the class."""
        factory: Any = {"device": device, "dtype": dtype}
        super().__init__(
            query_dim, key_dim, hidden_dim, dropout, bias, False, scale, batch_first, factory,
            initial=initial,
        )  # fmt: skip
        self.coverage_layer = nn.Linear(1, hidden_dim, bias=False, **factory)

    def _location(self, state: AttentionState) -> tuple[Tensor, Tensor | None]:
        coverage = state.cumulative
        return coverage.unsqueeze(-2) if coverage.dim() == 2 else coverage[None, None], None

    def _with_term(self, key: Tensor, state: AttentionState) -> Tensor | None:
        bare = bare_parameters(self._modules["coverage_layer"])
        if bare is None or bare[1] is not None or bare[0].dtype != key.dtype:
            return None
        coverage = state.cumulative.unsqueeze(-1)
        if torch.is_grad_enabled():  # its backward takes less time
            return key + linear(coverage, bare[0])
        return torch.addcmul(key, coverage, bare[0].t())


def coverage_loss(weights: Tensor, coverage: Tensor) -> Tensor:
    """The coverage loss of one step (See et al. 2017, equation 12): attention to what has been
    attended to already, ``sum_j min(weights_j, coverage_j)``.

    Args:
        weights: of the step, ``(B, Lk)``, or with any leading dims.
        coverage: the sum of the weights of the steps before it, of the same shape:
            ``state.cumulative`` of the state that was passed to the step.

    Returns:
        ``(B,)``, one loss per sequence, not reduced: take the mean over the steps of each
        sequence, then over the sequences. Padding and empty rows add 0.

    Raises:
        TypeError: they are not float tensors.
        ValueError: the shapes differ.
        RuntimeError: they are on different devices.
    """
    check_coverage(weights, coverage)
    return torch.minimum(weights, coverage).sum(-1)
