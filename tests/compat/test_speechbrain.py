"""SpeechBrain: content-based and location-aware attention."""

from __future__ import annotations

import loops
import pytest
import torch
from loops import SIZES, Inputs
from torch import Tensor, nn

from additive_attn.compat import speechbrain

DIMS = SIZES.memory, SIZES.query, SIZES.hidden, SIZES.memory
CASES = {"ContentBasedAttention": (), "LocationAwareAttention": (3, 2)}


def make(name: str, scaling: float = 0.7) -> nn.Module:
    torch.manual_seed(0)
    return getattr(speechbrain, name)(*DIMS, *CASES[name], scaling=scaling)


class Plain(nn.Module):
    """The formulas, with the parameters of ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"] = layer._modules
        self.scaling = layer.scaling

    def reset(self):
        self.last = None

    def forward(self, memory, lengths, query):
        ignored = torch.arange(memory.shape[1]) >= lengths[:, None]
        key = self.mlp_enc(memory)
        if hasattr(self, "conv_loc"):
            last = self.last
            if last is None:
                last = ~ignored / lengths[:, None].float()
            key = key + self.mlp_loc(self.conv_loc(last[:, None].to(memory)).mT)
        weight = self.mlp_attn.weight.squeeze(0)
        context, weights = loops.plain(
            self.mlp_dec(query), key, memory, weight, ignored, self.scaling
        )
        self.last = weights.detach()
        return self.mlp_out(context), weights


def decode(layer: nn.Module, given: Inputs) -> list[Tensor]:
    layer.reset()
    outputs, context = [], None
    for t in range(len(given["steps"])):
        query = loops.next_query(given, t, context)
        # Lengths may have any dtype, in which the original continues to compute.
        context, weights = layer(given["memory"], loops.lengths().to(query), query)
        outputs += [context, weights]
    return outputs


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    layer = make(name)
    loops.check(layer, Plain(layer), decode)


def test_what_a_step_leaves():
    layer, given = make("LocationAwareAttention").double(), loops.inputs()
    memory, lengths = given["memory"], loops.lengths()
    _, weights = layer(memory, lengths, given["steps"][0])
    assert torch.equal(layer.prev_attn, weights) and not layer.prev_attn.requires_grad
    assert torch.equal(layer.mask, 1 - loops.padding().long())
    torch.testing.assert_close(layer.precomputed_enc_h, layer.mlp_enc(memory))
    layer.reset()
    assert layer.prev_attn is layer.mask is layer.precomputed_enc_h is layer.enc_len is None


def test_beams_are_reordered_by_the_attribute():
    """A beam search sets prev_attn."""
    layer, given = make("LocationAwareAttention").double(), loops.inputs()
    plain = Plain(layer)
    plain.reset()
    memory, lengths = given["memory"][:1].expand(3, -1, -1).contiguous(), torch.full((3,), 9)
    index = torch.tensor([2, 2, 0])
    with torch.no_grad():
        for t in range(3):
            ours = layer(memory, lengths, given["steps"][t])
            torch.testing.assert_close(ours, plain(memory, lengths, given["steps"][t]))
            layer.prev_attn, plain.last = layer.prev_attn[index], plain.last[index]


def test_a_mask_that_a_caller_sets():
    layer, given = make("ContentBasedAttention").double(), loops.inputs()
    with torch.no_grad():
        layer(given["memory"], loops.lengths(), given["steps"][0])
        layer.mask = torch.zeros(SIZES.batch, SIZES.keys)
        layer.mask[:, 3:5] = 1
        _, weights = layer(given["memory"], loops.lengths(), given["steps"][0])
    assert ((weights > 0) == (layer.mask > 0)).all()


@pytest.mark.parametrize("name", CASES)
def test_side_by_side(name):
    module = loops.project("speechbrain", "nnet/attention.py")
    ours, theirs = make(name), getattr(module, name)(*DIMS, *CASES[name], scaling=0.7)
    loops.exchange(ours, theirs)
    loops.check(ours, theirs, decode)
