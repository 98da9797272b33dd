"""One call of the operators: its inputs, masking and options, in the order of the schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """Queries, keys, values and the energy's weight; leading dims broadcast."""

    query: Tensor  # (..., Lq, H)
    key: Tensor  # (..., Lk, H)
    value: Tensor  # (..., Lk, Dv)
    weight: Tensor  # (..., H)


class Masking(NamedTuple):
    """Which keys a row may attend to; ``spec.masks`` defines each part."""

    attn_mask: Tensor | None = None  # (..., Lq, Lk), bool or float
    lengths: Tensor | None = None  # (..., Lq or 1), int64: ends of the rows' keys
    starts: Tensor | None = None  # the same shape: first keys
    block_table: Tensor | None = None  # (..., Lq / rows, Lk / keys) rounded up, int32
    block_tiles: Tensor | None = None  # (tiles, rows, keys), bool: its shape is a block's
    left: int = -1
    right: int = -1


class Options(NamedTuple):
    """Dropout, with the seed of its random words, and the factor on the scores."""

    seed: Tensor | None = None  # (...), int64
    dropout_p: float = 0.0
    scale: float = 1.0


class Call(NamedTuple):
    """All arguments that forward and backward share, as the flat tuple that the operators take:
    building one tuple costs less than three."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    attn_mask: Tensor | None = None
    lengths: Tensor | None = None
    starts: Tensor | None = None
    block_table: Tensor | None = None
    block_tiles: Tensor | None = None
    left: int = -1
    right: int = -1
    seed: Tensor | None = None
    dropout_p: float = 0.0
    scale: float = 1.0

    @property
    def inputs(self) -> Inputs:
        return Inputs(*self[:4])

    @property
    def masking(self) -> Masking:
        return Masking(*self[4:11])

    @property
    def options(self) -> Options:
        return Options(*self[11:])

    def batch(self) -> torch.Size:
        """The batch dims that all arguments broadcast to."""
        ranks = (2, 2, 2, 1, 2, 1, 1, 2, 3, 0, 0, 0)
        shapes = [
            x.shape[: max(x.dim() - rank, 0)]
            for x, rank in zip(self[:12], ranks, strict=True)
            if isinstance(x, Tensor)
        ]
        batch: torch.Size = torch.broadcast_shapes(*shapes)
        return batch


class Upstream(NamedTuple):
    """Gradients of the outputs; None counts as zeros."""

    out: Tensor | None = None
    weights: Tensor | None = None
    lse: Tensor | None = None

    def named(self) -> dict[str, Tensor | None]:
        """Returns the gradients by the operators' names of them."""
        return {f"grad_{name}": x for name, x in self._asdict().items()}


class Needs(NamedTuple):
    """Which gradients backward computes; it returns an empty tensor for the others."""

    query: bool = True
    key: bool = True
    value: bool = True
    weight: bool = True
    mask: bool = True


class Tangents(NamedTuple):
    """Tangents of the inputs and of a float mask, in their shapes or over the whole batch; None
    counts as zeros."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    weight: Tensor | None = None
    mask: Tensor | None = None


class TangentCall(NamedTuple):
    """One call of ``tangent``, which returns tangents of the outputs of ``forward`` and of the
    gradients that ``backward`` returns. ``scores_tangent`` has the scores in place of the outputs.
    """

    upstream: tuple[Tensor | None, ...]
    call: Call
    upstream_tangents: tuple[Tensor | None, ...]
    tangents: Tangents
    need_outputs: tuple[bool, ...]
    needs: Needs

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> TangentCall:
        """Returns a call from the flat arguments of ``tangent``."""
        end = 3 + len(Call._fields) + 1
        rest = arguments[end:]
        return cls(
            Upstream(*arguments[:3]), Call(*arguments[3 : end - 1]), Upstream(*rest[:3]),
            Tangents(*rest[3:8]), rest[8:11], Needs(*rest[11:]),
        )  # fmt: skip

    @classmethod
    def of_scores(cls, arguments: tuple[Any, ...]) -> TangentCall:
        """Returns a call from the flat arguments of ``scores_tangent``."""
        end = 1 + len(Call._fields) - 3
        query, key, weight, mask = arguments[end + 1 : end + 5]
        need_query, need_key, need_weight, need_mask = arguments[end + 6 :]
        return cls(
            arguments[:1], call_of_scores(*arguments[1:end]), arguments[end : end + 1],
            Tangents(query, key, None, weight, mask), arguments[end + 5 : end + 6],
            Needs(need_query, need_key, False, need_weight, need_mask),
        )  # fmt: skip


def backward_arguments(arguments: tuple[Any, ...]) -> tuple[Upstream, Call, Tensor, Needs]:
    """Returns upstream gradients, the call, its lse and the gradients needed, from the flat
    arguments of ``backward``."""
    call = Call(*arguments[3:17])
    return Upstream(*arguments[:3]), call, arguments[17], Needs(*arguments[18:])


def call_of_scores(query: Tensor, key: Tensor, weight: Tensor, *rest: Any) -> Call:
    """Returns a call with these scores, from the flat arguments of ``scores``. Its values have no
    features."""
    masking = Masking(*rest[:7])
    return Call(query, key, key[..., :0], weight, *masking, scale=rest[7])


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which scores are accumulated and the log-sum-exp is returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32
