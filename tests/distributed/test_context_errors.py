"""Sharded sequences raise a sentence for arguments that they do not support; no process waits for
another."""

from __future__ import annotations

import processes
import pytest
import torch
from oracle import make
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from additive_attn.distributed import (
    context_parallel_additive_attention,
    shard_sequence,
    unshard_sequence,
)


def refused(kind, sentence, function, *arguments, **options):
    with pytest.raises(kind) as raised:
        function(*arguments, **options)
    assert sentence in str(raised.value), raised.value


def check_sequence_errors(mesh, folder):
    """A single process fails, and none waits for it."""
    first = mesh.get_local_rank() == 0
    x = torch.zeros(2, 6, 3)
    for changes, kind, sentence in [
        ({"tensor": [1.0]}, TypeError, "tensor is a list"),
        ({"tensor": x.to_sparse()}, TypeError, "tensor is of layout torch.sparse"),
        ({"tensor": distribute_tensor(x, mesh, [Shard(1)])}, TypeError, "tensor is a DTensor"),
        ({"dim": 3}, ValueError, "dim is 3, but tensor has shape (2, 6, 3)"),
        ({"dim": -4}, ValueError, "from -3 to 2"),
        ({"dim": 1.0}, TypeError, "dim is 1.0, but must be an integer"),
        ({"tensor": x[0, 0, 0], "dim": 0}, ValueError, "dim is 0, but tensor has shape ()"),
        ({"balanced": 1}, TypeError, "balanced is 1"),
    ]:
        arguments = {"tensor": x, "mesh": mesh, **changes}
        refused(kind, sentence, shard_sequence, **arguments)
        if first:
            refused(kind, sentence, unshard_sequence, **arguments)
        else:
            refused(RuntimeError, "Process 0 of the mesh stopped", unshard_sequence, x, mesh)
    for run in (
        lambda: unshard_sequence(x.to("meta"), mesh),
        lambda: torch.func.vmap(lambda y: unshard_sequence(y, mesh))(x[None]),
    ):
        if first:
            refused(RuntimeError, "unshard_sequence was called under", run)
        else:
            refused(RuntimeError, "Process 0 of the mesh stopped", unshard_sequence, x, mesh)
    for function in (shard_sequence, unshard_sequence):
        refused(TypeError, "must be a DeviceMesh", function, x, None)


def check_placements(mesh, folder):
    inputs = make((2,), 4, 5, 8, 6)
    wrong = {n: distribute_tensor(x, mesh, [Shard(0)]) for n, x in inputs.items()}
    refused(ValueError, "must be S(1)", context_parallel_additive_attention, **wrong, mesh=mesh)


def check_transforms(mesh, folder):
    """Transforms raise a sentence, on all processes and on a single one."""
    inputs = make((2,), 4, 5, 8, 6)

    def call(query):
        return context_parallel_additive_attention(query, *list(inputs.values())[1:], mesh)

    x = inputs["query"]
    for run in (
        lambda: torch.func.vmap(call)(x[None]), lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.func.grad(lambda q: call(q).sum())(x),
    ):  # fmt: skip
        refused(RuntimeError, "was called under torch.func", run)
        if mesh.get_local_rank() == 0:  # a single process fails
            refused(RuntimeError, "was called under torch.func", run)
        else:
            refused(RuntimeError, "Process 0 of the mesh stopped", call, x)
    with torch.autograd.forward_ad.dual_level():
        call(x)
        refused(RuntimeError, "forward mode", call, torch.autograd.forward_ad.make_dual(x, x))


def check_errors(mesh, folder):
    """All processes raise, and none waits for another."""
    first = mesh.get_local_rank() == 0
    inputs = make((2,), 4, 5, 8, 6)
    attend = context_parallel_additive_attention

    def call(changes=None, **options):
        return attend(**{**inputs, **(changes or {})}, **{"mesh": mesh, **options})

    for wrong in (None, "cpu", 4):
        refused(TypeError, "must be a DeviceMesh", call, mesh=wrong)
    two = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("batch", "sequence"))
    refused(ValueError, 'mesh["sequence"]', call, mesh=two)
    call(mesh=two["batch"])
    # A single process fails: its error gives the reason, those of the others name the process.
    for changes, options, kind, sentence in [
        ({"key": inputs["key"].double()}, {}, TypeError, "one dtype"),
        ({"value": inputs["value"][:, :3]}, {}, ValueError, "value has 3"),
        ({"query": None}, {}, TypeError, "query is a NoneType"),
        ({}, {"dropout_p": 2.0}, ValueError, "probability"),
        ({}, {"window": 3}, ValueError, "window is 3"),
        ({}, {"is_causal": 1}, TypeError, "is_causal is 1"),
        ({}, {"balanced": None}, TypeError, "balanced is None"),
        ({}, {"exchange": "send"}, ValueError, "exchange is 'send'"),
        ({}, {"lengths": [-1, 2]}, ValueError, "lengths holds -1"),
        ({}, {"lengths": [1.5, 2]}, TypeError, "must hold integers"),
        ({}, {"attn_mask": "causal"}, TypeError, "attn_mask is a str"),
        ({}, {"attn_mask": torch.ones(3, 5)}, ValueError, "must broadcast to (..., Lq, Lk)"),
    ]:
        if first:
            refused(kind, sentence, call, changes, **options)
        else:
            refused(RuntimeError, "Process 0 of the mesh stopped", call)
    # The arguments of each process are right by themselves.
    for changes, options, sentence in [
        ({"query": inputs["query"][:1]}, {}, "leading dims of query, key and value"),
        ({n: t[..., :4] for n, t in inputs.items() if n != "value"}, {}, "features of query"),
        ({n: t.double() for n, t in inputs.items()}, {}, "dtype"),
        ({}, {"is_causal": True}, "is_causal and window"),
        ({}, {"dropout_p": 0.5}, "dropout_p"),
        ({}, {"scale": 0.5}, "scale"),
        ({}, {"exchange": "ring"}, "exchange"),
        ({"key": inputs["key"].requires_grad_()}, {}, "need of gradients"),
    ]:
        refused(ValueError, f"the same {sentence}", *([call, changes] if first else [call]),
                **(options if first else {}))  # fmt: skip
        inputs["key"] = inputs["key"].detach()
    refused(ValueError, "have 10 positions" if mesh.size() == 2 else "have 20 positions", call,
            lengths=[5, 99])  # fmt: skip
    refused(ValueError, "takes starts and lengths per sequence", call, lengths=[[1] * 4] * 2,
            exchange="queries")  # fmt: skip
    refused(ValueError, "attn_mask has 3 keys on process 0", call,
            attn_mask=torch.ones(4, 3 if first else 5 * mesh.size()))  # fmt: skip
    uneven = inputs["query"][:, : 4 if first else 1]
    refused(ValueError, "Make them with shard_sequence", call, {"query": uneven}, balanced=True)


def test_errors(tmp_path):
    processes.run(__name__, 2, tmp_path)
