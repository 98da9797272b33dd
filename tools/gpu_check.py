"""Tests the Triton kernels on a GPU and measures them, in ten minutes: ``make gpu``.

    python tools/gpu_check.py               csv files and logs to benchmarks/results/local/gpu-*
    python tools/gpu_check.py --minutes 4   each part gets less time
    python tools/gpu_check.py --dry         whether every part starts, without a GPU (minutes)

Needs Python with torch, Triton, pytest and pytest-xdist; installs nothing. A part that fails, or
takes too long, ends there, and the next begins; the first failure is printed at the end. $OUT
names another folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
SAID = r"E  |.*FAILED|ERROR|passed by|skipped \d|left out|=*.* (passed|failed|error)"
# Tests of the CPU, and tests that only compile: any machine runs them.
NOT_ON_A_GPU = {
    "test_memory.py", "test_library.py", "test_architecture.py", "test_plot.py", "test_errors.py",
    "test_import.py", "test_triton_code.py", "test_triton_races.py", "test_onnx.py",
    "test_plain_path.py",
}  # fmt: skip


@dataclass
class Check:
    """The output folder, the time limit, and the results so far."""

    folder: Path
    seconds: float
    dry: bool
    begun: float = field(default_factory=time.monotonic)
    results: list[tuple[str, str, float]] = field(default_factory=list)
    first: str = ""

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(text + "\n")

    def failed(self, what: str, text: str) -> None:
        if not self.first:
            self.first = f"{what}\n{text}"

    def part(self, name: str, share: float, run: Callable[[float], str]) -> None:
        """``run`` gets the seconds it may take, and returns what went wrong."""
        limit = min(share * self.seconds, self.left - 5)
        if limit < 2:
            self.results.append((name, "no time left", 0.0))
            return
        self.say(f"==> {name} (at most {limit:.0f} s)")
        begin = time.monotonic()
        try:
            problem = run(limit)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self.failed(name, problem)
        took = time.monotonic() - begin
        self.results.append((name, problem.splitlines()[0] if problem else "ok", took))

    def command(
        self, *arguments: str, environment: dict[str, str] | None = None
    ) -> Callable[[float], str]:
        """A part that is one command, whose output is shown as it comes."""

        def run(limit: float) -> str:
            code, output = execute(arguments, limit, environment, self.say)
            return "" if code == 0 else explained(code, limit, output)

        return run


def execute(
    arguments: tuple[str, ...], limit: float, environment: dict[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[int | None, str]:  # fmt: skip
    """The exit code, None where time ran out, and the output. Then the command is first
    interrupted, as by Ctrl-C, so that it can print what it has done."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env={**os.environ, **(environment or {})},
        text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    interrupted: list[bool] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if say is not None and (not interrupted or line.startswith("stopped")):
                say(f"    {lines[-1]}"[:400])  # the traceback of the interrupt is useless

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            interrupted.append(True)
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its remaining children keep the pipe open
        except ProcessLookupError:
            pass
        reading.result()
    return code, "\n".join(lines)


def reason(code: int | None, limit: float) -> str:
    return f"took more than {limit:.0f} s" if code is None else f"exit code {code}"


def explained(code: int | None, limit: float, output: str) -> str:
    """The reason, and the end of the output unless the command was interrupted."""
    lines = output.splitlines()[-25:] if code is not None else []
    return "\n".join([reason(code, limit), *lines])


def files() -> list[str]:
    """Test files whose tests compute with the Triton kernels on a GPU."""
    found = list((ROOT / "tests/kernels").glob("test_triton*.py"))
    for name in ("promises", "layers", "compat"):
        found += (ROOT / "tests" / name).glob("test_*.py")
    return sorted(str(x.relative_to(ROOT)) for x in found if x.name not in NOT_ON_A_GPU)


def pytest(*arguments: str) -> tuple[str, ...]:
    options = ("-q", "-p", "no:cacheprovider", "--tb=short", "--durations=20")
    return (PYTHON, "-m", "pytest", *options, *arguments)


def tests(check: Check) -> Callable[[float], str]:
    """The tests, in parallel processes. A process whose GPU work has failed is replaced
    (tests/conftest.py). Each test is named as it ends: a run that is cut off prints no summary."""
    chosen = files()
    if check.dry:
        chosen = [x for x in chosen if x.endswith(("test_triton_probe.py", "test_merge.py"))]
    workers = 2 if check.dry else max(2, min(os.cpu_count() or 2, 16) - 2)
    environment = {"ADDITIVE_ATTN_TEST_DEVICE": "cpu" if check.dry else "cuda"}
    if check.dry:
        environment["ADDITIVE_ATTN_CPU"] = "pytorch"
    command = pytest("-vv", "-n", str(workers), "--dist", "worksteal", *chosen)

    def run(limit: float) -> str:
        code, output = execute(command, limit - 10, environment)
        (check.folder / "tests.txt").write_text(output)
        said = [x for x in output.splitlines() if re.match(SAID, x)]
        check.say("\n".join(f"    {x[:200]}" for x in said[-60:]))
        if code in (0, 5):  # 5: none of the tests is for this device
            return ""
        return "\n".join([said[-1] if said else reason(code, limit), *said[:12]])

    return run


def sanitizer(check: Check, program: str, tool: str) -> Callable[[float], str]:
    """Runs without torch's cache: each tensor is an allocation of its own, so that accesses
    between tensors are found."""
    few = ("-x", "-p", "no:xdist", "tests/kernels/test_triton.py", "-k", "sizes or strides")
    command = (program, "--tool", tool, "--error-exitcode", "9", *pytest(*few))
    names = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "ADDITIVE_ATTN_TEST_UNCHECKED")
    environment = {**dict.fromkeys(names, "1"), "ADDITIVE_ATTN_TEST_DEVICE": "cuda"}

    def run(limit: float) -> str:
        code, output = execute(command, limit - 10, environment)
        (check.folder / f"{tool}.txt").write_text(output)
        said = [x for x in output.splitlines() if "=====" in x or re.match(SAID, x)]
        check.say("\n".join(f"    {tool}: {x[:200]}" for x in said[-3:]))
        return "" if code == 0 else "\n".join([reason(code, limit), *said[:12]])

    return run


def compilers(check: Check) -> Callable[[float], str]:
    """Compiles the cases with torch.compile, whose cache on disk saves time later."""

    def run(limit: float) -> str:
        commands = [
            speed("--suite", suite, "--dtype", dtype, "--modes", mode, "--rounds", "2", "--budget",
                  "0.001", "--providers", "compile sum",
                  "--output", str(check.folder / f"warm-{suite}-{dtype}-{mode}.csv"))
            for suite, dtype, mode in (
                ("gpu", "float32", "full"), ("gpu", "bfloat16", "full"),
                ("gpu", "float32", "forward"), ("gpu", "bfloat16", "forward"),
                ("scaling", "float32", "full"),
            )
        ]  # fmt: skip
        with ThreadPoolExecutor(len(commands)) as pool:
            results = list(pool.map(lambda command: execute(command, limit - 10), commands))
        for path in check.folder.glob("warm-*.csv"):
            path.unlink()
        bad = [explained(code, limit, output) for code, output in results if code != 0]
        return bad[0] if bad else ""

    return run


def speed(*arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "benchmarks.run", *arguments)


def build(limit: float) -> str:
    command = (PYTHON, "setup.py", "-q", "build_ext", "--inplace")
    code, output = execute(command, limit, {"ADDITIVE_ATTN_BUILD_EXT": "1"})
    return "" if code == 0 else explained(code, limit, output)


def machine(check: Check, limit: float) -> str:
    """Prints the configuration, and fails unless the package's self-check passes."""
    code, output = execute((PYTHON, "-m", "additive_attn"), limit, None, check.say)
    path = next((line for line in output.splitlines() if line.startswith("gpu path")), "")
    if code == 0 and (check.dry or "triton" in path):
        return ""
    return f"{path or 'no gpu path'}: {explained(code, limit, output)}"


