"""A sequence and its shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from additive_attn.distributed.exchange import agree, checked_group, gathered
from additive_attn.distributed.layout import balanced_layout, chunks, in_order, layout_of


def shard_sequence(
    tensor: Tensor, mesh: DeviceMesh, dim: int = -2, *, balanced: bool = False
) -> Tensor:
    """The part of a sequence that this process holds, of a tensor that every process has whole.

    Args:
        tensor: any tensor; token ids, positions or features.
        mesh: of one dim.
        dim: that of the positions.
        balanced: whether a process holds a chunk of the head and one of the tail, so that causal
            attention costs every process the same: of 2N chunks r and 2N - 1 - r. Otherwise
            process r of N holds chunk r of N. Chunks differ by one position at most.

    Returns:
        The shard, differentiable. ``shard_sequence(torch.arange(L), mesh, 0, balanced=...)`` are
        its positions.

    Raises:
        TypeError, ValueError: the mesh is none of one dim, or does not contain this process.
    """
    group = checked_group(mesh)
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
    """The whole sequence on every process, of the shards that each process has: the inverse of
    :func:`shard_sequence`. The result carries no gradient: it is for outputs and evaluation.

    Raises:
        TypeError, ValueError: the mesh is none of one dim, shapes differ between processes, or
            balanced shards have other sizes than :func:`shard_sequence` gives them.
    """
    group = checked_group(mesh)
    shape = list(tensor.shape)
    dim %= max(len(shape), 1)
    others = {"shapes but for dim": (shape[:dim], shape[dim + 1 :]), "dtypes": tensor.dtype}
    sizes = [x[0] for x in agree(group, tensor.device, others, (shape[dim],))]
    layout = layout_of(sizes, balanced, "the sequence")
    shards = gathered(tensor.detach().movedim(dim, 0), sizes, group)
    return in_order(shards, layout).movedim(0, dim)
