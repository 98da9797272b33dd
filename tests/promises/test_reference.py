"""The formulas of the package, the docs, the oracle of the tests and the fallback agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from oracle import OUTPUTS, dense_mask, error, fused, make, plain
from torch import nn

from additive_attn import AdditiveAttention, PlainAdditiveAttention
from additive_attn.backends.plain import blocks
from additive_attn.spec.call import Masking
from additive_attn.spec.formula import plain_additive_attention

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def code_blocks():
    text = PAGE.read_text("utf-8") if PAGE.exists() else ""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_documented_plain_layer_is_ours():
    """The plain layer in the documentation gives the results of the package's layer."""
    blocks = [block for block in code_blocks() if "(nn.Module)" in block and "tanh" in block]
    if not PAGE.exists():
        pytest.skip("installed without the repository's documentation")
    assert blocks, f"{PAGE.name} shows no plain layer"
    for block in blocks:
        # A shortened listing may omit the imports.
        scope = {"torch": torch, "nn": nn, "F": nn.functional}
        exec(block, scope)
        names = re.findall(r"class (\w+)\(nn\.Module\)", block)
        layer = scope[names[0]](20, 32)
        fused_layer = AdditiveAttention(20, 32)
        fused_layer.load_state_dict(layer.state_dict())
        query, key = torch.randn(2, 3, 20), torch.randn(2, 10, 20)
        out, weights = layer(query, key, key)
        torch.testing.assert_close(fused_layer(query, key, key), (out, weights))


def test_plain_module_is_the_formula():
    layer = PlainAdditiveAttention(6, 8).double()
    query, key, value = (torch.randn(2, n, 6).double() for n in (3, 5, 5))
    out, weights = layer(query, key, value)
    expected = plain(
        layer.query_layer(query), layer.key_layer(key), value, layer.energy_layer.weight[0]
    )
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(weights, expected["weights"])


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "fallback", "kernel"])
def test_implementations_agree(implementation, masked, batch):
    inputs = make(batch, 6, 11, 7, 5, dtype=torch.float64)
    mask = torch.randn(6, 11, dtype=torch.float64).masked_fill(torch.rand(6, 11) < 0.3, -torch.inf)
    mask[2] = -torch.inf
    options = dict(attn_mask=mask, window=(3, 4)) if masked else {}
    allowed = dense_mask(inputs, **options)
    bias = mask if masked else None
    expected = plain(*inputs.values(), bias=bias, allowed=allowed, scale=0.7)
    if implementation == "kernel":
        got = fused(inputs, scale=0.7, **options)
    elif implementation == "reference":
        got = plain_additive_attention(*inputs.values(), bias, attended=allowed, scale=0.7)
        got = dict(zip(OUTPUTS, got, strict=True))
    else:
        left, right = (3, 4) if masked else (-1, -1)
        got = blocks.forward(
            *inputs.values(), *Masking(bias, left=left, right=right), None, 0.0, 0.7, True
        )
        got = dict(zip(OUTPUTS, got, strict=True))
    for name in OUTPUTS:
        assert error(got[name], expected[name]) < 1e-13, name


@pytest.mark.parametrize("block", [1, 40, 300])
def test_fallback_in_blocks(block, monkeypatch):
    """Blocks of one, some and all rows give the same results, forward and backward."""
    monkeypatch.setattr("additive_attn.backends.plain.plan._BLOCK_ELEMENTS", block)
    inputs = make((2,), 6, 11, 3, 5, dtype=torch.float64)
    lengths = torch.tensor([[11], [4]])
    mask = torch.randn(6, 11, dtype=torch.float64)
    seed = torch.tensor(3)
    arguments = *inputs.values(), *Masking(mask, lengths, left=4, right=2), seed, 0.3, 0.7
    upstream = torch.randn(2, 6, 5).double(), torch.randn(2, 6, 11).double(), torch.randn(2, 6)
    results = []
    for elements in (block, 2**20):
        monkeypatch.setattr("additive_attn.backends.plain.plan._BLOCK_ELEMENTS", elements)
        outputs = blocks.forward(*arguments, True)
        grads = blocks.backward(*upstream, *arguments, outputs[2], *[True] * 5)
        results.append([*outputs, *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
