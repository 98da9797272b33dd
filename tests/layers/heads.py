"""Attention with several heads in plain PyTorch: masks are those of nn.MultiheadAttention, and
empty rows give zeros."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from additive_attn import MultiheadAdditiveAttention

N, S, E, HEADS, STEPS = 3, 7, 8, 2, 4
F64 = torch.float64


def made(**options):
    options = {"num_heads": HEADS, "batch_first": True, "dtype": F64} | options
    layer = MultiheadAdditiveAttention(E, **options)
    nn.init.normal_(layer.energy_weight)
    return layer


def padded():
    return torch.arange(S) >= torch.tensor([7, 4, 0])[:, None]


def plain_heads(
    layer, query, key, value, key_padding_mask=None, attn_mask=None, averaged=True,
):  # fmt: skip
    """Computes the results that ``layer`` must give, from its parameters alone."""
    if query.dim() == 2:
        padding = None if key_padding_mask is None else key_padding_mask[None]
        tensors = [x[None] for x in (query, key, value)]
        out, weights = batch_first(layer, *tensors, padding, attn_mask)
        weights = weights.mean(1) if averaged else weights
        return out[0], weights[0]
    turn = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))
    out, weights = batch_first(layer, *map(turn, (query, key, value)), key_padding_mask, attn_mask)
    return turn(out), weights.mean(1) if averaged else weights


def batch_first(layer, query, key, value, key_padding_mask=None, attn_mask=None):
    n, h, e, heads = query.shape[0], layer.hidden_dim, layer.embed_dim, layer.num_heads
    if layer.in_proj_weight is None:
        w_q, w_k, w_v = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    else:
        w_q, w_k, w_v = layer.in_proj_weight.split([h, h, e])
    bias = layer.in_proj_bias
    b_q, b_k, b_v = (None,) * 3 if bias is None else bias.split([h, h, e])
    q, k, v = F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
    scores = q.new_zeros(n, heads, q.shape[1], k.shape[1])
    if attn_mask is not None:
        mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (n, heads))
        scores = scores + as_float(mask, scores)
    if key_padding_mask is not None:
        scores = scores + as_float(key_padding_mask, scores)[:, None, None]
    if layer.bias_k is not None:
        k = torch.cat([k, layer.bias_k.repeat(n, 1, 1)], 1)
        v = torch.cat([v, layer.bias_v.repeat(n, 1, 1)], 1)
    if layer.add_zero_attn:
        k = torch.cat([k, k.new_zeros(n, 1, h)], 1)
        v = torch.cat([v, v.new_zeros(n, 1, e)], 1)
    scores = F.pad(scores, (0, k.shape[1] - scores.shape[-1]))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    energy = torch.tanh(q[..., :, None, :] + k[..., None, :, :])
    scores = scores + (energy * layer.energy_weight[:, None, None]).sum(-1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    out = (weights @ v).transpose(1, 2).flatten(-2)
    return F.linear(out, layer.out_proj.weight, layer.out_proj.bias), weights


def as_float(mask, like):
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype).masked_fill(mask, -torch.inf)


class PlainHeads(nn.Module):
    """Replaces a layer by the formula with its parameters."""

    _qkv_same_embed_dim = False

    def __init__(self, layer):
        super().__init__()
        self.layer, self.batch_first = layer, layer.batch_first

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        return plain_heads(self.layer, query, key, value, key_padding_mask, attn_mask)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)
