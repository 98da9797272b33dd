"""What does not fit a layer, told in the terms of who called it, before any projection."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from additive_attn.ops.checks import (
    INTEGERS,
    is_readable,
    refuse_layouts,
)


def checked_features(name: str, count: int, what: str = "feature") -> int:
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(
            f"{name} is {count!r}, a {type(count).__name__}, but must be an integer, the number "
            f"of {what}s."
        )
    if count < 1:
        raise ValueError(f"{name} is {count}, but a layer needs at least one {what}.")
    return int(count)


_RANKS = {
    "": "all three must have 3 dims (batched) or all three 2 (unbatched). For "
    "one query (B, D) per sequence, use project and step.",
    "project": "both must have 3 dims (batched) or both 2 (unbatched).",
    "step": "needs one query per sequence: (B, query_dim) for a memory of keys "
    "(B, Lk, hidden_dim) and values (B, Lk, Dv), or (query_dim,) for keys (Lk, hidden_dim) and "
    "values (Lk, Dv).",
}


def refuse_ranks(caller: str, **tensors: Tensor) -> NoReturn:
    """``caller`` is a layer, or its method: "AdditiveAttention.step"."""
    raise ValueError(f"{_got(caller, tensors)}, but {_RANKS[caller.partition('.')[2]]}")


def _got(caller: str, tensors: dict[str, Tensor]) -> str:
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return f"{caller} got {found}"


def explain_memory(
    caller: str, query: Tensor, key: Tensor, value: Tensor, hidden_dim: int
) -> None:
    """Raises the sentence that tells why a memory does not fit, if there is one."""
    found = _got(caller, {"query": query, "keys": key, "values": value})
    if key.shape[-1] != hidden_dim:
        raise ValueError(
            f"{found}, but hidden_dim is {hidden_dim}. Take a memory that this layer projected."
        ) from None
    if len({*query.shape[:-1], *key.shape[:-2], *value.shape[:-2]} - {1}) > 1:
        raise ValueError(
            f"{found}, but the batch (dim 0) must be the same, or 1: one query per sequence."
        ) from None


def check_beams(caller: str, query: Tensor, key: Tensor, beams: int) -> None:
    """Of a memory (B, Lk, hidden_dim) that was expanded."""
    if query.shape[0] % beams or key.shape[0] not in (1, query.shape[0] // beams):
        raise ValueError(
            f"{_got(caller, {'query': query, 'keys': key})}, but the memory was expanded to "
            f"{beams} beams per sequence: it needs {key.shape[0] * beams} queries, those of a "
            "sequence side by side."
        )


def check_memory_dtype(dtype: Any, key: Tensor) -> None:
    if dtype != key.dtype and (dtype, key.dtype) not in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        raise TypeError(
            f"dtype is {dtype}, and the projected keys are {key.dtype}. A memory is kept in their "
            "dtype, or beside float32 in torch.bfloat16 or torch.float16."
        )


def explain_projection(layer: nn.Module, name: str, tensor: Tensor, features: int) -> None:
    """Raises the sentence that tells why ``layer`` could not project it, if there is one."""
    # Asked only now: autocast, and layers that users put in, take more than their own dtype.
    if tensor.layout is not torch.strided or tensor.is_nested:
        refuse_layouts(**{name: tensor})
    if tensor.shape[-1] != features:
        raise ValueError(
            f"{name} has {tensor.shape[-1]} features, but this layer was made for "
            f"{name}_dim={features}."
        ) from None
    for parameter in layer.parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a tensor, but the parameters of this layer are sharded (DTensor). "
                "After fully_shard(layer), call register_fsdp_forward_method(layer, 'project') "
                "and (layer, 'step'), of torch.distributed.fsdp, so that these gather them too."
            ) from None
        if parameter.device != tensor.device:
            raise RuntimeError(
                f"{name} is on {tensor.device}, but this layer is on {parameter.device}. Move one "
                "of them with .to(device)."
            ) from None
        if parameter.dtype != tensor.dtype:
            hint = (
                "Embed token ids with nn.Embedding first"
                if tensor.dtype in INTEGERS
                else "Convert one of them with .to(dtype), or call under torch.autocast"
            )
            raise TypeError(
                f"{name} is {tensor.dtype}, but the parameters of this layer are "
                f"{parameter.dtype}. {hint}."
            ) from None


def explain_shapes(caller: str, batch_first: bool, lengths: Any, **tensors: Tensor) -> None:
    """Raises the sentence that tells why shapes ``(B, L, ...)`` do not fit, if there is one."""
    shapes, found = {name: x.shape for name, x in tensors.items()}, _got(caller, tensors)
    at = 0 if batch_first else 1
    if len(shapes["key"]) == 3:
        batch = {shape[at] for shape in shapes.values()} - {1}
        other = {shape[1 - at] for shape in shapes.values()} - {1}
        order = "(L, B, D)" if batch_first else "(B, L, D)"
        hint = f"If they are {order}, make the layer with batch_first={not batch_first}."
        if len(batch) > 1:
            raise ValueError(
                f"{found}, but the batch (dim {at}, batch_first={batch_first}) must be the same, "
                f"or 1. {hint if len(other) <= 1 else 'Stack or expand them.'}"
            ) from None
        if isinstance(lengths, Tensor) and {*lengths.shape[:1]} == other - batch:
            raise ValueError(
                f"{found} and lengths {tuple(lengths.shape)}, one per sequence, but the batch "
                f"(dim {at}, batch_first={batch_first}) has another size. {hint}"
            ) from None
    length = 0 if len(shapes["key"]) == 3 and not batch_first else -2
    if shapes["key"][length] != shapes["value"][length]:
        raise ValueError(
            f"{found}, but each key belongs to one value: they may differ in the last dim only, "
            "or have a batch of 1."
        ) from None


def warn_of_polarity(attn_mask: Any, key_padding_mask: Any, stacklevel: int) -> None:
    """Warns of bool masks that make sense only if they are inverted."""
    if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool and attn_mask.dim() == 2:
        rows, keys = attn_mask.shape
        if 1 < rows == keys and is_readable(attn_mask):
            later = attn_mask[0, -1] and not attn_mask[0, 0] and not attn_mask[-1].any()
            if later and torch.equal(attn_mask, torch.ones_like(attn_mask).triu(1)):
                warnings.warn(
                    "attn_mask lets queries attend to later keys only, and the last query to "
                    "none. Here True = attend, unlike in nn.MultiheadAttention: invert it with "
                    "~attn_mask, or pass is_causal=True.",
                    stacklevel=stacklevel,
                )
    padding = key_padding_mask
    if isinstance(padding, Tensor) and padding.dtype == torch.bool and padding.dim() == 2:
        if padding.numel() and is_readable(padding) and padding[:, 0].all():
            if padding.all(-1).any() and not padding.all():
                warnings.warn(
                    "key_padding_mask ignores the first key of every sequence, and all keys of "
                    "some. Here True = ignore, as in nn.MultiheadAttention: if True marks the "
                    "keys to attend to, invert it with ~key_padding_mask.",
                    stacklevel=stacklevel,
                )


def check_energy(layer: nn.Module, shape: Sequence[int], wanted: tuple[int, int]) -> None:
    if shape != wanted:
        raise ValueError(
            f"energy_layer is a {type(layer).__name__} that gives {tuple(shape)} where {wanted} "
            "is needed: it must map (..., hidden_dim) to (..., 1)."
        )


def refuse_energy(layer: nn.Module) -> NoReturn:
    raise ValueError(
        f"energy_layer is a {type(layer).__name__} whose output is no affine function of its "
        "input, so it cannot be fused. It may drop out at random in training (set that "
        "probability to 0) or hold another nonlinearity (use PlainAdditiveAttention)."
    )


def refuse_backward_hooks() -> NoReturn:
    raise ValueError(
        "energy_layer has backward hooks, but gradients of energies do not pass through it, "
        "because it is fused. Remove them, or hook its parameters with register_hook."
    )


def refuse_root(layer: nn.Module) -> NoReturn:
    raise TypeError(
        f"{type(layer).__name__} itself was passed to torch.fx.symbolic_trace, which cannot "
        "look into it. Trace a model that holds it as a layer."
    )


def refuse_memory(caller: str, memory: Any) -> NoReturn:
    raise TypeError(
        f"{caller} got a memory that is a {type(memory).__name__}, but needs a ProjectedMemory. "
        "Prepare it with project."
    )
