"""Draws time and memory over the length from csv rows, to a file beside the csv.

python -m benchmarks.plot [FILE.csv ...]          the newest run of this checkout
python -m benchmarks.plot FILE.csv --figure scaling   docs/figures/scaling.png, for the README
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from benchmarks.arguments import parser_of
from benchmarks.cases import square
from benchmarks.rows import (
    COMPILED,
    DOT_PRODUCT,
    FUSED,
    PLAIN,
    PYTORCH_PATH,
    Measurement,
    chosen_files,
    measured_on,
    read,
)
from benchmarks.table import duration, size

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"

# Okabe and Ito's colours, distinguishable with every kind of colour vision.
STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"label": "plain PyTorch", "color": "#D55E00", "marker": "s"},
    # The faster of both spellings.
    COMPILED[0]: {"label": "torch.compile", "color": "#E69F00", "marker": "^"},
    PYTORCH_PATH: {"label": "additive_attn, no kernel", "color": "#56B4E9", "marker": "P"},
    FUSED: {"label": "additive_attn", "color": "#0072B2", "marker": "o", "linewidth": 2.5},
    DOT_PRODUCT: {"label": "dot-product attention", "color": "#777777", "marker": "d", "ls": "--"},
}


def needed_bytes(note: str) -> float | None:
    match = re.search(r"needs ([\d.]+) GB", note)
    return float(match[1]) * 1e9 if match else None


def scaling_of(measurements: list[Measurement]) -> list[Measurement]:
    """The squares of the scaling series, in order of their length."""
    found = {}
    for each in measurements:
        if each.shape == square(each.shape[1]).shape and not each.options:
            found[each.shape[1], each.dtype, each.mode] = each
    return [found[key] for key in sorted(found)]


def draw_series(axes: Any, series: list[Measurement], column: str) -> None:
    """Draws one curve per provider over the length. Crosses mark where memory does not suffice: in
    bytes at what would be needed, in milliseconds on the upper edge."""
    on_edge = column == "median_ms"
    for provider, style in STYLES.items():
        points, crosses = [], []
        for each in series:
            name = each.compiled if provider == COMPILED[0] else provider
            value, needed = each.value(column, name), needed_bytes(each.note(name))
            if value:
                points.append((each.shape[1], value))
            if needed is not None:
                crosses.append((each.shape[1], 1.0 if on_edge else needed))
        if points:
            axes.plot(*zip(*points, strict=True), markersize=5, **style)
        if crosses:
            transform = axes.get_xaxis_transform() if on_edge else axes.transData
            mark = {"marker": "x", "ls": "", "color": style["color"], "clip_on": False}
            axes.plot(*zip(*crosses, strict=True), **mark, markeredgewidth=2, transform=transform)
    lengths = sorted({each.shape[1] for each in series})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, labels=[str(length) for length in lengths])
    unit = duration if on_edge else size
    axes.yaxis.set_major_formatter(lambda value, _: unit(value).replace(".0 ", " "))
    axes.grid(alpha=0.3)


def draw_scaling(measurements: list[Measurement], path: Path) -> bool:
    """Time and memory of forward and backward beside each other, on white, which suits
    light and dark pages."""
    series = [each for each in scaling_of(measurements) if each.mode == "full"]
    series = [each for each in series if each.dtype == series[0].dtype]
    if len(series) < 2:
        return False
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    draw_series(time, series, "median_ms")
    draw_series(memory, series, "peak_extra_bytes")
    time.set_title("time, forward + backward", fontsize=11, pad=10)
    memory.set_title("extra memory", fontsize=11, pad=10)
    for axes in (time, memory):
        axes.set_xlabel("length L (queries = keys)")
    handles, labels = time.get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="black", marker="x", ls="", markeredgewidth=2))
    labels.append("does not fit into memory")
    place: dict[str, Any] = {"loc": "outside upper center", "ncols": 5, "columnspacing": 1.4}
    figure.legend(handles, labels, frameon=False, fontsize=9, **place)
    batch, _, _, hidden, value_dim = series[0].shape
    sizes = f"B = {batch}, H = {hidden}, Dv = {value_dim}, {series[0].dtype}"
    figure.supxlabel(f"{sizes}. {measured_on(series)}", fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)
    return True


def main() -> None:
    parser = parser_of("benchmarks.plot", __doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--figure", metavar="NAME", help="write docs/figures/NAME.png")
    args = parser.parse_args()
    for path in chosen_files(args.files):
        figure = FIGURES / f"{args.figure}.png" if args.figure else path.with_suffix(".png")
        if draw_scaling(read(path), figure):
            print(f"drew {os.path.relpath(figure)}")
        else:
            print(
                f"no {figure.name}: {os.path.relpath(path)} lacks forward and backward of at "
                "least two lengths, as --suite scaling measures them"
            )


if __name__ == "__main__":
    main()
