"""DTensors: batch and heads that are sharded over a DeviceMesh give the results of one process."""

from __future__ import annotations

import processes
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention.flex_attention import create_block_mask

from additive_attn import (
    AdditiveAttention,
    MultiheadAdditiveAttention,
    additive_attention,
    additive_scores,
)
from additive_attn.distributed import HeadParallel

CASES = {
    "batch": ((4, 3, 5), dict(query=0, key=0, value=0)),
    "heads": ((2, 4, 3, 5), dict(query=1, key=1, value=1, weight=0)),
    "shared key": ((4, 3, 5), dict(query=0)),
    "bool mask": ((4, 3, 5), dict(query=0, key=0, value=0, attn_mask=0)),
    "float mask, shared": ((4, 3, 5), dict(query=0, key=0, value=0)),
    "features of the values": ((2, 3, 5), dict(value=2)),
    "mixed": ((4, 3, 5), dict(query=0, value=2)),
}


def inputs_of(name):
    torch.manual_seed(0)
    (*batch, queries, keys), placements = CASES[name]
    inputs = {
        "query": torch.randn(*batch, queries, 8),
        "key": torch.randn(*([1] if name == "shared key" else batch), keys, 8),
        "value": torch.randn(*batch, keys, 6),
        "weight": torch.randn(batch[1], 8) if name == "heads" else torch.randn(8),
    }
    if "mask" in name:
        mask = torch.randn(*(batch if "bool" in name else ()), queries, keys)
        inputs["attn_mask"] = mask > 0 if "bool" in name else mask
    # In double precision, second derivatives agree though sums have another order.
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}, placements


def results(inputs):
    """Returns outputs, gradients, and the gradients of a penalty on gradients."""
    leaves = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    outputs = additive_attention(**leaves, need_weights=True, need_lse=True)
    outputs += (additive_scores(**{n: x for n, x in leaves.items() if n != "value"}),)
    total = sum((x.nan_to_num(neginf=0) ** 2).sum() for x in outputs)
    wanted = [x for x in leaves.values() if x.requires_grad]
    grads = torch.autograd.grad(total, wanted, create_graph=True)
    penalty = sum((x**2).sum() for x in grads)
    return [*outputs, *grads, *torch.autograd.grad(penalty, wanted)]


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def check_one_dim(mesh, folder):
    for name in CASES:
        inputs, placements = inputs_of(name)
        expected = results({n: x.clone() for n, x in inputs.items()})
        sharded = {
            n: distribute_tensor(
                x, mesh, [Shard(placements[n]) if n in placements else Replicate()]
            )
            for n, x in inputs.items()
        }
        ours = results(sharded)
        if name in ("batch", "heads"):
            for n in (0, 3):
                assert ours[n].placements[0] == Shard(placements["query"]), "in one piece"
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(full(mine), theirs)


