"""One call: autocast, checks, the seed of dropout, then the differentiable operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from additive_attn.backends.plain import whole
from additive_attn.ops import dispatch
from additive_attn.ops.autocast import autocast, autocast_dtype
from additive_attn.ops.autograd import attend
from additive_attn.ops.block_mask import block_terms, is_block_mask
from additive_attn.ops.checks import (
    Integers,
    aligned_lengths,
    check_mask,
    checked_batch,
    checked_probability,
    checked_scale,
    checked_window,
    is_dense,
    named,
    refuse_flags,
    refuse_layouts,
    refuse_rank,
    refuse_types,
)
from additive_attn.ops.masking import checked_bias, mask_of_lengths, with_bias, with_padding
from additive_attn.ops.scores import score
from additive_attn.spec.call import Call, Inputs
from additive_attn.spec.dropout import draw_seed

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # as Inputs, which costs more to make
_autocasts = torch._C._is_any_autocast_enabled
# Call(...) binds its arguments by name first, which costs as much again.
_tuple: Any = tuple.__new__


def masked_attention(
    inputs: _Inputs,
    attn_mask: Any,
    lengths: Integers | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    dropout_p: float,
    scale: float,
    need_weights: bool,
    score_bias: Tensor | None = None,
    need_lse: bool = False,
    key_padding_mask: Tensor | None = None,
    starts: Integers | None = None,
    bias: Tensor | None = None,
    compute: Callable[..., Any] = attend,
) -> Any:
    """Checks the arguments, casts them under autocast and attends. Returns out, weights (empty
    unless needed) and lse. ``score_bias`` is a ``bias`` that needs no check, for calls that do not
    need lse. ``compute`` replaces ``attend``."""
    query, key, value, weight = inputs
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and isinstance(weight, Tensor)
    ):
        inputs = query, key, value, weight = filled(*inputs, dropout_p)
    # Five times cheaper than asking per device; autocast is usually off.
    autocasts = _autocasts()
    if autocasts:
        inputs, attn_mask = _autocasted(inputs, attn_mask)
        query, key, value, weight = inputs
    batch = checked_batch(inputs)
    if batch is None:
        # Imported here, since it calls this function.
        from additive_attn.ops.packed import jagged_attention

        if compute is not attend:
            refuse_layouts(**named(inputs))
        without = attn_mask, lengths, key_padding_mask, starts, need_weights or None
        return jagged_attention(
            inputs, without, is_causal, window, dropout_p, scale, need_lse, bias
        )
    table = tiles = None
    if attn_mask is not None:
        if is_block_mask(attn_mask):
            shape = query.shape[-2], key.shape[-2]
            table, tiles = block_terms(attn_mask, query, batch, *shape)
            attn_mask = None
        else:
            check_mask(attn_mask, query, batch, (query.shape[-2], key.shape[-2]))
    if lengths is not None:
        attn_mask, lengths = _with_lengths(attn_mask, lengths, query, key, batch)
    if starts is not None:
        starts = aligned_lengths(starts, key, batch, query.shape[-2], "starts")
    if key_padding_mask is not None:
        attn_mask = with_padding(attn_mask, key_padding_mask, key, batch)
    left, right = (-1, -1) if window is None else checked_window(window)
    if not (type(is_causal) is type(need_weights) is type(need_lse) is bool):
        refuse_flags(is_causal=is_causal, need_weights=need_weights, need_lse=need_lse)
    right = 0 if is_causal else right
    if bias is not None:
        score_bias = checked_bias(bias, query)
        if need_lse:
            attn_mask, score_bias = with_bias(attn_mask, bias, query.dtype), None
    if type(scale) is not float or not -math.inf < scale < math.inf:
        scale = checked_scale(scale)
    if type(dropout_p) is not float or not 0.0 <= dropout_p <= 1.0:
        dropout_p = checked_probability("dropout_p", dropout_p)
    seed = draw_seed(query.device) if dropout_p > 0.0 else None
    arguments = (
        query, key, value, weight, attn_mask, lengths, starts, table, tiles, left, right,
        seed, dropout_p, scale,
    )  # fmt: skip
    call = _tuple(Call, arguments)
    if autocasts and not torch.compiler.is_compiling():
        with torch.autocast(query.device.type, enabled=False):  # no backend narrows further
            return compute(call, need_weights, score_bias, need_lse)
    return compute(call, need_weights, score_bias, need_lse)


def _with_lengths(
    attn_mask: Tensor | None, lengths: Integers, query: Tensor, key: Tensor, batch: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the lengths; or, as a small call is computed with on plain PyTorch in any case,
    the mask of the lengths."""
    if dispatch.cpu_is_plain and attn_mask is None and key.is_cpu and len(batch) == 1:
        num_keys = key.shape[-2]
        if query.numel() * num_keys <= whole.ELEMENTS:
            mask = mask_of_lengths(lengths, num_keys)
            if mask is not None and mask.shape[:1] == batch:
                return mask, None
    return attn_mask, aligned_lengths(lengths, key, batch, query.shape[-2])


