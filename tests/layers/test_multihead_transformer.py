"""nn.TransformerEncoderLayer and nn.TransformerDecoderLayer with several additive heads as their
attention: their fast paths compute dot products, and must not use the layer's parameters without
calling it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from heads import PlainHeads, plain_heads
from oracle import DEVICE
from torch import nn

from additive_attn import MultiheadAdditiveAttention

N, L, S, E, HEADS = 3, 6, 4, 8, 2
PADDING = torch.arange(L) >= torch.tensor([6, 3, 1])[:, None]  # left aligned: it may be nested
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)


def attention(**options):
    layer = MultiheadAdditiveAttention(E, HEADS, batch_first=True, **options)
    nn.init.normal_(layer.in_proj_weight, std=0.7)
    nn.init.normal_(layer.energy_weight)
    return layer


def encoder_layer(**options):
    options = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(E, HEADS, **options)
    layer.self_attn = attention()
    return layer.eval()


def encoded(layer, x, padding=None, mask=None):
    """The formula of the encoder layer, without a fast path."""
    x = layer.norm1(x + plain_heads(layer.self_attn, x, x, x, padding, mask)[0])
    return layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))


def no_grad(layer):
    return lambda *given, **options: torch.no_grad()(layer)(*given, **options)


def inference(layer):
    return lambda *given, **options: torch.inference_mode()(layer)(*given, **options).clone()


def compiled(layer):
    torch.compiler.reset()
    return no_grad(torch.compile(layer, backend="aot_eager", fullgraph=True))


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return no_grad(torch.load(file, weights_only=False))


def exported(layer):
    def call(x, **options):
        program = torch.export.export(layer, (x,), options)
        return no_grad(program.module())(x, **options)

    return call


def frozen(layer):
    return layer.requires_grad_(False)


WAYS = {
    "eval": lambda layer: layer, "training": lambda layer: layer.train(), "frozen": frozen,
    "no_grad": no_grad, "inference_mode": inference, "compiled": compiled, "exported": exported,
    "deepcopy": lambda layer: no_grad(copy.deepcopy(layer)),
    "pickle": lambda layer: no_grad(pickle.loads(pickle.dumps(layer))), "saved": saved,
    "cast": lambda layer: no_grad(layer.double().float()),
}  # fmt: skip
MASKING = {
    "none": {}, "padding": {"src_key_padding_mask": PADDING}, "causal": {"src_mask": CAUSAL},
    "hinted": {"src_mask": CAUSAL, "is_causal": True},
    "both": {"src_mask": CAUSAL != 0, "src_key_padding_mask": PADDING, "is_causal": True},
}  # fmt: skip


PAIRS = [
    pytest.param(way, masking, id=f"{way}-{masking}", marks=[pytest.mark.sweep] * slow)
    for way in WAYS
    for masking in MASKING
    for slow in [way in ("compiled", "exported") and masking in ("causal", "hinted", "padding")]
]


@pytest.mark.parametrize("way,masking", PAIRS)
def test_an_encoder_layer_uses_its_attention(way, masking):
    layer, x, masking = encoder_layer(), torch.randn(N, L, E), MASKING[masking]
    expected = encoded(
        layer, x, masking.get("src_key_padding_mask"), masking.get("src_mask")
    ).detach()
    torch.testing.assert_close(WAYS[way](layer)(x, **masking), expected)


def test_the_fast_path_would_give_another_result():
    """Shows that the tests above would fail if torch took its fast path. The layer has no
    ``merge_masks``, which that path calls, so a torch that did not check the layer would raise."""
    layer, x = encoder_layer(), torch.randn(N, L, E)
    expected = encoded(layer, x)
    layer.self_attn._qkv_same_embed_dim = True
    with pytest.raises(AttributeError, match="merge_masks"):
        no_grad(layer)(x)
    layer.self_attn.merge_masks = lambda *masks: (None, None)
    assert (no_grad(layer)(x) - expected).abs().max() > 0.01


@pytest.mark.parametrize("replaced", ["before", "after"])
@pytest.mark.parametrize("way", ["eval", "no_grad", "inference_mode", "deepcopy", "compiled"])
def test_an_encoder_that_nests_its_inputs(way, replaced):
    """A layer that is replaced after the encoder was made gets nested tensors."""
    x = torch.randn(N, L, E)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it will not nest
        if replaced == "before":
            encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True)
        else:
            layer = nn.TransformerEncoderLayer(E, HEADS, 16, 0.0, batch_first=True)
            encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
            for each in encoder.layers:
                each.self_attn = attention()
        encoder.eval()
        assert encoder.use_nested_tensor == (replaced == "after")
        expected = x
        for each in encoder.layers:
            expected = encoded(each, expected, PADDING)
        found = WAYS[way](encoder)(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(found[~PADDING], expected.detach()[~PADDING])
    assert found.isfinite().all()


@pytest.mark.parametrize("way", ["training", "no_grad", "inference_mode", "compiled", "pickle"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_layer(way, norm_first):
    options = dict(dim_feedforward=16, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer, plain = (nn.TransformerDecoderLayer(E, HEADS, **options) for _ in range(2))
    layer.self_attn, layer.multihead_attn = attention(), attention()
    plain.load_state_dict(layer.state_dict(), strict=False)
    for name in ("self_attn", "multihead_attn"):
        setattr(plain, name, PlainHeads(getattr(layer, name)))
    given = torch.randn(N, L, E), torch.randn(N, S, E)
    masking = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "tgt_key_padding_mask": CAUSAL[:N],
               "memory_key_padding_mask": PADDING[:, :S]}  # fmt: skip
    expected = plain.eval()(*given, **masking).detach()
    torch.testing.assert_close(WAYS[way](layer.eval())(*given, **masking), expected)


def test_gradients_through_a_transformer():
    """Compares an encoder and decoder, length first, with those whose attention is the formula."""
    model = nn.Transformer(E, HEADS, 1, 1, 16, dropout=0.0).double()
    for layer in (*model.encoder.layers, *model.decoder.layers):
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                setattr(layer, name, MultiheadAdditiveAttention(E, HEADS, dtype=torch.float64))
    plain = copy.deepcopy(model)
    for layer in (*plain.encoder.layers, *plain.decoder.layers):
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                setattr(layer, name, PlainHeads(getattr(layer, name)))
    source, target = (torch.randn(n, N, E, dtype=torch.float64) for n in (S, L))
    upstream, results = torch.randn(L, N, E, dtype=torch.float64), []
    for each in (model, plain):
        out = each(source, target, tgt_mask=CAUSAL.double(), src_key_padding_mask=PADDING[:, :S])
        results.append([out, *torch.autograd.grad(out, list(each.parameters()), upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["", "added"])
def test_nested_tensors(layout, added):
    layer = MultiheadAdditiveAttention(
        E, HEADS, batch_first=True, add_bias_kv=added, add_zero_attn=added, dtype=torch.float64
    )
    sizes = (6, 3, 1), (2, 5, 4)
    given = [[torch.randn(n, E, dtype=torch.float64, requires_grad=True) for n in each]
             for each in sizes]  # fmt: skip

    def nested(rows):
        return torch.nested.as_nested_tensor(rows, layout=layout)

    upstream = [torch.randn_like(x) for x in given[0]]
    leaves = [*given[0], *given[1], *layer.parameters()]
    for key in given:
        query, other = nested(given[0]), nested(key)
        other = query if key is given[0] else other
        out, weights = layer(query, other, other)
        assert out.is_nested and out.layout is layout and weights.shape[0] == N
        expected = [layer(q, k, k) for q, k in zip(given[0], key, strict=True)]
        if layout is torch.jagged:
            assert (out + query).is_nested
        for i, found in enumerate(out.unbind()):
            torch.testing.assert_close(found, expected[i][0])
        ours, theirs = (
            torch.autograd.grad(rows, leaves, upstream, allow_unused=True, materialize_grads=True)
            for rows in (out.unbind(), [x for x, _ in expected])
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_nested_tensors_that_are_refused():
    layer, x = attention(), torch.nested.as_nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(TypeError, match="key, value is not nested"):
        layer(x, torch.randn(2, 3, E), torch.randn(2, 3, E))
    with pytest.raises(ValueError, match="nested tensors with masks and is_causal"):
        layer(x, x, x, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    layer.batch_first = False
    with pytest.raises(ValueError, match="nested tensors with batch_first=False"):
        layer(x, x, x)
    steps, dense = attention(), torch.randn(2, 3, E)
    with pytest.raises(TypeError, match="key is nested"):
        steps.project(x)
    with pytest.raises(TypeError, match="query is nested"):
        steps.step(x, steps.project(dense))


UNREAD = pytest.mark.skipif(DEVICE != "cpu", reason="values of other devices are not read")


@pytest.mark.parametrize(
    "layout", [torch.strided, pytest.param(torch.jagged, marks=UNREAD)], ids=str
)
def test_nested_keys_have_a_value_each(layout):
    x, key, value = (
        torch.nested.as_nested_tensor([torch.randn(n, E) for n in sizes], layout=layout)
        for sizes in ((3, 5), (2, 5), (5, 2))
    )
    with pytest.raises(ValueError, match="different lengths"):
        attention()(x, key, value)
