"""Every instruction set of the kernel that this machine has, and the fallback, pass the core."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import PACKAGE_PARENT

from additive_attn.ops import dispatch

TESTS = Path(__file__).parents[1]
RUNNING = dispatch.cpu_path()


def run(code, path, **variables):
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=False, cwd=PACKAGE_PARENT,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT, "ADDITIVE_ATTN_CPU": path, **variables},
    )  # fmt: skip


@pytest.mark.skipif(
    "ADDITIVE_ATTN_CPU" in os.environ, reason="ADDITIVE_ATTN_CPU already chooses the one path"
)
@pytest.mark.parametrize("path", ["baseline", "avx2", "avx512", "pytorch"])
def test_core(path):
    if path == RUNNING:
        pytest.skip(f"{path} is what the whole suite runs on")
    available = run(
        ["-c", "from additive_attn.ops import dispatch; print(dispatch.cpu_path())"], path
    )
    if available.returncode and "which this processor or this build lacks" in available.stderr:
        pytest.skip(f"this machine has no {path}")
    assert available.returncode == 0, available.stderr
    # The fallback has no tiles and vectors, around which to test.
    names = "not around and not drops_what" if path == "pytorch" else ""
    result = run(
        ["-m", "pytest", "-q", "-m", "core", "-k", names, "-p", "no:cacheprovider", str(TESTS)],
        path,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 300


def test_triton_interpreter():
    pytest.importorskip("triton")
    result = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_triton.py")],
        "triton", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 40
