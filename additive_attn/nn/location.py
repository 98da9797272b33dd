"""Location-sensitive attention: a convolution of earlier weights inside the tanh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from additive_attn.nn.history import AttentionState, HistoryAttention
from additive_attn.nn.linear import bare_parameters
from additive_attn.ops.layer_checks import checked_number


class LocationSensitiveAttention(HistoryAttention):
    r"""Location-sensitive attention (Chorowski et al. 2015, arXiv:1506.07503): a key's score also
    depends on the weights that earlier steps gave to the keys around it.

    .. math::
        s_{tj} = \mathrm{scale} \cdot w^\top
            \tanh(W q_t + b_q + U k_j + b_k + M f_{tj}), \quad f_t = F * [a_{t-1}; \sum_{u<t} a_u]

    No step computes a tensor ``(B, Lk, hidden_dim)``.

    Args:
        query_dim, key_dim: features of queries and of keys.
        hidden_dim: features in which they are added.
        filters: of the convolution F.
        kernel_size: keys that a filter spans, an odd number.
        inputs: what is convolved: "previous", the last step's weights; "cumulative", the sum of
            all steps' weights; or both, in this order of channels.
        initial: the weights before the first step: "zeros", or "uniform" over the keys of each
            sequence.
        dropout: probability of dropping a weight, in training only.
        bias: whether the layers of queries, keys and energies have biases. The convolution and the
            layer of its features never have one, which would only add to those.
        scale: factor on the scores.
        batch_first: keys and values are (B, Lk, D) if True, (Lk, B, D) if False.
        device, dtype: of the parameters.

    Tacotron 2 has ``bias=False``; ESPnet's AttLoc ``filters=10, kernel_size=201,
    inputs=("previous",), initial="uniform", scale=2.0``, its AttCovLoc the same with
    ``inputs=("cumulative",)``.

    Parameters in the state_dict, beside those of :class:`AdditiveAttention`:
    ``location_conv.weight (filters, len(inputs), kernel_size)`` and ``location_layer.weight
    (hidden_dim, filters)``.

    Raises:
        TypeError: a dimension is not an integer.
        ValueError: a dimension is below 1, kernel_size is even, inputs or initial have other
            values, dropout is not a number in [0, 1], or scale is not a finite number.

    Example:
        >>> attention = LocationSensitiveAttention(20, 16, 32)
        >>> memory = attention.project(torch.randn(8, 9, 16), lengths=[9] * 8)
        >>> state = attention.initial_state(memory)
        >>> for query in torch.randn(5, 8, 20):
        ...     context, weights, state = attention.step(query, memory, state)
        >>> context.shape, weights.shape
        (torch.Size([8, 16]), torch.Size([8, 9]))
    """

    _term_layer = "location_layer"
    _usual: ClassVar[dict[str, Any]] = {
        **HistoryAttention._usual, "inputs": ("previous", "cumulative"), "initial": "zeros"
    }  # fmt: skip

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        filters: int = 32,
        kernel_size: int = 31,
        inputs: Sequence[str] = ("previous", "cumulative"),
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
        filters = checked_number("filters", filters, "filters")
        kernel_size = checked_number("kernel_size", kernel_size, "keys that a filter spans")
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size is {kernel_size}, but must be odd: a filter spans as many keys "
                "before a key as after it."
            )
        choices = ("previous", "cumulative"), ("previous",), ("cumulative",)
        if not isinstance(inputs, (tuple, list)) or tuple(inputs) not in choices:
            raise ValueError(
                f'inputs is {inputs!r:.60}, but must be ("previous", "cumulative"), '
                '("previous",) or ("cumulative",).'
            )
        self.inputs = tuple(inputs)
        self.location_conv = nn.Conv1d(
            len(inputs), filters, kernel_size, padding=kernel_size // 2, bias=False, **factory
        )
        self.location_layer = nn.Linear(filters, hidden_dim, bias=False, **factory)

    def _location(self, state: AttentionState) -> tuple[Tensor, Tensor | None]:
        inputs = torch.stack([getattr(state, name) for name in self.inputs], dim=-2)
        inputs = inputs.unsqueeze(0) if inputs.dim() == 2 else inputs
        conv: Any = self._modules["location_conv"]
        if _is_same_padded(conv):
            bare = bare_parameters(conv, nn.Conv1d)
            if bare is not None and bare[1] is None:
                return inputs.to(bare[0].dtype), bare[0]
        return conv(inputs.to(next(conv.parameters()).dtype)), None


def _is_same_padded(conv: Any) -> bool:
    """Whether ``conv`` is the convolution that the layer was constructed with."""
    return (
        type(conv) is nn.Conv1d
        and conv.padding == (conv.kernel_size[0] // 2,)
        and conv.stride == conv.dilation == (1,)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )
