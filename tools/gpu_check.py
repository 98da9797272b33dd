"""Tests the Triton kernels on a GPU and measures them, in ten minutes: ``make gpu``.

    python tools/gpu_check.py               csv files and logs to benchmarks/results/local/gpu-*
    python tools/gpu_check.py --minutes 4   each part gets less time
    python tools/gpu_check.py --dry         whether every part starts, without a GPU (minutes)

Needs Python with torch, Triton and pytest; installs nothing. A part that fails, or takes too long,
ends there, and the next begins; what failed first is said at the end. $OUT names another folder.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
# What is about the CPU, or is only compiled, and runs on any machine.
NOT_ON_A_GPU = {
    "test_memory.py", "test_library.py", "test_architecture.py", "test_plot.py", "test_errors.py",
    "test_import.py", "test_triton_code.py", "test_triton_races.py", "test_onnx.py",
}  # fmt: skip
SHAPES = ",".join([
    "1x4096x4096x128x128", "8x512x512x64x64", "32x50x50x1024x1024", "64x1x400x512x512",
    "1x1x10x32x20", "1x16x100000x256x512", "1x8x10x32x20", "1x512x512x128x128",
])  # fmt: skip


@dataclass
class Check:
    """Where everything goes, and how long it may take."""

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
    """The exit code, None where time ran out, and the output. First the command is asked to stop,
    as by Ctrl-C, so that it can say what it has done."""
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
                say(f"    {lines[-1]}"[:400])  # where it was interrupted says nothing

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
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind holds the pipe open
        except ProcessLookupError:
            pass
        reading.result()
    return code, "\n".join(lines)


def reason(code: int | None, limit: float) -> str:
    return f"took more than {limit:.0f} s" if code is None else f"exit code {code}"


def explained(code: int | None, limit: float, output: str) -> str:
    """With the end of the output, unless that says where it was interrupted."""
    lines = output.splitlines()[-25:] if code is not None else []
    return "\n".join([reason(code, limit), *lines])


def complaints(output: str) -> str:
    """The first lines of a pytest run that say what is wrong; else its end."""
    lines = output.splitlines()
    found = [x for x in lines if x.startswith(("E  ", "FAILED", "ERROR"))]
    return "\n".join(found[:12] or lines[-12:])


def tests(check: Check) -> Callable[[float], str]:
    """Parts of files side by side, each in a process of its own: an illegal access ends all CUDA
    work of a process. They share Triton's cache of compiled kernels."""
    kernels = sorted((ROOT / "tests/kernels").glob("test_triton*.py"))
    rest = [x for name in ("promises", "layers") for x in (ROOT / "tests" / name).glob("test_*")]
    rest.sort(key=lambda path: -path.stat().st_size)
    files = [path for path in (*kernels, *rest) if path.name not in NOT_ON_A_GPU]
    if check.dry:
        files = [path for path in files if path.name in ("test_triton_probe.py", "test_merge.py")]
    todo = [part for path in files for part in split(path)]
    device = "cpu" if check.dry else "cuda"
    environment = {"ADDITIVE_ATTN_TEST_DEVICE": device}
    if check.dry:
        environment |= {"ADDITIVE_ATTN_CPU": "pytorch"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--maxfail=4"]

    def one(part: list[str], end: float) -> tuple[str, int | None, str]:
        limit = end - time.monotonic()
        if limit < 3:
            return " ".join(part), None, "not started"
        code, output = execute((PYTHON, "-m", "pytest", *options, *part), limit, environment)
        return " ".join(part), code, output

    def run(limit: float) -> str:
        end = time.monotonic() + limit - 10
        problems = []
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            waiting = [pool.submit(one, part, end) for part in todo]
            for each in as_completed(waiting):
                part, code, output = each.result()
                last = output.splitlines()[-1] if output else ""
                check.say(f"    {part[:70]}: {reason(code, limit) if code is None else last}")
                with (check.folder / "tests.txt").open("a") as log:
                    log.write(f"==> {part}: {code}\n{output}\n")
                if code not in (0, 5):  # 5: none of its tests is for this device
                    problems.append(f"{part}: {reason(code, limit)}\n{complaints(output)}")
                    check.failed("tests", problems[-1])
                    check.say(problems[-1])
        return f"{len(problems)} of {len(todo)} parts\n{problems[0]}" if problems else ""

    return run


def split(path: Path) -> list[list[str]]:
    """The tests of a large file in several parts, as arguments of pytest."""
    text = path.read_text()
    names = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    count = min(len(names), 1 + len(text) // 4000)
    file = str(path.relative_to(ROOT))
    return [[f"{file}::{name}" for name in names[n::count]] for n in range(count)]


def build(limit: float) -> str:
    command = (PYTHON, "setup.py", "-q", "build_ext", "--inplace")
    code, output = execute(command, limit, {"ADDITIVE_ATTN_BUILD_EXT": "1"})
    return "" if code == 0 else explained(code, limit, output)


def machine(check: Check, limit: float) -> str:
    """What is there, and whether the package's own check of its kernels passes."""
    code, output = execute((PYTHON, "-m", "additive_attn"), limit, None, check.say)
    path = next((line for line in output.splitlines() if line.startswith("gpu path")), "")
    if code == 0 and (check.dry or "triton" in path):
        return ""
    return f"{path or 'no gpu path'}: {explained(code, limit, output)}"


def parts(check: Check) -> None:
    folder, dry = check.folder, check.dry
    device = ["--device", "cpu"] if dry else []
    interpreter = {"ADDITIVE_ATTN_CPU": "triton", "TRITON_INTERPRET": "1"} if dry else {}
    if not dry:
        check.part("build", 0.2, build)
        if check.first:  # without the library Python starts the kernels
            os.environ["ADDITIVE_ATTN_CPU"] = "pytorch"
    check.part("machine", 0.06, lambda limit: machine(check, limit))
    if check.results[-1][1] != "ok":  # the tests say which kernels compute something else
        os.environ["ADDITIVE_ATTN_TEST_UNCHECKED"] = "1"
    if not dry:
        os.environ.setdefault("ADDITIVE_ATTN_GPU", "triton")
    check.part("tests", 0.34, tests(check))
    check.part("questions", 0.12, check.command(
        PYTHON, "-m", "benchmarks.gpu", *device, *(["--quick"] if dry else []),
        "--output", str(folder / "questions.csv"), environment=interpreter,
    ))  # fmt: skip
    shapes = ["--shapes", "1x2x5x8x8"] if dry else ["--shapes", SHAPES]
    for dtype, chosen, share in (
        ("float32", shapes, 0.26),
        ("bfloat16", shapes if dry else ["--shapes", ",".join(SHAPES.split(",")[:3])], 0.08),
    ):
        path = str(folder / f"speed-{dtype}.csv")
        check.part(f"speed, {dtype}", share, check.command(
            PYTHON, "-m", "benchmarks.run", *device, *chosen, "--dtype", dtype, "--budget", "0.3",
            "--rounds", "7", "--output", path, environment=interpreter,
        ))  # fmt: skip
    check.part("tuner", 0.12, check.command(
        PYTHON, "-m", "tools.tune", *device, "--budget", "0.2", "--rounds", "5",
        "--output", str(folder / "tuning.csv"),
        *(["--shapes", "1x24x25x4x4", "--modes", "forward"] if dry else
          ["--shapes", "1x4096x4096x128x128,8x512x512x256x256"]),
        environment=interpreter,
    ))  # fmt: skip
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        check.results.append(("compute-sanitizer", "not installed", 0.0))
        return
    # Each tensor an allocation of its own: what lies between tensors would else be the cache's.
    check.part("compute-sanitizer", 0.08, check.command(
        sanitizer, "--error-exitcode", "1", PYTHON, "-m", "pytest", "-q", "-x", "-p",
        "no:cacheprovider", "-p", "no:xdist", "tests/kernels/test_triton.py",
        "-k", "sizes or strides",
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "ADDITIVE_ATTN_TEST_DEVICE": "cuda"},
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_check.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    args = parser.parse_args()
    import torch

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
    parts(check)
    check.say("\n==> summary")
    for name, result, took in check.results:
        check.say(f"{took:6.0f} s  {name}: {result}")
    check.say(f"everything is in {folder}")
    if check.first:
        check.say(f"\n==> what failed first: {check.first}")
    sys.exit(bool(check.first))


if __name__ == "__main__":
    main()
