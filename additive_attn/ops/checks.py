"""Checks of what users pass to functions and layers, with the error sentences."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from additive_attn.spec.call import Inputs, lse_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
)  # fmt: skip
Integers = Tensor | Sequence[int]
_LISTED = (Sequence, Integral, torch.SymInt)
# Whether a transform of torch.func made the tensor. It has no memory, even after the transform.
is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor
_is_compiling, _tracing_state = torch.compiler.is_compiling, torch._C._get_tracing_state


def warn_user(message: str) -> None:
    """Warns at the line that called the package, however many frames lie between."""
    level, frame, ours = 1, sys._getframe(), ("additive_attn", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is neither sparse nor nested. A nested one may have the layout strided."""
    return tensor.layout is torch.strided and not tensor.is_nested


def require_one_device(**tensors: Tensor | None) -> None:
    """Raises RuntimeError unless all tensors lie on one device."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        found = ", ".join(f"{name} is on {device}" for name, device in given.items())
        raise RuntimeError(
            f"Additive attention needs all tensors on one device, but {found}. Move them with "
            ".to(device)."
        )


def checked_batch(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> torch.Size | None:
    """Returns the leading dims that dense tensors of one dtype and device broadcast to; None for
    nested tensors."""
    query, key, value, weight = inputs
    if not (query.layout is key.layout is value.layout is weight.layout is torch.strided):
        if torch.jagged in (query.layout, key.layout, value.layout):
            return None
        refuse_layouts(**named(inputs))
    try:
        q, k, v, w = query.shape, key.shape, value.shape, weight.shape
    except RuntimeError:  # a nested tensor may have the layout strided, and has no shape
        refuse_layouts(**named(inputs))
    batch = q[:-2]
    # Fast path: the usual batch, along which nothing but a weight (1, H) is broadcast, or none.
    if not (
        (
            len(q) == len(k) == len(v) == 3
            and q[0] == k[0] == v[0]
            and k[1] == v[1]
            and q[2] == k[2]
            and (w[0] == q[2] if len(w) == 1 else w == (1, q[2]))
        )
        or (len(q) == len(k) == len(v) == 2 and k[0] == v[0] and q[1:] == k[1:] == w)
    ):
        try:
            batch = _broadcast_batch(q, k, v, w)
        except ValueError:
            refuse_ids(**named(inputs))
            raise
    dtype = query.dtype
    if not (dtype == key.dtype == value.dtype == weight.dtype and dtype in DTYPES):
        refuse_dtypes(**named(inputs))
    if not (query.is_cpu and key.is_cpu and value.is_cpu and weight.is_cpu) and not (
        query.device == key.device == value.device == weight.device
    ):
        require_one_device(**named(inputs))
    return batch


def named(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns the inputs by the names of the arguments, without a value that is the key itself."""
    named: dict[str, Tensor] = Inputs(*inputs)._asdict()
    if named["value"] is named["key"]:
        del named["value"]
    return named


def _broadcast_batch(
    query: torch.Size, key: torch.Size, value: torch.Size, weight: torch.Size
) -> torch.Size:
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) < 2:
            rows, size = "Lq" if name == "query" else "Lk", "Dv" if name == "value" else "H"
            refuse_rank(name, shape, f"(..., {rows}, {size})")
    if query[-1] != key[-1]:
        raise ValueError(
            f"query has {query[-1]} features and key has {key[-1]}, but they are added to each "
            "other: project both to the same hidden size H."
        )
    if key[-2] != value[-2]:
        raise ValueError(
            f"key has {key[-2]} positions and value has {value[-2]}, but each key belongs to one "
            "value: key is (..., Lk, H) and value is (..., Lk, Dv)."
        )
    try:
        batch = query[:-2]
        if not batch == key[:-2] == value[:-2]:
            batch = torch.broadcast_shapes(batch, key[:-2], value[:-2])
    except RuntimeError:
        found = f"query {tuple(query)}, key {tuple(key)} and value {tuple(value)}"
        if key[:-2] == value[:-2]:
            found = f"query {tuple(query)} and key {tuple(key)}"
        raise ValueError(
            f"The leading dims of {found} do not broadcast to each other. Each must be equal, or "
            "1."
        ) from None
    heads = query[-3:-2]
    if weight != query[-1:] and not (heads and weight in (heads + query[-1:], (1, query[-1]))):
        raise ValueError(
            f"weight has shape {tuple(weight)}, but a query of shape {tuple(query)} needs a "
            f"weight of shape ({query[-1]},), or (heads, {query[-1]}) where dim -3 of query is "
            "heads."
        )
    return batch


