"""Draws the shares of whole decoders' time, from csv rows: docs/figures/decoders.png.

python -m benchmarks.decoders.plot FILE.csv [--output FIGURE.png]
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.arguments import parser_of
from benchmarks.decoders.table import newest, read
from benchmarks.rows import Row, machine_line

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "decoders.png"
# Okabe and Ito's colours. The groups of a profile, by the name in the figure.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "attention": ("#D55E00", ("attention forward", "attention backward")),
    "projections": ("#E69F00", ("projections",)),
    "sums of gradients": ("#CC79A7", ("accumulation",)),
    "LSTM cells": ("#0072B2", ("cells",)),
    "autograd's engine, Python": ("#999999", ("engine",)),
}


def profiles(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by decoder, provider and group."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["group"] and row["part"] == "decoder" and row["case"].endswith("-decoder"):
            groups = found.setdefault(row["what"], {}).setdefault(row["provider"], {})
            groups[row["group"]] = float(row["self_ms"])
    return found


def draw(rows: list[Row], path: Path) -> bool:
    """Draws a bar for each provider of each decoder, as a share of the plain one's time."""
    found = profiles(rows)
    if not found:
        return False
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.75 * len(found)), layout="constrained")
    labels, place = [], 0.0
    for decoder, providers in found.items():
        longest = sum(providers["plain"].values())
        for provider, groups in providers.items():
            start = 0.0
            for colour, names in PARTS.values():
                width = 100 * sum(groups[name] for name in names) / longest
                axes.barh(place, width, left=start, color=colour, height=0.85)
                start += width
            first = provider == "plain"
            labels.append((place, f"{decoder}   {provider}" if first else provider))
            place += 1
        place += 0.6
    axes.set_yticks([y for y, _ in labels], labels=[text for _, text in labels], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step, forward + backward, in % of the plain decoder's")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    handles: list[Any] = [
        plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in PARTS.values()
    ]
    figure.legend(handles, list(PARTS), loc="outside upper center", ncols=5, frameon=False,
                  fontsize=9)  # fmt: skip
    figure.supxlabel(
        f"self times of the profiler, float32. {machine_line(rows[0])}", fontsize=7,
        color="#555555",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)
    return True


def main() -> None:
    parser = parser_of("benchmarks.decoders.plot", __doc__)
    parser.add_argument("file", nargs="?", type=Path, help="the newest run by default")
    parser.add_argument("--output", type=Path, default=FIGURE)
    args = parser.parse_args()
    path = args.file or newest()
    if not draw(read(path), args.output):
        raise SystemExit(
            f"{path} lacks profiles of decoders; python -m benchmarks.decoders --group decoders "
            "--split writes them."
        )
    print(f"drew {os.path.relpath(args.output)}")


if __name__ == "__main__":
    main()
