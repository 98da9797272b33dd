"""DistributedDataParallel over a decoder's steps, whose gradients are made at the end of a
backward pass, gives the gradients of one process in every mode. So do layers under FSDP2."""

from __future__ import annotations

import processes
import pytest
import torch
from test_training import compare, cutter, data, made, trained
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from additive_attn import AdditiveAttention, PlainAdditiveAttention

MODES = {
    "find unused": dict(find_unused_parameters=True),
    "static graph": dict(static_graph=True),
    "a bucket for each": dict(bucket_cap_mb=1e-5),
    "views of buckets": dict(gradient_as_bucket_view=True),
}
KINDS = ("decoder", "located", "covered")


class Spare(nn.Module):
    """A model with unused parameters."""

    def __init__(self, name: str, freeze: bool = False) -> None:
        super().__init__()
        self.model, self.spare = made(name), nn.Linear(3, 3).double()
        self.model.attention.key_layer.requires_grad_(not freeze)
        self.spare.requires_grad_(not freeze)

    def forward(self, x):
        return self.model(x)


def same(ours, expected):
    compare({name.removeprefix("module."): x for name, x in ours.items()}, expected)


def check_modes(mesh, folder):
    for name in KINDS:
        expected = trained(made(name))
        for options in MODES.values():
            model = DistributedDataParallel(made(name), **options)
            same(trained(model, cutter(mesh)), expected)


def check_unused_and_frozen_parameters(mesh, folder):
    for name in KINDS:
        for freeze in (False, True):
            expected = trained(Spare(name, freeze))
            model = DistributedDataParallel(Spare(name, freeze), find_unused_parameters=True)
            same(trained(model, cutter(mesh)), expected)


def gradients(model, cut, skip):
    """Returns the gradients of three batches, with two backward passes of the first. They are
    exchanged with the last."""
    for number in range(3):
        with skip(number < 2):
            loss = model(cut(data(number).double())).square().mean()
            if number == 0:
                loss.backward(retain_graph=True)
            loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def check_accumulated(mesh, folder):
    for name in KINDS:
        expected = gradients(made(name), lambda x: x, lambda skipped: torch.enable_grad())
        for options in MODES.values():
            model = DistributedDataParallel(made(name), **options)
            if options.get("static_graph"):
                trained(model, cutter(mesh), 1, torch.optim.SGD(model.parameters(), 0.0))
                model.zero_grad()  # the first pass of a static graph must exchange gradients

            def skip(skipped, model=model):
                return model.no_sync() if skipped else torch.enable_grad()

            same(gradients(model, cutter(mesh), skip), expected)


def check_sharded_layers(mesh, folder):
    """FSDP2 shards the layer, each of its Linears, and a layer whose steps a decoder calls."""
    torch.manual_seed(0)
    plain, x = PlainAdditiveAttention(6, 8), torch.randn(2, 5, 6)
    expected = plain(x, x, x)[0]
    expected.square().sum().backward()

    def layer():
        made = AdditiveAttention(6, 8)
        made.load_state_dict(plain.state_dict())
        return made

    def check(made, out):
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        grads = {n: p.grad.full_tensor() for n, p in made.named_parameters()}
        compare(grads, {n: p.grad for n, p in plain.named_parameters()}, 1e-5)

    root, each, stepped = layer(), layer(), layer()
    fully_shard(root, mesh=mesh)
    with pytest.raises(TypeError, match="register_fsdp_forward_method"):
        root.project(x)
    check(root, root(x, x)[0])
    for child in (*each.children(), each):
        fully_shard(child, mesh=mesh)
    check(each, each(x, x)[0])
    fully_shard(stepped, mesh=mesh)
    for name in ("project", "step"):
        register_fsdp_forward_method(stepped, name)
    memory = stepped.project(x)
    check(stepped, torch.stack([stepped.step(x[:, i], memory)[0] for i in range(5)], 1))


def test_two_processes(tmp_path):
    processes.run(__name__, 2, tmp_path)
