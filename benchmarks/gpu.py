"""Questions that only a GPU can answer, before speed is measured (benchmarks.run).

    python -m benchmarks.gpu                       on a GPU (a minute or two)
    python -m benchmarks.gpu --question host       what the host spends on a call
    python -m benchmarks.gpu --device cpu --quick  whether it runs, in Triton's interpreter
                                                   (ADDITIVE_ATTN_CPU=triton TRITON_INTERPRET=1)

barriers: the loop over features, through shared memory and without (benchmarks/score_loop.py).
kernels: the time of each Triton kernel in a call, and the instructions that it issued as a share
of those that the GPU could issue in that time. The counts are those of machine-code.csv, which the
same Triton must have compiled for the same GPU.
host: microseconds until a call returns, and until the GPU has finished, several calls in a row.
"""

from __future__ import annotations

import csv
import importlib.metadata
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from benchmarks import measure, rows, score_loop, table
from benchmarks.arguments import parser_of
from benchmarks.cases import Case, make_inputs, parse
from benchmarks.providers import PROVIDERS
from benchmarks.rows import Row
from benchmarks.run import require_kernel

COLUMNS = ["question", "shape", "mode", "what", "value", "unit"]
SHAPES = {
    "barriers": "1x4096x4096x128x128",
    "kernels": "1x4096x4096x128x128,8x512x512x64x64,32x50x50x1024x1024,1x16x100000x256x512",
    "host": "1x1x10x32x20,64x1x400x512x512,1x8x10x32x20,8x512x512x64x64",
}
QUICK = dict.fromkeys(SHAPES, "1x64x70x8x8")
SLEEP = 50_000_000  # clocks
CALLS = 20  # in a row: so few that the GPU's queue holds their launches
MODES = ("forward", "full")


