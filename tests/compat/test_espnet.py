"""ESPnet: attention with one head."""

from __future__ import annotations

import loops
import pytest
import torch
from loops import SIZES, Inputs
from torch import Tensor, nn

from additive_attn.compat import espnet

DIMS = SIZES.memory, SIZES.query, SIZES.hidden
LENGTHS = loops.lengths().tolist()
CASES = {"AttAdd": (), "AttLoc": (3, 2), "AttCov": (), "AttCovLoc": (3, 2), "AttLocRec": (3, 2)}


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return getattr(espnet, name)(*DIMS, *CASES[name], **options)


class Plain(nn.Module):
    """The formulas, with the parameters of ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"] = layer._modules
        self.name = type(layer).__name__

    def reset(self):
        self.key = None

    def forward(self, memory, lengths, query, state, scaling=2.0):
        if self.key is None:
            self.key = self.mlp_enc(memory)
            self.ignored = torch.arange(memory.shape[1]) >= torch.tensor(lengths)[:, None]
        uniform = (~self.ignored).to(memory) / torch.tensor(lengths)[:, None]
        if query is None:
            query = memory.new_zeros(len(memory), SIZES.query)
        key, covers = self.key, "Cov" in self.name
        if covers:
            state = [uniform] if state is None else state
            inputs = torch.stack(state).sum(0)
        elif self.name == "AttLocRec":
            zeros = memory.new_zeros(len(memory), SIZES.hidden)
            inputs, states = (uniform, (zeros, zeros)) if state is None else state
        else:
            inputs = uniform if state is None else state
        if "Loc" in self.name:
            found = self.loc_conv(inputs[:, None, None]).squeeze(2)
            if self.name == "AttLocRec":
                states = self.att_lstm(found.relu().amax(-1), states)
                key = key + states[0][:, None]
            else:
                key = key + self.mlp_att(found.mT)
        elif covers:
            key = key + self.wvec(inputs[:, :, None])
        weight = self.gvec.weight.squeeze(0)
        context, weights = loops.plain(
            self.mlp_dec(query), key, memory, weight, self.ignored, scaling
        )
        if covers:
            return context, [*state, weights]
        return context, (weights, states) if self.name == "AttLocRec" else weights


def decode(layer: nn.Module, given: Inputs, lengths=LENGTHS, start=None) -> list[Tensor]:
    layer.reset()
    outputs, context, state = [], None, None if start is None else start(given["memory"])
    for t in range(len(given["steps"])):
        query = loops.next_query(given, t, context)
        context, state = layer(given["memory"], lengths, query, state)
        last = state[-1] if isinstance(state, list) else state
        outputs += [context, last[0] if isinstance(last, tuple) else last]
    return outputs


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    layer = make(name)
    loops.check(layer, Plain(layer), decode)
    # Another batch, after a reset.
    one = SIZES._replace(batch=1, keys=7)
    layer.float()
    loops.check(layer, Plain(layer), lambda x, given: decode(x, given, [7]), sizes=one)


@pytest.mark.parametrize("name", CASES)
def test_no_query_no_gradients_other_scaling(name):
    layer, given = make(name).double(), loops.inputs()
    with torch.no_grad():
        for x in (layer, plain := Plain(layer)):
            x.reset()
        ours, theirs = (x(given["memory"], LENGTHS, None, None, 0.5) for x in (layer, plain))
    torch.testing.assert_close(ours, theirs)


def test_what_a_sequence_leaves():
    layer, given = make("AttAdd").double(), loops.inputs()
    layer(given["memory"], LENGTHS, given["steps"][0], None)
    assert layer.enc_h is given["memory"] and layer.h_length == SIZES.keys
    torch.testing.assert_close(layer.pre_compute_enc_h, layer.mlp_enc(given["memory"]))
    assert torch.equal(layer.mask, loops.padding())
    layer.reset()
    assert layer.enc_h is layer.h_length is layer.pre_compute_enc_h is layer.mask is None


def test_hierarchical_attention_projects_every_call():
    layer = make("AttAdd", han_mode=True)
    layer.double()
    given = loops.inputs()
    for factor in (1.0, 2.0):
        memory = factor * given["memory"]
        plain = Plain(layer)
        plain.reset()
        expected = plain(memory, LENGTHS, given["steps"][0], None)
        torch.testing.assert_close(layer(memory, LENGTHS, given["steps"][0], None), expected)


def test_the_bias_of_the_energy_has_a_zero_gradient():
    layer = make("AttLoc").double()
    _, grads = loops.run(layer, decode, loops.inputs())
    assert torch.equal(grads["gvec.bias"], torch.zeros(1, dtype=torch.float64))
    sum(x.sum() for x in decode(layer, loops.inputs())).backward()
    assert all(x.grad is not None for x in layer.parameters())


def test_constraint():
    layer, given = make("AttLoc").double(), loops.inputs(SIZES._replace(batch=1))
    layer.reset()
    with torch.no_grad():
        memory, query = given["memory"], given["steps"][0]
        _, free = layer(memory, [11], query, None)
        _, weights = layer(memory, [11], query, None, last_attended_idx=4)
    assert (weights[0] > 0).nonzero().flatten().tolist() == [3, 4, 5, 6]
    torch.testing.assert_close(weights[0, 3:7], free[0, 3:7] / free[0, 3:7].sum())
    with pytest.raises(NotImplementedError, match="one"):
        layer(memory.expand(2, -1, -1), [11, 11], query.expand(2, -1), None, last_attended_idx=4)


@pytest.mark.parametrize("name", CASES)
def test_side_by_side(name):
    module = loops.project("espnet", "nets/pytorch_backend/rnn/attentions.py")
    ours, theirs = make(name), getattr(module, name)(*DIMS, *CASES[name])
    loops.exchange(ours, theirs)

    def start(memory):
        """Returns the first state, which some of ESPnet's layers make in float32 for all
        dtypes."""
        weights = (~loops.padding()).to(memory) / loops.lengths()[:, None]
        zeros = memory.new_zeros(SIZES.batch, SIZES.hidden)
        return [weights] if "Cov" in name else (weights, (zeros, zeros))

    late = "Cov" in name or name == "AttLocRec"
    loops.check(ours, theirs, lambda x, given: decode(x, given, LENGTHS, start if late else None))