def refuse_rank(name: str, shape: torch.Size, needed: str) -> NoReturn:
    dims = "two dims" if needed.count(",") > 1 else "one dim"
    raise ValueError(f"{name} has shape {tuple(shape)}, but needs at least {dims}: {needed}.")


def check_mask(
    attn_mask: Tensor, query: Tensor, batch: torch.Size, scores: tuple[int, int]
) -> None:
    if not isinstance(attn_mask, Tensor):
        hint = conversion(attn_mask)
        if callable(attn_mask):
            hint = "Make a BlockMask of a mask_mod with create_block_mask."
        raise TypeError(
            f"attn_mask is a {type(attn_mask).__name__}, but must be a tensor, a BlockMask or "
            f"None. {hint}"
        )
    if not is_dense(attn_mask):
        refuse_layouts(attn_mask=attn_mask)
    dtype = attn_mask.dtype
    if dtype != torch.bool and dtype != query.dtype and dtype != lse_dtype(query.dtype):
        hint = ".bool()" if dtype in INTEGERS else f".to({query.dtype})"
        raise TypeError(
            f"attn_mask has dtype {dtype}, but must be bool (True = attend), or float to be added "
            f"to the scores: of the dtype of query, {query.dtype}, or of float32 beside 16 bits. "
            f"Convert it with {hint}."
        )
    if attn_mask.device != query.device:
        require_one_device(query=query, attn_mask=attn_mask)
    full = (*batch, *scores)
    shape = attn_mask.shape
    if shape != full and not broadcasts(shape, full):
        hint = ""
        if shape == (*batch[:1], scores[1]):
            hint = " One mask per sequence needs a dim of queries: .unsqueeze(1)."
        elif len(batch) > 1 and shape == (batch.numel(), *scores):
            hint = f" Split its dim 0 with .unflatten(0, {tuple(batch)})."
        elif shape[-2:] == scores[::-1] != scores:
            hint = " Transpose it with .mT."
        raise ValueError(
            f"attn_mask has shape {tuple(shape)}, but must broadcast to (..., Lq, Lk) = {full}: "
            f"each dim, counted from the last, must be equal or 1.{hint}"
        )


def as_integers(
    name: str, given: Any, device: torch.device, num_keys: int | None = None
) -> Tensor:
    """Returns a tensor of integers unchanged, and lists, tuples and NumPy arrays as a tensor on
    ``device``. Their numbers are compared with ``num_keys`` before they are copied there."""
    listed = not isinstance(given, Tensor)
    if not isinstance(given, Tensor):
        try:
            # torch.tensor raises for some strides of arrays, and drops the mask of masked ones.
            numbers = given if isinstance(given, _LISTED) else given.tolist()
            given = torch.tensor(numbers, device="cpu")
        except (AttributeError, TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{name} is {given!r:.60}, a {type(given).__name__}, but must be integers: a "
                "tensor, or a list or NumPy array of them. Convert it with torch.tensor."
            ) from None
        if given.numel() == 0:
            given = given.long()
    if given.dtype not in INTEGERS:
        hint = "Convert it with .long()."
        if given.dtype == torch.bool:  # which .long() would make lengths of 0 and 1
            hint = "Pass a mask of padding as key_padding_mask, where True = ignore."
        raise TypeError(f"{name} has dtype {given.dtype}, but must hold integers. {hint}")
    if listed and num_keys is not None:
        check_range(name, given, num_keys)
    return given.to(device) if listed else given


