"""Reads the csv rows back: what tables and figures are made from, and nothing else."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PLAIN = "plain"
COMPILED = ("compile matmul", "compile sum")
FUSED = "fused"
DOT_PRODUCT = "dot product"


@dataclass(frozen=True)
class Measurement:
    """One problem in one mode, with the csv row of every provider."""

    suite: str
    shape: tuple[int, int, int, int, int]
    options: str
    dtype: str
    mode: str
    rows: dict[str, dict[str, str]]

    def milliseconds(self, provider: str) -> float | None:
        value = self.rows.get(provider, {}).get("median_ms")
        return float(value) if value else None

    def compiled_milliseconds(self) -> float | None:
        """The faster of the two spellings."""
        times = [time for name in COMPILED if (time := self.milliseconds(name)) is not None]
        return min(times, default=None)

    def bytes(self, provider: str) -> int | None:
        value = self.rows.get(provider, {}).get("peak_extra_bytes")
        return int(value) if value else None

    def note(self, provider: str) -> str:
        return self.rows.get(provider, {}).get("note", "")


def read(path: Path) -> list[Measurement]:
    measurements: dict[tuple[object, ...], Measurement] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            sizes = [int(row[name]) for name in ("B", "Lq", "Lk", "H", "Dv")]
            shape = (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4])
            key = (row["suite"], shape, row["options"], row["dtype"], row["mode"])
            if key not in measurements:
                measurements[key] = Measurement(*key, rows={})
            measurements[key].rows[row["provider"]] = row
    if not measurements:
        raise SystemExit(f"{path} has no measurements; python -m benchmarks.run writes them.")
    return list(measurements.values())


def machine(measurements: list[Measurement]) -> str:
    """One line on where and with what the rows were measured."""
    row = next(iter(measurements[0].rows.values()))
    threads = f"{row['threads']} threads, " if row["device"] == "cpu" else ""
    return (
        f"{row['name']} ({threads}{row['isa']}), torch {row['torch']}, "
        f"additive_attn {row['additive_attn']}, Python {row['python']}, {row['date'][:10]}"
    )


def chosen_files(paths: list[Path]) -> Iterator[Path]:
    """The named csv files, or every full run that is stored."""
    folder = Path(__file__).with_name("results")
    yield from paths or sorted(folder.glob("*/speed.csv"))
