"""The operators ``additive_attn::forward`` and ``additive_attn::backward``: schemas, shapes, and
who computes them.

Every tensor argument broadcasts over leading dims. The plain PyTorch implementation serves every
device; a compiled library replaces it on the CPU, and Triton kernels on a GPU.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from additive_attn import chunked, gpu
from additive_attn.shapes import batch_shape, lse_dtype

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, "
    "Tensor? attn_mask, Tensor? lengths, Tensor? seed"
)
_OPTIONS = "int left, int right, float dropout_p, float scale"

torch.library.define(
    "additive_attn::forward",
    f"({_INPUTS}, {_OPTIONS}, bool need_weights) -> (Tensor out, Tensor weights, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "additive_attn::backward",
    f"(Tensor? grad_out, Tensor? grad_weights, Tensor? grad_lse, {_INPUTS}, Tensor lse, "
    f"{_OPTIONS}, bool need_query, bool need_key, bool need_value, bool need_weight, bool "
    "need_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("additive_attn::forward", "default", chunked.forward)
torch.library.impl("additive_attn::backward", "default", chunked.backward)
torch.library.impl("additive_attn::forward", "CUDA", gpu.forward)
torch.library.impl("additive_attn::backward", "CUDA", gpu.backward)


def require_one_device(**tensors: Tensor | None) -> None:
    """Refuses tensors that lie on several devices, in words."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        found = ", ".join(f"{name} is on {device}" for name, device in given.items())
        raise RuntimeError(
            f"additive_attention needs all tensors on one device, but {found}. Move them with "
            ".to(device)."
        )


# One meta tensor brings a call here although the others are real, and what is returned would be
# memory that nobody has written.
@torch.library.register_fake("additive_attn::forward")
def _forward_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require_one_device(
        query=query, key=key, value=value, weight=weight, attn_mask=attn_mask, lengths=lengths,
        seed=seed,
    )  # fmt: skip
    batch = batch_shape(query, key, value, weight, attn_mask, lengths, seed)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    return (
        query.new_empty((*batch, num_queries, value.shape[-1])),
        query.new_empty((*batch, num_queries, num_keys) if need_weights else (0,)),
        query.new_empty((*batch, num_queries), dtype=lse_dtype(query.dtype)),
    )


@torch.library.register_fake("additive_attn::backward")
def _backward_shapes(
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    left: int,
    right: int,
    dropout_p: float,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_weight: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require_one_device(
        grad_out=grad_out, grad_weights=grad_weights, grad_lse=grad_lse,
        query=query, key=key, value=value, weight=weight, attn_mask=attn_mask, lengths=lengths,
        seed=seed, lse=lse,
    )  # fmt: skip
    batch = batch_shape(query, key, value, weight, attn_mask, lengths, seed)
    mask_shape = attn_mask.shape if need_mask and attn_mask is not None else (0,)
    return (
        query.new_empty((*batch, *query.shape[-2:]) if need_query else (0,)),
        query.new_empty((*batch, *key.shape[-2:]) if need_key else (0,)),
        query.new_empty((*batch, *value.shape[-2:]) if need_value else (0,)),
        query.new_empty((*batch, weight.shape[-1]) if need_weight else (0,), dtype=lse.dtype),
        query.new_empty(mask_shape),
    )


_CPU_PATHS = ("avx512", "avx2", "baseline", "pytorch", "triton")


def _load_library() -> tuple[Path | None, str]:
    """The compiled library, if any, and the reason for the choice in words."""
    forced = os.environ.get("ADDITIVE_ATTN_CPU")
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
    candidates = sorted(Path(__file__).parent.glob("_C*.so"))
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
    from additive_attn.triton import operators

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
