"""Runs checks in groups of processes. A group starts once for a file, by a server that has already
imported torch."""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

if not dist.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("needs torch.distributed and a fork server", allow_module_level=True)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
     "oracle", "additive_attn.distributed"]
)  # fmt: skip


def _work(rank: int, world: int, module: str, names: Sequence[str], folder: str, at: str) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    faulthandler.enable(Path(at, f"crash.{rank}").open("w"))  # for the stack of every thread
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{at}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ranks",))
    checks = importlib.import_module(module)
    for name in names:
        torch.manual_seed(0)
        message = ""
        try:
            getattr(checks, name)(mesh, Path(folder))
        except BaseException:
            message = traceback.format_exc()
        Path(at, f"{name}.{rank}").write_text(message, encoding="utf-8")
        if message:
            os._exit(1)  # the others may wait for this process
    dist.barrier()  # others may still read what this process has sent
    # The destructor of a group joins threads, which may wait for the interpreter's lock, while its
    # own thread has the lock: https://github.com/pytorch/pytorch/issues/56297
    os._exit(0)


def run(module: str, world: int, folder: Path, names: Sequence[str] = ()) -> None:
    """Runs functions check_...(mesh, folder) of a test module in one group: those named, or all.

    gloo's own threads have crashed (malloc found a heap that was overwritten) in checks in which
    valgrind, AddressSanitizer and an allocator with guarded pages found no fault. If they end a
    check, it is run once more, with a warning. A crash in one of Python's threads, which run the
    kernels, is a failure."""
    names = names or [name for name in vars(sys.modules[module]) if name.startswith("check_")]
    again: set[str] = set()
    while True:
        at = folder / f"group {len(again)}"
        failed, crashed = _attempt(module, world, folder, names, at)
        names = list(failed)
        if not crashed or any(CURRENT in stack for stack in crashed) or names[0] in again:
            break
        again.add(names[0])
        warnings.warn(
            "\n".join([f"Threads of torch's own ended {names[0]} of {module}.", *crashed]),
            stacklevel=2,
        )
    assert not failed, "\n".join([*failed.values(), *crashed])


CURRENT = "Current thread"  # what faulthandler prints if one of Python's threads got the signal
CRASHES = [-signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL, -signal.SIGSEGV]


def _attempt(
    module: str, world: int, folder: Path, names: Sequence[str], at: Path
) -> tuple[dict[str, str], list[str]]:
    """Returns the messages of each check that failed, and the stacks of processes that a signal
    ended."""
    at.mkdir(parents=True)
    arguments = (world, module, names, str(folder), str(at))
    group = [CONTEXT.Process(target=_work, args=(rank, *arguments)) for rank in range(world)]
    for process in group:
        process.start()
    end = time.monotonic() + 300  # for all; a test that hangs longer ends its worker
    for process in group:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    failed: dict[str, str] = {}
    for name in names:
        files = [at / f"{name}.{rank}" for rank in range(world)]
        said = [file.read_text("utf-8") if file.exists() else "was not run" for file in files]
        if any(said):
            failed[name] = "\n".join(
                f"{name} on process {rank}: {message}"
                for rank, message in enumerate(said)
                if message
            )
    ended = [rank for rank, process in enumerate(group) if process.exitcode in CRASHES]
    return failed, [f"process {rank}: {(at / f'crash.{rank}').read_text()}" for rank in ended]
