"""Attention over keys that are sharded over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from additive_attn.distributed.exchange import agree, checked_group, sending_device
from additive_attn.distributed.layout import Masks, layout_of, length
from additive_attn.distributed.ring import ContextParallel, Plan
from additive_attn.ops.attend import masked_attention
from additive_attn.ops.block_mask import is_block_mask
from additive_attn.ops.checks import (
    Integers,
    aligned_lengths,
    as_integers,
    check_mask,
    checked_window,
    is_readable,
    refuse_flags,
    refuse_types,
)
from additive_attn.ops.second_order import has_tangents
from additive_attn.spec.call import Call, Inputs, Options

# Up to so many bytes of all processes together, every process gathers keys and values, or queries:
# sending so little in turns takes longer than gathering it.
GATHER_BYTES = 4 * 2**20
_TRANSFORMED = (
    "context_parallel_additive_attention was called under torch.func (vmap, grad, jvp) or with "
    "tangents of forward mode, but is differentiable only by .backward() and "
    "torch.autograd.grad. Leading dims take the place of vmap. For the rest call "
    "additive_attention, on the whole sequence."
)
_EXCHANGES = ("auto", "ring", "keys", "queries")


@torch.compiler.disable
def context_parallel_additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    mesh: DeviceMesh,
    *,
    attn_mask: Tensor | None = None,
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

    Masks and dropout depend on positions in the whole sequence, so results and gradients are those
    of one process. Memory follows the shard: a process holds a few blocks as large as its own.

    Args:
        query: ``(..., Lq, H)``, the queries of this process. DTensors are taken too, sharded along
            the sequence, with a replicated weight; the results are DTensors then.
        key, value: ``(..., Lk, H)`` and ``(..., Lk, Dv)``, its keys and values. Shards may differ
            in size, also be empty; other dims are equal on all processes.
        weight: ``(H,)``, or ``(heads, H)``, the same on all processes. Each gets a part of its
            gradient, as of all parameters of a model whose sequence is sharded: the sum is the
            whole, which DistributedDataParallel and FSDP make.
        mesh: of one dim. Of a mesh of several dims pass that of the sequence,
            ``mesh["sequence"]``.
        attn_mask: bool or float, as in :func:`additive_attention`: it broadcasts to
            ``(..., Lq, keys of all processes)``, for the queries of this process.
        lengths, starts: as in :func:`additive_attention`, counted in the whole sequence: ``(B,)``,
            or ``(B, Lq)`` for the queries of this process.
        is_causal, window: as in :func:`additive_attention`, by positions in the whole sequence.
        dropout_p: probability of dropping a weight. The seed is drawn by the first process of the
            mesh: the weights dropped are those that one process drops with its generator.
        scale, need_lse: as in :func:`additive_attention`.
        balanced: whether shards are those of ``shard_sequence(..., balanced=True)``. Otherwise
            the processes hold successive parts of the sequence.
        exchange: "ring": blocks of keys and values are sent from process to process while another
            is computed; "keys": every process gets all of them first; "queries": every process
            gets all queries, and attends to its own keys. "auto": keys where those of all
            processes take 4 MiB or less, else queries where they and their outputs do, else ring.

    Returns:
        out ``(..., Lq, Dv)``, and lse ``(..., Lq)`` if need_lse, of this process's queries.
        All processes of the mesh take part in forward and in backward. Differentiable any number
        of times; with create_graph=True every process gathers keys and values first.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`additive_attention`. All processes raise
            where they call with different shapes, dtypes or options.
    """
    group = checked_group(mesh)
    try:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(_TRANSFORMED)
        if type(balanced) is not bool:
            refuse_flags(balanced=balanced)
        if exchange not in _EXCHANGES:
            raise ValueError(f"exchange is {exchange!r}, but must be one of {_EXCHANGES}.")
        inputs = query, key, value, weight
        call = _checked(inputs, mesh, is_causal, dropout_p, scale, need_lse, balanced)
        masking = _masking(call, attn_mask, starts, lengths, is_causal, window)
    except Exception as error:
        agree(group, sending_device(mesh, query), error, (0,) * 7)
        raise
    plan = _agreed(group, call, *masking, balanced, exchange)
    with torch.autocast(call.query.device.type, enabled=False):
        out, lse = ContextParallel.apply(plan, attn_mask, *call.inputs)
    if hasattr(query, "device_mesh"):
        rows = sum(length(x) for x in plan.rows)
        out, lse = _sharded(out, mesh, rows, -2), _sharded(lse, mesh, rows, -1)
    return (out, lse) if need_lse else out


def _masking(
    call: Call, attn_mask: Any, starts: Any, lengths: Any, is_causal: bool, window: Any
) -> tuple[Masks, int, bool]:
    """Returns checked masks by position, the number of keys of attn_mask, and whether any mask
    differs between queries."""
    if has_tangents((attn_mask,)):
        raise RuntimeError(_TRANSFORMED)
    left, right = (-1, -1) if window is None else checked_window(window)
    given = {"starts": starts, "lengths": lengths}
    aligned = [None if x is None else _aligned(x, n, call) for n, x in given.items()]
    masks = Masks(left, 0 if is_causal else right, *aligned)
    masked = 1 if attn_mask is None else _masked_keys(attn_mask, call)
    per_query = any(x is not None and _is_per_query(x, call) for x in given.values())
    return masks, masked, per_query or attn_mask is not None


