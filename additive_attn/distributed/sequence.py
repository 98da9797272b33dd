"""Shards a sequence over processes, and joins the shards again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from additive_attn.distributed.exchange import agree, checked_group, gathered, sending_device
from additive_attn.distributed.layout import balanced_layout, chunks, in_order, layout_of
from additive_attn.ops.checks import is_dense, refuse_flags, refuse_types


def shard_sequence(
    tensor: Tensor, mesh: DeviceMesh, dim: int = -2, *, balanced: bool = False
) -> Tensor:
    """Returns this process's shard of a sequence that every process has whole.

    Args:
        tensor: any tensor; token ids, positions or features.
        mesh: of one dim.
        dim: the dim of the positions.
        balanced: whether a process holds a chunk of the head and one of the tail, so that causal
            attention costs every process the same: of 2N chunks r and 2N - 1 - r. Otherwise
            process r of N holds chunk r of N. Chunks differ by one position at most.

    Returns:
        The shard, differentiable. ``shard_sequence(torch.arange(L), mesh, 0, balanced=...)`` are
        its positions.

    Raises:
        TypeError, ValueError: the mesh does not have one dim, or does not contain this process;
            tensor is not a tensor, or has no such dim; balanced is not a bool.
    """
    group = checked_group(mesh)
    dim = _checked_dim(tensor, dim, balanced)
    rank, processes, total = dist.get_rank(group), dist.get_world_size(group), tensor.shape[dim]
    if not balanced:
        start, stop = chunks(total, processes)[rank]
        return tensor.narrow(dim, start, stop - start)
    parts = (
        tensor.narrow(dim, start, stop - start)
        for start, stop in balanced_layout(total, processes)[rank]
    )
    return torch.cat(tuple(parts), dim)


def unshard_sequence(
    tensor: Tensor, mesh: DeviceMesh, dim: int = -2, *, balanced: bool = False
) -> Tensor:
    """Returns the whole sequence on every process, from the shards of all: the inverse of
    :func:`shard_sequence`. The result has no gradient: it is for outputs and evaluation.

    Raises:
        TypeError, ValueError: the mesh does not have one dim, shapes differ between processes, or
            balanced shards have other sizes than :func:`shard_sequence` gives them; tensor is not
            a tensor, or has no such dim; balanced is not a bool.
        RuntimeError: another process raised; or torch.func transforms the call, or the tensor is
            on meta.
    """
    group = checked_group(mesh)
    try:
        dim = _checked_dim(tensor, dim, balanced)
        if torch._C._are_functorch_transforms_active() or tensor.is_meta:
            raise RuntimeError(
                "unshard_sequence was called under torch.func, or with a tensor on meta, neither "
                "of which has values to send. Call it on the result of the transform."
            )
    except (TypeError, ValueError, RuntimeError) as error:
        agree(group, sending_device(mesh, tensor), error, (0,))
        raise
    shape = list(tensor.shape)
    others = {"shapes but for dim": (shape[:dim], shape[dim + 1 :]), "dtypes": tensor.dtype}
    sizes = [x[0] for x in agree(group, tensor.device, others, (shape[dim],))]
    layout = layout_of(sizes, balanced, "the sequence")
    shards = gathered(tensor.detach().movedim(dim, 0), sizes, group)
    return in_order(shards, layout).movedim(0, dim)


def _checked_dim(tensor: Any, dim: Any, balanced: Any) -> int:
    """Returns the dim of positions, counted from the first."""
    if not isinstance(tensor, Tensor):
        refuse_types(tensor=tensor)
    if hasattr(tensor, "device_mesh") or not is_dense(tensor):
        found = "nested" if tensor.is_nested else "a DTensor"
        found = found if tensor.layout is torch.strided else f"of layout {tensor.layout}"
        raise TypeError(
            f"tensor is {found}, but must be a dense tensor of this process. Pass .to_local() or "
            ".full_tensor() of a DTensor, .to_dense() of a sparse tensor, .to_padded_tensor(0.0) "
            "of a nested one."
        )
    if type(balanced) is not bool:
        refuse_flags(balanced=balanced)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim is {dim!r}, but must be an integer: the dim of the positions.")
    rank = tensor.dim()
    if not -rank <= dim < rank:
        among = f"from {-rank} to {rank - 1}" if rank else "of a tensor that has one"
        raise ValueError(
            f"dim is {dim}, but tensor has shape {tuple(tensor.shape)}. Pass the dim of the "
            f"positions, {among}."
        )
    return dim % rank
