"""Several heads: a replacement of nn.MultiheadAttention with another score."""

from __future__ import annotations

import layouts
import pytest
import torch
from heads import plain_heads
from oracle import assert_same
from torch import nn

from additive_attn import MultiheadAdditiveAttention

N, L, S, E, HEADS = 3, 5, 7, 12, 2
F64 = torch.float64


def made(**options):
    options = {"batch_first": True, "dtype": F64} | options
    layer = MultiheadAdditiveAttention(options.pop("embed_dim", E), HEADS, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def inputs(kind, layer, batched=True, dtype=F64):
    """Returns query, key and value. The kind says which of them are one tensor."""

    def randn(length, features):
        shape = (N, length, features) if layer.batch_first else (length, N, features)
        shape = shape if batched else (length, features)
        return torch.randn(shape, dtype=dtype).requires_grad_()

    query = randn(L, E)
    if kind == "self":
        return [query] * 3
    if kind == "query is key":
        return [query, query, randn(L, layer.vdim)]
    key = randn(S, layer.kdim)
    return [query, key, key if kind == "key is value" else randn(S, layer.vdim)]


def masks(kind, keys, batched=True, dtype=F64):
    """Returns masks with the polarity of nn.MultiheadAttention. Some leave no key to the first row
    of the first sequence, or to a sequence."""
    n = N if batched else 1
    pairs = torch.rand(L, keys) < 0.4
    each = torch.rand(n * HEADS, L, keys) < 0.4
    each[0, 0] = True
    padding = torch.rand(n, keys) < 0.4
    padding[-1] = True

    def added(mask):
        return torch.randn(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)

    found = {
        "none": {},
        "2-D": {"attn_mask": pairs},
        "3-D": {"attn_mask": each},
        "float": {"attn_mask": added(pairs)},
        "float 3-D": {"attn_mask": added(each)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": added(padding)},
        "both": {"attn_mask": each, "key_padding_mask": padding},
        "both float": {"attn_mask": added(pairs), "key_padding_mask": added(padding)},
        "bool beside float": {"attn_mask": pairs, "key_padding_mask": added(padding)},
        "float beside bool": {"attn_mask": added(each), "key_padding_mask": padding},
    }[kind]
    if not batched and "key_padding_mask" in found:
        found["key_padding_mask"] = found["key_padding_mask"][0]
    return found


def compare(layer, given, tolerance=1e-11, **options):
    """Compares outputs and all gradients, with upstream gradients of unusual strides."""
    options, averaged = dict(options), options.get("average_attn_weights", True)
    expected = plain_heads(
        layer, *given, options.get("key_padding_mask"), options.get("attn_mask"), averaged
    )
    found = layer(*given, **options)
    # Float masks that need gradients get them too.
    leaves = {id(x): x for x in [*given, *layer.parameters(), *options.values()]
              if isinstance(x, torch.Tensor) and x.requires_grad}  # fmt: skip
    upstream = [layouts.transposed(torch.randn_like(x)) for x in expected]
    results = [
        [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]
        for outputs in (found, expected)
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


SHARING = ["self", "query is key", "key is value", "apart"]
KINDS = [
    "none", "2-D", "3-D", "float", "float 3-D", "padding", "float padding", "both", "both float",
    "bool beside float", "float beside bool",
]  # fmt: skip
OPTIONS = {
    "plain": {}, "no bias": {"bias": False}, "hidden_dim": {"hidden_dim": 20},
    "kdim": {"kdim": 5}, "vdim": {"vdim": 5}, "kdim and vdim": {"kdim": 9, "vdim": 9},
    "bias_kv": {"add_bias_kv": True}, "zero_attn": {"add_zero_attn": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True, "hidden_dim": 8},
}  # fmt: skip


def shareable(sharing, options):
    """Whether tensors with these numbers of features can be one tensor."""
    kdim, vdim = options.get("kdim", E), options.get("vdim", E)
    return {"self": kdim == vdim == E, "query is key": kdim == E, "key is value": kdim == vdim,
            "apart": True}[sharing]  # fmt: skip


@pytest.mark.parametrize(
    "sharing,options",
    [
        pytest.param(sharing, options, id=f"{sharing}-{name}")
        for sharing in SHARING
        for name, options in OPTIONS.items()
        if shareable(sharing, options)
    ],
)
def test_outputs_and_gradients_are_those_of_the_formula(sharing, options):
    layer = made(**options)
    compare(layer, inputs(sharing, layer))


@pytest.mark.core
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind, added):
    layer = made(add_bias_kv=added, add_zero_attn=added)
    given = masks(kind, S)
    for mask in given.values():
        if mask.is_floating_point():
            mask.requires_grad_()
    compare(layer, inputs("key is value", layer), **given, average_attn_weights=False)


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
def test_layouts_and_averages(layout, averaged):
    layer = made(batch_first=layout == "batch first")
    batched = layout != "unbatched"
    for kind in ("none", "both", "float 3-D"):
        given = inputs("apart", layer, batched)
        compare(layer, given, **masks(kind, S, batched), average_attn_weights=averaged)
    out, weights = layer(*given, need_weights=False)
    assert weights is None
    torch.testing.assert_close(out, layer(*given)[0])


@pytest.mark.parametrize(
    "turned", [layouts.transposed, layouts.offset, layouts.surrounded, layouts.batch_last]
)
def test_strides_of_inputs(turned):
    layer = made()
    given = [turned(x.detach()) for x in inputs("apart", layer)]
    expected = layer(*(x.contiguous() for x in given))
    torch.testing.assert_close(layer(*given), expected)
    wide = torch.randn(N, 1, E, dtype=F64).expand(N, S, E)
    torch.testing.assert_close(layer(wide, wide, wide), plain_heads(layer, wide, wide, wide))


@pytest.mark.parametrize(
    "n,length,keys", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1), (1, 33, 65)]
)
def test_sizes(n, length, keys):
    layer = made()
    query, key = torch.randn(n, length, E, dtype=F64), torch.randn(n, keys, E, dtype=F64)
    padding = torch.zeros(n, keys, dtype=torch.bool)
    mask = torch.zeros(n * HEADS, length, keys, dtype=torch.bool)
    for options in ({}, {"key_padding_mask": padding, "attn_mask": mask}):
        out, weights = layer(query, key, key, **options, average_attn_weights=False)
        assert out.shape == query.shape and weights.shape == (n, HEADS, length, keys)
        if keys:
            torch.testing.assert_close(out, plain_heads(layer, query, key, key)[0])
        else:
            torch.testing.assert_close(out, layer.out_proj.bias.expand(out.shape))


