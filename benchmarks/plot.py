"""Draws figures from csv rows, beside the csv.

python -m benchmarks.plot [FILE.csv ...]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.results import DOT_PRODUCT, FUSED, PLAIN, Measurement, chosen_files, machine, read

# Okabe and Ito's colours, distinguishable with every kind of colour vision.
STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"color": "#D55E00", "marker": "s"},
    "compile matmul": {"color": "#E69F00", "marker": "^"},
    "compile sum": {"color": "#CC79A7", "marker": "v"},
    FUSED: {"color": "#0072B2", "marker": "o", "linewidth": 2.5},
    DOT_PRODUCT: {"color": "#999999", "marker": "d", "linestyle": "--"},
}
LABELS = {
    PLAIN: "plain PyTorch",
    "compile matmul": "torch.compile, matmul",
    "compile sum": "torch.compile, sum",
    FUSED: "additive_attn",
    DOT_PRODUCT: "dot-product attention",
}
MODES = {"forward": "forward", "full": "forward + backward"}


def needed_bytes(note: str) -> float | None:
    match = re.search(r"needs ([\d.]+) GB", note)
    return float(match[1]) * 1e9 if match else None


def draw_series(axes: Any, series: list[Measurement], quantity: str) -> None:
    """One curve per provider over the length; crosses where memory does not suffice: with
    ``bytes`` at what would be needed, with ``milliseconds`` on the upper edge."""
    for provider, style in STYLES.items():
        points = [(each.shape[1], getattr(each, quantity)(provider)) for each in series]
        known = [(length, value) for length, value in points if value]
        if known:
            axes.plot(*zip(*known, strict=True), label=LABELS[provider], markersize=5, **style)
        for each in series:
            needed = needed_bytes(each.note(provider))
            if needed is None:
                continue
            on_edge = quantity == "milliseconds"
            axes.plot(
                each.shape[1],
                1.0 if on_edge else needed,
                "x",
                color=style["color"],
                markersize=8,
                markeredgewidth=2,
                clip_on=False,
                transform=axes.get_xaxis_transform() if on_edge else axes.transData,
            )
    lengths = sorted({each.shape[1] for each in series})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, labels=[str(length) for length in lengths])
    axes.grid(alpha=0.3)


def draw_scaling(measurements: list[Measurement], path: Path) -> None:
    scaling = [each for each in measurements if each.suite == "scaling"]
    scaling = [each for each in scaling if each.dtype == scaling[0].dtype]
    modes = [mode for mode in MODES if any(each.mode == mode for each in scaling)]
    if not modes:
        return
    figure, axes = plt.subplots(
        2, len(modes), figsize=(5.5 * len(modes), 8), layout="constrained", squeeze=False
    )
    for column, mode in enumerate(modes):
        series = [each for each in scaling if each.mode == mode]
        time, memory = axes[:, column]
        draw_series(time, series, "milliseconds")
        draw_series(memory, series, "bytes")
        time.set_title(MODES[mode], pad=14)
        time.set_ylabel("milliseconds")
        memory.set_ylabel("extra memory, bytes")
        memory.set_xlabel("length L = Lq = Lk")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    cross = plt.Line2D([], [], color="black", marker="x", linestyle="", markeredgewidth=2)
    figure.legend(
        [*handles, cross],
        [*labels, "does not fit into memory"],
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    batch, _, _, hidden, value_dim = scaling[0].shape
    figure.supxlabel(
        f"B = {batch}, H = {hidden}, Dv = {value_dim}, {scaling[0].dtype}. {machine(scaling)}",
        fontsize=8,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_speedups(measurements: list[Measurement], path: Path) -> None:
    """How many times faster than the fastest plain form that could run."""
    bars: list[tuple[str, float, str]] = []
    for each in measurements:
        fused = each.milliseconds(FUSED)
        plain = [each.milliseconds(PLAIN), each.compiled_milliseconds()]
        possible = [time for time in plain if time is not None]
        if fused is None or not possible:
            continue
        label = f"{each.shape} {each.options} {each.dtype if each.dtype != 'float32' else ''}"
        bars.append((" ".join(label.split()), min(possible) / fused, each.mode))
    labels = list(dict.fromkeys(label for label, _, _ in bars))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.36 * len(labels)), layout="constrained")
    colors = {"forward": "#56B4E9", "full": "#0072B2"}
    for mode, offset in (("forward", -0.2), ("full", 0.2)):
        chosen = [(labels.index(label) + offset, value) for label, value, m in bars if m == mode]
        if not chosen:
            continue
        positions, values = zip(*chosen, strict=True)
        drawn = axes.barh(
            positions,
            [value - 1 for value in values],
            left=1,
            height=0.38,
            color=colors[mode],
            label=MODES[mode],
        )
        axes.bar_label(drawn, [f"{value:.3g}x" for value in values], padding=3, fontsize=7)
    axes.set_yticks(range(len(labels)), labels=labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    axes.margins(x=0.12)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_title(
        "additive_attn against the faster of plain PyTorch and torch.compile", fontsize=10
    )
    axes.set_xlabel(f"times faster\n{machine(measurements)}", fontsize=8)
    axes.set_ylabel("(B, Lq, Lk, H, Dv)", fontsize=8)
    axes.legend(loc="best", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    for path in chosen_files(parser.parse_args().files):
        measurements = read(path)
        draw_scaling(measurements, path.with_name(f"{path.stem}_scaling.png"))
        draw_speedups(measurements, path.with_name(f"{path.stem}_speedups.png"))
        print(f"drew {path.parent}/{path.stem}_*.png")


if __name__ == "__main__":
    main()
