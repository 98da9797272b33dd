"""Attention over keys that are sharded over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from additive_attn.distributed.exchange import agree, checked_group
from additive_attn.distributed.layout import Masks, layout_of
from additive_attn.distributed.ring import ContextParallel, Plan
from additive_attn.ops.attend import masked_attention
from additive_attn.ops.checks import (
    Integers,
    aligned_lengths,
    as_integers,
    checked_window,
    is_readable,
    refuse_flags,
    refuse_types,
)
from additive_attn.spec.call import Call, Options

# Keys and values of all processes together, in bytes, up to which every process gathers them: less
# takes longer to send in turns than to send.
GATHER_BYTES = 4 * 2**20
_EXCHANGES = ("auto", "ring", "gather")


@torch.compiler.disable
def context_parallel_additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    mesh: DeviceMesh,
    *,
    lengths: Integers | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    scale: float = 1.0,
    need_lse: bool = False,
    starts: Integers | None = None,
    balanced: bool = False,
    exchange: str = "auto",
) -> Any:
    """:func:`additive_attention` of a sequence that is sharded over the processes of a mesh: each
    calls it with its shards, and gets the outputs of its queries over the keys of all processes.

    Masks and dropout go by positions in the whole sequence, so results and gradients are those of
    one process. Memory follows the shard: a process holds a few blocks as large as its own.

    Args:
        query: ``(..., Lq, H)``, the queries of this process.
        key, value: ``(..., Lk, H)`` and ``(..., Lk, Dv)``, its keys and values. Shards may differ
            in size, also be empty; other dims are equal on all processes.
        weight: ``(H,)``, or ``(heads, H)``, the same on all processes. Each gets the gradient of
            its own rows, as of all parameters of a model whose sequence is sharded: their sum is
            the whole, which DistributedDataParallel and FSDP make.
        mesh: of one dim; of a mesh of several dims that of the sequence, ``mesh["sequence"]``.
        lengths, starts: as in :func:`additive_attention`, counted in the whole sequence: ``(B,)``,
            or ``(B, Lq)`` for the queries of this process.
        is_causal, window: as in :func:`additive_attention`, by positions in the whole sequence.
        dropout_p: probability of dropping a weight. The seed is drawn by the first process of the
            mesh: the weights dropped are those that one process drops with its generator.
        scale, need_lse: as in :func:`additive_attention`.
        balanced: whether shards are those of ``shard_sequence(..., balanced=True)``. Otherwise
            the processes hold successive parts of the sequence.
        exchange: "ring": blocks are sent from process to process while others are computed with;
            "gather": every process gets all keys and values first; "auto": gather where they
            take 4 MiB or less together.

    Returns:
        out ``(..., Lq, Dv)``, and lse ``(..., Lq)`` if need_lse, of this process's queries.
        Differentiable once. All processes of the mesh take part in forward and in backward.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`additive_attention`; or the processes call
            with different shapes, dtypes or options, which all of them raise.
    """
    group = checked_group(mesh)
    try:
        given = {"query": query, "key": key, "value": value, "weight": weight}
        if not all(isinstance(x, Tensor) for x in given.values()):
            refuse_types(**given)
        if type(balanced) is not bool:
            refuse_flags(balanced=balanced)
        if exchange not in _EXCHANGES:
            raise ValueError(f"exchange is {exchange!r}, but must be one of {_EXCHANGES}.")
        # Checks, autocast and the seed; what depends on the whole sequence comes below.
        call: Call = masked_attention(
            (query, key, value, weight), None, None, is_causal, None, dropout_p, scale, False,
            None, need_lse, compute=lambda call, *_: call,
        )  # fmt: skip
        left, right = (-1, -1) if window is None else checked_window(window)
        aligned = [
            None if x is None else _aligned(x, name, call)
            for name, x in (("starts", starts), ("lengths", lengths))
        ]
        if call.query.device.type != mesh.device_type:
            raise RuntimeError(
                f"query is on {call.query.device}, but the mesh is one of {mesh.device_type} "
                "devices. Move the tensors with .to(device)."
            )
    except Exception as error:
        agree(group, _device(mesh, query), error, (0,) * 5)
        raise
    masks = Masks(left, 0 if is_causal else right, *aligned)
    plan = _agreed(group, call, masks, balanced, exchange)
    with torch.autocast(call.query.device.type, enabled=False):
        out, lse = ContextParallel.apply(plan, *call.inputs)
    return (out, lse) if need_lse else out


def _device(mesh: DeviceMesh, query: Any) -> torch.device:
    """One that the group can send from, whatever was passed."""
    if isinstance(query, Tensor) and query.device.type == mesh.device_type:
        return query.device
    current = mesh.device_type != "cpu" and torch.accelerator.current_device_index()
    return torch.device(mesh.device_type, current) if current else torch.device(mesh.device_type)


def _aligned(given: Integers, name: str, call: Call) -> Tensor:
    """Checked but for the number of keys, which no process knows yet."""
    anywhere = call.key.new_empty(1, 1).expand(2**62, 1)
    if (lowest := _extreme(as_integers(name, given, call.key.device), min)) < 0:
        raise ValueError(f"{name} holds {lowest}, but counts keys from 0.")
    return aligned_lengths(given, anywhere, call.batch(), call.query.shape[-2], name)


def _extreme(numbers: Tensor | None, of: Any) -> int:
    """The smallest or the largest of 0 and integers that are cheap to look at."""
    readable = numbers is not None and numbers.numel() and is_readable(numbers)
    return of(0, *(int(x) for x in numbers.aminmax())) if readable else 0  # type: ignore[union-attr]


def _agreed(
    group: dist.ProcessGroup, call: Call, masks: Masks, balanced: bool, exchange: str
) -> Plan:
    """What all processes call with."""
    query, key, value, weight = call.inputs
    common = {
        "leading dims of query, key and value": [tuple(x.shape[:-2]) for x in call.inputs[:3]],
        "features of query and value": (query.shape[-1], value.shape[-1]),
        "shape of weight": tuple(weight.shape),
        "dtype": query.dtype,
        "is_causal and window": masks[:2],
        "dropout_p": call.dropout_p,
        "scale": call.scale,
        "balanced": balanced,
        "exchange": exchange,
        "need of gradients of query, key, value and weight": [
            torch.is_grad_enabled() and x.requires_grad for x in call.inputs
        ],
    }
    drawn = 0 if call.seed is None else int(call.seed)
    highest = (_extreme(x, max) for x in masks[2:])
    told = agree(group, key.device, common, (query.shape[-2], key.shape[-2], drawn, *highest))
    rows = layout_of([x[0] for x in told], balanced, "queries")
    keys = layout_of([x[1] for x in told], balanced, "keys")
    total = sum(x[1] for x in told)
    for name, number in (("starts", 3), ("lengths", 4)):
        if (most := max(x[number] for x in told)) > total:
            raise ValueError(
                f"{name} holds {most}, but the keys of all processes have {total} positions."
            )
    features = key[..., :1, :].numel() + value[..., :1, :].numel()
    small = total * features * key.element_size() <= GATHER_BYTES
    seed, dropout_p, scale = call.options
    if seed is not None:
        seed = torch.full_like(seed, told[0][2])
    gathers = exchange == "gather" or (exchange == "auto" and small)
    return Plan(group, Options(seed, dropout_p, scale), masks, rows, keys, gathers)
