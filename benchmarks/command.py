"""What commands that measure cases of their own share: options, where rows go, reading them."""

from __future__ import annotations

import argparse
import csv
import os
from argparse import Namespace
from collections.abc import Collection, Iterable
from datetime import datetime
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.arguments import parser_of
from benchmarks.rows import Row
from benchmarks.run import require_kernel

LEAST = {"threads": 1, "steps": 1, "rounds": 2}


def parser(
    name: str, description: str | None, cases: Collection[str], *, samples: bool = False
) -> argparse.ArgumentParser:
    """Options of ``benchmarks.NAME``; with ``samples`` also how many are taken."""
    made = parser_of(f"benchmarks.{name}", description)
    made.add_argument("--case", nargs="+", choices=list(cases), default=list(cases))
    made.add_argument("--threads", type=int, default=2)
    if samples:
        made.add_argument("--rounds", type=int, default=9, help="samples of each provider")
        made.add_argument("--budget", type=float, default=12.0, help="seconds per case")
    made.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs")
    made.add_argument("--save", action="store_true", help="replace these cases in what git tracks")
    made.add_argument("--output", type=Path, help="csv file to write instead")
    return made


def parsed(parser: argparse.ArgumentParser) -> Namespace:
    args = parser.parse_args()
    if args.quick and args.save:
        parser.error("--quick measures other sizes than the files that git tracks")
    for name, least in LEAST.items():
        number = getattr(args, name, None)
        if number is not None and number < least:
            parser.error(f"--{name} is {number}; it is at least {least}")
    if not getattr(args, "budget", 1.0) > 0:
        parser.error(f"--budget is {args.budget}; it is positive")
    return args


def begin(args: Namespace, name: str) -> Path:
    """Stops where plain PyTorch would be measured; returns the file that rows go to."""
    require_kernel(torch.device("cpu"), None)
    torch.set_num_threads(args.threads)
    folder = rows.folder_name(rows.machine(torch.device("cpu")))
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    kept, local = (
        rows.RESULTS / folder / f"{name}.csv",
        rows.LOCAL / name / f"{folder}-{stamp}.csv",
    )
    path: Path = args.output or (kept if args.save else local)
    return path


def write(
    path: Path,
    measured: Iterable[Row],
    columns: list[str],
    args: Namespace,
    cases: Collection[str],
) -> None:
    """Writes the rows of a run. With --save, the tracked rows of other cases stay, and so do the
    profiles of a case if only its times were measured. Rows are in the order of the cases."""
    before: list[Row] = []
    if args.save and args.output is None and path.exists():
        with path.open(newline="") as file:
            before = [row for row in csv.DictReader(file) if row.get("case") in cases]

    def kind(row: Row) -> tuple[str, bool]:
        return row["case"], bool(row.get("group"))

    def merged(found: list[Row]) -> list[Row]:
        again, order = set(map(kind, found)), list(cases)
        kept = [row for row in before if kind(row) not in again]
        return sorted([*kept, *found], key=lambda row: (order.index(row["case"]), kind(row)[1]))

    rows.write(path, measured, columns, merged)


def shown_rows(path: Path, name: str, cases: Collection[str]) -> list[Row]:
    """Returns the rows that ``benchmarks.NAME`` has written to a file, and prints a line about
    their machine."""
    try:
        with path.open(newline="") as file:
            found: list[Row] = [row for row in csv.DictReader(file) if row.get("case") in cases]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} does not hold rows of benchmarks.{name}: {error!r}") from None
    if not found:
        raise SystemExit(f"{path} does not hold rows of benchmarks.{name}.")
    print(f"\n{os.path.relpath(path)}\n{rows.machine_line(found[0])}\n")
    return found
