"""Measures decoders, writes csv rows and prints them as a table.

    python -m benchmarks.decoders                         everything (16 minutes)
    python -m benchmarks.decoders --case attloc joeynmt
    python -m benchmarks.decoders --group decoders --split

All providers of a case are timed round-robin in this process. Their results are compared before
anything is timed. Times are CPU times of all threads together; the csv also has wall-clock times.
Rows are written to a new file in benchmarks/results/local/, which git ignores; --save replaces the
rows of these cases in the file that git tracks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from additive_attn.ops import dispatch
from additive_attn.ops.library import how_to_build
from benchmarks import command, rows
from benchmarks.decoders import table
from benchmarks.decoders.cases import CASES, Case
from benchmarks.decoders.problem import measured
from benchmarks.decoders.split import split
from benchmarks.rows import Row


def measure_case(
    case: Case, budget: float, rounds: int, profile: bool, quick: bool
) -> Iterator[Row]:
    torch.compiler.reset()
    about = rows.machine(torch.device("cpu"))
    about |= {
        "case": case.name,
        "what": f"tiny: {case.what}" if quick else case.what,
        "part": case.part,
        "mode": case.mode,
    }
    about |= dict(zip(table.SIZES, case.sizes, strict=True))
    problem = case.build(quick)
    found = measured(problem, budget, rounds)
    for provider, columns in found.items():
        yield about | {"provider": provider} | columns
    if profile and case.group in table.LOOPS:
        for provider, run in problem.runs.items():
            for group, spent in split(run, by_operator=provider != "plain").items():
                row = about | {"provider": provider, "group": group}
                yield row | {"self_ms": float(f"{spent:.5g}")}


def require_operators() -> None:
    """Exits if plain PyTorch would compute an operator that is measured as the fused layer's."""
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in dispatch.PLAIN if not compiled(f"additive_attn::{name}", "CPU")]
    if missing:
        raise SystemExit(
            f"The compiled kernel lacks {', '.join(missing)}: plain PyTorch would be measured "
            f"under the name of the fused layer. {how_to_build().capitalize()}"
        )


def main() -> None:
    parser = command.parser("decoders", __doc__, CASES, samples=True)
    groups = sorted({case.group for case in CASES.values()})
    parser.add_argument("--group", nargs="+", choices=groups, default=groups)
    parser.add_argument("--steps", type=int, help="steps of every decoder, if not its own")
    parser.add_argument("--split", action="store_true", help="also profile where the time goes")
    args = command.parsed(parser)
    if args.save and args.steps:
        parser.error("--steps measures other loops than the files that git tracks")
    path = command.begin(args, "decoders")
    require_operators()
    chosen = [CASES[name] for name in args.case if CASES[name].group in args.group]
    if args.steps:
        chosen = [case.of_steps(args.steps) for case in chosen]

    def all_rows() -> Iterator[Row]:
        for case in chosen:
            found = list(measure_case(case, args.budget, args.rounds, args.split, args.quick))
            print(table.line(case, found), flush=True)
            yield from found

    command.write(path, all_rows(), table.COLUMNS, args, CASES)
    table.show(path, groups, with_bars=True, split=False)
    if args.split:
        table.show(path, groups, with_bars=False, split=True)


if __name__ == "__main__":
    main()
