"""Prints csv rows as a markdown table.

python -m benchmarks.table                            the newest run of this checkout
python -m benchmarks.table FILE.csv --suites speed,masks
python -m benchmarks.table AVX512.csv AVX2.csv --side-by-side
python -m benchmarks.table FILE.csv --dtype float32
python -m benchmarks.table FILE.csv --slower          where plain PyTorch or torch.compile wins
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from benchmarks.arguments import parser_of
from benchmarks.rows import DOT_PRODUCT, PLAIN, Measurement, chosen_files, measured_on, read

MODES = {"forward": "forward", "full": "forward + backward"}
NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "baseline": "SSE2"}


def duration(milliseconds: float | None, spread: tuple[float, float] | None = None) -> str:
    if milliseconds is None:
        return "-"
    unit, factor = "µs", 1e3
    if milliseconds >= 1e3:
        unit, factor = "s", 1e-3
    elif milliseconds >= 1:
        unit, factor = "ms", 1
    times = [factor * each for each in (milliseconds, *(spread or ()))]
    median, *limits = (f"{each:.0f}" if each >= 100 else f"{each:.3g}" for each in times)
    return f"{median} {unit} ({' to '.join(limits)})" if limits else f"{median} {unit}"


def size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def ratio(slow: float | None, fast: float | None) -> str:
    return "-" if slow is None or fast is None else f"{slow / fast:.3g}x"


def time(measurement: Measurement, provider: str, spread: bool) -> str:
    """The median, with its 20 % and 80 % quantiles where they are asked for, or why there is
    none."""
    low, high = (measurement.value(name, provider) for name in ("q20_ms", "q80_ms"))
    limits = (low, high) if spread and low is not None and high is not None else None
    return measurement.note(provider) or duration(measurement.milliseconds(provider), limits)


def problem(measurement: Measurement) -> list[str]:
    shape = f"{measurement.shape} {measurement.options}".rstrip()
    if measurement.dtype != "float32":
        shape += f" {measurement.dtype}"
    return [measurement.what, shape, MODES[measurement.mode]]


def long_table(measurements: Iterable[Measurement], ours: str, spread: bool) -> list[list[str]]:
    header = ["what", "(B, Lq, Lk, H, Dv)", "mode", "plain", "torch.compile", ours]
    header += ["vs plain", "vs compile", "memory plain", f"memory {ours}", "dot product"]
    rows = [header]
    for each in measurements:
        plain, compiled, fused = map(each.milliseconds, (PLAIN, each.compiled, ours))
        cells = [time(each, provider, spread) for provider in (PLAIN, each.compiled, ours)]
        cells[-1] = cells[-1] if spread else f"**{cells[-1]}**"
        cells += [ratio(plain, fused), ratio(compiled, fused)]
        cells += [size(each.bytes(PLAIN)), size(each.bytes(ours)), time(each, DOT_PRODUCT, spread)]
        rows.append([*problem(each), *cells])
    return rows


def side_by_side(runs: list[list[Measurement]]) -> list[list[str]]:
    """Our time in every run, and how many times longer the others took in the same run."""
    header = ["what", "(B, Lq, Lk, H, Dv)", "mode"]
    for run in runs:
        row = next(iter(run[0].rows.values()))
        name = NAMES.get(row["isa"], row["isa"]) if row["device"] == "cpu" else row["name"]
        header += [f"{name} {run[0].ours}", "plain", "torch.compile", "dot product"]
    rows = [header]
    known = [{each.key: each for each in run} for run in runs]
    for each in runs[0]:
        cells = problem(each)
        for cases in known:
            found = cases.get(each.key)
            if found is None:
                cells += ["-"] * 4
                continue
            fused = found.milliseconds(found.ours)
            others = map(found.milliseconds, (PLAIN, found.compiled, DOT_PRODUCT))
            cells += [f"**{duration(fused)}**", *(ratio(other, fused) for other in others)]
        rows.append(cells)
    return rows


def loses(measurement: Measurement) -> bool:
    """Whether plain PyTorch or torch.compile takes less time than ours."""
    ours = measurement.milliseconds(measurement.ours)
    others = map(measurement.milliseconds, (PLAIN, measurement.compiled))
    return ours is not None and any(other is not None and other < ours for other in others)


def markdown(rows: list[list[str]]) -> str:
    """Aligned, so that it can be read as it is."""
    empty = [index for index, cells in enumerate(zip(*rows[1:], strict=True)) if not any(cells)]
    rows = [[cell for index, cell in enumerate(row) if index not in empty] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = rows[0].index("mode") + 1  # then come numbers
    rule = ["-" * n if index < text else "-" * (n - 1) + ":" for index, n in enumerate(widths)]
    lines = [
        [cell.ljust(n) if i < text else cell.rjust(n) for i, (cell, n) in enumerate(pairs)]
        for pairs in (zip(row, widths, strict=True) for row in [rows[0], rule, *rows[1:]])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(
    paths: list[Path],
    suites: list[str] | None = None,
    beside: bool = False,
    spread: bool = False,
    dtype: str | None = None,
    slower: bool = False,
) -> None:
    runs = []
    for path in paths:
        run = read(path)
        print(f"\n{os.path.relpath(path)}\n{measured_on(run)}\n")
        run = [each for each in run if suites is None or each.suite in suites]
        run = [each for each in run if dtype in (None, each.dtype)]
        run = [each for each in run if loses(each)] if slower else run
        if not run:
            wanted = [*(suites or []), *filter(None, [dtype, "slower" * slower])]
            raise SystemExit(f"{path} has no rows of {', '.join(wanted)}.")
        runs.append(run)
        if not beside:
            print(markdown(long_table(run, run[0].ours, spread)))
    if beside:
        print(markdown(side_by_side(runs)))


def main() -> None:
    parser = parser_of("benchmarks.table", __doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--suites", help="only these, separated by commas")
    parser.add_argument("--dtype", help="only this one")
    parser.add_argument("--slower", action="store_true", help="only where another one is faster")
    parser.add_argument("--side-by-side", action="store_true", help="several runs in one table")
    parser.add_argument("--spread", action="store_true", help="with 20 %% and 80 %% quantiles")
    args = parser.parse_args()
    suites = None if args.suites is None else args.suites.split(",")
    files = list(chosen_files(args.files))
    show(files, suites, args.side_by_side, args.spread, args.dtype, args.slower)


if __name__ == "__main__":
    main()
