"""ESPnet: attention with several heads."""

from __future__ import annotations

import copy

import loops
import pytest
import torch
from loops import SIZES, Inputs
from oracle import DEVICE
from torch import Tensor, nn

from additive_attn.compat import espnet_heads

HEADS = 3
DIMS = SIZES.memory, SIZES.query, HEADS, SIZES.hidden, 4
LENGTHS = loops.lengths().tolist()
CASES = {"AttMultiHeadAdd": (), "AttMultiHeadLoc": (3, 2)}


def make(name: str, values: int = 4, **options) -> nn.Module:
    """``values``: features of a projected value, whose number decides whether values are
    projected."""
    torch.manual_seed(0)
    return getattr(espnet_heads, name)(*DIMS[:-1], values, *CASES[name], **options)


class Plain(nn.Module):
    """The formulas, with the parameters of ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"] = layer._modules
        self.name, self.scaling = type(layer).__name__, layer.scaling

    def reset(self):
        pass

    def forward(self, memory, lengths, query, state):
        ignored = torch.arange(memory.shape[1]) >= torch.tensor(lengths)[:, None]
        located = self.name.endswith("Loc")
        if state is None:
            state = [(~ignored).to(memory) / torch.tensor(lengths)[:, None]] * HEADS
        found = []
        for h in range(HEADS):
            key = self.mlp_k[h](memory)
            if located:
                made = self.loc_conv[h](state[h][:, None, None]).squeeze(2)
                key = key + self.mlp_att[h](made.mT)
            weight = self.gvec[h].weight.squeeze(0)
            q, v = self.mlp_q[h](query), self.mlp_v[h](memory)
            scale = 2.0 if located else self.scaling
            found.append(loops.plain(q, key, v, weight, ignored, scale))
        contexts, weights = zip(*found, strict=True)
        return self.mlp_o(torch.cat(contexts, -1)), list(weights)


def decode(layer: nn.Module, given: Inputs) -> list[Tensor]:
    layer.reset()
    outputs, context, state = [], None, None
    for t in range(len(given["steps"])):
        query = loops.next_query(given, t, context)
        context, state = layer(given["memory"], LENGTHS, query, state)
        outputs += [context, *state]
    return outputs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("values", [2, 4])
@pytest.mark.parametrize("han_mode", [False, True])
def test_formula(name, values, han_mode):
    layer = make(name, values, han_mode=han_mode)
    loops.check(layer, Plain(layer), decode)


@pytest.mark.parametrize(
    "changed", ["gvec", "mlp_q", "mlp_k", "mlp_v", "mlp_o", "mlp_att", "loc_conv"]
)
def test_modules_that_tools_have_changed_are_called(changed):
    layer = make("AttMultiHeadLoc")
    module = getattr(layer, changed)
    nn.utils.parametrizations.weight_norm(module if changed == "mlp_o" else module[1])
    loops.check(layer, Plain(layer), decode)


@pytest.mark.skipif(DEVICE != "cpu", reason="values of other devices are not read")
@pytest.mark.parametrize(
    "name", ["gvec.1.weight", "mlp_q.1.weight", "mlp_q.1.bias", "mlp_o.weight"]
)
@pytest.mark.parametrize("values", [2, 4])
@pytest.mark.parametrize("graded", [False, True])
def test_writes_without_a_new_version(name, values, graded):
    """A fused optimizer, ``.data`` and NumPy write without a new version."""
    layer, given = make("AttMultiHeadAdd", values).double(), loops.inputs()
    query = given["steps"][0]
    with torch.set_grad_enabled(graded):
        before, _ = layer(given["memory"], LENGTHS, query, None)
        layer.get_parameter(name).data.add_(torch.rand_like(layer.get_parameter(name)))
        found, _ = layer(given["memory"], LENGTHS, query, None)
        expected, _ = Plain(layer)(given["memory"], LENGTHS, query, None)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)


def test_keys_that_a_caller_replaces():
    layer, given = make("AttMultiHeadAdd").double(), loops.inputs()
    query = given["steps"][0]
    with torch.no_grad():
        layer(given["memory"], LENGTHS, query, None)
        other = copy.deepcopy(layer)
        layer.pre_compute_v = [2 * x for x in layer.pre_compute_v]
        ours, _ = layer(given["memory"], LENGTHS, query, None)
        before, _ = other(given["memory"], LENGTHS, query, None)
    torch.testing.assert_close(ours, 2 * before)


@pytest.mark.parametrize("frozen", [False, True])
def test_steps_after_a_backward_pass_for_the_output_alone(frozen):
    """The product of the output's weight and the values' weight is made once for all steps, in a
    graph that backward frees."""
    layer, given = make("AttMultiHeadAdd").double(), loops.inputs()
    if frozen:
        layer.requires_grad_(False).mlp_o.requires_grad_()
    plain, found = Plain(layer), []
    for one in (layer, plain):
        one.reset()
        for query in given["steps"][:2]:
            context, _ = one(given["memory"], LENGTHS, query, None)
            found += torch.autograd.grad(context.square().sum(), layer.mlp_o.weight)
    torch.testing.assert_close(found[:2], found[2:])


@pytest.mark.usefixtures("steps_leave_records")
def test_upstream_nan_at_padding_ends_there():
    layer, given = make("AttMultiHeadAdd"), loops.inputs(dtype=torch.float32)
    memory = given["memory"].clone().requires_grad_()
    context, _ = layer(memory, LENGTHS, given["steps"][0], None)
    context.sum().mul(torch.nan).backward()
    assert memory.grad is not None
    padding = loops.padding()
    assert (memory.grad[padding] == 0).all() and memory.grad[~padding].isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_side_by_side(name):
    module = loops.project("espnet", "nets/pytorch_backend/rnn/attentions.py")
    ours, theirs = make(name), getattr(module, name)(*DIMS, *CASES[name])
    loops.exchange(ours, theirs)
    start = (~loops.padding()).double() / loops.lengths()[:, None]

    def loop(x, given):
        """Sets the first weights, which ESPnet makes in float32 for all dtypes."""
        x.reset()
        outputs, state = [], [start.to(given["memory"])] * HEADS
        for query in given["steps"]:
            context, state = x(given["memory"], LENGTHS, query, state)
            outputs += [context, *state]
        return outputs

    loops.check(ours, theirs, loop)
