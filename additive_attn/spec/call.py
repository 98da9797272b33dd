"""One call of the operators: its inputs, masking and options, in the order of the schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What is attended with and to; leading dims broadcast."""

    query: Tensor  # (..., Lq, H)
    key: Tensor  # (..., Lk, H)
    value: Tensor  # (..., Lk, Dv)
    weight: Tensor  # (..., H)


class Masking(NamedTuple):
    """Which keys a row may attend to; ``spec.masks`` says what each part means."""

    attn_mask: Tensor | None = None  # (..., Lq, Lk), bool or float
    lengths: Tensor | None = None  # (..., Lq or 1), int64
    left: int = -1
    right: int = -1


class Options(NamedTuple):
    """Dropout, with the seed that numbers its random words, and the factor on the scores."""

    seed: Tensor | None = None  # (...), int64
    dropout_p: float = 0.0
    scale: float = 1.0


class Call(NamedTuple):
    """All arguments that forward and backward share."""

    inputs: Inputs
    masking: Masking
    options: Options

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> Call:
        """From the flat arguments of an operator."""
        return Call(Inputs(*arguments[:4]), Masking(*arguments[4:8]), Options(*arguments[8:11]))

    def flat(self) -> tuple[Any, ...]:
        """As the flat arguments of an operator."""
        return (*self.inputs, *self.masking, *self.options)

    def batch(self) -> torch.Size:
        """The batch dims that all arguments broadcast to."""
        query, key, value, weight = self.inputs
        shapes = [query.shape[:-2], key.shape[:-2], value.shape[:-2], weight.shape[:-1]]
        if self.masking.attn_mask is not None:
            shapes.append(self.masking.attn_mask.shape[:-2])
        if self.masking.lengths is not None:
            shapes.append(self.masking.lengths.shape[:-1])
        if self.options.seed is not None:
            shapes.append(self.options.seed.shape)
        batch: torch.Size = torch.broadcast_shapes(*shapes)
        return batch


class Upstream(NamedTuple):
    """Gradients of the outputs; None counts as zeros."""

    out: Tensor | None = None
    weights: Tensor | None = None
    lse: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients backward computes; it returns an empty tensor for the others."""

    query: bool = True
    key: bool = True
    value: bool = True
    weight: bool = True
    mask: bool = True


def backward_arguments(arguments: tuple[Any, ...]) -> tuple[Upstream, Call, Tensor, Needs]:
    """Upstream gradients, the call, its lse and the gradients needed, from the flat arguments."""
    call = Call.of(arguments[3:14])
    return Upstream(*arguments[:3]), call, arguments[14], Needs(*arguments[15:])


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores are accumulated, and the log-sum-exp is returned, in this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