def _local(name: str, tensor: Any, mesh: DeviceMesh, balanced: bool) -> Any:
    """Returns the shard of a DTensor. Other tensors are shards already."""
    if not hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import Partial, Replicate, Shard

    wanted = Replicate() if name == "weight" else Shard(tensor.dim() - 2)
    if tensor.device_mesh != mesh or tensor.placements != (wanted,) or balanced:
        raise ValueError(
            f"{name} is a DTensor of placements {tensor.placements} on {tensor.device_mesh}, with "
            f"balanced={balanced}, but must be {wanted} on {mesh}, whose shards are not balanced. "
            "Call .redistribute, or pass local tensors."
        )
    return tensor.to_local(grad_placements=[Partial() if name == "weight" else wanted])


def _sharded(local: Tensor, mesh: DeviceMesh, size: int, dim: int) -> Tensor:
    """Returns a DTensor, sharded along ``dim``, which has ``size`` positions in all."""
    from torch.distributed.tensor import DTensor, Shard

    shape = list(local.shape)
    shape[dim] = size
    strides = torch.empty(shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        local, mesh, [Shard(local.dim() + dim)], shape=torch.Size(shape), stride=strides
    )
    return made


def _checked(
    inputs: Any, mesh: DeviceMesh, is_causal: bool, dropout_p: float, scale: float,
    need_lse: bool, balanced: bool,
) -> Call:  # fmt: skip
    """Returns the call of this process's shards: no masks, cast under autocast, with a seed."""
    if has_tangents(inputs):
        raise RuntimeError(_TRANSFORMED)
    named = zip(Inputs._fields, inputs, strict=True)
    inputs = [_local(name, x, mesh, balanced) for name, x in named]
    if not all(isinstance(x, Tensor) for x in inputs):
        refuse_types(**dict(zip(Inputs._fields, inputs, strict=True)))
    call: Call = masked_attention(
        inputs, None, None, is_causal, None, dropout_p, scale, False, None, need_lse,
        compute=lambda call, *_: call,
    )  # fmt: skip
    if call.query.device.type != mesh.device_type:
        raise RuntimeError(
            f"query is on {call.query.device}, but the mesh is one of {mesh.device_type} "
            "devices. Move the tensors with .to(device)."
        )
    return call


def _aligned(given: Integers, name: str, call: Call) -> Tensor:
    """Checks all but the number of keys, since the processes have not exchanged theirs yet."""
    anywhere = call.key.new_empty(1, 1).expand(2**62, 1)
    if (lowest := _extreme(as_integers(name, given, torch.device("cpu")), min)) < 0:
        raise ValueError(f"{name} holds {lowest}, but counts keys from 0.")
    return aligned_lengths(given, anywhere, call.batch(), call.query.shape[-2], name)


def _masked_keys(attn_mask: Any, call: Call) -> int:
    """Checks a mask, and returns the size of its dim of keys. It is compared later, when the
    processes have exchanged the numbers of their keys."""
    if is_block_mask(attn_mask) or hasattr(attn_mask, "device_mesh"):
        raise TypeError(
            f"attn_mask is a {type(attn_mask).__name__}, but must be a tensor (..., Lq, keys of "
            "all processes) for the queries of this process. is_causal, window, starts and "
            "lengths take no memory for pairs."
        )
    keys = attn_mask.shape[-1] if isinstance(attn_mask, Tensor) and attn_mask.dim() else 1
    check_mask(attn_mask, call.query, call.batch(), (call.query.shape[-2], keys))
    return int(keys)


def _is_per_query(given: Integers, call: Call) -> bool:
    return as_integers("lengths", given, call.key.device).dim() > len(call.batch()[:1])


def _extreme(numbers: Tensor | None, of: Any) -> int:
    """The smallest or the largest of 0 and those integers that can be read without waiting."""
    readable = numbers is not None and numbers.numel() and is_readable(numbers)
    return of(0, *(int(x) for x in numbers.aminmax())) if readable else 0  # type: ignore[union-attr]


def _agreed(
    group: dist.ProcessGroup, call: Call, masks: Masks, masked: int, per_query: bool,
    balanced: bool, exchange: str,
) -> Plan:  # fmt: skip
    """Raises unless all processes call with equal arguments. Returns the plan of the call."""
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
    sizes = query.shape[-2], key.shape[-2]
    agreed = agree(group, key.device, common, (*sizes, drawn, *highest, per_query, masked))
    per_row = any(x[5] for x in agreed)
    rows = layout_of([x[0] for x in agreed], balanced, "queries")
    keys = layout_of([x[1] for x in agreed], balanced, "keys")
    total = sum(x[1] for x in agreed)
    for name, number in (("starts", 3), ("lengths", 4)):
        if (most := max(x[number] for x in agreed)) > total:
            raise ValueError(
                f"{name} holds {most}, but the keys of all processes have {total} positions."
            )
    for process, numbers in enumerate(agreed):
        if numbers[6] not in (1, total):
            raise ValueError(
                f"attn_mask has {numbers[6]} keys on process {process}, but the keys of all "
                f"processes have {total} positions. Pass (..., Lq, {total}) or (..., Lq, 1)."
            )
    seed, dropout_p, scale = call.options
    if seed is not None:
        seed = torch.full_like(seed, agreed[0][2])
    if exchange == "auto":
        features = _row(key) + _row(value), _row(query) + call.batch().numel() * value.shape[-1]
        elements = total * features[0], sum(x[0] for x in agreed) * features[1]
        small = [number * key.element_size() <= GATHER_BYTES for number in elements]
        exchange = "keys" if small[0] else "queries" if small[1] and not per_row else "ring"
    elif exchange == "queries" and per_row:
        raise ValueError(
            'exchange is "queries", which takes starts and lengths per sequence, (B,), but some '
            'are per query, or an attn_mask is given. Pass exchange="auto" or "ring".'
        )
    return Plan(group, Options(seed, dropout_p, scale), masks, None, rows, keys, exchange)


def _row(tensor: Tensor) -> int:
    """Elements of one position."""
    return tensor.shape[:-2].numel() * tensor.shape[-1]
