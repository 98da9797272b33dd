"""Measures every provider, writes csv rows and prints them as a table.

    python -m benchmarks.run                        what the README shows (a quarter of an hour)
    python -m benchmarks.run --suite quick          a few cases (a minute or two)
    python -m benchmarks.run --suite scaling,1x2048x2048x64x64 --dtype float32 bfloat16
    python -m benchmarks.run --path avx2            as on a machine without AVX-512
    python -m benchmarks.run --path pytorch --suite speed      the plain PyTorch path

Correctness is asserted against fp64 before anything is timed. All providers are timed round-robin
in this process. forward is timed without autograd, full is forward and backward with a random
upstream gradient. What does not fit into memory gets a row that says so. Rows go to a new file
in benchmarks/results/local/, which git ignores; --save writes the files that git tracks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException

from additive_attn.ops import dispatch
from additive_attn.ops.library import how_to_build
from benchmarks import measure, rows, table
from benchmarks.arguments import parser_of
from benchmarks.cases import FIRST_PAGE, SUITES, Case, make_inputs, parse
from benchmarks.providers import PROVIDERS, Provider, Runner
from benchmarks.rows import Row

# The environment variables of a path. Below the machine's best, PyTorch, torch.compile and
# the libraries that multiply matrices are limited to the same instructions.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# torch.compile's cache ignores the instruction set: an entry of another one computes garbage.
UNCACHED = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
PATHS: dict[str, dict[str, str]] = {
    "avx512": {},
    "avx2": dict(zip(LIMITS, ("avx2", "AVX2", "AVX2"), strict=True)) | UNCACHED,
    "baseline": dict(zip(LIMITS, ("default", "SSE41", "SSE4_2"), strict=True)) | UNCACHED,
    "pytorch": {"ADDITIVE_ATTN_GPU": "pytorch"},
}


def measure_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    modes: list[str],
    budget: float,
    rounds: int,
    providers: list[Provider],
) -> Iterator[tuple[str, str, Row]]:
    """(provider, mode, measured columns) for every provider that supports this case."""
    # Each case compiles anew, for its own sizes: the best that torch.compile can do.
    torch.compiler.reset()
    inputs = make_inputs(case, dtype, device)
    exact = replace(case, dropout_p=0.0)
    reference = measure.Reference(exact, inputs)
    runners: list[tuple[Provider, Runner]] = []
    for provider in providers:
        runner = provider.runner(case, inputs)
        if runner is not None and (not case.providers or provider.name in case.providers):
            runners.append((provider, runner))

    for mode in modes:
        actions, peaks = {}, {}
        with torch.set_grad_enabled(mode == "full"):
            for provider, runner in runners:
                needed = provider.bytes_needed(case, mode, dtype.itemsize)
                if 1.05 * needed > measure.available_bytes(device):
                    note = f"out of memory: needs {needed / 1e9:.3g} GB"
                    yield provider.name, mode, {"note": note}
                    continue
                call = measure.action(runner, inputs, mode)
                try:
                    if provider.additive:
                        checked = provider.runner(exact, inputs) if case.dropout_p else runner
                        assert checked is not None
                        reference.check(provider.name, checked, mode)
                    else:
                        call()
                except (TorchDynamoException, torch.OutOfMemoryError) as error:
                    too_large = isinstance(error, torch.OutOfMemoryError)
                    problem = "out of memory" if too_large else "does not compile"
                    yield provider.name, mode, {"note": f"{problem}: {type(error).__name__}"}
                    continue
                actions[provider.name] = call
                peaks[provider.name] = measure.peak_extra_bytes(call, device)
            samples = measure.interleave(actions, device, budget, rounds)
        for name, seconds in samples.items():
            times = zip(("median_ms", "q20_ms", "q80_ms"), measure.quantiles(seconds), strict=True)
            columns: Row = {key: float(f"{time:.5g}") for key, time in times}
            yield name, mode, columns | {"peak_extra_bytes": peaks[name]}


def progress(done: str, case: Case, row: Row) -> None:
    what = f"[{done}] {case!s:<42} {row['dtype']:<8} {row['mode']:<8} {row['provider']:<15}"
    result = row.get("note")
    if not result:
        limits = row["q20_ms"], row["q80_ms"]
        memory = table.size(row["peak_extra_bytes"])
        result = f"{table.duration(row['median_ms'], limits):<30} {memory}"
    print(what, result, flush=True)


def measured(
    cases: list[tuple[str, Case]],
    dtypes: list[torch.dtype],
    modes: list[str],
    device: torch.device,
    budget: float,
    rounds: int,
    providers: list[Provider],
) -> Iterator[Row]:
    about = rows.machine(device)
    todo = [(suite, case, dtype) for dtype in dtypes for suite, case in cases]
    for number, (suite, case, dtype) in enumerate(todo, start=1):
        chosen = [mode for mode in modes if mode in case.modes]
        for provider, mode, columns in measure_case(
            case, dtype, device, chosen, budget, rounds, providers
        ):
            row = about | dict(zip(rows.SIZES, case.shape, strict=True)) | columns
            row |= {"suite": suite, "what": case.what, "options": case.options}
            row |= {"dtype": str(dtype).removeprefix("torch."), "mode": mode, "provider": provider}
            progress(f"{number}/{len(todo)}", case, row)
            yield row


def require_kernel(device: torch.device, path: str | None) -> bool:
    """Returns whether our rows are those of plain PyTorch; exits unless ``path`` names it."""
    if device.type == "cuda":
        kernels, reason = dispatch.gpu_path()
        actual = "pytorch" if kernels is None else "triton"
    elif device.type == "cpu":
        actual, reason = dispatch.cpu_path(), dispatch.cpu_reason
    else:
        actual, reason = "pytorch", f"there is no kernel for {device.type}"
    if actual == "pytorch" and path != "pytorch":
        raise SystemExit(
            f"This would measure plain PyTorch under the name of the fused layer ({reason}). "
            f"Ask for the plain PyTorch path (--path pytorch), or {how_to_build()}"
        )
    return actual == "pytorch"


def arguments() -> argparse.Namespace:
    parser = parser_of("benchmarks.run", __doc__)
    suites = f"of {', '.join([FIRST_PAGE, *SUITES])}, or BxLqxLkxHxDv, with commas"
    parser.add_argument("--suite", "--shapes", default=FIRST_PAGE, help=suites)
    parser.add_argument("--quick", dest="suite", action="store_const", const="quick")
    parser.add_argument("--path", choices=PATHS, help="instructions of the kernel and of PyTorch")
    for name, accepted, default in (
        ("--providers", [provider.name for provider in PROVIDERS], slice(None)),
        ("--modes", ["forward", "full"], slice(None)),
        ("--dtype", ["float32", "bfloat16", "float16"], slice(1)),
    ):
        parser.add_argument(name, nargs="+", choices=accepted, default=accepted[default])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; all by default")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each provider")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds per provider and mode")
    parser.add_argument("--save", action="store_true", help="write the results that git tracks")
    parser.add_argument("--output", type=Path, help="csv file to write instead")
    parsed = parser.parse_args()
    try:
        torch.empty(0, device=parsed.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {parsed.device}: {str(error).splitlines()[0]}")
    if (parsed.threads or 1) < 1 or parsed.rounds < 2 or not parsed.budget > 0:
        parser.error("--threads and --budget are positive, --rounds at least 2")
    return parsed


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    wanted = {"ADDITIVE_ATTN_CPU": args.path, **PATHS[args.path]} if args.path else {}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        # They are read when torch and additive_attn are imported.
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]])
    ours = rows.PYTORCH_PATH if require_kernel(device, args.path) else rows.FUSED
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    folder, suite = rows.folder_name(rows.machine(device)), args.suite.replace(",", "+")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    kept = rows.RESULTS / folder / f"{suite}.csv"
    path = args.output or (kept if args.save else rows.LOCAL / f"{folder}-{suite}-{stamp}.csv")
    chosen = set(args.providers) - ({rows.FUSED, rows.PYTORCH_PATH} - {ours})
    measurements = measured(
        parse(args.suite),
        [getattr(torch, name) for name in args.dtype],
        args.modes,
        device,
        args.budget,
        args.rounds,
        [provider for provider in PROVIDERS if provider.name in chosen],
    )
    try:
        rows.write(path, measurements)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    table.show([path], spread=True)


if __name__ == "__main__":
    main()
