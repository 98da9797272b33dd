"""Checks of what is passed to merge_attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from additive_attn.ops.checks import DTYPES, is_dense, refuse_layouts, require_one_device
from additive_attn.spec.call import lse_dtype


def check_merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, (Sequence, Tensor)) or not all(
            isinstance(tensor, Tensor) for tensor in given
        ):
            kind = type(given).__name__
            if isinstance(given, (list, tuple)):
                kind += f" of {', '.join(sorted({type(each).__name__ for each in given}))}"
            raise TypeError(
                f"merge_attention got {name} that are not a sequence of tensors, but a {kind}. "
                "Pass a list of the results of additive_attention."
            )
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"merge_attention got {len(outs)} outs and {len(lses)} lses, but needs one lse for "
            "each out and at least one of both. Call additive_attention with need_lse=True to "
            "get them."
        )
    for out, lse in zip(outs, lses, strict=True):
        if not (is_dense(out) and is_dense(lse)):
            refuse_layouts(out=out, lse=lse)
        if out.dim() == 0 or out.shape[:-1] != lse.shape or out.shape != outs[0].shape:
            raise ValueError(
                f"merge_attention got an out of shape {tuple(out.shape)} with an lse of shape "
                f"{tuple(lse.shape)}, but every out must be (..., Lq, Dv) with an lse (..., Lq), "
                f"all of the shape of the first, {tuple(outs[0].shape)}."
            )
        dtype = out.dtype
        if dtype not in DTYPES or dtype != outs[0].dtype or lse.dtype != lse_dtype(dtype):
            raise TypeError(
                f"merge_attention got an out of {out.dtype} with an lse of {lse.dtype}, but all "
                "outs must have one dtype among float64, float32, bfloat16 and float16 (the "
                f"first has {outs[0].dtype}), with an lse of float64 if that is float64, and of "
                "float32 otherwise. Convert them with .to(dtype)."
            )
        require_one_device(**{"outs[0]": outs[0], "out": out, "lse": lse})
