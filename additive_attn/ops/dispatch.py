"""Which backend computes on which device, and why."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from additive_attn.backends.plain import blocks, pairs, steps, tangents
from additive_attn.backends.plain import scores as plain_scores
from additive_attn.ops.checks import warn_user
from additive_attn.ops.library import find_library, how_to_build
from additive_attn.ops.schemas import registrations

PLAIN: dict[str, Any] = {
    "forward": blocks.forward,
    "backward": blocks.backward,
    "scores": plain_scores.scores,
    "scores_backward": plain_scores.scores_backward,
    "pair_scores": pairs.pair_scores,
    "pair_gradients": pairs.pair_gradients,
    "prepare_keys": steps.prepare_keys,
    "step": steps.step,
    "step_backward": steps.step_backward,
    "keep_entries": steps.keep_entries,
    "location_features": steps.location_features,
    "location_features_backward": steps.location_features_backward,
}
# Composed of the operators above, on every device.
_COMPOSED = {"tangent": tangents.tangent, "scores_tangent": tangents.scores_tangent}
_CPU_PATHS = ("avx512", "avx2", "baseline", "pytorch", "triton")
_GPU_PATHS = ("triton", "pytorch")
# Repeat a call that has a launch plan, without the dispatcher's call to Python, or return None.
# ``gpu_path`` sets them.
repeated_forward: Callable[..., Any] | None = None
repeated_backward: Callable[..., Any] | None = None
_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active


def _forced(variable: str, paths: tuple[str, ...]) -> str | None:
    """Returns the path that an environment variable names; empty counts as unset."""
    path = os.environ.get(variable) or None
    if path is not None and path not in paths:
        raise ImportError(
            f"{variable} is {path!r}, which names no path. Set it to one of {', '.join(paths)}, "
            "or unset it to let the package choose."
        )
    return path


def _choose_cpu() -> tuple[str | None, str]:
    """Returns the compiled library, if any, and the reason for the choice, as text."""
    forced = _forced("ADDITIVE_ATTN_CPU", _CPU_PATHS)
    if forced == "pytorch":
        return None, "ADDITIVE_ATTN_CPU=pytorch asks for plain PyTorch"
    if forced == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ImportError(
                "ADDITIVE_ATTN_CPU=triton runs the GPU's kernels in Triton's interpreter, to test "
                "them: set TRITON_INTERPRET=1 too."
            )
        return None, "ADDITIVE_ATTN_CPU=triton asks for the GPU's kernels in Triton's interpreter"
    path, text = find_library()
    if path is not None:
        why = "ADDITIVE_ATTN_CPU asks for it" if forced else "fastest kernel this CPU supports"
        return str(path), ", ".join(filter(None, (why, text and f"library {text}")))
    if forced is not None:
        raise ImportError(
            f"ADDITIVE_ATTN_CPU={forced} asks for a compiled kernel, but {text}. To build it, "
            f"{how_to_build()}"
        )
    return None, text


def _register_cpu() -> None:
    if os.environ.get("ADDITIVE_ATTN_CPU") == "triton":
        kernels = importlib.import_module("additive_attn.backends.triton")
        for name in PLAIN.keys() & vars(kernels).keys():
            registrations.impl(name, getattr(kernels, name), "CPU")


def _warn_of_plain_path() -> None:
    if library_path is None and not os.environ.get("ADDITIVE_ATTN_CPU"):
        warnings.warn(
            "additive_attn computes on the CPU with plain PyTorch, several times slower than its "
            f"compiled kernel: {cpu_reason}. To build the kernel, {how_to_build()}; or set "
            "ADDITIVE_ATTN_CPU=pytorch to silence this warning.",
            stacklevel=2,
        )


def cpu_path() -> str:
    """Returns the CPU's path: avx512, avx2, neon, baseline, pytorch, or triton (interpreted)."""
    if library_path is None:
        return "triton" if os.environ.get("ADDITIVE_ATTN_CPU") == "triton" else "pytorch"
    isa: str = torch.ops.additive_attn.cpu_isa()
    return isa