def check_two_dims(mesh, folder):
    """The batch is sharded along one dim of the mesh, heads along the other."""
    if mesh.size() < 4:
        return
    mesh = init_device_mesh("cpu", (2, mesh.size() // 2))
    inputs, _ = inputs_of("heads")
    expected = results({n: x.clone() for n, x in inputs.items()})
    heads_alone = [Replicate(), Shard(0)]
    sharded = {
        n: distribute_tensor(x, mesh, heads_alone if n == "weight" else [Shard(0), Shard(1)])
        for n, x in inputs.items()
    }
    ours = results(sharded)
    assert ours[0].placements == (Shard(0), Shard(1)) == ours[3].placements
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(full(mine), theirs)


def check_dropout(mesh, folder):
    """Dropout depends on the position in the whole batch. All processes have the same seed."""
    inputs, placements = inputs_of("heads")
    results = []
    for sharded in (False, True):
        torch.manual_seed(5)
        x = {
            n: distribute_tensor(t, mesh, [Shard(placements[n])]) if sharded else t
            for n, t in inputs.items()
        }
        torch.manual_seed(5)
        results.append(full(additive_attention(**x, dropout_p=0.5)))
    torch.testing.assert_close(*results)


def check_masks_of_this_process(mesh, folder):
    """Masks, lengths and lists that are no DTensors are those of the whole batch."""
    inputs, _ = inputs_of("batch")
    bias = torch.nn.Parameter(torch.randn(3, 5).double())
    block_mask = create_block_mask(
        lambda b, h, i, j: i >= j, None, None, 3, 5, device="cpu", BLOCK_SIZE=2
    )
    for masking in (
        {"lengths": [5, 2, 0, 3]}, {"lengths": torch.tensor([5, 2, 0, 3]), "starts": [1, 0, 0, 2]},
        {"attn_mask": torch.rand(4, 3, 5) < 0.7}, {"key_padding_mask": torch.rand(4, 5) < 0.3},
        {"attn_mask": bias}, {"attn_mask": block_mask},
    ):  # fmt: skip
        found = []
        for placement in (None, Shard(0), Replicate()):
            x = inputs
            if placement is not None:
                x = {
                    n: distribute_tensor(t, mesh, [Replicate() if n == "weight" else placement])
                    for n, t in inputs.items()
                }
            x = {n: t.detach().requires_grad_() for n, t in x.items()}
            bias.grad = None
            outputs = [additive_attention(**x, **masking)]
            outputs.append(additive_scores(x["query"], x["key"], x["weight"], **masking))
            sum(full(o).nan_to_num(neginf=0).square().sum() for o in outputs).backward()
            grads = [*(t.grad for t in x.values()), bias.grad]
            found.append([full(t) for t in (*outputs, *grads) if t is not None])
        for ours in found[1:]:
            for mine, theirs in zip(ours, found[0], strict=True):
                torch.testing.assert_close(mine, theirs, msg=lambda m, k=masking: f"{k}: {m}")


def check_layers(mesh, folder):
    """Every process has all parameters, and the batch is sharded."""
    for layer in (AdditiveAttention(8, 8), MultiheadAdditiveAttention(8, 2, batch_first=True)):
        x = torch.randn(4, 5, 8)
        layer(x, x, x)[0].square().sum().backward()
        expected = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        replicated = distribute_module(layer, mesh)
        batch = distribute_tensor(x, mesh, [Shard(0)])
        out = replicated(batch, batch, batch)[0]
        assert out.placements == (Shard(0),)
        out.square().sum().backward()
        for parameter, grad in zip(replicated.parameters(), expected, strict=True):
            torch.testing.assert_close(full(parameter.grad), grad)


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = MultiheadAdditiveAttention(8, 4, batch_first=True, **options)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x, y, z, **options):
        out, weights = self.attention(x, y, z, **options)
        return self.norm(x + out), weights


def check_heads(mesh, folder):
    """Tensor parallel: parameters are sharded by heads; inputs and outputs are each process's
    tensors."""
    options = {"average_attn_weights": False, "key_padding_mask": torch.rand(3, 5) < 0.3}
    for layer in ({}, {"kdim": 6, "vdim": 7}, {"bias": False, "add_bias_kv": True}):
        x, y, z = (torch.randn(3, 5, layer.get(n, 8)).double() for n in ("embed", "kdim", "vdim"))
        y, z = (y, z) if "kdim" in layer else (x, x)
        found = []
        for parallel in (False, True):
            model = Model(**layer).double()
            if parallel:
                parallelize_module(model, mesh, {"attention": HeadParallel()})
                assert model.attention.energy_weight.to_local().shape[0] == 4 // mesh.size()
            x.grad, x.requires_grad = None, True
            out, weights = model(x, y, z, **options)
            (out.square().sum() + weights.square().sum()).backward()
            grads = [full(p.grad) for p in model.parameters()]
            found.append([out, weights, x.grad, *grads])
            with torch.no_grad():
                whole = distribute_tensor(x.detach(), mesh, [Replicate()]) if parallel else x
                other = whole if y is x else None
                if other is not None:
                    memory = model.attention.project(other)
                    out, _ = model.attention.step(whole[:, 0], memory)
                    found[-1].append(full(out))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def check_dropout_of_heads(mesh, folder):
    """Returned weights are those after dropout, as in one process."""
    x, found = torch.randn(3, 5, 8), []
    for parallel in (False, True):
        model = Model(dropout=0.5)
        if parallel:
            parallelize_module(model, mesh, {"attention": HeadParallel()})
        torch.manual_seed(5)
        out, weights = model(x, x, x)
        (out.square().sum() + weights.square().sum()).backward()
        found.append([out, weights, *(full(p.grad) for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def check_traffic_of_heads(mesh, folder):
    """With projections that are sharded by heads, forward sends only outputs, which are added
    up."""
    model = Model(kdim=6, vdim=7)
    parallelize_module(model, mesh, {"attention": HeadParallel()})
    x, y, z = torch.randn(3, 5, 8), torch.randn(3, 5, 6), torch.randn(3, 5, 7)
    with CommDebugMode() as sent:
        model(x, y, z, need_weights=False)
    counts = {str(name): count for name, count in sent.get_comm_counts().items()}
    assert sum(counts.values()) == 1 and "all_reduce" in next(iter(counts)), counts


def check_errors_of_heads(mesh, folder):
    for model, kind, sentence in (
        (torch.nn.Sequential(AdditiveAttention(8, 8)), TypeError, "given a AdditiveAttention"),
        (torch.nn.Sequential(MultiheadAdditiveAttention(9, 9)), ValueError, "num_heads is 9"),
    ):
        with pytest.raises(kind, match=sentence):
            parallelize_module(model, mesh, {"0": HeadParallel()})


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.sweep), 4])
def test_sharded_calls_equal_one_process(world, tmp_path):
    processes.run(__name__, world, tmp_path)
