"""Layers under DistributedDataParallel, under FSDP2, and with sequences that are shared by
processes, train as in one process."""

from __future__ import annotations

import functools
import itertools

import processes
import pytest
import torch
import torch.distributed.checkpoint as checkpoints
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from additive_attn import (
    AdditiveAttention,
    CoverageAttention,
    LocationSensitiveAttention,
    MultiheadAdditiveAttention,
    additive_attention,
)
from additive_attn.distributed import context_parallel_additive_attention, shard_sequence


class Encoder(nn.Module):
    """Calls the layer's forward between other layers."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = AdditiveAttention(8, 12, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attention(x, x, need_weights=False)[0])


class Heads(Encoder):
    def __init__(self):
        super().__init__()
        self.attention = MultiheadAdditiveAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attention(x, x, x)[0])


class Decoder(nn.Module):
    """Calls project and step, whose gradients are made once for all steps."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = AdditiveAttention(8, 12, query_dim=6, key_dim=8, **options)
        self.cell = nn.GRUCell(8, 6)

    def forward(self, x):
        memory = self.attention.project(self.embed(x), lengths=[7] * len(x))
        state, outputs = x.new_zeros(len(x), 6, dtype=memory.key.dtype), []
        for _ in range(4):
            context, _ = self.attention.step(state, memory)
            state = self.cell(context, state)
            outputs.append(state)
        return torch.stack(outputs, 1)


class Located(Decoder):
    kind = LocationSensitiveAttention

    def __init__(self):
        super().__init__()
        self.attention = self.kind(6, 8, 12)

    def forward(self, x):
        memory = self.attention.project(self.embed(x), lengths=[7] * len(x))
        hidden, outputs = x.new_zeros(len(x), 6, dtype=memory.key.dtype), []
        state = self.attention.initial_state(memory)
        for _ in range(4):
            context, _, state = self.attention.step(hidden, memory, state)
            hidden = self.cell(context, hidden)
            outputs.append(hidden)
        return torch.stack(outputs, 1)


class Covered(Located):
    kind = CoverageAttention


MODELS = {
    "encoder": Encoder, "heads": Heads, "decoder": Decoder, "located": Located,
    "covered": Covered, "normalized": functools.partial(Decoder, normalize=True),
    "without bias": functools.partial(Decoder, bias=False),
}  # fmt: skip


def data(step):
    return torch.randn(8, 9, 5, generator=torch.Generator().manual_seed(step))


