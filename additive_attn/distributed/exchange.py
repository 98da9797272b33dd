"""Exchanges numbers and tensors between processes, by torch.distributed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def checked_group(mesh: Any) -> dist.ProcessGroup:
    """Returns the process group of a mesh of one dim that contains this process."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh is a {type(mesh).__name__}, but must be a DeviceMesh of one dim. Make one with "
            'torch.distributed.device_mesh.init_device_mesh("cpu", (processes,)).'
        )
    if mesh.ndim != 1:
        name = (mesh.mesh_dim_names or ("name",))[-1]
        raise ValueError(
            f"mesh has {mesh.ndim} dims, of sizes {tuple(mesh.shape)}, but a sequence is sharded "
            f'along one. Pass that dim of the mesh: mesh["{name}"].'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh holds the processes {mesh.mesh.tolist()}, and this is process "
            f"{dist.get_rank()}. Call it only on the processes of the mesh."
        )
    return mesh.get_group()


def sending_device(mesh: DeviceMesh, query: Any) -> torch.device:
    """Returns a device that the group can send from, whatever was passed."""
    if isinstance(query, Tensor) and query.device.type == mesh.device_type:
        return query.device
    current = mesh.device_type != "cpu" and torch.accelerator.current_device_index()
    return torch.device(mesh.device_type, current) if current else torch.device(mesh.device_type)


def agree(
    group: dist.ProcessGroup,
    device: torch.device,
    common: dict[str, Any] | BaseException,
    numbers: Sequence[int],
) -> list[list[int]]:
    """Returns the numbers of every process. Raises on all processes unless ``common`` is equal on
    all; a process that has failed already passes its exception, so that none waits for it."""
    failed = isinstance(common, BaseException)
    mine = f"{type(common).__name__}: {common}" if failed else common
    digest = zlib.crc32(repr(mine).encode())
    processes = dist.get_world_size(group)
    with torch._C._DisableFuncTorch():  # a process that failed within a transform sends that too
        own = torch.tensor([failed, digest, *numbers], dtype=torch.int64, device=device)
        of_all = own.new_empty(processes, own.numel())
        dist.all_gather(list(of_all), own, group=group)
        rows: list[list[int]] = of_all.tolist()
        if any(row[0] for row in rows) or len({row[1] for row in rows}) > 1:
            described: list[Any] = [None] * processes
            dist.all_gather_object(described, mine, group=group)
            if not failed:
                _refuse(described)
    return [row[2:] for row in rows]


def _refuse(described: list[Any]) -> None:
    """Raises on a process that has not failed itself."""
    for process, error in enumerate(described):
        if isinstance(error, str):
            raise RuntimeError(f"Process {process} of the mesh stopped: {error}")
    for name in described[0]:
        given = [common[name] for common in described]
        if any(x != given[0] for x in given):
            found = ", ".join(f"{x} on process {i}" for i, x in enumerate(given))
            raise ValueError(
                f"The processes of the mesh must call with the same {name}, but got {found}."
            )


def packed(tensors: Sequence[Tensor | None]) -> Tensor:
    """Joins tensors (..., L, n) to one (L, features), so that a block is one message."""
    rows = [x.movedim(-2, 0).flatten(1) for x in tensors if x is not None]
    return torch.cat(rows, 1) if len(rows) > 1 else rows[0].contiguous()


def unpacked(rows: Any, like: Sequence[Tensor | None]) -> list[Any]:
    """The inverse of ``packed``, for tensors with the leading dims and features of ``like``."""
    sizes = [0 if x is None else x[..., :1, :].shape[:-2].numel() * x.shape[-1] for x in like]
    return [
        None if x is None
        else part.unflatten(1, (*x.shape[:-2], x.shape[-1])).movedim(0, -2)
        for part, x in zip(rows.split(sizes, 1), like, strict=True)
    ]  # fmt: skip


def gathered(tensor: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Returns the tensors of all processes, whose first dims have these sizes."""
    most = max(max(sizes), 1)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    whole = tensor.new_empty(len(sizes), *padded.shape)
    dist.all_gather(list(whole), padded, group=group)
    return [x[:size] for x, size in zip(whole, sizes, strict=True)]


class Exchange:
    """Sends a message to one process and receives one from another, asynchronously; None = no
    message."""

    def __init__(
        self, group: dist.ProcessGroup, send: tuple[int, Tensor] | None = None,
        receive: tuple[int, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._sent, self._received = send, receive  # held until they have arrived
        operations = [
            dist.P2POp(operation, message[1], group=group, group_peer=message[0])
            for operation, message in ((dist.isend, send), (dist.irecv, receive))
            if message is not None and message[1].numel()
        ]
        self._works: list[Any] = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor | None:
        for work in self._works:
            work.wait()
        self._sent = None
        return None if self._received is None else self._received[1]


class Ring:
    """At step t a process sends to the process t places after it, and receives from the one t
    places before it. What is not ``needed`` is not sent: ``needed(a, b)`` says whether process a
    has a row that may attend to a key of process b."""

    def __init__(
        self, group: dist.ProcessGroup, needed: Callable[[int, int], bool], sizes: Sequence[int]
    ) -> None:
        self.group, self.needed, self.sizes = group, needed, sizes
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)

    def before(self, step: int) -> int:
        return (self.rank - step) % self.processes

    def after(self, step: int) -> int:
        return (self.rank + step) % self.processes

    def blocks(self, own: Sequence[Tensor]) -> Iterator[Any]:
        """Yields this process's block at step 0, then that of each process before it; None where
        it is not needed. The next block is received meanwhile."""
        message = packed(own) if self.processes > 1 else None
        coming = self._coming(1, message)
        yield own if self.needed(self.rank, self.rank) else None
        for step in range(1, self.processes):
            # Popped, so that only the caller holds it, and can free it.
            received = [coming.wait()]
            coming = self._coming(step + 1, message)
            yield None if received[0] is None else unpacked(received.pop(), own)

    def _coming(self, step: int, own: Any) -> Exchange:
        if step >= self.processes:
            return Exchange(self.group)
        after, before = self.after(step), self.before(step)
        send = (after, own) if self.needed(after, self.rank) else None
        receive = None
        if self.needed(self.rank, before):
            receive = before, own.new_empty(self.sizes[before], own.shape[1])
        return Exchange(self.group, send, receive)

    def give_back(self, step: int, gradient: Tensor | None, own: Tensor) -> Exchange:
        """Sends the gradient of this step's block to the process that the block came from, and
        receives one of this process's block."""
        after = self.after(step)
        return Exchange(
            self.group,
            None if gradient is None else (self.before(step), gradient),
            (after, torch.empty_like(own)) if self.needed(after, self.rank) else None,
        )
