"""OpenNMT-py."""

from __future__ import annotations

import loops
import pytest
import torch
from loops import SIZES, Inputs
from torch import Tensor, nn

from additive_attn.compat import opennmt

SQUARE = SIZES._replace(memory=6, query=6, hidden=6)


def make(coverage: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return opennmt.GlobalAttention(6, coverage, "mlp")


class Plain(nn.Module):
    """The formula, with the parameters of ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"] = layer._modules

    def forward(self, src, enc_out, src_len=None, coverage=None):
        query = src if src.dim() == 3 else src[:, None]
        if coverage is not None:
            enc_out.add_(self.linear_cover(coverage[:, :, None]))
            enc_out = enc_out.tanh()
        ignored = None
        if src_len is not None:
            ignored = (torch.arange(enc_out.shape[1]) >= src_len[:, None])[:, None]
        context, weights = loops.plain(
            self.linear_query(query), self.linear_context(enc_out)[:, None], enc_out[:, None],
            self.v.weight[0], ignored,
        )  # fmt: skip
        out = self.linear_out(torch.cat([context, query], -1))
        return (out, weights) if src.dim() == 3 else (out[:, 0], weights[:, 0])


def decode(layer: nn.Module, given: Inputs) -> list[Tensor]:
    """Runs steps with input feeding, then all queries in one call."""
    memory, lengths, outputs, context = given["memory"] * 1, loops.lengths(), [], None
    for t in range(len(given["steps"])):
        context, weights = layer(loops.next_query(given, t, context), memory, lengths)
        outputs += [context, weights]
    return [*outputs, *layer(given["steps"].transpose(0, 1), memory, lengths)]


def cover(layer: nn.Module, given: Inputs) -> list[Tensor]:
    """Gives each step its own memory for the backward pass, since the original writes to it."""
    outputs, coverage = [], torch.zeros_like(given["memory"][:, :, 0])
    for query in given["steps"]:
        memory = given["memory"] * 1
        context, weights = layer(query, memory, loops.lengths(), coverage)
        coverage = coverage + weights
        outputs += [context, weights, memory]
    return outputs


def cover_one_memory(layer: nn.Module, given: Inputs) -> list[Tensor]:
    memory, outputs, coverage = given["memory"].clone(), [], None
    for query in given["steps"]:
        context, weights = layer(query, memory, loops.lengths(), coverage)
        coverage = weights if coverage is None else coverage + weights
        outputs += [context, weights]
    return [*outputs, memory]


def test_formula():
    layer = make()
    loops.check(layer, Plain(layer), decode, sizes=SQUARE)


def test_coverage_changes_the_memory_in_place():
    layer = make(True)
    loops.check(layer, Plain(layer), cover, sizes=SQUARE)
    given = loops.inputs(SQUARE)
    with torch.no_grad():
        expected = cover_one_memory(Plain(layer), given)
        torch.testing.assert_close(cover_one_memory(layer, given), expected)


@pytest.mark.parametrize("options", [{"attn_type": "dot"}, {"attn_func": "sparsemax"}])
def test_what_it_does_not_compute(options):
    with pytest.raises(ValueError, match="Keep OpenNMT-py's own class"):
        opennmt.GlobalAttention(6, **{"attn_type": "mlp", **options})


@pytest.mark.parametrize("coverage", [False, True])
def test_side_by_side(coverage):
    module = loops.project("onmt", "modules/global_attention.py")
    ours, theirs = make(coverage), module.GlobalAttention(6, coverage, "mlp")
    loops.exchange(ours, theirs)
    loops.check(ours, theirs, cover if coverage else decode, sizes=SQUARE)
