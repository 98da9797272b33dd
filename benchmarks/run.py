"""Measures every provider and writes csv rows.

    python -m benchmarks.run                                   everything (an hour or so)
    python -m benchmarks.run --quick                           a few cases (a minute or two)
    python -m benchmarks.run --shapes steps,1x2048x2048x64x64 --dtype float32,bfloat16

Correctness is asserted against fp64 before anything is timed. All providers run in this process,
in turns. forward is timed without autograd, full is forward and backward with a random upstream
gradient. What does not fit into memory gets a row that says so.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

import torch
from torch._dynamo.exc import TorchDynamoException

import additive_attn
from additive_attn.ops import dispatch
from benchmarks import measure
from benchmarks.providers import PROVIDERS, Provider, Runner, make_inputs
from benchmarks.shapes import QUICK, SUITES, Case, parse

RESULTS = Path(__file__).with_name("results")


@dataclass
class Row:
    device: str
    name: str
    threads: int
    isa: str
    torch: str
    additive_attn: str
    python: str
    date: str
    suite: str
    B: int
    Lq: int
    Lk: int
    H: int
    Dv: int
    options: str
    dtype: str
    mode: str
    provider: str
    median_ms: float | None = None
    q20_ms: float | None = None
    q80_ms: float | None = None
    peak_extra_bytes: int | None = None
    note: str = ""


def machine(device: torch.device) -> dict[str, object]:
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
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def measure_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    modes: list[str],
    budget: float,
    rounds: int,
    providers: list[Provider],
) -> list[tuple[str, str, dict[str, object]]]:
    """(provider, mode, measured columns) for every provider that knows this case."""
    # Each case compiles anew, for its own sizes: the best that torch.compile can do.
    torch.compiler.reset()
    inputs = make_inputs(case, dtype, device)
    exact = replace(case, dropout_p=0.0)
    reference = measure.Reference(exact, inputs)
    results: list[tuple[str, str, dict[str, object]]] = []

    runners: list[tuple[Provider, Runner]] = []
    for provider in providers:
        runner = provider.runner(case, inputs)
        if runner is not None:
            runners.append((provider, runner))

    for mode in modes:
        actions, peaks = {}, {}
        with torch.set_grad_enabled(mode == "full"):
            for provider, runner in runners:
                needed = provider.bytes_needed(case, mode, dtype.itemsize)
                if needed > measure.available_bytes(device):
                    note = f"out of memory: needs {needed / 1e9:.3g} GB"
                    results.append((provider.name, mode, {"note": note}))
                    continue
                call = measure.action(runner, inputs, mode)
                try:
                    if provider.additive:
                        checked = provider.runner(exact, inputs) if case.dropout_p else runner
                        assert checked is not None
                        reference.check(provider.name, checked, mode)
                    call()
                except (TorchDynamoException, torch.OutOfMemoryError) as error:
                    too_large = isinstance(error, torch.OutOfMemoryError)
                    problem = "out of memory" if too_large else "does not compile"
                    note = f"{problem}: {type(error).__name__}"
                    results.append((provider.name, mode, {"note": note}))
                    continue
                actions[provider.name] = call
                peaks[provider.name] = measure.peak_extra_bytes(call, device)
            samples = measure.interleave(actions, device, budget, rounds)
        for name, seconds in samples.items():
            median, low, high = measure.quantiles(seconds)
            columns: dict[str, object] = {
                "median_ms": float(f"{median:.5g}"),
                "q20_ms": float(f"{low:.5g}"),
                "q80_ms": float(f"{high:.5g}"),
                "peak_extra_bytes": peaks[name],
            }
            results.append((name, mode, columns))
    return results


def progress(number: int, total: int, row: Row) -> None:
    time = row.note if row.median_ms is None else f"{row.median_ms:12.4f} ms"
    memory = "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:10.1f} MB"
    shape = f"({row.B}, {row.Lq}, {row.Lk}, {row.H}, {row.Dv}) {row.options}"
    what = f"{shape:<42} {row.dtype:<8} {row.mode:<8} {row.provider:<15}"
    print(f"[{number}/{total}] {what} {time} {memory}", flush=True)


def run(
    cases: list[tuple[str, Case]],
    dtypes: list[torch.dtype],
    modes: list[str],
    device: torch.device,
    budget: float,
    rounds: int,
    providers: list[Provider],
    output: TextIO,
) -> None:
    about = machine(device)
    writer = csv.DictWriter(output, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    todo = [(suite, case, dtype) for dtype in dtypes for suite, case in cases]
    for number, (suite, case, dtype) in enumerate(todo, start=1):
        chosen = [mode for mode in modes if mode in case.modes]
        for provider, mode, columns in measure_case(
            case, dtype, device, chosen, budget, rounds, providers
        ):
            row = Row(
                **about,  # type: ignore[arg-type]
                suite=suite,
                B=case.batch,
                Lq=case.query_len,
                Lk=case.key_len,
                H=case.hidden,
                Dv=case.value_dim,
                options=case.options,
                dtype=str(dtype).removeprefix("torch."),
                mode=mode,
                provider=provider,
                **columns,  # type: ignore[arg-type]
            )
            writer.writerow(asdict(row))
            output.flush()
            progress(number, len(todo), row)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="three cases, a few rounds")
    parser.add_argument(
        "--shapes", help=f"suites ({', '.join(SUITES)}) or BxLqxLkxHxDv, separated by commas"
    )
    names = [provider.name for provider in PROVIDERS]
    parser.add_argument("--providers", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--modes", default="forward,full", help="forward, full or both")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--rounds", type=int, help="samples of each provider (30; quick: 7)")
    parser.add_argument("--budget", type=float, help="seconds per provider (10; quick: 1)")
    parser.add_argument("--output", type=Path, help="csv file (results/MACHINE/speed.csv)")
    arguments = parser.parse_args()

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.shapes is not None:
        cases = parse(arguments.shapes)
    elif arguments.quick:
        cases = [("quick", case) for case in QUICK]
    else:
        cases = parse(",".join(SUITES))

    path = arguments.output
    if path is None:
        folder = re.sub(r"[^a-z0-9]+", "-", str(machine(device)["name"]).lower()).strip("-")
        path = RESULTS / folder / ("quick.csv" if arguments.quick else "speed.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as output:
        run(
            cases,
            [getattr(torch, name) for name in arguments.dtype.split(",")],
            arguments.modes.split(","),
            device,
            budget=arguments.budget or (1.0 if arguments.quick else 10.0),
            providers=[p for p in PROVIDERS if p.name in arguments.providers.split(",")],
            rounds=arguments.rounds or (7 if arguments.quick else 30),
            output=output,
        )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
