"""Writes csv rows, finds them and reads them back. Tables and figures are made from them
alone."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import additive_attn
from additive_attn.ops import dispatch
from benchmarks.cases import name_of

RESULTS = Path(__file__).with_name("results")
LOCAL = RESULTS / "local"  # ignored by git

PLAIN = "plain"
COMPILED = ("compile matmul", "compile sum")
FUSED = "fused"
PYTORCH_PATH = "pytorch path"
DOT_PRODUCT = "dot product"


SIZES = ("B", "Lq", "Lk", "H", "Dv")
COLUMNS = [
    *("device", "name", "threads", "isa", "torch", "triton", "additive_attn", "python"),
    *("commit", "date", "suite", "what", *SIZES, "options", "dtype", "mode", "provider"),
    *("median_ms", "q20_ms", "q80_ms", "peak_extra_bytes", "note"),
]
Row = dict[str, Any]  # by column; what is not measured is missing


def machine(device: torch.device) -> Row:
    """The columns about the machine and the versions that are measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        name, isa = platform.processor() or platform.machine(), dispatch.cpu_path()
        if sys.platform == "linux":
            models = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
            name = models[0].strip() if models else name
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "isa": isa,
        "torch": torch.__version__,
        "additive_attn": additive_attn.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        **({"triton": importlib.metadata.version("triton")} if device.type == "cuda" else {}),
    }


def commit() -> str:
    """The commit of the checkout, with a + where files differ from it; empty outside of one."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return found.stdout.strip()


def folder_name(about: Row) -> str:
    """Machine, instruction set and threads, as the name of a folder or file."""
    name = f"{about['name']} {about['isa']} {about['threads']}t"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(
    path: Path,
    rows: Iterable[Row],
    columns: list[str] = COLUMNS,
    merge: Callable[[list[Row]], Iterable[Row]] | None = None,
) -> None:
    """Writes rows as they come to a file beside the path, and moves it there at the end: a run
    that is stopped replaces nothing. ``merge`` gets all rows and returns those to keep."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.csv")
    try:
        with part.open("w", newline="") as output:
            writer = csv.DictWriter(output, columns, lineterminator="\n")
            writer.writeheader()
            found: list[Row] = []
            for row in rows:
                writer.writerow(row)
                output.flush()
                found.append(row)
            if merge is not None:
                output.seek(0)
                output.truncate()
                writer.writeheader()
                writer.writerows(merge(found))
    except BaseException:
        print(f"stopped; what was measured is in {part}", file=sys.stderr)
        raise
    part.replace(path)


@dataclass(frozen=True)
class Measurement:
    """One problem in one mode, with the csv row of every provider."""

    suite: str
    shape: tuple[int, ...]
    options: str
    dtype: str
    mode: str
    what: str
    rows: dict[str, dict[str, str]]

    @property
    def key(self) -> tuple[object, ...]:
        return self.shape, self.options, self.dtype, self.mode

    def value(self, column: str, provider: str) -> float | None:
        value = self.rows.get(provider, {}).get(column)
        return float(value) if value else None

    def milliseconds(self, provider: str) -> float | None:
        return self.value("median_ms", provider)

    def bytes(self, provider: str) -> float | None:
        return self.value("peak_extra_bytes", provider)

    def note(self, provider: str) -> str:
        return self.rows.get(provider, {}).get("note", "")

    @property
    def compiled(self) -> str:
        """The faster of the two spellings, or one that says why there is none."""
        times = {name: self.milliseconds(name) for name in COMPILED}
        return min(COMPILED, key=lambda name: times[name] or float("inf"))

    @property
    def ours(self) -> str:
        return PYTORCH_PATH if PYTORCH_PATH in self.rows else FUSED


def read(path: Path) -> list[Measurement]:
    measurements: dict[tuple[object, ...], Measurement] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                shape = tuple(int(row[name]) for name in SIZES)
                key = (row["suite"], shape, row["options"], row["dtype"], row["mode"])
                if key not in measurements:
                    what = row.get("what") or name_of(shape, row["options"])
                    measurements[key] = Measurement(*key, what=what, rows={})
                measurements[key].rows[row["provider"]] = row
    except (OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} does not hold rows of benchmarks.run: {error!r}") from None
    if not measurements:
        raise SystemExit(f"{path} has no measurements; python -m benchmarks.run writes them.")
    return list(measurements.values())


def measured_on(measurements: list[Measurement]) -> str:
    """One line about the machine and the versions of the rows."""
    return machine_line(next(iter(measurements[0].rows.values())))


def machine_line(row: Row) -> str:
    threads = f"{row['threads']} threads, " if row["device"] == "cpu" else ""
    commit = f" ({row['commit']})" if row.get("commit") else ""
    triton = f"Triton {row['triton']}, " if row.get("triton") else ""
    return (
        f"{row['name']} ({threads}{row['isa']}), torch {row['torch']}, {triton}"
        f"additive_attn {row['additive_attn']}{commit}, Python {row['python']}, {row['date'][:10]}"
    )


def chosen_files(paths: list[Path]) -> Iterator[Path]:
    """The named csv files, or the newest run of this checkout; else those that came with it."""
    if paths:
        yield from paths
        return
    local = [path for path in LOCAL.glob("*.csv") if not path.name.endswith(".part.csv")]
    if local:
        yield max(local, key=lambda path: path.stat().st_mtime)
        return
    print("nothing was measured here yet (python -m benchmarks.run); of other machines:")
    for path in sorted(RESULTS.glob("*/*.csv")):
        with path.open(newline="") as file:
            if {"suite", *SIZES, "provider"} <= set(csv.DictReader(file).fieldnames or ()):
                yield path