def best(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    samples = measure.interleave(calls, device, 0.5, 9 if device.type == "cuda" else 2)
    return {name: min(seconds) for name, seconds in samples.items()}


def barriers(case: Case, mode: str, device: torch.device) -> Iterator[Row]:
    if mode != "forward":
        return
    length = case.query_len // score_loop.TILE * score_loop.TILE
    if length == 0:
        return
    for name, seconds in best(score_loop.measured(device, length), device).items():
        tanh = length * length * 128
        yield {"what": name, "value": f"{tanh / seconds / 1e12:.4g}", "unit": "T tanh/s"}


def runner(case: Case, device: torch.device, name: str, mode: str) -> Callable[[], object] | None:
    inputs = make_inputs(case, torch.float32, device)
    provider = next(provider for provider in PROVIDERS if provider.name == name)
    if provider.bytes_needed(case, mode, 4) > measure.available_bytes(device):
        return None
    found = provider.runner(case, inputs)
    return None if found is None else measure.action(found, inputs, mode)


@contextmanager
def recorded(launches: list[tuple[str, Any, Any]]) -> Iterator[None]:
    """Records every launch of a Triton kernel, between two events."""
    run = JITFunction.run

    def timed(kernel: Any, *arguments: Any, **options: Any) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = run(kernel, *arguments, **options)
        end.record()
        launches.append((kernel.__name__, begin, end))
        return result

    JITFunction.run = timed
    try:
        yield
    finally:
        JITFunction.run = run


def issued(device: torch.device) -> dict[str, float]:
    """Instructions per pair of each kernel, from machine-code.csv; none for other GPUs."""
    major, minor = torch.cuda.get_device_capability(device)
    wanted = importlib.metadata.version("triton"), f"sm_{major}{minor}"
    with (rows.RESULTS / "machine-code.csv").open(newline="") as file:
        return {
            row["kernel"]: 128 * float(row["in_all_per_tanh"])
            for row in csv.DictReader(file)
            if (row["triton"], row["target"]) == wanted
            and row["in_all_per_tanh"]
            and row["dtype"] == "float32"
        }


def kernels(case: Case, mode: str, device: torch.device) -> Iterator[Row]:
    if device.type != "cuda":
        return
    call = runner(case, device, "fused", mode)
    assert call is not None
    call()
    counts = issued(device) if case.shape[3:] == (128, 128) else {}
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    least: dict[tuple[str, int], float] = {}
    clock = 0.0
    for _ in range(5):
        asleep, awake = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        launches: list[tuple[str, Any, Any]] = []
        asleep.record()
        torch.cuda._sleep(SLEEP)
        awake.record()
        with recorded(launches):  # while the GPU sleeps, so that it does not wait for the host
            call()
        torch.cuda.synchronize(device)
        clock = max(clock, SLEEP / asleep.elapsed_time(awake) * 1e3)
        for place, (name, begin, end) in enumerate(launches):
            seconds = begin.elapsed_time(end) / 1e3
            least[name, place] = min(seconds, least.get((name, place), seconds))
    yield {"what": "clock", "value": f"{clock / 1e9:.3f}", "unit": "GHz"}
    total: dict[str, float] = defaultdict(float)
    for (name, _), seconds in least.items():
        total[name] += seconds
    for name, seconds in total.items():
        yield {"what": name, "value": f"{seconds * 1e6:.4g}", "unit": "us on the GPU"}
        if name in counts:
            # A processor has four issue slots per clock; a warp's instruction takes one.
            pairs = case.batch * case.query_len * case.key_len
            share = counts[name] * pairs / 32 / (4 * processors * clock * seconds)
            yield {"what": name, "value": f"{share:.3f}", "unit": "of all places to issue"}


def host(case: Case, mode: str, device: torch.device) -> Iterator[Row]:
    for name in ("fused", "compile sum", "plain"):
        call = runner(case, device, name, mode)
        if call is None:
            continue
        call()
        returned, finished = [], []
        calls = CALLS if device.type == "cuda" else 1
        with torch.set_grad_enabled(mode == "full"):
            for _ in range(7 if calls > 1 else 2):
                measure.synchronize(device)
                begin = time.perf_counter()
                for _ in range(calls):
                    call()
                returned.append(time.perf_counter() - begin)
                measure.synchronize(device)
                finished.append(time.perf_counter() - begin)
        for what, seconds in (("returned", returned), ("finished", finished)):
            value = f"{min(seconds) / calls * 1e6:.4g}"
            yield {"what": f"{name} {what}", "value": value, "unit": "us"}


QUESTIONS = {"barriers": barriers, "kernels": kernels, "host": host}


def answers(names: list[str], device: torch.device, quick: bool) -> Iterator[Row]:
    for name in names:
        for _, case in parse((QUICK if quick else SHAPES)[name]):
            for mode in MODES:
                try:
                    with torch.set_grad_enabled(mode == "full"):
                        found = list(QUESTIONS[name](case, mode, device))
                except Exception as error:  # the other questions still run
                    message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    found = [{"what": "failed", "value": message}]
                    if device.type == "cuda" and "CUDA error" in message:
                        raise  # nothing runs any more in this process
                for row in found:
                    row = {"question": name, "shape": str(case), "mode": mode, **row}
                    print("  ".join(str(row.get(column, "")) for column in COLUMNS), flush=True)
                    yield row


def tables(found: list[dict[str, str]]) -> Iterator[str]:
    """One table of each question, with a column for each of its answers."""
    for question in dict.fromkeys(row["question"] for row in found):
        answered = [
            row for row in found if row["question"] == question and row["what"] != "failed"
        ]
        names = list(dict.fromkeys(f"{row['what']}, {row['unit']}" for row in answered))
        lines: dict[tuple[str, str], list[str]] = {}
        for row in answered:
            line = lines.setdefault((row["shape"], row["mode"]), ["-"] * len(names))
            line[names.index(f"{row['what']}, {row['unit']}")] = row["value"]
        if lines:
            yield table.markdown(
                [[question, "mode", *names]] + [[*k, *v] for k, v in lines.items()]
            )


def main() -> None:
    parser = parser_of("benchmarks.gpu", __doc__)
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--output", type=Path, default=rows.LOCAL / "gpu.csv", help="csv file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        require_kernel(device, None)
    rows.write(args.output, answers(args.question, device, args.quick), COLUMNS)
    with args.output.open(newline="") as file:
        found = list(csv.DictReader(file))
    print(f"wrote {args.output}", *tables(found), sep="\n\n")
    failed = [row["value"] for row in found if row["what"] == "failed"]
    if failed:
        raise SystemExit(f"{len(failed)} failed, first: {failed[0]}")


if __name__ == "__main__":
    main()
