"""Prints the csv rows of decoders as markdown tables."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.decoders.cases import Case
from benchmarks.rows import Row

SIZES = ("B", "Lk", "H", "Dv", "T")
COLUMNS = [
    *("device", "name", "threads", "isa", "torch", "additive_attn", "python", "commit", "date"),
    *("case", "what", "part", *SIZES, "mode", "provider"),
    *("cpu_ms", "q20_ms", "q80_ms", "wall_ms", "note"),
]


def line(case: Case, found: Iterable[Row]) -> str:
    """Times of a case, and what is asked of it."""
    times = {row["provider"]: row for row in found}
    parts = [
        f"{name} {row['note']}" if row.get("note")
        else f"{name} {row['cpu_ms']:.4g}/{row['wall_ms']:.4g} ms"
        for name, row in times.items()
    ]  # fmt: skip
    for bar in case.bars:
        if all(times.get(name, {}).get("cpu_ms") for name in (bar.ours, bar.other)):
            ratio = times[bar.other]["cpu_ms"] / times[bar.ours]["cpu_ms"]
            met = "met" if ratio >= bar.ratio else "MISSED"
            ours = "" if bar.ours == "fused" else f"{bar.ours} "
            parts.append(f"{ours}vs {bar.other} {ratio:.2f}x (bar {bar.ratio:g}x: {met})")
    return f"{case.name:<24} " + "; ".join(parts)
