"""The CPU kernels under the sanitizers, without torch: tests/kernel_driver.cpp against plain loops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
COMPILER = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
FLAGS = ["-std=c++17", "-g1", f"-I{CSRC}", "-pthread"]
MEMORY = ["-O1", "-fsanitize=address,undefined"]
THREADS = ["-O1", "-fsanitize=thread"]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: set CXX, or install g++ or clang++"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="the kernel's sources are not here"),
]


def build(folder: Path, sanitizer: list[str]) -> Path:
    """The driver and the kernels of every instruction set, in one program."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    linked = subprocess.run([COMPILER, *sanitizer, probe, "-o", folder / "probe"], capture_output=True)
    if linked.returncode or subprocess.run([folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{COMPILER} cannot build programs with {sanitizer[-1]}")

    sources = [*sorted(CSRC.glob("kernels*.cpp")), ROOT / "tests" / "kernel_driver.cpp"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *FLAGS, *sanitizer, "-w", "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "driver"
    subprocess.run([COMPILER, *FLAGS, *sanitizer, *objects, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("memory"), MEMORY)


@pytest.fixture(scope="module")
def threaded_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("threads"), THREADS)


def run(program: Path, kernels: str, *arguments: str) -> None:
    done = subprocess.run(
        [program, *arguments],
        env={**os.environ, "ADDITIVE_ATTN_CPU": kernels},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "which this processor or this build lacks" in done.stderr:
        pytest.skip(f"this processor has no {kernels}")
    # The undefined-behaviour sanitizer reports and goes on.
    assert "runtime error" not in done.stderr, done.stderr[-5000:]
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"^[1-9]\d* passed, 0 failed$", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_results_and_memory(driver: Path, kernels: str) -> None:
    run(driver, kernels)


@pytest.mark.parametrize("family", ["split keys", "gradients", "queries"])
def test_threads(threaded_driver: Path, family: str) -> None:
    run(threaded_driver, "", family)
