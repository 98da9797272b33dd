"""Attention weights as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes

# Few enough that no screen or page shrinks the image again, which would lose thin lines.
MAX_PIXELS = 512
EMPTY_COLOR = "lightgrey"


def plot_attention(
    weights: Any,
    source_tokens: Sequence[str] | None = None,
    target_tokens: Sequence[str] | None = None,
    *,
    ax: Any = None,
    source_length: int | None = None,
    target_length: int | None = None,
    head: int | Literal["mean", "grid"] = "mean",
    style: Literal["matrix", "alignment"] = "matrix",
    cmap: str = "viridis",
    vmin: float = 0.0,
    vmax: float | None = None,
    colorbar: bool = True,
    max_ticks: int = 40,
    title: str | None = None,
) -> Axes | numpy.ndarray:
    """Draws attention weights as an image and returns the Axes, for the caller to change or save.

    A row that attends to nothing is grey. Where there are more weights than pixels, each pixel
    shows the largest weight of a block, because sharp alignments would vanish in a mean.

    Args:
        weights: ``(target, source)`` or ``(heads, target, source)``, leading dims of size 1
            allowed; a tensor of any device and dtype, or an array.
        source_tokens: labels of the keys. Default: numbers.
        target_tokens: labels of the queries. Default: numbers.
        ax: matplotlib Axes to draw into; an array of them, one per head, with ``head="grid"``.
            Default: a new figure.
        source_length: draw only the first keys, without the padding. Default: as many as there
            are source_tokens, else all.
        target_length: the same for the queries.
        head: of weights with heads, the mean over them, the one with this number, or all of them
            beside each other on one colour scale ("grid").
        style: "matrix" puts targets top to bottom and sources left to right; "alignment" puts
            targets left to right and sources bottom to top, as speech synthesis does.
        cmap: matplotlib colour map.
        vmin, vmax: range of the colours. Default: 0 to the largest weight.
        colorbar: whether to explain the colours.
        max_ticks: label at most so many positions of an axis.
        title: title of the Axes, or of the figure with ``head="grid"``.

    Returns:
        matplotlib Axes; with ``head="grid"`` a 1-D array of them, one per head.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: weights are no real numbers, or ax is no Axes.
        ValueError: shape, head, tokens or lengths do not fit the weights, or max_ticks is below 1.
    """
    plt = _import_pyplot()
    if max_ticks < 1:
        raise ValueError(f"max_ticks is {max_ticks}, but at least one position is labelled.")
    images = _select(weights, head)
    images = images[:, : _length("target", target_length, target_tokens, images.shape[1])]
    images = images[..., : _length("source", source_length, source_tokens, images.shape[2])]
    if style not in ("matrix", "alignment"):
        raise ValueError(f'style is {style!r}; it may be "matrix" or "alignment".')
    if vmax is None:
        finite = images[images.isfinite()]
        vmax = max(finite.max().item(), vmin) if finite.numel() else vmin + 1

    if ax is None:
        columns = math.ceil(math.sqrt(len(images)))
        rows = math.ceil(len(images) / columns)
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=_figure_size(images, style, rows, columns),
            layout="constrained",
            squeeze=False,
        )
        axes = grid.ravel()
        for unused in axes[len(images) :]:
            unused.remove()
        axes = axes[: len(images)]
    else:
        axes = _as_axes_array(ax, len(images))
        figure = axes[0].figure

    for number, (each, image) in enumerate(zip(axes, images, strict=True)):
        drawn = _draw(each, image, style, plt.get_cmap(cmap), vmin, vmax)
        on_target, on_source = ("x", "y") if style == "alignment" else ("y", "x")
        _label(each, on_source, "source", source_tokens, image.shape[1], max_ticks)
        _label(each, on_target, "target", target_tokens, image.shape[0], max_ticks)
        if head == "grid":
            each.set_title(f"head {number}")
    if title is not None:
        if head == "grid" and ax is None:
            figure.suptitle(title)
        else:
            axes[0].set_title(title)
    if colorbar:
        figure.colorbar(drawn, ax=list(axes), label="weight")
    return axes if head == "grid" else axes[0]


def _import_pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_attention draws with matplotlib, which is not installed. "
            "Install it with: pip install matplotlib"
        ) from error
    return plt


def _select(weights: Any, head: int | str) -> Tensor:
    """The chosen heads, ``(number, target, source)``."""
    try:
        weights = torch.as_tensor(weights).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"weights are a {type(weights).__name__}, but must be a tensor, or an array or list "
            "of numbers. The layer returns them second."
        ) from None
    if weights.is_complex() or weights.is_meta:
        found = weights.dtype if weights.is_complex() else "on meta, where there are no values"
        raise TypeError(f"weights are {found}, but real numbers are drawn. Pass those.")
    shape = tuple(weights.shape)
    while weights.dim() > 3 and weights.shape[0] == 1:
        weights = weights[0]
    if weights.dim() not in (2, 3) or 0 in weights.shape:
        raise ValueError(
            f"weights have the shape {shape}; (target, source) or (heads, target, source) can be "
            "drawn, without empty dims. Of a batch, choose one entry: weights[i]."
        )
    if weights.dim() == 2:
        weights = weights[None]
    weights = weights.float()
    if head == "grid":
        return weights
    if head == "mean":
        return weights.mean(dim=0, keepdim=True)
    # True is an int to Python, and more likely a wish for all heads than for the second.
    if type(head) is int and -len(weights) <= head < len(weights):
        return weights[head][None]
    raise ValueError(
        f'head is {head!r}; the weights have {len(weights)} heads, so it may be "mean", "grid" '
        f"or a number below {len(weights)}."
    )


def _length(name: str, length: int | None, tokens: Sequence[str] | None, available: int) -> int:
    if length is None:
        length = available if tokens is None else len(tokens)
    if not 0 < length <= available or (tokens is not None and len(tokens) < length):
        count = "no" if tokens is None else str(len(tokens))
        raise ValueError(
            f"The weights have {available} {name} positions, but {name}_length asks for {length} "
            f"and there are {count} {name}_tokens. Pass one token per drawn position."
        )
    return length


def _as_axes_array(ax: Any, count: int) -> Any:
    import numpy
    from matplotlib.axes import Axes

    axes = numpy.ravel(numpy.asarray(ax, dtype=object))
    if not all(isinstance(each, Axes) for each in axes):
        raise TypeError(
            f"ax is {ax!r}, but must be matplotlib Axes, as pyplot.subplots() returns them, or "
            'an array of them with head="grid".'
        )
    if len(axes) != count:
        raise ValueError(
            f"ax holds {len(axes)} Axes, but {count} images are to be drawn. Pass {count}, or "
            "leave ax out to get a new figure."
        )
    return axes


def _figure_size(images: Tensor, style: str, rows: int, columns: int) -> tuple[float, float]:
    height, width = images.shape[1:] if style == "matrix" else (images.shape[2], images.shape[1])
    limit = 8.0 if len(images) == 1 else 3.5

    def inches(cells: int) -> float:
        return min(max(0.3 * cells + 1.2, 2.5), limit)

    return columns * inches(width) + 1.0, rows * inches(height)


def _draw(ax: Any, image: Tensor, style: str, cmap: Any, vmin: float, vmax: float) -> Any:
    pixels, block_rows, block_columns = _shrink(image)
    blank = (pixels == 0).all(dim=1, keepdim=True)
    pixels = pixels.masked_fill(blank, torch.nan).cpu()
    # The last block may reach beyond the last position, so the extent goes by blocks and the
    # limits by positions.
    bottom, right = pixels.shape[0] * block_rows - 0.5, pixels.shape[1] * block_columns - 0.5
    limits = [(-0.5, image.shape[1] - 0.5), (image.shape[0] - 0.5, -0.5)]
    extent = (-0.5, right, bottom, -0.5)
    if style == "alignment":
        pixels = pixels.T
        limits = [(-0.5, image.shape[0] - 0.5), (-0.5, image.shape[1] - 0.5)]
        extent = (-0.5, bottom, -0.5, right)
    drawn = ax.imshow(
        pixels.numpy(),
        cmap=cmap.with_extremes(bad=EMPTY_COLOR),
        vmin=vmin,
        vmax=vmax,
        aspect="auto",
        interpolation="nearest",
        origin="lower" if style == "alignment" else "upper",
        extent=extent,
    )
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    return drawn


def _shrink(image: Tensor) -> tuple[Tensor, int, int]:
    """The image with at most MAX_PIXELS per side, and the size of the blocks it is made of."""
    rows, columns = (math.ceil(count / MAX_PIXELS) for count in image.shape)
    if rows == columns == 1:
        return image, 1, 1
    pooled = F.max_pool2d(image[None], (rows, columns), ceil_mode=True)[0]
    return pooled, rows, columns


def _label(
    ax: Any, axis: str, name: str, tokens: Sequence[str] | None, count: int, max_ticks: int
) -> None:
    from matplotlib.ticker import MaxNLocator

    if tokens is None:
        getattr(ax, f"{axis}axis").set_major_locator(MaxNLocator("auto", integer=True))
    else:
        step = math.ceil(count / max_ticks)
        # A dollar sign would start a formula.
        labels = [str(token).replace("$", r"\$") for token in tokens[:count:step]]
        positions = range(0, count, step)
        if axis == "y":
            ax.set_yticks(positions, labels=labels)
        else:
            upright = max(map(len, labels)) <= 2
            ax.set_xticks(positions, labels=labels, rotation=0 if upright else 90)
    getattr(ax, f"set_{axis}label")(name)
