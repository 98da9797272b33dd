"""Masks and lengths: none is narrowed to another dtype, all broadcast over the batch alike, and
few lengths are traced as many are."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import DEVICE

from additive_attn import AdditiveAttention, PlainAdditiveAttention, additive_attention

B, LQ, LK, D = 3, 4, 6, 8


def layers(dim=D):
    plain, layer = PlainAdditiveAttention(dim, dim), AdditiveAttention(dim, dim)
    layer.load_state_dict(plain.state_dict())
    return layer, plain


def plain_masked(plain, x, mask):
    """Adds a mask to the scores of the plain layer, as a user writes it under autocast."""
    query, key = plain.query_layer(x), plain.key_layer(x)
    energy = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
    weights = torch.softmax(plain.energy_layer(energy).squeeze(-1) + mask, -1)
    return weights @ x.to(weights.dtype), weights


@pytest.mark.parametrize("offset,spread", [(1000.0, 1.0), (100.0, 1.0), (0.0, 8.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_precision_of_a_mask(dtype, offset, spread):
    layer, plain = layers()
    x = torch.randn(2, 50, D)
    mask = (offset + spread * torch.randn(50, 50)).requires_grad_()
    exact = plain_masked(plain.double(), x.double(), mask.double())[1]
    plain.float()
    with torch.autocast(DEVICE, dtype):
        ours = layer(x, x, attn_mask=mask)[1]
        theirs = plain_masked(plain, x, mask)[1]
    bound = 2 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps
    assert (ours.double() - exact).abs().max() <= bound
    upstream = torch.randn_like(exact)
    truth = torch.autograd.grad(exact, mask, upstream)[0]
    (ours,) = torch.autograd.grad(ours, mask, upstream.to(ours.dtype))
    (theirs,) = torch.autograd.grad(theirs, mask, upstream.to(theirs.dtype))
    assert ours.dtype == mask.dtype
    bound = 3 * (theirs.double() - truth).abs().max() + torch.finfo(dtype).eps
    assert (ours.double() - truth).abs().max() <= bound


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_mask_beside_16_bits(dtype):
    """The mask's values and gradient have the precision of float32: 1e-6 would be 0 in float16."""
    q, k, v = (torch.randn(2, n, D, dtype=dtype) for n in (LQ, LK, LK))
    w = torch.randn(D, dtype=dtype)
    mask = (1000 + torch.randn(LQ, LK)).requires_grad_()
    wide = additive_attention(q.float(), k.float(), v.float(), w.float(), attn_mask=mask)
    ours = additive_attention(q, k, v, w, attn_mask=mask)
    # A GPU rounds a weight to the dtype of the values before it multiplies them.
    rounding = 2 * torch.finfo(dtype).eps * v.abs().max()
    assert (ours - wide).abs().max() <= rounding
    upstream = 2**-12 * torch.randn_like(ours)
    (theirs,) = torch.autograd.grad(wide, mask, upstream.float())
    (grad,) = torch.autograd.grad(ours, mask, upstream)
    assert grad.dtype == torch.float32
    assert (grad - theirs).abs().max() <= 2**-9 * theirs.abs().max()


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_of_any_float_dtype_under_autocast(dtype, mask_dtype):
    layer, _ = layers()
    x, mask = torch.randn(2, LK, D), torch.randn(LK, LK).to(mask_dtype)
    with torch.autocast(DEVICE, dtype):
        torch.testing.assert_close(
            layer(x, x, attn_mask=mask), layer(x, x, attn_mask=mask.float())
        )


def shapes_of(full):
    """Yields ``full`` with every subset of its dims set to 1."""
    return sorted(set(itertools.product(*((size, 1) for size in full))))


@pytest.mark.parametrize("batches", [(B, B, B), (B, 1, 1), (1, B, B), (B, B, 1)], ids=str)
@pytest.mark.parametrize("shape", [(), *shapes_of((B,)), *shapes_of((B, LQ))][1:], ids=str)
def test_lengths_broadcast(batches, shape):
    layer, _ = layers()
    q, k, v = (torch.randn(b, n, D) for b, n in zip(batches, (LQ, LK, LK), strict=True))
    lengths = torch.randint(0, LK + 1, shape)
    full = lengths[:, None] if lengths.dim() == 1 else lengths
    allowed = torch.arange(LK) < full.expand(B, LQ)[..., None]
    expected = layer(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(layer(q, k, v, lengths=lengths), expected)
    w = layer.energy_layer.weight[0]
    out, weights = additive_attention(
        layer.query_layer(q), layer.key_layer(k), v, w, lengths=lengths, need_weights=True
    )
    torch.testing.assert_close((out, weights), expected)
    if lengths.dim() == 1:
        memory = layer.project(k, v, lengths=lengths)
        torch.testing.assert_close(layer.step(q[:, 0], memory)[0], expected[0][:, 0])


@pytest.mark.parametrize("batches", [(B, B, B), (B, 1, 1), (1, B, B), (B, B, 1)], ids=str)
@pytest.mark.parametrize("size", [B, 1])
def test_key_padding_masks_broadcast(batches, size):
    layer, _ = layers()
    q, k, v = (torch.randn(b, n, D) for b, n in zip(batches, (LQ, LK, LK), strict=True))
    padding = torch.rand(size, LK) < 0.4
    expected = layer(q, k, v, attn_mask=~padding[:, None].expand(B, LQ, LK))
    torch.testing.assert_close(layer(q, k, v, key_padding_mask=padding), expected)
    memory = layer.project(k, v, key_padding_mask=padding)
    torch.testing.assert_close(layer.step(q[:, 0], memory)[0], expected[0][:, 0])


@pytest.mark.parametrize("shape", shapes_of((B, LQ, LK)) + shapes_of((LQ, LK)), ids=str)
def test_attn_masks_broadcast(shape):
    layer, _ = layers()
    q, k = torch.randn(B, LQ, D), torch.randn(1, LK, D)
    mask = torch.rand(shape) < 0.6
    torch.testing.assert_close(
        layer(q, k, attn_mask=mask), layer(q, k, attn_mask=mask.expand(B, LQ, LK))
    )


def test_a_memory_shared_by_beams():
    layer, _ = layers()
    q, k = torch.randn(5, D), torch.randn(1, LK, D)
    memory = layer.project(k, lengths=torch.tensor([2]))
    short = layer.step(q, layer.project(k[:, :2]))[0]
    torch.testing.assert_close(layer.step(q, memory)[0], short)


@pytest.mark.parametrize("number", [64, 65])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_lengths_are_not_read_while_tracing(mode, number):
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k = torch.randn(number, 1, D), torch.randn(number, LK, D)
    lengths = torch.full((number,), 3)
    w = torch.randn(D)
    traced = make_fx(
        lambda lengths: additive_attention(q, k, k, w, lengths=lengths),
        tracing_mode=mode, _allow_non_fake_inputs=True,
    )(lengths)  # fmt: skip
    other = torch.full((number,), 2)
    torch.testing.assert_close(traced(other), additive_attention(q, k, k, w, lengths=other))