@functools.cache
def gpu_path() -> tuple[ModuleType | None, str]:
    """Returns the module of the Triton kernels, or None, and the reason, as text. Decides once."""
    forced = _forced("ADDITIVE_ATTN_GPU", _GPU_PATHS)
    if forced == "pytorch":
        return None, "ADDITIVE_ATTN_GPU=pytorch asks for plain PyTorch"
    try:
        kernels = importlib.import_module("additive_attn.backends.triton")
        kernels.probe(torch.device("cuda"), blocks.forward, blocks.backward, warn_user)
    # Whatever Triton, the driver or the host compiler may raise, plain PyTorch still computes.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if forced is not None:
            raise ImportError(
                f"ADDITIVE_ATTN_GPU=triton asks for the Triton kernels, but {problem}. Triton >= "
                "3.6 and a C compiler are needed: pip install triton"
            ) from error
        warn_user(
            "additive_attn computes on this GPU with plain PyTorch, which is many times slower: "
            f"{problem}. Triton >= 3.6 and a C compiler are needed: pip install triton; or set "
            "ADDITIVE_ATTN_GPU=pytorch to silence this warning.",
        )
        return None, problem
    global repeated_forward, repeated_backward
    repeated_forward, repeated_backward = kernels.repeated, kernels.again
    return kernels, "Triton kernels" if forced is None else "chosen by ADDITIVE_ATTN_GPU"


def gpu_described() -> str:
    """For ``show_config``: what computes tensors on a GPU, and why."""
    if not torch.cuda.is_available():
        return "none (torch finds no GPU)"
    kernels, reason = gpu_path()
    return f"{'pytorch' if kernels is None else 'triton'} ({reason})"


def on_plain_path(device: torch.device) -> bool:
    """Whether plain PyTorch computes tensors of this device."""
    if device.type == "cpu":
        return cpu_is_plain
    return gpu_path()[0] is None if device.type == "cuda" else device.type != "meta"


def _on_gpu(name: str) -> Any:
    def run(*arguments: Any) -> Any:
        kernels, _ = gpu_path()
        return getattr(kernels, name, PLAIN[name])(*arguments)

    return run


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator without the derivative that is registered on it. A Function turns
    gradients off for all transforms of ``torch.func``, so they are on again for the outer ones."""
    if _functorch_active():
        with torch.enable_grad(), _set_fwd_grad_enabled(True), _below_autograd():
            return operator(*arguments)
    with _below_autograd():
        return operator(*arguments)


# What may raise comes before what is registered, so that a failed import can be repeated.
library_path, cpu_reason = _choose_cpu()
_forced("ADDITIVE_ATTN_GPU", _GPU_PATHS)  # raises for a wrong name, even without a GPU
cpu_is_plain = library_path is None and os.environ.get("ADDITIVE_ATTN_CPU") != "triton"
_warn_of_plain_path()
for _name, _operator in PLAIN.items():
    registrations.impl(_name, _operator, "CompositeExplicitAutograd")
    registrations.impl(_name, _on_gpu(_name), "CUDA")
for _name, _operator in _COMPOSED.items():
    registrations.impl(_name, _operator, "CompositeExplicitAutograd")
_register_cpu()

forward = torch.ops.additive_attn.forward.default
backward = torch.ops.additive_attn.backward.default
# Without the call through Python, whose cost shows in small calls.
forward_directly, backward_directly = forward._op, backward._op
scores = torch.ops.additive_attn.scores.default
scores_backward = torch.ops.additive_attn.scores_backward.default
scores_directly, scores_backward_directly = scores._op, scores_backward._op
tangent = torch.ops.additive_attn.tangent.default
scores_tangent = torch.ops.additive_attn.scores_tangent.default
