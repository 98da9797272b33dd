"""Whole decoders on compiled code: every kernel of their steps, and of the gradients that are made
once for all steps, runs in the emulator."""

from __future__ import annotations

import decoders
import emulation
import paths
import pytest
import torch
from oracle import error, generator
from torch import nn

from additive_attn import AdditiveAttention

pytestmark = pytest.mark.compiled
KEYS, STEPS = 130, 2  # ranges of keys
STEP = {"forward_kernel", "merge_kernel", "probability_kernel"}
CONTENT = STEP | {
    "gradient_kernel", "split_sum_kernel",
    # Once for all steps.
    "prepare_kernel", "opposite_kernel", "given_kernel", "feature_kernel",
}  # fmt: skip
CASES = {
    "content": CONTENT,
    "beams": CONTENT,
    "tacotron": STEP | {"location_kernel", "correlation_kernel"},
    "pointer": STEP | {"location_kernel"},
}


class Content(nn.Module):
    """Steps with a cell between them, of beams if there are several."""

    def __init__(self, beams: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.beams = (
            AdditiveAttention(decoders.D, decoders.H, key_dim=decoders.K),
            beams,
        )
        self.cell = nn.Linear(decoders.DV + decoders.D, decoders.D)

    def forward(self, key, value, query):
        memory = self.layer.project(key, value)
        memory = memory.expand(self.beams) if self.beams > 1 else memory
        return self.decoded(query, lambda query: self.layer.step(query, memory))

    def plain(self, key, value, query):
        key, value = (x.repeat_interleave(self.beams, 0) for x in (key, value))
        layer = self.layer

        def step(query):
            energy = torch.tanh(layer.query_layer(query)[:, None] + layer.key_layer(key))
            weights = layer.energy_layer(energy).squeeze(-1).softmax(-1)
            return (weights[:, None] @ value).squeeze(1), weights

        return self.decoded(query, step)

    def decoded(self, query, step):
        query, found = query.repeat_interleave(self.beams, 0), []
        for _ in range(STEPS):
            context, weights = step(query)
            query = torch.tanh(self.cell(torch.cat([context, query], -1)))
            found += [context, weights]
        return found


def inputs(dtype):
    g = generator(0)
    shapes = (2, KEYS, decoders.K), (2, KEYS, decoders.DV), (2, decoders.D)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kind", CASES)
def test_a_decoder(kind):
    """Results keep the rule of ``oracle``, and the expected kernels have run."""
    options = {}
    if kind in ("content", "beams"):
        decoder = Content(2 if kind == "beams" else 1)
    else:
        decoder = decoders.Decoder(decoders.build(kind), torch.float32)
        options = {"steps": STEPS}
    before = len(emulation.launched())
    with paths.running("triton"), emulation.running():
        ours = decoders.results(decoder, decoder, inputs(torch.float32), **options)
    names = emulation.launched()[before:]
    assert set(names) == CASES[kind], sorted(set(names))
    assert names.count("forward_kernel") == STEPS
    same = decoders.results(decoder, decoder.plain, inputs(torch.float32), **options)
    decoder.double()
    exact = decoders.results(decoder, decoder.plain, inputs(torch.float64), **options)
    for times, found in enumerate(zip(ours, same, exact, strict=True), 2):
        for mine, other, truth in zip(*found, strict=True):
            floor = 2**-20 * (1 + truth.abs().max().item())
            assert error(mine, truth) <= times * error(other, truth) + floor
