"""Checks of what users pass to a layer. Errors name what was passed, not what is projected from
it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from additive_attn.ops.checks import (
    DTYPES,
    INTEGERS,
    aligned_lengths,
    bounds,
    check_mask,
    checked_batch,
    has_values,
    is_dense,
    is_readable,
    refuse_dtypes,
    refuse_flags,
    refuse_ids,
    refuse_layouts,
    refuse_types,
    require,
    require_one_device,
    warn_user,
)
from additive_attn.spec.call import lse_dtype


def checked_number(name: str, count: int, of: str = "features") -> int:
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(
            f"{name} is {count!r:.60}, a {type(count).__name__}, but must be an integer, the "
            f"number of {of}."
        )
    if count < 1:
        raise ValueError(f"{name} is {count}, but the number of {of} must be at least 1.")
    return int(count)


def check_flags(**flags: Any) -> None:
    if not all(type(flag) is bool for flag in flags.values()):
        refuse_flags(**flags)


def check_factory(device: Any, dtype: Any) -> None:
    """Checks the device and dtype of parameters."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(
            f"dtype is {dtype!r:.60}, but parameters need torch.float64, torch.float32, "
            "torch.bfloat16, torch.float16, or None for torch's default."
        )
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (TypeError, RuntimeError, AssertionError) as error:
            raise type(error)(
                f"device is {device!r:.60}, on which no tensor can be made: "
                f"{str(error).splitlines()[0].rstrip('.')}."
            ) from None


_RANKS = {
    "": "all three must have 3 dims (batched) or all three 2 (unbatched). For "
    "one query (B, D) per sequence, use project and step; for more leading dims, such as heads, "
    "additive_attention.",
    "project": "both must have 3 dims (batched) or both 2 (unbatched).",
    "step": "needs one query per sequence: (B, query_dim) for a memory of keys "
    "(B, Lk, hidden_dim) and values (B, Lk, Dv), or (query_dim,) for keys (Lk, hidden_dim) and "
    "values (Lk, Dv).",
}


def refuse_ranks(caller: str, **tensors: Tensor) -> NoReturn:
    """``caller`` is a layer, or its method: "AdditiveAttention.step"."""
    refuse_ids(**tensors)
    raise ValueError(f"{got(caller, tensors)}, but {_RANKS[caller.partition('.')[2]]}")


def got(caller: str, tensors: dict[str, Tensor]) -> str:
    if any(x.is_nested and x.layout is torch.strided for x in tensors.values()):
        refuse_layouts(**tensors)  # they have no shape
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return f"{caller} got {found}"


def check_beams(caller: str, query: Tensor, key: Tensor, beams: int) -> None:
    """Checks queries beside an expanded memory of keys (B, Lk, hidden_dim) or (Lk, hidden_dim)."""
    queries = query.shape[0] if query.dim() > 1 else 1
    sequences = key.shape[0] if key.dim() == 3 else 1
    if queries != sequences * beams and (sequences > 1 or queries % beams or key.dim() == 2):
        raise ValueError(
            f"{got(caller, {'query': query, 'keys': key})}, but the memory was expanded to "
            f"{beams} beams per sequence: it needs {sequences * beams} queries, those of a "
            "sequence side by side."
        )


def check_memory(
    caller: str, key: Any, value: Any, lengths: Any = None, attn_mask: Any = None
) -> None:
    """Checks types and ranks of a user's own memory, since no later error would name them."""
    if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
        refuse_types(key=key, value=value)
    if not (is_dense(key) and is_dense(value)):
        refuse_layouts(key=key, value=value)
    if key.dtype not in DTYPES:
        refuse_dtypes(key=key)
    for name, each in (("lengths", lengths), ("attn_mask", attn_mask)):
        if each is not None and not isinstance(each, Tensor):
            raise TypeError(
                f"{caller} got a memory whose {name} is a {type(each).__name__}, but it must be a "
                "tensor or None. Prepare a memory with project, which takes more."
            )
        if each is not None and not is_dense(each):
            refuse_layouts(**{name: each})
    if not (2 <= key.dim() <= 3 and value.dim() == key.dim()):
        raise ValueError(
            f"{got(caller, {'keys': key, 'values': value})}, but needs a memory of keys "
            "(B, Lk, hidden_dim) and values (B, Lk, Dv), or both without B."
        )


