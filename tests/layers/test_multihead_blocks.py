"""A BlockMask as the mask of several heads gives the results of the dense mask that it
represents."""

from __future__ import annotations

import pytest
import torch
from oracle import DEVICE
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from additive_attn import MultiheadAdditiveAttention

N, L, S, E, HEADS = 2, 20, 20, 16, 2
IGNORED = torch.arange(S) >= torch.tensor([[20], [13]])
FLOATS = torch.randn(N, S).masked_fill(IGNORED, -torch.inf)


def near(b, h, q, k):
    return (q >= k) & (q - k < 5 + 3 * h)


def made(batch=None, heads=None, rows=L):
    return create_block_mask(near, batch, heads, rows, S, device=DEVICE, BLOCK_SIZE=8)


def dense(heads):
    h, q, k = torch.arange(heads), torch.arange(L), torch.arange(S)
    allowed = near(0, h[:, None, None], q[:, None], k)
    return ~allowed.repeat(N, 1, 1) if heads > 1 else ~allowed[0]


def layer(**options):
    torch.manual_seed(0)
    return MultiheadAdditiveAttention(E, HEADS, batch_first=True, **options).double()


@pytest.mark.parametrize(
    "padding", [None, IGNORED, FLOATS.double()], ids=["none", "bool", "float"]
)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("heads", [None, HEADS])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_as_the_dense_mask(padding, need_weights, heads, dropout):
    """Results are also the same with the hint is_causal, which is wrong for this mask."""
    results = []
    for mask, hint in (
        (dense(heads or 1), False), (made(None, heads), False), (made(None, heads), True),
    ):  # fmt: skip
        attention, x = layer(dropout=dropout), torch.randn(N, L, E).double().requires_grad_()
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, N * L * E).double().view(N, L, E).requires_grad_()
        out, weights = attention(
            x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights,
            is_causal=hint,
        )  # fmt: skip
        found = [out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])]
        results.append(found + [weights] * need_weights)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_in_transformers():
    """A decoder passes a BlockMask to the layer; PyTorch's encoder converts masks itself, and
    raises."""
    decoder = nn.TransformerDecoderLayer(E, HEADS, 32, 0.0, batch_first=True).double()
    decoder.self_attn, decoder.multihead_attn = layer(), layer()
    x = torch.randn(N, L, E).double()
    expected = decoder(x, x, tgt_mask=dense(1), memory_mask=dense(1))
    for hint in (False, True):
        out = decoder(x, x, tgt_mask=made(), memory_mask=made(), tgt_is_causal=hint)
        torch.testing.assert_close(out, expected)
    encoder = nn.TransformerEncoderLayer(E, HEADS, 32, 0.0, batch_first=True).double()
    encoder.self_attn = layer()
    with pytest.raises(RuntimeError, match="must be None or torch"):
        encoder(x, src_mask=made())


def test_without_a_batch_and_in_a_graph():
    attention, x = layer().eval(), torch.randn(N, L, E).double()
    expected = attention(x, x, x, attn_mask=dense(1))
    torch.testing.assert_close(attention(*[x[0]] * 3, attn_mask=made())[0], expected[0][0])
    mask = made()
    graph = torch.compile(
        lambda x: attention(x, x, x, attn_mask=mask), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(graph(x), expected)
    time_first = MultiheadAdditiveAttention(E, HEADS).double().eval()
    time_first.load_state_dict(attention.state_dict())
    out, _ = time_first(*[x.transpose(0, 1)] * 3, attn_mask=mask)
    torch.testing.assert_close(out.transpose(0, 1), expected[0])


@pytest.mark.parametrize("options,arguments,sentence", [
    ({"add_bias_kv": True}, {"attn_mask": made()}, "add_bias_kv and add_zero_attn append"),
    ({"add_zero_attn": True}, {"attn_mask": made()}, "add_bias_kv and add_zero_attn append"),
    ({}, {"attn_mask": made(rows=9)}, "BlockMask for 9 queries"),
    ({}, {"attn_mask": made(batch=3)}, "BlockMask of batch 3"),
    ({}, {"attn_mask": made(heads=3)}, "and 3 heads"),
    ({}, {"key_padding_mask": made()}, "BlockMask is an attn_mask"),
])  # fmt: skip
def test_sentences(options, arguments, sentence):
    x = torch.randn(N, L, E).double()
    with pytest.raises((TypeError, ValueError), match=sentence):
        layer(**options)(x, x, x, **arguments)