def check_range(name: str, numbers: Tensor, num_keys: int) -> None:
    """Raises unless numbers that can be read at once lie between 0 and ``num_keys``."""
    if not is_readable(numbers) or numbers.numel() == 0:
        return
    low, high = bounds(numbers)
    if low < 0 or high > num_keys:
        raise ValueError(
            f"{name} holds values from {low} to {high}, but key has {num_keys} positions: "
            f"{name} must lie between 0 and {num_keys}."
        )


def aligned_lengths(
    lengths: Integers, key: Tensor, batch: torch.Size, num_queries: int, name: str = "lengths"
) -> Tensor:
    """Returns ``lengths`` as int64, broadcastable to ``(*batch, Lq)``."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS:
        lengths = as_integers(name, lengths, key.device, key.shape[-2])
    if not is_dense(lengths):
        refuse_layouts(**{name: lengths})
    if lengths.device != key.device:
        require_one_device(**{"key": key, name: lengths})
    shape, full = lengths.shape, (*batch[:1], num_queries)
    per_query = len(shape) == len(full)
    wanted = full if per_query else full[:-1]
    if shape != wanted and not (len(shape) >= len(full) - 1 and broadcasts(shape, wanted)):
        raise ValueError(
            f"{name} has shape {tuple(shape)}, but must be {tuple(full[:-1])}, one "
            f"{name[:-1]} per sequence, or {full}, one per query; each dim may also be 1."
        )
    if lengths.dtype != torch.int64:
        lengths = lengths.to(torch.int64)
    check_range(name, lengths, key.shape[-2])
    if len(batch) > 1 or (batch and not per_query):
        rows = shape[-1] if per_query else 1
        lengths = lengths.reshape(shape[0], *(1,) * (len(batch) - 1), rows)
    return lengths


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether each dim, counted from the last, is equal or 1."""
    for size, wanted in zip(reversed(shape), reversed(full), strict=False):
        if size != 1 and size != wanted:
            return False
    return len(shape) <= len(full)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds values: not on meta, nor in a trace or transform, where there may be
    none, or others than those that the program will run with."""
    return (
        not _is_compiling()
        and _tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not tensor.is_meta
        and not is_wrapper(tensor)
        # A subclass with its own __torch_dispatch__, such as FakeTensor, may hold no values.
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def is_readable(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device or ending a trace or transform."""
    return tensor.is_cpu and has_values(tensor)