def check_masking(
    key: Tensor, value: Tensor, lengths: Tensor | None, attn_mask: Tensor | None
) -> None:
    """Checks the masks of a memory that the user constructed, as every step does."""
    batch = checked_batch((key[..., :1, :], key, value, key.new_empty(key.shape[-1])))
    if batch is None:
        refuse_layouts(key=key, value=value)
    for each in (lengths, attn_mask):
        # One sequence may serve a batch of queries.
        if each is not None and tuple(batch) == (1,) and each.dim() > 0:
            batch = each.shape[:1]
    if lengths is not None:
        aligned_lengths(lengths, key, batch, 1)
    if attn_mask is not None:
        check_mask(attn_mask, key, batch, (1, key.shape[-2]))


def check_state(
    caller: str, state: tuple[Any, Any], query: Tensor, key: Tensor, first: Sequence[int],
    beams: int,
) -> None:  # fmt: skip
    """Raises unless the state fits query and memory, or has the shape ``first`` of the state that
    a memory starts with."""
    named = {"state.previous": state[0], "state.cumulative": state[1]}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{caller} got a {name} that is a {type(x).__name__}, but needs a tensor: begin "
                "with initial_state(memory)."
            )
        if not is_dense(x):
            refuse_layouts(**{name: x})
        if x.dtype not in DTYPES or lse_dtype(x.dtype) != lse_dtype(key.dtype):
            raise TypeError(
                f"{caller} got a {name} of {x.dtype} with keys of {key.dtype}, but weights are "
                f"float, of {lse_dtype(key.dtype)} here, or 16 bits. Convert them with "
                f".to({lse_dtype(key.dtype)})."
            )
    require_one_device(key=key, **named)
    try:
        batch = torch.broadcast_shapes(query.shape[:-1], first[:-1])
    except RuntimeError:
        return  # query and memory do not fit: the step fails, and explain_memory says why
    wanted = (*batch, key.shape[-2])
    found = state[0].shape  # which cannot be hashed in torch.export
    if state[1].shape != found or tuple(found) not in (wanted, tuple(first)):
        raise ValueError(
            f"{caller} got a state of {tuple(state[0].shape)} and {tuple(state[1].shape)}, a "
            f"query {tuple(query.shape)} and a memory of keys {tuple(key.shape)} and {beams} "
            f"beam(s), but they need a state of {wanted}: begin with initial_state(memory), and "
            "reorder it with the beams."
        )


def check_index(index: Any, queries: int, beside: Tensor, waits: bool = False) -> None:
    """Checks the numbers of earlier queries, one for each query to come. ``waits``: also reads
    them where that waits for a device."""
    if not isinstance(index, Tensor) or index.dtype not in INTEGERS:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index is {kind}; it must be a tensor of integers, one for each query.")
    if not is_dense(index):
        refuse_layouts(index=index)
    if index.device != beside.device:
        require_one_device(index=index, keys=beside)
    if index.dim() != 1:
        raise ValueError(f"index has shape {tuple(index.shape)}; it must have one dim, (N,).")
    if torch.compiler.is_compiling():
        require(
            ((index >= 0) & (index < queries)).all(),
            "index holds numbers of queries that do not exist: they are numbered from 0.",
        )
    elif index.numel() and has_values(index) and (waits or index.is_cpu):
        low, high = bounds(index)
        if not 0 <= low <= high < queries:
            raise ValueError(
                f"index holds {low} to {high}, but there are {queries} queries, numbered from 0 "
                f"to {queries - 1}."
            )


def check_coverage(weights: Any, coverage: Any) -> None:
    if not (isinstance(weights, Tensor) and isinstance(coverage, Tensor)):
        refuse_types(weights=weights, coverage=coverage)
    for name, x in (("weights", weights), ("coverage", coverage)):
        if not is_dense(x):
            refuse_layouts(**{name: x})
        if x.dtype not in DTYPES or lse_dtype(x.dtype) != lse_dtype(weights.dtype):
            raise TypeError(
                f"{name} has dtype {x.dtype} beside weights of {weights.dtype}, but attention "
                "weights, and their sum, are float, of one dtype, or of float32 beside 16 bits. "
                f"Convert it with .to(dtype)."
            )
    if weights.shape != coverage.shape or weights.dim() == 0:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} and coverage {tuple(coverage.shape)}, but "
            "both must be (B, Lk): the weights of a step, and state.cumulative before it."
        )
    require_one_device(weights=weights, coverage=coverage)


