"""The operators ``additive_attn::forward`` and ``additive_attn::backward``: schemas, shapes, and
who computes them.

Every tensor argument broadcasts over leading dims. The plain PyTorch implementation serves every
device; a compiled library replaces it on the CPU.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from additive_attn import chunked

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
    batch = chunked.batch_shape(query, key, value, weight, attn_mask, lengths, seed)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    return (
        query.new_empty((*batch, num_queries, value.shape[-1])),
        query.new_empty((*batch, num_queries, num_keys) if need_weights else (0,)),
        query.new_empty((*batch, num_queries), dtype=chunked.lse_dtype(query.dtype)),
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
    batch = chunked.batch_shape(query, key, value, weight, attn_mask, lengths, seed)
    mask_shape = attn_mask.shape if need_mask and attn_mask is not None else (0,)
    return (
        query.new_empty((*batch, *query.shape[-2:]) if need_query else (0,)),
        query.new_empty((*batch, *key.shape[-2:]) if need_key else (0,)),
        query.new_empty((*batch, *value.shape[-2:]) if need_value else (0,)),
        query.new_empty((*batch, weight.shape[-1]) if need_weight else (0,), dtype=lse.dtype),
        query.new_empty(mask_shape),
    )


_CPU_PATHS = ("avx512", "avx2", "baseline", "pytorch")


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
    cure = "install a C++ compiler and run: pip install --force-reinstall --no-deps additive-attn"
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


library_path, cpu_reason = _load_library()

forward = torch.ops.additive_attn.forward.default
backward = torch.ops.additive_attn.backward.default


def cpu_path() -> str:
    """What computes on the CPU: avx512, avx2, neon, baseline, or pytorch."""
    return "pytorch" if library_path is None else torch.ops.additive_attn.cpu_isa()
