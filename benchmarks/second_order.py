"""Measures forward mode and double backward, writes csv rows and prints them as a table.

    python -m benchmarks.second_order                          everything (3 minutes)
    python -m benchmarks.second_order --case jvp-4096
    python -m benchmarks.second_order --table FILE.csv

The other provider is the plain formula, differentiated by torch.func a block of rows at a time, so
that it fits in the same memory. Both are compared with each other at a small size before anything
is timed, and are timed round-robin. Times are of forward, gradients and their gradients, or of one
jvp. Rows go to a new file in benchmarks/results/local/, which git ignores; --save replaces the
rows of these cases in the file that git tracks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp

from additive_attn import additive_attention
from benchmarks import command, rows
from benchmarks.decoders.problem import Problem
from benchmarks.measure import peak_extra_bytes, quantiles
from benchmarks.rows import Row
from benchmarks.table import duration, markdown, ratio, size

COLUMNS = [
    *("device", "name", "threads", "isa", "torch", "additive_attn", "python", "commit", "date"),
    *("case", "what", *rows.SIZES, "provider"),
    *("median_ms", "q20_ms", "q80_ms", "cpu_ms", "peak_extra_bytes"),
]
PLAIN, FUSED = "plain in blocks", "fused"
MEMORY = 400_000_000  # bytes, for what torch.func keeps of a block
KEPT = 10  # tensors (rows, Lk, H)
Tensors = tuple[Tensor, ...]


class Case(NamedTuple):
    name: str
    what: str
    length: int
    build: Callable[[Callable[..., Tensor], int], Callable[..., Tensors]]
    rounds: int


def plain(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    energy = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
    return (energy @ weight).softmax(-1) @ value


def tangents(function: Callable[..., Tensor], length: int) -> Callable[..., Tensors]:
    """One product of the Jacobian with a direction of all inputs."""

    def run(query: Tensor, *others: Tensor) -> Tensors:
        moved = tuple(x.roll(1, 0) for x in (query, *others))
        found = [
            jvp(function, (query[..., part, :], *others), (moved[0][..., part, :], *moved[1:]))[1]
            for part in parts(function, length)
        ]
        return (torch.cat(found, -2),)

    return run


def double(function: Callable[..., Tensor], length: int) -> Callable[..., Tensors]:
    """Gradients, and the gradients of their product with a direction."""

    def gradients(upstream: Tensor, *inputs: Tensor) -> Any:
        return vjp(function, *inputs)[1](upstream)

    def run(query: Tensor, *others: Tensor) -> Tensors:
        upstream, moved = query.flip(0), tuple(x.roll(1, 0) for x in (query, *others))
        if function is additive_attention:
            leaves = [x.detach().requires_grad_() for x in (query, *others)]
            given = upstream.detach().requires_grad_()
            grads = torch.autograd.grad(function(*leaves), leaves, given, create_graph=True)
            return torch.autograd.grad(grads, [given, *leaves], moved)
        of_rows, of_all = [], [torch.zeros_like(x) for x in others]
        for part in parts(function, length):
            primals = upstream[..., part, :], query[..., part, :], *others
            pulled = vjp(gradients, *primals)[1]((moved[0][..., part, :], *moved[1:]))
            of_rows.append(pulled[:2])
            of_all = [x + y for x, y in zip(of_all, pulled[2:], strict=True)]
        return *(torch.cat(x, -2) for x in zip(*of_rows, strict=True)), *of_all

    return run


def parts(function: Callable[..., Tensor], length: int) -> Iterator[slice]:
    """Blocks of rows whose energies fit in the memory; all rows where none are kept."""
    step = length if function is additive_attention else max(1, MEMORY // (512 * length * KEPT))
    return (slice(row, row + step) for row in range(0, length, step))


CASES = {
    case.name: case
    for case in (
        Case("jvp-1024", "forward mode", 1024, tangents, 3),
        Case("double-1024", "double backward", 1024, double, 3),
        Case("jvp-4096", "forward mode", 4096, tangents, 1),
        Case("double-4096", "double backward", 4096, double, 1),
    )
}


def inputs(length: int) -> Tensors:
    torch.manual_seed(0)
    return *(torch.randn(length, 128) for _ in range(3)), torch.randn(128) / 4


def check(case: Case) -> None:
    few = inputs(96)
    runs = {
        name: lambda f=f: case.build(f, 96)(*few)
        for name, f in ((PLAIN, plain), (FUSED, additive_attention))
    }
    Problem(runs, lambda found: {str(i): x for i, x in enumerate(found)}).check()


def measure_case(case: Case, quick: bool = False) -> Iterator[Row]:
    check(case)
    length = 32 if quick else case.length
    tensors = inputs(length)
    samples: dict[str, list[tuple[float, float, int | None]]] = {PLAIN: [], FUSED: []}
    for _ in range(case.rounds):
        for name, function in ((PLAIN, plain), (FUSED, additive_attention)):
            run, times = case.build(function, length), [0.0, 0.0]

            def timed(run: Any = run, times: list[float] = times) -> None:
                start = time.perf_counter(), time.process_time()
                run(*tensors)
                times[:] = time.perf_counter() - start[0], time.process_time() - start[1]

            peak = peak_extra_bytes(timed, torch.device("cpu"))
            samples[name].append((*times, peak))  # type: ignore[arg-type]
    about = rows.machine(torch.device("cpu"))
    about |= {"case": case.name, "what": f"tiny: {case.what}" if quick else case.what}
    about |= dict(zip(rows.SIZES, (1, length, length, 128, 128), strict=True))
    for name, found in samples.items():
        wall, cpu, peaks = zip(*found, strict=True)
        figures = *quantiles([*wall] * 2), quantiles([*cpu] * 2)[0]
        columns = ("median_ms", "q20_ms", "q80_ms", "cpu_ms")
        row = {key: float(f"{x:.5g}") for key, x in zip(columns, figures, strict=True)}
        peak = max((x for x in peaks if x is not None), default=None)
        yield about | {"provider": name, **row, "peak_extra_bytes": peak}


def show(path: Path) -> None:
    found = command.shown_rows(path, "second_order", CASES)
    table = [["L", "mode", "plain in blocks", "ours", "ratio", "its memory", "ours"]]
    for name in CASES:
        of = {row["provider"]: row for row in found if row["case"] == name}
        if {PLAIN, FUSED} <= of.keys():
            slow, fast = (float(of[each]["median_ms"]) for each in (PLAIN, FUSED))
            peaks = (of[each]["peak_extra_bytes"] for each in (PLAIN, FUSED))
            memory = [size(float(x)) if x else "" for x in peaks]
            times = [duration(slow), f"**{duration(fast)}**", ratio(slow, fast)]
            table.append([of[FUSED]["Lq"], of[FUSED]["what"], *times, *memory])
    print(markdown(table))


def main() -> None:
    parser = command.parser("second_order", __doc__, CASES)
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="print it, measure nothing")
    args = command.parsed(parser)
    if args.table is not None:
        return show(args.table)
    path = command.begin(args, "second-order")

    def all_rows() -> Iterator[Row]:
        for name in args.case:
            for row in measure_case(CASES[name], args.quick):
                print(*(row[key] for key in ("case", "provider", "median_ms")), "ms", flush=True)
                yield row

    command.write(path, all_rows(), COLUMNS, args, CASES)
    show(path)


if __name__ == "__main__":
    main()
