"""Runs the CPU kernels under sanitizers: kernel_driver.cpp compares them with plain loops, without
torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
DRIVER = ROOT / "tests" / "kernels" / "kernel_driver.cpp"
STEP_DRIVER = DRIVER.with_name("step_driver.cpp")
COMPILERS = [os.environ.get("CXX"), "g++", "clang++"]
COMPILER = next((c for c in COMPILERS if c and shutil.which(c)), None)
FLAGS = ["-std=c++17", "-O1", "-g1", "-w", f"-I{CSRC}", "-pthread"]
# Only the undefined behaviour that kernels may have: the checks of all take twice as long to
# compile.
MEMORY = "-fsanitize=address,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
MEMORY += ",nonnull-attribute"
THREADS = "-fsanitize=thread"
# The kernels are compiled with -Og: in two thirds of the time of -O1, while they run a tenth
# longer.
QUICKLY = "-Og"
# The code that several threads execute is the same for all instruction sets.
BASELINE_ONLY = """#include "problem.h"
namespace additive_attn {
const Kernels* avx512_kernels() { return nullptr; }
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace additive_attn
"""

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: install g++ or set CXX"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="the sources of the CPU kernel are not here"),
]


def compile_all(sources: list[Path], folder: Path, *flags: str) -> list[Path]:
    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *FLAGS, *flags, "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


@pytest.fixture(scope="session")
def cache() -> Path:
    """Returns the folder for this compiler and these sources. Workers and later runs share it."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(
        version + repr((FLAGS, QUICKLY, MEMORY, THREADS, BASELINE_ONLY)).encode()
    )
    for source in (DRIVER, STEP_DRIVER, *sorted(CSRC.rglob("*.*"))):
        digest.update(source.read_bytes())
    folder = ROOT / ".pytest_cache" / "kernel_driver" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder: one process builds, and the others wait for its results."""
    import fcntl

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(
    cache: Path, name: str, sources: list[Path], sanitizer: str, driver: Path = DRIVER
) -> Path:
    """Builds the driver with these kernels. Only the kernels are instrumented."""
    program, folder = cache / f"{driver.stem} {name}", cache / f"{name} objects"
    with locked(cache):
        if program.exists():
            return program
        folder.mkdir(exist_ok=True)
        probe = folder / "probe.cpp"
        probe.write_text("int main() {}\n")
        command = [COMPILER, sanitizer, probe, "-o", folder / "probe"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"{COMPILER} cannot build programs with {sanitizer}")
        objects = [cache / f"{driver.stem}.o", *(folder / f"{s.stem}.o" for s in sources)]
        if not objects[0].exists():
            compile_all([driver], cache)
        missing = [s for s in sources if not (folder / f"{s.stem}.o").exists()]
        compile_all(missing, folder, QUICKLY, sanitizer)
        unfinished = folder / "driver"
        subprocess.run([COMPILER, *FLAGS, sanitizer, *objects, "-o", unfinished], check=True)
        return unfinished.rename(program)


SOURCES = [CSRC / "dispatch.cpp", *sorted((CSRC / "targets").glob("*.cpp"))]


@pytest.fixture(scope="session")
def driver(cache: Path) -> Path:
    return build(cache, "memory", SOURCES, MEMORY)


@pytest.fixture(scope="session")
def step_driver(cache: Path) -> Path:
    return build(cache, "memory", SOURCES, MEMORY, STEP_DRIVER)


@pytest.fixture(scope="session")
def threaded_driver(cache: Path) -> Path:
    baseline_only = cache / "baseline_only.cpp"
    baseline_only.write_text(BASELINE_ONLY)
    sources = [CSRC / "dispatch.cpp", CSRC / "targets" / "baseline.cpp", baseline_only]
    return build(cache, "threads", sources, THREADS)


def run(program: Path, kernels: str, *arguments: str) -> None:
    done = subprocess.run(
        [program, *arguments],
        env={**os.environ, "ADDITIVE_ATTN_CPU": kernels},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "which this processor or this build lacks" in done.stderr:
        pytest.skip(f"this processor has no {kernels}")
    # The undefined-behaviour sanitizer reports an error and continues.
    assert "runtime error" not in done.stderr, done.stderr[-5000:]
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"^[1-9]\d* passed, 0 failed$", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_results_and_memory(driver: Path, kernels: str) -> None:
    run(driver, kernels)


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_steps(step_driver: Path, kernels: str) -> None:
    run(step_driver, kernels)


def test_unknown_family_is_an_error(driver: Path) -> None:
    done = subprocess.run(
        [driver, "no such family"],
        env={**os.environ, "ADDITIVE_ATTN_CPU": "baseline"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "The families: keys, features," in done.stderr


@pytest.mark.parametrize("family", ["split keys", "gradients", "queries"])
def test_threads(threaded_driver: Path, family: str) -> None:
    run(threaded_driver, "baseline", family)
