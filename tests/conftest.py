"""Runs every test on its paths, with fresh memory that is never zeros."""

from __future__ import annotations

import ctypes
import gc
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers are the threads

import emulation
import features
import paths
import pytest
import torch

from additive_attn.ops import dispatch
from additive_attn.ops import memory as memory_of_steps

if paths.DEVICE != "cpu":
    torch.set_default_device(paths.DEVICE)
    if os.environ.get("ADDITIVE_ATTN_TEST_UNCHECKED"):
        # Skips the self-check, which would disable Triton's kernels.
        from additive_attn.backends import triton

        triton.probe = lambda *_: None


# The bytes of unwritten memory: 3e38 and 0.75 as float, both far from zero as index. There are two
# since a kernel may compute large numbers in another form, in which they change no result.
FILLS = 0x7F, 0x3F


def poison_memory(fill: int) -> None:
    """Fills every fresh allocation with a byte.

    Outputs and buffers that a kernel does not write usually read as zero, which hides the bug.
    """
    perturb, mmap_threshold = -6, -3
    try:
        libc = ctypes.CDLL(None)
        # Fresh memory from mmap is not perturbed, so large blocks are also allocated on the heap.
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(perturb, fill ^ 0xFF)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


poison_memory(FILLS[0])


def poison_device() -> None:
    """Frees small and large blocks of NaN, which the allocator returns next."""
    sizes = [2**9] * 64 + [2**14] * 16 + [2**19] * 8 + [2**25]
    blocks = [torch.full((size,), 255, dtype=torch.uint8) for size in sizes]
    blocks.clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--path", choices=["native"], help="no test runs on any other path")
    parser.addoption(
        "--compiled", choices=["80", "90"],
        help="only the Triton kernels, compiled for sm_80 or sm_90, in an emulator",
    )  # fmt: skip
    parser.addoption("--features", metavar="FILE", help="write which features the tests computed")


def pytest_configure(config: pytest.Config) -> None:
    """Raises where the tests would run on the fallback unasked: they would not test the kernel."""
    if paths.native() == "pytorch" and paths.FORCED != "pytorch":
        reason = dispatch.cpu_reason if paths.DEVICE == "cpu" else dispatch.gpu_path()[1]
        raise pytest.UsageError(
            f"The tests would run on plain PyTorch: {reason}. Build the kernel (make build), or "
            "set ADDITIVE_ATTN_CPU=pytorch to test the fallback."
        )
    if config.option.compiled:
        try:
            emulation.install(int(config.option.compiled))
        except emulation.Unusable as error:
            raise pytest.UsageError(f"--compiled: {error}.") from error
    if config.option.path == "native":
        paths.available = lambda: (paths.native(),)
    if config.option.features:
        features.record()


# Paths. Every test runs on the native one. ``core`` adds the other instruction sets and plain
# PyTorch, ``interpreter`` adds Triton's interpreter; ``triton`` runs on Triton's kernels alone.
# ``kernel`` adds the other instruction sets, and does not run on plain PyTorch.


def paths_of(marks: set[str]) -> list[str]:
    if "triton" in marks:
        return [path for path in paths.available() if path == "triton"]
    extra = {*paths.PLAIN, *paths.INSTRUCTION_SETS} if "core" in marks else set()
    if "kernel" in marks:
        extra = set(paths.INSTRUCTION_SETS)
    if "interpreter" in marks:
        extra.add("triton")
    if "kernel" not in marks or paths.native() != "pytorch":
        extra.add(paths.native())
    return [path for path in paths.available() if path in extra]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    if marks & {"core", "kernel", "interpreter", "triton"}:
        absent = pytest.param("", marks=pytest.mark.skip(reason="no such kernel runs here"))
        metafunc.parametrize("path", paths_of(marks) or [absent], indirect=True)


def path_of(item: pytest.Item) -> str:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return str(parameters.get("path", paths.native()))