def trained(model, cut=lambda x: x, steps=3, optimizer=None, data=data):
    """Returns the parameters after some steps. The loss is the mean over a process's sequences."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        x = data(step).to(next(model.parameters()).dtype)
        model(cut(x)).square().mean().backward()
        optimizer.step()
    return {name: whole(x.detach()) for name, x in model.named_parameters()}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def cutter(mesh):
    rank, world = mesh.get_local_rank(), mesh.size()
    return lambda x: x.chunk(world)[rank]


def compare(ours, expected, tolerance=1e-9):
    for name, parameter in expected.items():
        mine = ours[name.removeprefix("module.")]
        torch.testing.assert_close(
            mine, parameter, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def made(name, dtype=torch.float64):
    torch.manual_seed(3)
    return MODELS.get(name, name)().to(dtype)


def check_ddp(mesh, folder):
    for name in MODELS:
        expected = trained(made(name))
        model = nn.parallel.DistributedDataParallel(made(name))
        ours = trained(model, cutter(mesh))
        compare({n.removeprefix("module."): x for n, x in ours.items()}, expected)


def sharded(name, layer, mesh, dtype=torch.float64, **options):
    model = made(name, dtype)
    if layer:
        fully_shard(model.attention, mesh=mesh, **options)
        if hasattr(model.attention, "project"):
            register_fsdp_forward_method(model.attention, "project")
            register_fsdp_forward_method(model.attention, "step")
    return fully_shard(model, mesh=mesh, **options)


def check_fsdp(mesh, folder):
    """Shards the layer and the model around it, or the model alone."""
    for name in MODELS:
        expected = trained(made(name))
        for layer, free in itertools.product((True, False), (True, False)):
            if name == "decoder" or layer == free:
                model = sharded(name, layer, mesh, reshard_after_forward=free)
                compare(trained(model, cutter(mesh)), expected)


def check_accumulated(mesh, folder):
    """Gradients of two batches are exchanged once."""

    def step(model, cut, skip):
        for number in range(2):
            skip(model, number == 0)
            (model(cut(data(number).double())).square().mean() / 2).backward()
        return {n: whole(x.grad) for n, x in model.named_parameters()}

    def skip_fsdp(model, skipped):
        model.set_requires_gradient_sync(not skipped)

    for name in ("encoder", "decoder", "located"):
        expected = step(made(name), lambda x: x, lambda model, skipped: None)
        model = sharded(name, True, mesh)
        compare(step(model, cutter(mesh), skip_fsdp), expected)


class Sequence(nn.Module):
    """Attention over a sequence that the processes of ``mesh`` share, or in one process without a
    mesh."""

    mesh = None

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(5, 3 * 8)
        self.energy = nn.Parameter(torch.randn(8) / 3)

    def forward(self, x):
        inputs = (*self.project(x).chunk(3, -1), self.energy)
        if self.mesh is None:
            return additive_attention(*inputs, is_causal=True)
        return context_parallel_additive_attention(
            *inputs, self.mesh, is_causal=True, balanced=True, exchange="ring"
        )


def check_sequence(mesh, folder):
    """Each process has a part of the gradients of parameters; DDP and FSDP2 add them up. The
    sequence is sharded alone, and beside a sharded batch."""
    positions = 4 * 2 * mesh.size()

    def long(step):
        generator = torch.Generator().manual_seed(step)
        return torch.randn(4, positions, 5, generator=generator, dtype=torch.float64)

    expected = trained(made(Sequence), data=long)
    both = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("batch", "sequence"))
    for batch, sequence in ((None, mesh), (both["batch"], both["sequence"])):

        def cut(x, batch=batch, sequence=sequence):
            x = x if batch is None else cutter(batch)(x)
            return shard_sequence(x, sequence, balanced=True)

        model = made(Sequence)
        model.mesh = sequence
        wrapped = nn.parallel.DistributedDataParallel(model)
        ours = trained(wrapped, cut, data=long)
        compare({n.removeprefix("module."): x for n, x in ours.items()}, expected)
        model = made(Sequence)
        model.mesh = sequence
        compare(trained(fully_shard(model, mesh=mesh), cut, data=long), expected)


def check_mixed_precision(mesh, folder):
    """SGD changes parameters as in float32, up to the rounding of bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in ("heads", "decoder", "located"):
        before = dict(made(name, torch.float32).named_parameters())
        model = made(name, torch.float32)
        expected = trained(model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
        for layer in (False, True):
            model = sharded(name, layer, mesh, torch.float32, mp_policy=policy)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            ours = trained(model, cutter(mesh), optimizer=optimizer)
            changes = [
                torch.cat([(x[n] - before[n].detach()).flatten() for n in before])
                for x in (ours, expected)
            ]
            difference = (changes[0] - changes[1]).norm() / changes[1].norm()
            assert difference < 0.05, (name, layer, difference)


def check_checkpoint(mesh, folder):
    """A model that is saved after two steps, loaded into a fresh one and trained further has the
    parameters of one that was trained without a stop."""
    for name in ("encoder", "decoder", "located"):
        expected = trained(made(name), steps=3)
        model = sharded(name, True, mesh)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        trained(model, cutter(mesh), 2, optimizer)
        state = get_state_dict(model, optimizer)
        place = folder / f"checkpoint {name}"
        checkpoints.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=place)

        fresh = sharded(name, True, mesh)
        optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
        state = get_state_dict(fresh, optimizer)
        loaded = {"model": state[0], "optimizer": state[1]}
        checkpoints.load(loaded, checkpoint_id=place)
        set_state_dict(
            fresh, optimizer, model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )  # fmt: skip
        optimizer.zero_grad()
        fresh(cutter(mesh)(data(2).double())).square().mean().backward()
        optimizer.step()
        compare({n: whole(x.detach()) for n, x in fresh.named_parameters()}, expected)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.sweep)])
def test_training(world, tmp_path):
    processes.run(__name__, world, tmp_path)