def test_rows_without_a_key_give_zeros_and_padding_cannot_leak():
    layer = made()
    query, key, _ = (x.detach() for x in inputs("key is value", layer))
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0], padding[1, 3:] = True, True
    dirty = key.masked_fill(padding[..., None], torch.nan).requires_grad_()
    out, weights = layer(query, dirty, dirty, key_padding_mask=padding)
    clean = layer(query, key, key, key_padding_mask=padding)
    assert_same(out, clean[0]), assert_same(weights, clean[1])
    assert_same(out[0], layer.out_proj.bias.expand(L, E).contiguous())
    assert not weights[0].any() and not weights[1, :, 3:].any()
    layer.requires_grad_(False)
    (grad,) = torch.autograd.grad(layer(query, dirty, dirty, padding)[0].sum(), dirty)
    assert not grad[padding].any()


def causal(kind="float"):
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    return later if kind == "bool" else torch.zeros(L, L).masked_fill(later, -torch.inf).double()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_is_causal_is_a_hint(kind, need_weights, padded, added):
    layer = made(add_zero_attn=added)
    given = inputs("self", layer)
    mask, padding = causal(kind), masks("padding", L)["key_padding_mask"] if padded else None
    out, weights = layer(
        *given, attn_mask=mask, key_padding_mask=padding, is_causal=True, need_weights=need_weights
    )
    expected = plain_heads(layer, *given, padding, mask)
    torch.testing.assert_close(out, expected[0])
    if need_weights:
        torch.testing.assert_close(weights, expected[1])


def test_a_causal_mask_that_is_learned_gets_its_gradient():
    layer = made()
    given, grads = inputs("self", layer), []
    for hint in (True, False):
        mask = causal().requires_grad_()
        out, _ = layer(*given, attn_mask=mask, is_causal=hint)
        grads += torch.autograd.grad(out.square().sum(), mask)
    assert grads[0].any()
    torch.testing.assert_close(*grads)


def test_a_wrong_hint_is_used_where_torch_uses_it():
    layer, theirs = made(), nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=F64)
    given, other = inputs("self", layer), torch.zeros(L, L, dtype=F64)
    for each in (layer, theirs):
        hinted = each(*given, attn_mask=other, is_causal=True, need_weights=False)[0]
        exact = each(*given, attn_mask=causal(), need_weights=False)[0]
        torch.testing.assert_close(hinted, exact)
        hinted = each(*given, attn_mask=other, is_causal=True)
        torch.testing.assert_close(hinted, each(*given, attn_mask=other))


def test_shapes_dtypes_and_polarity_are_those_of_nn_multihead_attention():
    for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 5, "vdim": 4}):
        for batch_first in (True, False):
            ours = made(batch_first=batch_first, **options)
            theirs = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, dtype=F64, **options)
            for batched in (True, False):
                given = inputs("apart", ours, batched)
                for averaged in (True, False):
                    some = masks("both", S, batched)
                    some["attn_mask"][..., 0], some["key_padding_mask"][..., 0] = False, False
                    for kind in ({}, some):
                        kind = kind | {"average_attn_weights": averaged}
                        found = zip(ours(*given, **kind), theirs(*given, **kind), strict=True)
                        for a, b in found:
                            assert a.shape == b.shape and a.dtype == b.dtype
                        assert torch.equal(a == 0, b == 0)


def test_the_weights_are_those_after_dropout():
    layer = made(dropout=0.5)
    given = inputs("key is value", layer)
    value = torch.nn.functional.linear(
        given[2], layer.in_proj_weight[-E:], layer.in_proj_bias[-E:]
    )
    heads = value.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.manual_seed(5)
    out, weights = layer(*given, average_attn_weights=False)
    expected = layer.out_proj((weights @ heads).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(out, expected)
    assert 0.3 < (weights == 0).double().mean() < 0.7
    torch.manual_seed(5)
    torch.testing.assert_close(layer(*given, need_weights=False)[0], out)
    leaves = [given[0], given[1], *layer.parameters()]
    upstream = torch.randn_like(weights)
    torch.manual_seed(5)
    again = layer(*given, average_attn_weights=False)[1]
    undropped = layer.eval()(*given, average_attn_weights=False)[1]
    kept = undropped * 2.0 * (weights != 0)
    torch.testing.assert_close(again, kept)
    ours, theirs = (
        torch.autograd.grad(x, leaves, upstream, allow_unused=True) for x in (again, kept)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
