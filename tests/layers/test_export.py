"""Decoders in torch.export, of any number of sequences and keys: no size becomes a constant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from additive_attn import (
    AdditiveAttention,
    CoverageAttention,
    LocationSensitiveAttention,
    MultiheadAdditiveAttention,
)

D = 8
LAYERS = {
    "content": lambda: AdditiveAttention(D, D),
    "location": lambda: LocationSensitiveAttention(D, D, D, kernel_size=5, initial="uniform"),
    "coverage": lambda: CoverageAttention(D, D, D),
    "heads": lambda: MultiheadAdditiveAttention(D, 2, batch_first=True),
}


class Decoder(nn.Module):
    def __init__(self, layer, masking, beams):
        super().__init__()
        self.layer, self.masking, self.beams = layer, masking, beams

    def forward(self, keys, mask):
        layer, query = self.layer, keys[:, 0].repeat_interleave(self.beams, 0)
        memory = layer.project(keys, keys, **{self.masking: mask}).expand(self.beams)
        state = layer.initial_state(memory) if hasattr(layer, "initial_state") else None
        results = []
        for _ in range(2):
            if state is None:
                context, weights = layer.step(query, memory)
            else:
                context, weights, state = layer.step(query, memory, state)
            query = query + context
            results += [context, weights]
        return results


def given(masking, batch, keys):
    lengths = torch.arange(batch) % keys + 1
    mask = lengths if masking == "lengths" else torch.arange(keys) >= lengths[:, None]
    return torch.randn(batch, keys, D), mask


@pytest.mark.parametrize("masking,beams", [("lengths", 1), ("key_padding_mask", 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_any_number_of_sequences_and_keys(name, masking, beams):
    model = Decoder(LAYERS[name](), masking, beams).eval()
    batch, keys = torch.export.Dim("batch", min=1), torch.export.Dim("keys", min=1, max=512)
    shapes = {0: batch, 1: keys}, {0: batch} if masking == "lengths" else {0: batch, 1: keys}
    program = torch.export.export(model, given(masking, 3, 7), dynamic_shapes=shapes).module()
    for sizes in ((3, 7), (4, 9), (1, 2)):
        inputs = given(masking, *sizes)
        torch.testing.assert_close(program(*inputs), model(*inputs))