def require(condition: Tensor, sentence: str) -> None:
    """Raises ValueError unless ``condition``, a tensor of one bool, is true. A compiled graph
    raises RuntimeError when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, sentence)
    elif has_values(condition) and not condition:
        raise ValueError(sentence)


def bounds(tensor: Tensor) -> tuple[int, int]:
    """The smallest and the largest element of an integer tensor."""
    if tensor.numel() > 64:
        low, high = tensor.aminmax()
        return int(low), int(high)
    # A decoder step is so short that the cost of calling a reduction would show.
    values = tensor.tolist() if tensor.dim() == 1 else tensor.flatten().tolist()
    return min(values), max(values)


def checked_scale(scale: float) -> float:
    """``scale`` as a float, from any finite real number."""
    try:
        number = float(scale) if isinstance(scale, Real) else math.nan
    except OverflowError:
        number = math.inf
    if isinstance(scale, bool) or not -math.inf < number < math.inf:
        raise ValueError(
            f"scale is {scale!r}, but the scores need a finite factor, a number such as a float. "
            "The default is 1.0."
        )
    return number


def checked_probability(name: str, p: float) -> float:
    """``p`` as a float, from any real number in [0, 1]."""
    if isinstance(p, bool) or not isinstance(p, Real) or not 0.0 <= p <= 1.0:
        raise ValueError(
            f"{name} is {p!r}, but a probability is a number, such as a float, between 0 and 1."
        )
    return float(p)


def _is_side(side: Any) -> bool:
    if isinstance(side, (int, Integral)):  # int first, since Integral is slow
        return not isinstance(side, bool) and -1 <= int(side) < 2**63
    return isinstance(side, torch.SymInt) and side >= -1


def checked_window(window: tuple[int, int]) -> tuple[int, int]:
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not (pair and _is_side(window[0]) and _is_side(window[1])):
        raise ValueError(
            f"window is {window!r}, but must be a pair (left, right) of integers below "
            "2**63, each -1 (unbounded) or more: query i attends to the keys i - left ... i + "
            "right."
        )
    left, right = (x if isinstance(x, torch.SymInt) else int(x) for x in window)
    return left, right


_TYPE_HINTS = {
    "PackedSequence": "Unpack it with torch.nn.utils.rnn.pad_packed_sequence(packed, "
    "batch_first=True), which gives a tensor and its lengths.",
    "Proxy": "torch.fx.symbolic_trace cannot look into it: call torch.fx.wrap"
    "('additive_attention') in the module that uses it, or make AdditiveAttention a layer of the "
    "traced model.",
    "NoneType": "Pass a tensor.",
    "ProjectedMemory": "A memory is for step(query, memory).",
    "MaskedArray": "torch.as_tensor would drop its mask: fill masked entries first, with .filled.",
    "tuple": "Pass one tensor: h of an LSTM's (h, c), or the outputs of (outputs, state).",
}


def conversion(given: Any) -> str:
    """Returns a sentence that says how to make a tensor of ``given``."""
    module = isinstance(given, torch.nn.Module)
    usual = "Pass its weight." if module else "Convert it with torch.as_tensor."
    return _TYPE_HINTS.get(type(given).__name__, usual)


def refuse_types(**given: Any) -> NoReturn:
    wrong = {name: each for name, each in given.items() if not isinstance(each, Tensor)}
    if "value" in wrong and wrong["value"] is given.get("key"):
        del wrong["value"]  # the user did not pass it
    found = ", ".join(f"{name} is a {type(each).__name__}" for name, each in wrong.items())
    hints = " ".join(sorted({conversion(each) for each in wrong.values()}))
    raise TypeError(f"Additive attention needs tensors, but {found}. {hints}")


def refuse_layouts(**tensors: Tensor) -> NoReturn:
    found = ", ".join(
        f"{name} is nested" if tensor.is_nested else f"{name} is {tensor.layout}"
        for name, tensor in tensors.items()
        if not is_dense(tensor)
    )
    raise TypeError(
        f"Additive attention needs dense tensors, but {found}. Convert a sparse tensor with "
        ".to_dense(), and a nested one with .to_padded_tensor(0.0), passing its lengths."
    )


def refuse_flags(**flags: Any) -> NoReturn:
    wrong = {name: flag for name, flag in flags.items() if not isinstance(flag, bool)}
    found = ", ".join(f"{name} is {flag!r}" for name, flag in wrong.items())
    raise TypeError(f"{found}, but must be True or False. Convert it with bool().")


def refuse_dtypes(**tensors: Tensor) -> NoReturn:
    found = ", ".join(f"{name} is {tensor.dtype}" for name, tensor in tensors.items())
    hint = "Convert them with .to(dtype), or call under torch.autocast."
    if any(tensor.dtype in INTEGERS for tensor in tensors.values()):
        hint = "Embed token ids with nn.Embedding first."
    raise TypeError(
        "Additive attention needs tensors of one dtype among float64, "
        f"float32, bfloat16 and float16, but {found}. {hint}"
    ) from None


def refuse_ids(**tensors: Tensor) -> None:
    """Raises TypeError where token ids were passed: their dtype is wrong, not their shape."""
    if any(tensor.dtype in INTEGERS for tensor in tensors.values()):
        refuse_dtypes(**tensors)