def filled(query: Any, key: Any, value: Any, weight: Any, dropout_p: float) -> Inputs:
    """Fills in a query of zeros, and values without features, where they are left out. Neither
    takes more memory than one row."""
    if isinstance(key, Tensor) and (query is None or value is None):
        if not is_dense(key):
            refuse_layouts(key=key)
        if key.dim() < 2:
            refuse_rank("key", key.shape, "(..., Lk, H)")
        if value is None:
            if dropout_p != 0.0:
                raise ValueError(
                    f"dropout_p is {dropout_p!r}, but the value is left out, and the returned "
                    "weights are those before dropout. Apply F.dropout to them, or pass a value."
                )
            value = key.detach().narrow(-1, 0, 0)
        if query is None and isinstance(weight, Tensor):
            *batch, _, hidden = key.shape
            if weight.dim() == 2 and batch and batch[-1] == 1:
                batch[-1] = weight.shape[0]
            shape = weight.shape
            if shape != (hidden,) and shape not in ((1, hidden), (*batch[-1:], hidden)):
                raise ValueError(
                    f"weight has shape {tuple(shape)}, but a key of shape {tuple(key.shape)}, "
                    f"with the query left out, needs a weight of shape ({hidden},), or (heads, "
                    f"{hidden}) where dim -3 of key is heads."
                )
            query = key.new_zeros(hidden).expand(*batch, 1, hidden)
    given = Inputs(query, key, value, weight)
    if not all(isinstance(x, Tensor) for x in given):
        refuse_types(**{n: x for n, x in given._asdict().items() if n != "value" or x is not None})
    return given


def masked_scores(
    query: Tensor, key: Tensor, weight: Tensor, attn_mask: Any,
    lengths: Integers | None, is_causal: bool, window: tuple[int, int] | None, scale: float,
    key_padding_mask: Tensor | None, starts: Integers | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    # The scores do not read values. Where the key is no tensor, the error names no value.
    value: Any = key if isinstance(key, Tensor) else None
    result: Tensor = masked_attention(
        (query, key, value, weight), attn_mask, lengths, is_causal, window, 0.0, scale, False,
        None, True, key_padding_mask, starts, bias, score,
    )[0]  # fmt: skip
    return result


def masked_step(
    inputs: _Inputs, attn_mask: Tensor | None, lengths: Integers | None, dropout_p: float,
    scale: float, need_weights: bool, need_lse: bool, *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``masked_attention`` for one query per entry: query ``(..., H)``, mask ``(..., Lk)``."""
    query, key, value, weight = inputs
    rows, mask = query, attn_mask
    if isinstance(query, Tensor):
        if query.dim() == 0:
            refuse_rank("query", query.shape, "(..., H)")
        rows = query.unsqueeze(-2)
        if isinstance(key, Tensor) and query.dim() == key.dim():
            _refuse_row(query, key)
    if isinstance(mask, Tensor) and mask.dim() > 0:
        mask = mask.unsqueeze(-2)
    try:
        out, weights, lse = masked_attention(
            (rows, key, value, weight), mask, lengths, False, None, dropout_p, scale,
            need_weights, None, need_lse, *options,
        )  # fmt: skip
    except ValueError as error:
        made = {"query": (query, rows), "attn_mask": (attn_mask, mask)}
        raise ValueError(f"{error} {_explained_rows(made)}") from None
    # An output that is not needed may be None, or of any shape.
    weights = weights.squeeze(-2) if need_weights else weights
    return out.squeeze(-2), weights, lse.squeeze(-1) if need_lse else lse


def _refuse_row(query: Tensor, key: Tensor) -> None:
    """Raises where a dim of queries, of size 1, would be broadcast along the batch of keys."""
    if not (is_dense(query) and is_dense(key)):
        return
    q, k = tuple(query.shape), tuple(key.shape)
    if q[:-1] == (*k[:-2], 1) and k[-3:-2] > (1,):
        raise ValueError(
            f"query has shape {q} beside keys {k}, so its dim of 1 would count as a leading dim, "
            "and each query attend to the keys of all sequences. Pass query.squeeze(-2), or call "
            "additive_attention."
        )


def _explained_rows(made: dict[str, tuple[Any, Any]]) -> str:
    """Returns the end of an error sentence that names other shapes than the user passed."""
    found = [
        f"{name} {tuple(given.shape)} as {tuple(rows.shape)}"
        for name, (given, rows) in made.items()
        if isinstance(given, Tensor) and given is not rows
    ]
    return f"(One query per sequence is one row of queries: {', '.join(found)}.)" if found else ""


def _autocasted(inputs: _Inputs, attn_mask: Tensor | None) -> tuple[_Inputs, Tensor | None]:
    """Casts inputs, except float64, to autocast's dtype where it is on. No mask is narrowed."""
    dtype = autocast_dtype(inputs[0].device.type)
    if dtype is None:
        return inputs, attn_mask
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        # A mask in bfloat16 and inputs in float16, or the reverse: float32 holds both.
        narrow = attn_mask.dtype.itemsize == 2 and attn_mask.dtype != dtype
        attn_mask = attn_mask.float() if narrow else attn_mask
    query, key, value, weight = inputs
    cast_key = autocast(key, dtype)
    cast_value = cast_key if value is key else autocast(value, dtype)
    return (autocast(query, dtype), cast_key, cast_value, autocast(weight, dtype)), attn_mask