def check_narrowed(
    name: str, wide: Tensor, narrow: Tensor, attended: Callable[[], Tensor]
) -> None:
    """Raises where ``narrow`` ``(..., Lk, n)`` cannot hold a number of a key that is ``attended``,
    bool ``(..., Lk)``. Only where values can be read without waiting for a device."""
    if narrow.dtype == wide.dtype or not is_readable(narrow) or not narrow.isinf().any():
        return
    lost = narrow.isinf() & wide.isfinite() & attended().unsqueeze(-1)
    if lost.any():
        largest = wide.expand_as(lost)[lost].abs().max().item()
        raise ValueError(
            f"{name} holds {largest:.4g}, but {narrow.dtype} holds no number beyond "
            f"{torch.finfo(narrow.dtype).max:.4g}: it would become inf. Pass "
            "dtype=torch.bfloat16, or leave dtype out."
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
    """Raises an error that says why ``layer`` could not project it, where the reason is known."""
    # Checked only after the failure: autocast, and layers that users put in, accept more dtypes.
    if not is_dense(tensor):
        refuse_layouts(**{name: tensor})
    refuse_ids(**{name: tensor})
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
            raise TypeError(
                f"{name} is {tensor.dtype}, but the parameters of this layer are "
                f"{parameter.dtype}. Convert one of them with .to(dtype), or call under "
                "torch.autocast."
            ) from None


def explain_shapes(caller: str, batch_first: bool, lengths: Any, **tensors: Tensor) -> None:
    """Raises an error that says why shapes ``(B, L, ...)`` do not fit, where that is known."""
    if nested := {name: x for name, x in tensors.items() if x.is_nested}:
        if batch_first and all(x.layout is torch.jagged for x in nested.values()):
            return
        refuse_layouts(**nested)
    shapes, found = {name: x.shape for name, x in tensors.items()}, got(caller, tensors)
    at = 0 if batch_first else 1
    if not all(isinstance(n, int) for shape in shapes.values() for n in shape):
        return  # in torch.export, where sizes cannot be hashed
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
        counts = () if lengths is None else torch.as_tensor(lengths).shape
        if {*counts[:1]} == other - batch != set():
            raise ValueError(
                f"{found} and lengths {tuple(counts)}, one per sequence, but the batch "
                f"(dim {at}, batch_first={batch_first}) has another size. {hint}"
            ) from None
    length = 0 if len(shapes["key"]) == 3 and not batch_first else -2
    if shapes["key"][length] != shapes["value"][length]:
        raise ValueError(
            f"{found}, but each key belongs to one value: they may differ in the last dim only, "
            "or have a batch of 1."
        ) from None


def warn_of_polarity(attn_mask: Any, key_padding_mask: Any, ignores: bool = False) -> None:
    """Warns of bool masks that make sense only if they are inverted. With ``ignores``, True in
    attn_mask means: do not attend."""
    polarity = "attend, unlike in nn.MultiheadAttention"
    if ignores and getattr(attn_mask, "dtype", None) == torch.bool:
        attn_mask, polarity = ~attn_mask, "do not attend, as in nn.MultiheadAttention"
    if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool and attn_mask.dim() == 2:
        rows, keys = attn_mask.shape
        if 1 < rows == keys and is_readable(attn_mask):
            later = attn_mask[0, -1] and not attn_mask[0, 0] and not attn_mask[-1].any()
            if later and torch.equal(attn_mask, torch.ones_like(attn_mask).triu(1)):
                warn_user(
                    "attn_mask lets queries attend to later keys only, and the last query to "
                    f"none. Here True = {polarity}: invert it with ~attn_mask"
                    f"{'' if ignores else ', or pass is_causal=True'}.",
                )
    padding = key_padding_mask
    if isinstance(padding, Tensor) and padding.dtype == torch.bool and padding.dim() == 2:
        if padding.numel() and is_readable(padding) and padding[:, 0].all():
            if padding.all(-1).any() and not padding.all():
                warn_user(
                    "key_padding_mask ignores the first key of every sequence, and all keys of "
                    "some. Here True = ignore, as in nn.MultiheadAttention: if True marks the "
                    "keys to attend to, invert it with ~key_padding_mask.",
                )


def check_energy(layer: nn.Module, shape: Sequence[int], wanted: tuple[int, int]) -> None:
    if shape != wanted:
        raise ValueError(
            f"energy_layer is a {type(layer).__name__} that gives {tuple(shape)} where {wanted} "
            "is needed: it must map (..., hidden_dim) to (..., 1)."
        )


def refuse_energy(layer: nn.Module) -> NoReturn:
    hint = (
        "It may drop out at random in training (set that probability to 0) or hold another "
        "nonlinearity (use PlainAdditiveAttention)."
    )
    if any(hasattr(module, "fake_quant_enabled") for module in layer.modules()):
        hint = (
            "Quantisation-aware training rounds and clamps it: set energy_layer.qconfig = None "
            "before prepare_qat, which leaves this layer alone as a float Linear."
        )
    raise ValueError(
        f"energy_layer is a {type(layer).__name__} whose output is no affine function of its "
        f"input, so it cannot be fused. {hint}"
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
