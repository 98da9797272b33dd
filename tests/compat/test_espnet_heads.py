"""ESPnet: attention with several heads."""

from __future__ import annotations

import copy

import loops
import pytest
import torch
from loops import SIZES, Inputs
from torch import Tensor, nn

from additive_attn.compat import espnet_heads

HEADS = 3
DIMS = SIZES.memory, SIZES.query, HEADS, SIZES.hidden, 4
LENGTHS = loops.lengths().tolist()
CASES = {"AttMultiHeadAdd": (), "AttMultiHeadLoc": (3, 2)}


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return getattr(espnet_heads, name)(*DIMS, *CASES[name], **options)


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
@pytest.mark.parametrize("han_mode", [False, True])
def test_formula(name, han_mode):
    layer = make(name, han_mode=han_mode)
    loops.check(layer, Plain(layer), decode)


@pytest.mark.parametrize("changed", ["gvec", "mlp_q", "mlp_k", "mlp_att", "loc_conv"])
def test_modules_that_tools_have_changed_are_called(changed):
    layer = make("AttMultiHeadLoc")
    nn.utils.parametrizations.weight_norm(getattr(layer, changed)[1])
    loops.check(layer, Plain(layer), decode)


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


@pytest.mark.parametrize("name", CASES)
def test_side_by_side(name):
    module = loops.project("espnet", "nets/pytorch_backend/rnn/attentions.py")
    ours, theirs = make(name), getattr(module, name)(*DIMS, *CASES[name])
    loops.exchange(ours, theirs)
    start = (~loops.padding()).double() / loops.lengths()[:, None]

    def loop(x, given):
        """ESPnet makes the first weights in float32 always."""
        x.reset()
        outputs, state = [], [start.to(given["memory"])] * HEADS
        for query in given["steps"]:
            context, state = x(given["memory"], LENGTHS, query, state)
            outputs += [context, *state]
        return outputs

    loops.check(ours, theirs, loop)