def parts(check: Check, built: bool = False) -> None:
    folder, dry = check.folder, check.dry
    device = ["--device", "cpu"] if dry else []
    interpreter = {"ADDITIVE_ATTN_CPU": "triton", "TRITON_INTERPRET": "1"} if dry else {}
    if not dry and not built:
        check.part("build", 0.2, build)
        if check.first:  # without the library Python launches the kernels
            os.environ["ADDITIVE_ATTN_CPU"] = "pytorch"
    check.part("machine", 0.2, lambda limit: machine(check, limit))
    if check.results[-1][1] != "ok":  # the tests then show which kernels are wrong
        os.environ["ADDITIVE_ATTN_TEST_UNCHECKED"] = "1"
    if not dry:
        os.environ.setdefault("ADDITIVE_ATTN_GPU", "triton")
    side_by_side: dict[str, Callable[[float], str]] = {"tests": tests(check)}
    if not dry:
        side_by_side["torch.compile"] = compilers(check)
        program = shutil.which("compute-sanitizer")
        for tool in ("memcheck", "racecheck") if program else ():
            side_by_side[tool] = sanitizer(check, str(program), tool)
        if program is None:
            check.results.append(("compute-sanitizer", "not installed", 0.0))
    with ThreadPoolExecutor(len(side_by_side)) as pool:
        for name, run in side_by_side.items():
            pool.submit(check.part, name, 0.42, run)
    tiny = ["--shapes", "1x2x5x8x8"]
    providers = ["--providers", "plain", "fused", "dot product", *([] if dry else ["compile sum"])]
    check.part("speed", 0.3, check.command(*speed(
        *device, *(tiny if dry else ["--suite", "gpu"]), *providers,
        "--dtype", "float32", "bfloat16", "--budget", "0.1", "--rounds", "7",
        "--output", str(folder / "speed.csv"),
    ), environment=interpreter))  # fmt: skip
    check.part("scaling", 0.14, check.command(*speed(
        *device, *(tiny if dry else ["--suite", "scaling", "--modes", "full"]), *providers,
        "--budget", "0.2", "--rounds", "5", "--output", str(folder / "scaling.csv"),
    ), environment=interpreter))  # fmt: skip
    check.part("questions", 0.12, check.command(
        PYTHON, "-m", "benchmarks.gpu", *device, *(["--quick"] if dry else []),
        "--output", str(folder / "questions.csv"), environment=interpreter,
    ))  # fmt: skip
    check.part("tuner", 0.2, check.command(
        PYTHON, "-m", "tools.tune", *device, "--budget", "0.2", "--rounds", "5",
        "--output", str(folder / "tuning.csv"),
        *(["--shapes", "1x24x25x4x4", "--modes", "forward"] if dry else
          ["--shapes", "1x4096x4096x128x128,8x512x512x256x256"]),
        environment=interpreter,
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_check.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--built", action="store_true", help="the compiled library is there")
    args = parser.parse_args()
    try:
        import torch
        import xdist  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}: this takes Python with torch, Triton, pytest and pytest-xdist.")

    if not args.dry and not torch.cuda.is_available():
        sys.exit("torch sees no GPU on this machine: run this where torch.cuda.is_available().")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    local = ROOT / "benchmarks" / "results" / "local" / f"gpu-{stamp}"
    folder = Path(os.environ.get("OUT") or local)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # so that cuBLAS repeats bit for bit
    check = Check(folder, 60 * args.minutes, args.dry)
    parts(check, args.built)
    check.say("\n==> summary")
    for name, result, took in check.results:
        check.say(f"{took:6.0f} s  {name}: {result}")
    check.say(f"everything is in {folder}")
    if check.first:
        check.say(f"\n==> what failed first: {check.first}")
    sys.exit(bool(check.first))


if __name__ == "__main__":
    main()
