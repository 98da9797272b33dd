"""What runs on this machine, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

from additive_attn.ops import dispatch


def show_config() -> str:
    """Prints and returns the versions in use, which implementation computes on which device and
    why, and on what hardware the implementations have run."""
    # The version of the code that runs; the metadata may belong to another, installed copy.
    from additive_attn import __version__

    lines = {
        "additive_attn": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu path": f"{dispatch.cpu_path()} ({dispatch.cpu_reason})",
        "cpu library": str(dispatch.library_path or "none"),
        "cpu threads": str(torch.get_num_threads()),
        "gpu path": dispatch.gpu_described(),
        "run so far": "the compiled kernel on x86-64; the Triton kernels on one NVIDIA H200",
        "other devices": "pytorch (plain PyTorch in blocks of query rows)",
    }
    width = max(map(len, lines))
    text = "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items())
    print(text)
    return text


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return (
            "not installed"
            if importlib.util.find_spec(distribution.replace("-", "_")) is None
            else "unknown"
        )
