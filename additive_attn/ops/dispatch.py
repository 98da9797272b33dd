"""Which backend computes on which device, and why."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from additive_attn.backends import blocks
from additive_attn.ops import schemas  # noqa: F401

_GPU_PATHS = ("triton", "pytorch")


def gpu_forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels, _ = gpu_path()
    if kernels is None:
        return blocks.forward(*arguments)
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = kernels.forward(*arguments)
    return outputs


def gpu_backward(
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels, _ = gpu_path()
    if kernels is None:
        return blocks.backward(*arguments)
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    gradients = kernels.backward(*arguments)
    return gradients


@functools.cache
def gpu_path() -> tuple[ModuleType | None, str]:
    """The module of the Triton kernels, or None, and the reason in words; decided once."""
    forced = os.environ.get("ADDITIVE_ATTN_GPU") or None
    if forced is not None and forced not in _GPU_PATHS:
        raise ImportError(
            f"ADDITIVE_ATTN_GPU is {forced!r}, which names no GPU path. Set it to one of "
            f"{', '.join(_GPU_PATHS)}, or unset it to let the package choose."
        )
    if forced == "pytorch":
        return None, "ADDITIVE_ATTN_GPU=pytorch asks for plain PyTorch"
    try:
        kernels = importlib.import_module("additive_attn.backends.triton")
        kernels.probe(torch.device("cuda"))
    # Whatever Triton, the driver or the host compiler may raise, plain PyTorch still computes.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if forced is not None:
            raise ImportError(
                f"ADDITIVE_ATTN_GPU=triton cannot be served: {problem}. Triton >= 3.6 and a C "
                "compiler are needed: pip install triton"
            ) from error
        warnings.warn(
            "additive_attn computes on this GPU with plain PyTorch, which is many times slower: "
            f"{problem}. Triton >= 3.6 and a C compiler are needed: pip install triton; or set "
            "ADDITIVE_ATTN_GPU=pytorch to silence this warning.",
            stacklevel=3,
        )
        return None, problem
    return kernels, "Triton kernels" if forced is None else "chosen by ADDITIVE_ATTN_GPU"


def gpu_described() -> str:
    """For ``show_config``: what tensors on a GPU are computed with, and why."""
    if not torch.cuda.is_available():
        return "none (torch sees no GPU)"
    kernels, reason = gpu_path()
    return f"{'pytorch' if kernels is None else 'triton'} ({reason})"


torch.library.impl("additive_attn::forward", "default", blocks.forward)
torch.library.impl("additive_attn::backward", "default", blocks.backward)
torch.library.impl("additive_attn::forward", "CUDA", gpu_forward)
torch.library.impl("additive_attn::backward", "CUDA", gpu_backward)


_CPU_PATHS = ("avx512", "avx2", "baseline", "pytorch", "triton")


def _load_library() -> tuple[Path | None, str]:
    """The compiled library, if any, and the reason for the choice in words."""
    forced = os.environ.get("ADDITIVE_ATTN_CPU") or None
    if forced is not None and forced not in _CPU_PATHS:
        raise ImportError(
            f"ADDITIVE_ATTN_CPU is {forced!r}, which names no CPU path. Set it to one of "
            f"{', '.join(_CPU_PATHS)}, or unset it to let the package choose."
        )
    if forced == "pytorch":
        return None, "ADDITIVE_ATTN_CPU=pytorch asks for plain PyTorch"
    if forced == "triton":
        _interpret()
        return None, "ADDITIVE_ATTN_CPU=triton asks for the GPU's kernels in Triton's interpreter"
    candidates = sorted(Path(__file__).parents[1].glob("_C*.so"))
    problem = "the package was installed without its compiled library"
    if candidates:
        try:
            torch.ops.load_library(candidates[-1])
        except (OSError, RuntimeError) as error:
            problem = f"the compiled library does not load ({error})"
        else:
            why = "the best path of this machine" if forced is None else "ADDITIVE_ATTN_CPU"
            return candidates[-1], f"chosen by {why}"
    cure = (
        "install a C++ compiler and run, in the folder of the package's sources: pip install "
        "--force-reinstall --no-deps --no-build-isolation ."
    )
    if forced is not None:
        raise ImportError(
            f"ADDITIVE_ATTN_CPU={forced} cannot be served: {problem}. To build it, {cure}"
        )
    warnings.warn(
        "additive_attn computes on the CPU with plain PyTorch, which is several times slower: "
        f"{problem}. To build the library, {cure}; or set ADDITIVE_ATTN_CPU=pytorch to silence "
        "this warning.",
        stacklevel=2,
    )
    return None, problem


def _interpret() -> None:
    """Registers the Triton kernels for the CPU too, which tests them without a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError(
            "ADDITIVE_ATTN_CPU=triton runs the GPU's kernels in Triton's interpreter, to test "
            "them: set TRITON_INTERPRET=1 too."
        )
    from additive_attn.backends import triton as operators

    torch.library.impl("additive_attn::forward", "CPU", operators.forward)
    torch.library.impl("additive_attn::backward", "CPU", operators.backward)


library_path, cpu_reason = _load_library()

forward = torch.ops.additive_attn.forward.default
backward = torch.ops.additive_attn.backward.default


def cpu_path() -> str:
    """What computes on the CPU: avx512, avx2, neon, baseline, pytorch, or triton (interpreted)."""
    if library_path is None:
        return "triton" if os.environ.get("ADDITIVE_ATTN_CPU") == "triton" else "pytorch"
    isa: str = torch.ops.additive_attn.cpu_isa()
    return isa


_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator without the derivative that is registered on it. A Function turns
    gradients off for all transforms of ``torch.func``, so the outer ones get them back."""
    if _functorch_active():
        with torch.enable_grad(), _set_fwd_grad_enabled(True), _below_autograd():
            return operator(*arguments)
    with _below_autograd():
        return operator(*arguments)
