"""Draws attention weights."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from additive_attn.ops.checks import warn_user
from additive_attn.ops.plot_checks import (
    as_number,
    check_labels,
    checked_colors,
    checked_length,
    checked_limit,
    checked_weights,
)

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes

# Few enough that no screen or page scales the image down again, which would lose thin lines.
MAX_PIXELS = 512
EMPTY_COLOR = "lightgrey"
NAN_COLOR = (0.84, 0.15, 0.16, 1.0)  # red
UNDRAWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls and halves of surrogates
LONGEST = 20  # characters of a token
SMALL, USUAL = 7.0, 9.0  # points of a font
LABEL_INCHES = 1.1 * SMALL / 72  # height of a small label
CHARACTER_INCHES = 0.62 * USUAL / 72


def plot_attention(
    weights: Any,
    source_tokens: Sequence[Any] | None = None,
    target_tokens: Sequence[Any] | None = None,
    *,
    ax: Any = None,
    source_length: int | None = None,
    target_length: int | None = None,
    batch: int | None = None,
    head: int | Literal["mean", "grid"] | None = None,
    style: Literal["matrix", "alignment"] = "matrix",
    cmap: str = "viridis",
    vmin: float = 0.0,
    vmax: float | Literal["robust"] | None = None,
    colorbar: bool = True,
    max_ticks: int = 40,
    title: str | None = None,
) -> Axes | numpy.ndarray:
    """Draws attention weights as an image and returns the Axes, for the caller to change or save.

    A row that attends to nothing is grey, NaN is red. A pixel that stands for several weights
    shows the largest, because sharp alignments would vanish in a mean.

    Args:
        weights: ``(target, source)``, ``(batch, target, source)`` with ``batch`` given,
            ``(heads, target, source)`` with ``head`` given, or ``(batch, heads, target,
            source)``; a tensor of any device and dtype, or an array. Dims of size 1 need no
            choice. Also the list of the weights ``(source,)`` or ``(batch, source)`` that
            decoder steps returned.
        source_tokens: labels of the keys, one for each that is drawn. Default: numbers.
        target_tokens: labels of the queries. Default: numbers.
        ax: matplotlib Axes to draw into; an array of them, one per head, with ``head="grid"``.
            Default: a new figure.
        source_length: draw only the first keys, without the padding. Default: all.
        target_length: the same for the queries.
        batch: which sequence of the batch to draw.
        head: the number of one head, "mean" over the heads, or "grid": all of them side by side
            on one colour scale.
        style: "matrix" puts targets top to bottom and sources left to right; "alignment" puts
            targets left to right and sources bottom to top, as is usual in speech synthesis.
        cmap: matplotlib colour map.
        vmin, vmax: range of the colours. Default: 0 to the largest weight; with vmax="robust" to
            the weight that nine of ten rows do not exceed, so that outliers do not darken the
            others.
        colorbar: whether to explain the colours.
        max_ticks: label at most so many positions of an axis, and no more than fit.
        title: title of the Axes, or of the figure with ``head="grid"``.

    Returns:
        matplotlib Axes; with ``head="grid"`` a 1-D array of them, one per head.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: weights are not real numbers, or ax is not Axes.
        ValueError: another argument does not fit the weights, or does not allow such a value.
    """
    plt = _import_pyplot()
    batch, head, max_ticks = map(as_number, (batch, head, max_ticks))
    check_labels(
        style, max_ticks, title, colorbar, source_tokens=source_tokens, target_tokens=target_tokens
    )
    vmin, colors = checked_limit("vmin", vmin), checked_colors(plt, cmap)
    images = _select(checked_weights(weights), batch, head)
    images = images[:, : _length("target", target_length, target_tokens, images.shape[1])]
    images = images[..., : _length("source", source_length, source_tokens, images.shape[2])]
    labels = _Labels(target_tokens, source_tokens, title, style, max_ticks)
    largest = top = _top(images, vmin, 1.0)
    if isinstance(vmax, str) and vmax == "robust":
        top = _top(images, vmin, 0.9)
    elif vmax is not None:
        top = checked_limit("vmax", vmax, vmin)
    axes, panel = _axes(plt, ax, images, labels)
    for each, image in zip(axes, images, strict=True):
        drawn = _draw(each, image, style, colors, vmin, top)
    labels.write(axes, images, panel, is_grid=head == "grid", is_own=ax is None)
    if colorbar:
        below = ((images < vmin) & (images != -torch.inf)).any()
        extend = ("neither", "max", "min", "both")[(largest > top) + 2 * int(below)]
        axes[0].figure.colorbar(drawn, ax=list(axes), label="weight", extend=extend, aspect=30)
    return axes if head == "grid" else axes[0]


class _Labels:
    """Tokens and titles, in characters that an installed font has."""

    def __init__(
        self,
        target_tokens: Sequence[Any] | None,
        source_tokens: Sequence[Any] | None,
        title: str | None,
        style: str,
        max_ticks: int,
    ) -> None:
        self.max_ticks = max_ticks
        # The names of the x axis and the y axis.
        self.names = ("target", "source") if style == "alignment" else ("source", "target")
        texts = {"target": _texts(target_tokens), "source": _texts(source_tokens)}
        shown = "".join([*texts["target"], *texts["source"], title or ""])
        self.family, missing = _families(frozenset(shown))
        if missing:
            listed = " ".join(sorted(missing)[:10])
            warn_user(
                f"plot_attention draws boxes for {_count(len(missing), 'character')} that no "
                f"installed font has: {listed}. Install a font with them (on Debian and Ubuntu: "
                "fonts-noto-cjk for Chinese, Japanese and Korean, fonts-noto-core for other "
                "scripts, fonts-symbola for emoji) and remove matplotlib's list of fonts, "
                "fontlist-*.json in matplotlib.get_cachedir().",
            )
        boxes = dict.fromkeys(map(ord, missing), "□")
        self.texts = {name: [each.translate(boxes) for each in texts[name]] for name in texts}
        self.title = title and title.translate(boxes)

    def width(self, name: str) -> float:
        """Returns the inches that the longest token needs."""
        return CHARACTER_INCHES * max(map(_width, self.texts[name]), default=0)

    def write(
        self, axes: Any, images: Tensor, panel: list[float], is_grid: bool, is_own: bool
    ) -> None:
        for number, (each, image) in enumerate(zip(axes, images, strict=True)):
            shown = [True, True]
            if is_own:  # only the left and the lowest panels of a grid
                place = each.get_subplotspec()
                columns = place.get_gridspec().ncols
                shown = [number + columns >= len(axes), place.is_first_col()]
            for axis, name, is_shown, inches in zip("xy", self.names, shown, panel, strict=True):
                count = image.shape[0 if name == "target" else 1]
                self._ticks(each, axis, self.texts[name][:count], count, inches, is_shown)
                if is_shown:
                    each.set(**{f"{axis}label": name})
            if is_grid:
                prefix = f"{self.title}: " if self.title and not is_own else ""
                each.set_title(f"{prefix}head {number}", fontsize=USUAL, family=self.family)
        if self.title and not is_grid:
            axes[0].set_title(self.title, family=self.family)
        elif self.title and is_own:
            axes[0].figure.suptitle(self.title, family=self.family)

    def _ticks(
        self, ax: Any, axis: str, texts: list[str], count: int, inches: float, is_shown: bool
    ) -> None:
        """Labels as many positions as fit on the axis."""
        from matplotlib.ticker import MaxNLocator

        ticks = ax.xaxis if axis == "x" else ax.yaxis
        if not texts:
            ticks.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
            ticks.set_tick_params(labelsize=USUAL, labelbottom=is_shown, labelleft=is_shown)
            return
        step = math.ceil(count / min(self.max_ticks, max(1, int(inches / LABEL_INCHES))))
        pitch = inches * step / count
        lying = axis == "y" or (max(map(_width, texts)) + 1) * CHARACTER_INCHES <= pitch
        ticks.set_ticks(
            range(0, count, step) if is_shown else [],
            # A dollar sign would start a formula.
            labels=[text.replace("$", r"\$") for text in texts[::step]] if is_shown else [],
            rotation=0 if lying else 90,
            fontsize=USUAL if pitch >= 1.5 * USUAL / 72 else SMALL,
            family=self.family,
        )


def _import_pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_attention draws with matplotlib, which is not installed. "
            "Install it with: pip install matplotlib"
        ) from error
    return plt


def _select(weights: Tensor, batch: int | None, head: int | str | None) -> Tensor:
    """Returns the chosen images, ``(number, target, source)``."""
    shape = tuple(weights.shape)
    if weights.dim() < 2 or 0 in shape or any(size > 1 for size in shape[:-4]):
        raise ValueError(
            f"weights have the shape {shape}; (target, source), with dims of a batch and of heads "
            "before them, can be drawn, without empty dims. If there are more dims, choose one "
            "entry: weights[i]."
        )
    weights = weights.reshape(shape[-4:])
    if len(shape) == 3 and shape[0] > 1 and (batch is None) == (head is None):
        raise ValueError(
            f"weights have the shape {shape}. Say what the first dim is: batch=0 draws the first "
            'sequence of (batch, target, source), as the layer returns them, and head="mean", '
            'head="grid" or head=0 draw (heads, target, source).'
        )
    while weights.dim() < 4:
        # Where an entry of a batch is chosen, the missing dim is that of the heads.
        weights = weights.unsqueeze(1 if weights.dim() == 3 and batch is not None else 0)
    entries, heads = weights.shape[:2]
    if batch is None and entries == 1:
        batch = 0
    # True is an int in Python, and more likely means all entries than the second.
    if type(batch) is not int or not -entries <= batch < entries:
        raise ValueError(
            f"batch is {batch!r}; the weights {shape} hold {_count(entries, 'sequence')}. Draw "
            f"one of them: a number below {entries}."
        )
    images = weights[batch]
    if head == "grid":
        return images
    if head == "mean" or (head is None and heads == 1):
        return images.mean(dim=0, keepdim=True)
    if type(head) is int and -heads <= head < heads:
        return images[head][None]
    raise ValueError(
        f"head is {head!r}; the weights have {_count(heads, 'head')}, so it may be "
        f'"mean", "grid" or a number below {heads}.'
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _length(name: str, length: int | None, tokens: Sequence[Any] | None, available: int) -> int:
    length = checked_length(f"{name}_length", length)
    given = available if tokens is None else len(tokens)
    positions = _count(available, f"{name} position")
    if length is None and given != available:
        raise ValueError(
            f"The weights have {positions}, but there are {given} {name}_tokens. Pass one token "
            f"per position, or {name}_length to leave out padding."
        )
    length = available if length is None else length
    if not 0 < length <= available or given < length:
        count = "no" if tokens is None else str(given)
        raise ValueError(
            f"The weights have {positions}, but {name}_length asks for {length} and there are "
            f"{count} {name}_tokens. Draw at least one position, at most all, and pass no tokens, "
            "or one for each."
        )
    return length


def _texts(tokens: Sequence[Any] | None) -> list[str]:
    """Returns tokens as text: numbers of tensors, without line breaks, and not too long."""
    if tokens is None:
        return []
    numbers = (math.prod(getattr(token, "shape", (0,))) == 1 for token in tokens)
    texts = [str(x.item() if one else x) for x, one in zip(tokens, numbers, strict=True)]
    texts = [UNDRAWN.sub(lambda x: ascii(x[0])[1:-1], text) for text in texts]
    return [f"{text[: LONGEST - 1]}…" if len(text) > LONGEST else text for text in texts]


def _top(images: Tensor, vmin: float, part: float) -> float:
    """Returns the weight that ``part`` of the rows do not exceed: for 1, the largest of all."""
    maxima = images.nan_to_num(nan=vmin, posinf=vmin).amax(dim=-1).flatten()
    maxima = maxima[maxima > vmin].sort().values
    return maxima[int(part * (len(maxima) - 1))].item() if len(maxima) else vmin + 1


def _axes(plt: Any, ax: Any, images: Tensor, labels: _Labels) -> tuple[Any, list[float]]:
    """Returns an array of Axes, one per image, and width and height of a panel in inches."""
    import numpy

    if ax is None:
        return _new_figure(plt, images, labels)
    axes = numpy.ravel(numpy.asarray(ax, dtype=object))
    if not all(isinstance(each, plt.Axes) for each in axes):
        raise TypeError(
            f"ax is {ax!r}, but must be matplotlib Axes, as pyplot.subplots() returns them, or "
            'an array of them with head="grid".'
        )
    number = len(images)
    if len(axes) != number:
        raise ValueError(
            f"ax holds {len(axes)} Axes, but {_count(number, 'image')} are to be drawn. Pass "
            f"{number}, or leave ax out to get a new figure."
        )
    box = axes[0].get_window_extent()
    return axes, [box.width / axes[0].figure.dpi, box.height / axes[0].figure.dpi]


def _new_figure(plt: Any, images: Tensor, labels: _Labels) -> tuple[Any, list[float]]:
    """Creates a figure whose panels have the proportions of the weights, and room for labels."""
    number = len(images)
    columns = math.ceil(math.sqrt(number))
    # A grid without empty panels, if one is nearly as wide as high.
    columns = next((n for n in range(columns, 2 * columns) if number % n == 0), columns)
    rows = math.ceil(number / columns)
    cells = {"target": images.shape[1], "source": images.shape[2]}
    limit = 8.0 if number == 1 else 4.4
    pitch = min(0.3, limit / max(cells.values()))
    panel = [min(max(cells[name] * pitch, limit / 4, 1.2), limit) for name in labels.names]
    width = columns * panel[0] + labels.width(labels.names[1]) + 1.5
    height = rows * (panel[1] + 0.3) + labels.width(labels.names[0]) + 0.7
    figure = plt.figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = grid.ravel()
    for unused in axes[number:]:
        unused.remove()
    return axes[:number], panel


def _draw(ax: Any, image: Tensor, style: str, cmap: Any, vmin: float, vmax: float) -> Any:
    """Pools the image to at most MAX_PIXELS per side and draws that."""
    block_rows, block_columns = (math.ceil(count / MAX_PIXELS) for count in image.shape)
    pixels = F.max_pool2d(image[None], (block_rows, block_columns), ceil_mode=True)[0]
    blank = (pixels == 0).all(dim=1, keepdim=True)
    missing = pixels.isnan() | (pixels == torch.inf)
    pixels = pixels.masked_fill(blank, torch.nan).cpu()
    # The last block may reach beyond the last position, so the extent counts blocks and the limits
    # count positions.
    bottom, right = pixels.shape[0] * block_rows - 0.5, pixels.shape[1] * block_columns - 0.5
    limits = [(-0.5, image.shape[1] - 0.5), (image.shape[0] - 0.5, -0.5)]
    extent = (-0.5, right, bottom, -0.5)
    if style == "alignment":
        pixels, missing = pixels.T, missing.T
        limits = [(-0.5, image.shape[0] - 0.5), (-0.5, image.shape[1] - 0.5)]
        extent = (-0.5, bottom, -0.5, right)
    place = {
        "aspect": "auto",
        "interpolation": "nearest",
        "origin": "lower" if style == "alignment" else "upper",
        "extent": extent,
    }
    colors = cmap.with_extremes(bad=EMPTY_COLOR)
    drawn = ax.imshow(pixels.numpy(), cmap=colors, vmin=vmin, vmax=vmax, **place)
    if missing.any():
        red = torch.tensor(NAN_COLOR) * missing.cpu()[..., None]
        ax.imshow(red.numpy(), **place)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    return drawn


def _width(text: str) -> int:
    """Returns the width in characters, of which East Asian ones count twice."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


@functools.cache
def _families(characters: frozenset[str]) -> tuple[list[str], set[str]]:
    """Returns the default fonts, those installed for characters that they lack, and the characters
    that all fonts lack."""
    from matplotlib import font_manager

    def known(path: str) -> set[str]:
        try:
            return set(map(chr, font_manager.get_font(path).get_charmap()))
        except (OSError, RuntimeError):  # a font that matplotlib cannot read
            return set()

    families = list(font_manager.FontProperties().get_family())
    missing = {each for each in characters if each.isprintable() and not each.isspace()}
    for family in families:
        missing -= known(font_manager.findfont(font_manager.FontProperties(family=[family])))
    for font in font_manager.fontManager.ttflist:
        # The former draws boxes for all characters. Matplotlib cannot draw the latter.
        if not missing or "Last Resort" in font.name or "Color" in font.name:
            continue
        found = missing & known(font.fname) if font.style == "normal" else set()
        if found:
            families.append(font.name)
            missing -= found
    return families, missing