def asked_for(item: pytest.Item, compiled: bool) -> bool:
    """Whether a test runs: with ``--compiled``, if it runs on Triton kernels or is of that
    option."""
    if item.get_closest_marker("compiled"):
        return compiled
    return not compiled or path_of(item) == "triton"


def interpreted(item: pytest.Function) -> bool:
    """Whether the marker ``interpreter`` selects these values of the parameters."""
    parameters = item.callspec.params
    wanted = item.get_closest_marker("interpreter")
    if parameters.get("path") != "triton" or wanted is None or paths.native() == "triton":
        return True
    return all(
        repr(parameters[name]) in map(repr, values) for name, values in wanted.kwargs.items()
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not hasattr(item, "callspec") or interpreted(item)]
    items[:] = [item for item in items if asked_for(item, bool(config.option.compiled))]
    if "sweep" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("sweep")]
        config.stash[SWEEPS] = len(left_out)
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
    if hasattr(config, "workeroutput"):
        config.workeroutput["sweeps"] = config.stash.get(SWEEPS, 0)


def pytest_collection_finish() -> None:
    """Exempts modules and tests, which are needed until the end, from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Ends the exemption. Otherwise libraries warn, at the end of the process, about what is
    left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The path that the test computes on."""
    name = getattr(request, "param", paths.native())
    request.node.user_properties.append(("path", name))
    with paths.running(name):
        yield name


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    poison_memory(FILLS[zlib.crc32(request.node.nodeid.encode()) % len(FILLS)])
    if paths.DEVICE == "cpu":
        # torch.manual_seed saves the stack of every call, for a GPU that is used later.
        torch.default_generator.manual_seed(0)
        yield
        return
    torch.manual_seed(0)
    poison_device()
    yield
    try:
        torch.get_device_module(paths.DEVICE).synchronize()
    except RuntimeError:
        # After an illegal access no GPU work runs in this process; xdist starts another one.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets the number of threads; the old number is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The features that passing tests of all workers computed.

computed: set[features.Cell] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Runs in the process of the test, after each of its phases."""
    if report.when == "setup":
        features.clear()
    elif report.when == "call" and report.passed:
        computed.update(features.passed())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["features"] = list(computed)
    elif session.config.option.features:
        features.write(session.config.option.features, computed)


# The lines that are printed at the start and at the end.

SWEEPS = pytest.StashKey[int]()


def pytest_report_header() -> list[str]:
    others = [path for path in (*paths.INSTRUCTION_SETS, *paths.PLAIN, "triton")
              if path not in paths.available()]  # fmt: skip
    if emulation.installed():
        return [f"additive_attn: Triton kernels {emulation.described()}, in an emulator of PTX"]
    lines = [f"additive_attn on {paths.DEVICE}: all tests on {paths.native()}"]
    if len(paths.available()) > 1:
        names = ", ".join(paths.available()[1:]).replace("triton", "triton (in its interpreter)")
        lines[0] += f"; core tests also on {names}"
    if others:
        lines.append(f"not here or not asked for: {', '.join(others)}")
    return lines


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {})
    node.config.stash[SWEEPS] = told.get("sweeps", 0)
    computed.update(map(tuple, told.get("features", ())))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    stats = terminalreporter.stats
    passed = Counter(
        dict(report.user_properties).get("path") for report in stats.get("passed", ())
    )
    if passed:
        counts = (f"{path} {passed[path]}" for path in paths.available() if passed[path])
        terminalreporter.write_line(f"passed by path: {', '.join(counts)}")
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ")
                      for report in stats.get("skipped", ()))  # fmt: skip
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    if config.stash.get(SWEEPS, 0):
        terminalreporter.write_line(
            f"left out: {config.stash[SWEEPS]} expensive sweeps; make test-all runs them too"
        )


@pytest.fixture
def steps_leave_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes plain PyTorch record small steps, which are ordinary calls there otherwise
    (test_whole_steps.py)."""
    monkeypatch.setattr(memory_of_steps, "WHOLE_ELEMENTS", -1)
