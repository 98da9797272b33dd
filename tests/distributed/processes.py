"""Groups of processes that run checks: started once for a file, by a server that has imported
torch already."""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import multiprocessing
import os
import sys
import time
import traceback
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


def _work(rank: int, world: int, module: str, names: Sequence[str], folder: str) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    faulthandler.enable()  # a crash shows the stack of every thread
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world,
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
        Path(folder, f"{name}.{rank}").write_text(message, encoding="utf-8")
        if message:
            os._exit(1)  # the others may wait for this process
    dist.barrier()  # the others may still need what this process has sent
    # The destructor of a group joins threads that may wait for the interpreter's lock, which its
    # thread holds: https://github.com/pytorch/pytorch/issues/56297
    os._exit(0)


def run(module: str, world: int, folder: Path, names: Sequence[str] = ()) -> None:
    """Runs functions check_...(mesh, folder) of a test module, all unless named, in one group."""
    names = names or [name for name in vars(sys.modules[module]) if name.startswith("check_")]
    arguments = (world, module, names, str(folder))
    group = [CONTEXT.Process(target=_work, args=(rank, *arguments)) for rank in range(world)]
    for process in group:
        process.start()
    end = time.monotonic() + 300  # of all together: before a test that hangs ends its worker
    for process in group:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
    bad = []
    for name in names:
        for rank in range(world):
            file = folder / f"{name}.{rank}"
            message = file.read_text(encoding="utf-8") if file.exists() else "was not run"
            if message:
                bad.append(f"{name} on process {rank}: {message}")
    assert not bad, "\n".join(bad)
