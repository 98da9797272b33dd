"""Prints csv rows as a markdown table.

python -m benchmarks.table [FILE.csv ...] [--suites steps,layers]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.results import (
    DOT_PRODUCT,
    FUSED,
    PLAIN,
    Measurement,
    chosen_files,
    machine,
    read,
)

HEADER = [
    "(B, Lq, Lk, H, Dv)",
    "mode",
    "plain",
    "torch.compile",
    "fused",
    "vs plain",
    "vs compile",
    "memory plain",
    "memory fused",
    "dot product",
]


def duration(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    unit, factor = "µs", 1e3
    if milliseconds >= 1e3:
        unit, factor = "s", 1e-3
    elif milliseconds >= 1:
        unit, factor = "ms", 1
    number = milliseconds * factor
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def ratio(slow: float | None, fast: float | None) -> str:
    return "-" if slow is None or fast is None else f"{slow / fast:.3g}x"


def cells(measurement: Measurement, several_dtypes: bool) -> list[str]:
    plain, fused = measurement.milliseconds(PLAIN), measurement.milliseconds(FUSED)
    compiled = measurement.compiled_milliseconds()
    shape = f"{measurement.shape} {measurement.options}".rstrip()
    if several_dtypes:
        shape += f" {measurement.dtype}"
    return [
        shape,
        measurement.mode,
        measurement.note(PLAIN) or duration(plain),
        measurement.note("compile matmul") if compiled is None else duration(compiled),
        f"**{duration(fused)}**",
        ratio(plain, fused),
        ratio(compiled, fused),
        size(measurement.bytes(PLAIN)),
        size(measurement.bytes(FUSED)),
        duration(measurement.milliseconds(DOT_PRODUCT)),
    ]


def markdown(measurements: list[Measurement]) -> str:
    several_dtypes = len({measurement.dtype for measurement in measurements}) > 1
    rows = [HEADER, ["---", "---", *["---:"] * (len(HEADER) - 2)]]
    rows += [cells(measurement, several_dtypes) for measurement in measurements]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--suites", help="only these, separated by commas")
    arguments = parser.parse_args()
    for path in chosen_files(arguments.files):
        measurements = read(path)
        print(f"\n{machine(measurements)}\n")
        if arguments.suites is not None:
            suites = arguments.suites.split(",")
            measurements = [each for each in measurements if each.suite in suites]
        print(markdown(measurements))


if __name__ == "__main__":
    main()
