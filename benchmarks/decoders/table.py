"""Prints the csv rows of decoders as markdown tables.

python -m benchmarks.decoders.table FILE.csv --group decoders
python -m benchmarks.decoders.table FILE.csv --group layers --bars
python -m benchmarks.decoders.table FILE.csv --group calls hoisting
python -m benchmarks.decoders.table FILE.csv --split
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser_of
from benchmarks.decoders.cases import CASES, COMPILED, Case
from benchmarks.decoders.split import GROUPS
from benchmarks.rows import LOCAL, Row, machine_line
from benchmarks.table import duration, markdown, ratio

SIZES = ("B", "Lk", "H", "Dv", "T")
COLUMNS = [
    *("device", "name", "threads", "isa", "torch", "additive_attn", "python", "commit", "date"),
    *("case", "what", "part", *SIZES, "mode", "provider", "group"),
    *("cpu_ms", "q20_ms", "q80_ms", "wall_ms", "self_ms"),
]
LOOPS = ("layers", "decoders", "codebases")  # groups
LOCAL_DECODERS = LOCAL / "decoders"
Times = dict[str, dict[str, Row]]  # by case and provider


def line(case: Case, found: Iterable[Row]) -> str:
    """Returns the times of a case, and whether they meet its bars."""
    times = {row["provider"]: row for row in found if not row.get("group")}
    parts = [
        f"{name} {float(row['cpu_ms']):.4g} ms ({float(row['wall_ms']):.4g} by the clock)"
        for name, row in times.items()
    ]  # fmt: skip
    for bar in case.bars:
        reached = reached_by(times, bar.other, bar.ours)
        if reached is not None:
            met = "met" if reached >= bar.ratio else "MISSED"
            ours = "" if bar.ours == "fused" else f"{bar.ours} "
            parts.append(f"{ours}vs {bar.other} {reached:.2f}x (bar {bar.ratio:g}x: {met})")
    return f"{case.name:<24} " + "; ".join(parts)


def milliseconds(times: dict[str, Row], provider: str) -> float | None:
    text = times.get(provider, {}).get("cpu_ms")
    return float(text) if text else None


def reached_by(times: dict[str, Row], other: str, ours: str) -> float | None:
    slow, fast = milliseconds(times, other), milliseconds(times, ours)
    return slow / fast if slow and fast else None


def read(path: Path) -> list[Row]:
    try:
        with path.open(newline="") as file:
            rows: list[Row] = [row for row in csv.DictReader(file) if row["case"] in CASES]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} does not hold rows of benchmarks.decoders: {error!r}") from None
    if not rows:
        raise SystemExit(
            f"{path} has no known cases; python -m benchmarks.decoders --split writes them."
        )
    return rows


def times_of(rows: Iterable[Row]) -> Times:
    times: Times = {}
    for row in rows:
        if not row["group"]:
            times.setdefault(row["case"], {})[row["provider"]] = row
    return times


def sizes(row: Row) -> str:
    return f"({', '.join(row[name] for name in SIZES)})"


def loops_table(times: Times, with_bars: bool) -> list[list[str]]:
    header = ["what", "(B, Lk, H, Dv, T)", "part", "mode", "plain", "torch.compile", "fused"]
    header += ["vs plain", "vs compile"] + ["bars"] * with_bars
    table = [header]
    for name, providers in times.items():
        row = next(iter(providers.values()))
        plain, compiled = (milliseconds(providers, each) for each in ("plain", COMPILED))
        for ours in providers:
            if not ours.startswith("fused"):
                continue
            fused = milliseconds(providers, ours)
            what = row["what"] + ours.removeprefix("fused")
            cells = [what, sizes(row), row["part"], "forward + backward", duration(plain)]
            cells += [duration(compiled), f"**{duration(fused)}**"]
            cells += [ratio(plain, fused), ratio(compiled, fused)]
            if with_bars:
                asked = [bar for bar in CASES[name].bars if bar.ours == ours]
                cells.append(", ".join(f"{bar.ratio:g}x" for bar in asked))
            table.append(cells)
    return table


def calls_table(times: Times, with_bars: bool) -> list[list[str]]:
    header = ["what", "(B, Lk, H, Dv, T)", "compared with", "mode", "its time", "ours", "ratio"]
    table = [header + ["bar"] * with_bars]
    for name, providers in times.items():
        for bar in CASES[name].bars:
            row = next(iter(providers.values()))
            other, ours = (milliseconds(providers, each) for each in (bar.other, bar.ours))
            what = row["what"]
            if bar.ours != "fused":
                what += f": {bar.ours.removeprefix('fused, ')}"
            mode = "forward" if row["mode"] == "forward" else "forward + backward"
            cells = [what, sizes(row), bar.other, mode, duration(other), f"**{duration(ours)}**"]
            table.append([*cells, ratio(other, ours), *[f"{bar.ratio:g}x"] * with_bars])
    return table


def split_table(rows: Iterable[Row]) -> list[list[str]]:
    """Makes a table of self times, in per cent of the provider's own sum."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    about: dict[str, Row] = {}
    for row in rows:
        if row["group"]:
            about[row["case"]] = row
            groups = found.setdefault((row["case"], row["provider"]), {})
            groups[row["group"]] = float(row["self_ms"])
    table = [["what", "part", "provider", "mode", *GROUPS, "sum"]]
    for (case, provider), groups in found.items():
        total = sum(groups.values())
        cells = [f"{100 * groups[name] / total:.0f}%" for name in GROUPS]
        row = about[case]
        table.append(
            [row["what"], row["part"], provider, "forward + backward", *cells, duration(total)]
        )
    return table


def show(path: Path, groups: list[str], with_bars: bool, split: bool) -> None:
    rows = read(path)
    print(f"\n{os.path.relpath(path)}\n{machine_line(rows[0])}\n")
    if split:
        print(markdown(split_table(row for row in rows if CASES[row["case"]].group in groups)))
        return
    for name in groups:
        times = times_of(row for row in rows if CASES[row["case"]].group == name)
        if times:
            make: Any = loops_table if name in LOOPS else calls_table
            print(markdown(make(times, with_bars)) + "\n")


def newest() -> Path:
    found = [each for each in LOCAL_DECODERS.glob("*.csv") if not each.match("*.part.csv")]
    if not found:
        raise SystemExit("Nothing was measured here yet: python -m benchmarks.decoders does.")
    return max(found, key=lambda path: path.stat().st_mtime)


def main() -> None:
    parser = parser_of("benchmarks.decoders.table", __doc__)
    parser.add_argument("file", nargs="?", type=Path, help="the newest run by default")
    groups = sorted({case.group for case in CASES.values()})
    parser.add_argument("--group", nargs="+", choices=groups, default=groups)
    parser.add_argument("--bars", action="store_true", help="with what is asked of each case")
    parser.add_argument("--split", action="store_true", help="where the time goes")
    args = parser.parse_args()
    show(args.file or newest(), args.group, args.bars, args.split)


if __name__ == "__main__":
    main()
