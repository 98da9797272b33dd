"""Checks of what is passed to plot_attention."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from additive_attn.ops.checks import is_dense, refuse_flags, refuse_layouts


def checked_weights(weights: Any) -> Tensor:
    """Returns weights as a float tensor, those of decoder steps stacked."""
    try:
        if type(weights).__module__ == "numpy" and weights.ndim:
            # torch raises for negative strides or other byte orders, warns of read-only memory.
            weights = weights.astype(weights.dtype.newbyteorder("="), order="C")
        if isinstance(weights, list | tuple) and getattr(weights[0], "ndim", False):
            steps = [torch.as_tensor(step).detach().cpu() for step in weights]
            # The steps of one sequence, (target, source), or of a batch, (batch, target, source).
            weights = torch.stack(steps, dim=-2 if steps[0].dim() > 1 else 0)
        weights = torch.as_tensor(weights).detach()
    except (TypeError, ValueError, RuntimeError, IndexError):
        raise TypeError(
            f"weights are a {type(weights).__name__}, but must be a tensor, an array or list of "
            "numbers, or a list of tensors of one shape, one per decoder step. The layer returns "
            "them second."
        ) from None
    if weights.is_complex() or weights.is_quantized or weights.is_meta:
        found = "on meta, where there are no values" if weights.is_meta else weights.dtype
        raise TypeError(f"weights are {found}, but real numbers are drawn. Pass those.")
    if not is_dense(weights):
        refuse_layouts(weights=weights)
    return weights.float()


def check_labels(style: Any, max_ticks: Any, title: Any, colorbar: Any, **tokens: Any) -> None:
    if style not in ("matrix", "alignment"):
        raise ValueError(f'style is {style!r:.60}; it may be "matrix" or "alignment".')
    if isinstance(max_ticks, bool) or not isinstance(max_ticks, int) or max_ticks < 1:
        raise ValueError(
            f"max_ticks is {max_ticks!r:.60}, but must be an integer; at least one position is "
            "labelled."
        )
    if title is not None and not isinstance(title, str):
        raise TypeError(
            f"title is {title!r:.60}, but must be a text or None. Convert it with str()."
        )
    if not isinstance(colorbar, bool):
        refuse_flags(colorbar=colorbar)
    for name, each in tokens.items():
        listed = hasattr(each, "__len__") and hasattr(each, "__getitem__")
        if each is not None and not (
            listed and getattr(each, "ndim", 1) == 1 and not isinstance(each, dict)
        ):
            raise TypeError(
                f"{name} are {each!r:.60}, but must be a list with a label for each position, or "
                "None."
            )


def as_number(given: Any) -> Any:
    """Returns a NumPy integer, or a tensor of one integer, as an int; all else is unchanged."""
    if isinstance(given, bool):
        return given
    try:
        return operator.index(given)
    except (TypeError, ValueError, RuntimeError):
        return given


def checked_length(name: str, length: Any) -> int | None:
    """Returns an integer, or a tensor or array of one, as an int; None stays None."""
    try:
        return None if length is None else operator.index(length)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} is {length!r:.60}, but must be an integer, the number of positions to draw, "
            "or None."
        ) from None


def checked_limit(name: str, limit: Any, lower: float = -math.inf) -> float:
    try:
        if isinstance(limit, str | bool | bytes):
            raise TypeError
        number = float(limit)
    except (TypeError, ValueError, RuntimeError):
        other = ', "robust" or None' if name == "vmax" else ""
        raise TypeError(
            f"{name} is {limit!r:.60}, but the range of the colours needs a number{other}."
        ) from None
    if not lower < number < math.inf:
        above = "" if lower == -math.inf else f" above vmin, which is {lower}"
        raise ValueError(
            f"{name} is {limit!r:.60}, but the range of the colours needs a finite number{above}."
        )
    return number


def checked_colors(plt: Any, cmap: Any) -> Any:
    try:
        return plt.get_cmap(cmap)
    except (TypeError, ValueError):
        raise ValueError(
            f"cmap is {cmap!r:.60}, but must be a colour map of matplotlib, or the name of one: "
            "matplotlib.colormaps lists them."
        ) from None
