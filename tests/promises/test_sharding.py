"""DTensors: batch and heads sharded over a DeviceMesh give what one process gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from additive_attn import AdditiveAttention, additive_attention, additive_scores

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

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
    return inputs, placements


def results(inputs, differentiate=torch.autograd.grad):
    leaves = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    outputs = additive_attention(**leaves, need_weights=True, need_lse=True)
    outputs += (additive_scores(**{n: x for n, x in leaves.items() if n != "value"}),)
    total = sum((x.nan_to_num(neginf=0) ** 2).sum() for x in outputs)
    return [*outputs, *differentiate(total, [x for x in leaves.values() if x.requires_grad])]


def work(rank, world, store):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world,))

    def full(x):
        return x.full_tensor() if isinstance(x, DTensor) else x

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

    torch.manual_seed(1)
    layer, x = AdditiveAttention(8, 8), torch.randn(4, 5, 8)
    layer(x, x)[0].square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    replicated = torch.distributed.tensor.distribute_module(layer, mesh)
    batch = distribute_tensor(x, mesh, [Shard(0)])
    replicated(batch, batch)[0].square().sum().backward()
    for parameter, grad in zip(replicated.parameters(), expected, strict=True):
        torch.testing.assert_close(full(parameter.grad), grad)
    dist.destroy_process_group()


def test_sharded_calls_equal_one_process(tmp_path):
    mp.spawn(work, args=(2, str(tmp_path / "store")), nprocs=2)
