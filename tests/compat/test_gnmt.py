"""NVIDIA GNMT."""

from __future__ import annotations

import copy

import loops
import pytest
import torch
from loops import SIZES, Inputs
from oracle import DEVICE
from torch import Tensor, nn

from additive_attn.compat import _base, gnmt


def make(**options) -> nn.Module:
    torch.manual_seed(0)
    layer = gnmt.BahdanauAttention(SIZES.query, SIZES.memory, SIZES.hidden, **options)
    if layer.normalize:
        nn.init.normal_(layer.normalize_bias)
    return layer


class Plain(nn.Module):
    """The formula, with the parameters of ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"] = layer._modules
        self.__dict__["_parameters"] = layer._parameters
        self.normalize, self.batch_first = layer.normalize, layer.batch_first

    def set_mask(self, lengths, keys):
        self.ignored = torch.arange(SIZES.keys) >= lengths[:, None]

    def forward(self, query, keys):
        if not self.batch_first:
            keys = keys.transpose(0, 1)
        swap = query.dim() == 3 and not self.batch_first
        q = query.transpose(0, 1) if swap else query
        single = q.dim() == 2
        q, weight = self.linear_q(q[:, None] if single else q), self.linear_att
        if self.normalize:
            q = q + self.normalize_bias
            weight = self.normalize_scalar * weight / weight.norm()
        key, value = self.linear_k(keys)[:, None], keys[:, None]
        context, weights = loops.plain(q, key, value, weight, self.ignored[:, None])
        if single:
            return context[:, 0], weights[:, 0]
        return (context.transpose(0, 1), weights.transpose(0, 1)) if swap else (context, weights)


def decode(layer: nn.Module, given: Inputs) -> list[Tensor]:
    """Runs steps with queries (B, D) and (1, B, D), then all queries in one call."""
    memory, queries = given["memory"], given["steps"]
    if not layer.batch_first:
        memory = memory.transpose(0, 1).contiguous()
    layer.set_mask(loops.lengths(), memory)
    outputs, context = [], None
    for t in range(len(queries)):
        query = loops.next_query(given, t, context)
        one = query.unsqueeze(1 if layer.batch_first else 0)
        context, weights = layer(query if t % 2 else one, memory)
        outputs += [context, weights]
        context = context.reshape(SIZES.batch, -1)
    return [*outputs, *layer(queries.transpose(0, 1) if layer.batch_first else queries, memory)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_formula(normalize, batch_first):
    layer = make(normalize=normalize, batch_first=batch_first)
    loops.check(layer, Plain(layer), decode)


@pytest.mark.usefixtures("steps_leave_records")
def test_keys_are_projected_once_in_decoding(monkeypatch):
    layer, given = make().double(), loops.inputs()
    calls = []
    monkeypatch.setattr(gnmt, "lend", lambda *a, **k: calls.append(1) or _base.lend(*a, **k))
    memory = given["memory"].transpose(0, 1).contiguous()
    with torch.no_grad():
        layer.set_mask(loops.lengths(), memory)
        for query in given["steps"]:
            layer(query, memory)
        assert len(calls) == 1
        layer.set_mask(loops.lengths() // 2 + 1, memory)
        layer(given["steps"][0], memory)
        layer.linear_k.weight.mul_(2)
        layer(given["steps"][0], memory)
    assert len(calls) == 3


@pytest.mark.skipif(DEVICE != "cpu", reason="values of other devices are not read")
@pytest.mark.parametrize(
    "name",
    ["memory", "linear_att", "normalize_scalar", "normalize_bias", "linear_q.weight",
     "linear_k.weight"],
)  # fmt: skip
@pytest.mark.parametrize("graded", [False, True])
def test_writes_without_a_new_version(name, graded):
    """A fused optimizer, ``.data`` and NumPy write without a new version."""
    layer, given = make(normalize=True).double(), loops.inputs()
    memory, query = given["memory"].transpose(0, 1).contiguous(), given["steps"][0]
    with torch.set_grad_enabled(graded):
        layer.set_mask(loops.lengths(), memory)
        before, _ = layer(query, memory)
        written = memory if name == "memory" else layer.get_parameter(name)
        written.data.add_(torch.rand_like(written))
        fresh = copy.deepcopy(layer)
        fresh.set_mask(loops.lengths(), memory)
        expected, _ = fresh(query, memory)
        found, _ = layer(query, memory)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)


def test_state_dict():
    names = ["linear_att", "normalize_scalar", "normalize_bias", "linear_q.weight"]
    assert list(make(normalize=True).state_dict()) == [*names, "linear_k.weight"]
    assert make().normalize_scalar is None
