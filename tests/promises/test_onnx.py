"""Both of torch's ONNX exporters, run in onnxruntime against PyTorch at several lengths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from additive_attn import AdditiveAttention, additive_scores

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = AdditiveAttention(8, 16)

    def forward(self, query, key, lengths):
        return self.attention(query, key, lengths=lengths)


class Step(Whole):
    def forward(self, query, key, lengths):
        return self.attention.step(query, self.attention.project(key, lengths=lengths))


class Scores(Whole):
    """Replaces -inf by finite numbers, which can be compared."""

    def forward(self, query, key, lengths):
        layer = self.attention
        query, key = layer.query_layer(query), layer.key_layer(key)
        scores = additive_scores(query, key, layer.energy_layer.weight[0], lengths=lengths)
        return (scores.exp(),)


def export(model, arguments, path, dynamo):
    dims = [{d: f"{name}{d}" for d in range(x.dim() - (x.dim() > 1))}
            for name, x in zip("qkl", arguments, strict=True)]  # fmt: skip
    if dynamo:
        dynamic = [dict.fromkeys(d, torch.export.Dim.DYNAMIC) for d in dims]
        torch.onnx.export(
            model, arguments, dynamo=True, dynamic_shapes=tuple(dynamic), verbose=False
        ).save(path)
    else:
        names = ["query", "key", "lengths"]
        torch.onnx.export(model, arguments, path, dynamo=False, input_names=names,
                          dynamic_axes=dict(zip(names, dims, strict=True)))  # fmt: skip


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("kind", [Whole, Step, Scores])
def test_exported_layers_compute_the_same(kind, dynamo, tmp_path):
    def random(batch, queries, keys):
        query = torch.randn(batch, *([] if kind is Step else [queries]), 8)
        return query, torch.randn(batch, keys, 8), torch.randint(0, keys + 1, (batch,))

    model, path = kind().eval(), str(tmp_path / "model.onnx")
    export(model, random(2, 3, 5), path, dynamo)
    session = onnxruntime.InferenceSession(path)
    names = [x.name for x in session.get_inputs()]
    for sizes in ((2, 3, 5), (3, 6, 9), (1, 1, 2)):
        arguments = random(*sizes)
        given = {n: x.numpy() for n, x in zip(names, arguments, strict=True)}
        for ours, expected in zip(session.run(None, given), model(*arguments), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), expected)
