"""Promise 10: errors are sentences, nothing is silently cast, broadcast or clipped."""

from __future__ import annotations

import contextlib
import re
import warnings
from array import array

import fresh
import pytest
import torch
from oracle import assert_sentence, make
from torch import nn

from additive_attn import (
    AdditiveAttention,
    LocationSensitiveAttention,
    MultiheadAdditiveAttention,
    additive_attention,
    additive_attention_step,
    additive_scores,
    coverage_loss,
    merge_attention,
    varlen_additive_attention,
)
from additive_attn.ops import dispatch
from additive_attn.spec.call import Call


def call(**changes):
    options = {
        k: changes.pop(k) for k in list(changes) if k not in ("query", "key", "value", "weight")
    }
    inputs = make((2,), 3, 5, 8, 6) | changes
    return additive_attention(*inputs.values(), **options)


def t(*shape, dtype=torch.float32, **kw):
    return torch.zeros(shape, dtype=dtype, **kw)


def nested(**options):
    return torch.nested.nested_tensor([t(5, 8), t(3, 8)], **options)


F64, F16 = torch.float64, torch.float16
CASES = {
    # what is passed -> (exception, what the sentence names)
    "query 1-D": (dict(query=t(8)), ValueError, r"query has shape \(8,\).*at least two dims"),
    "key 1-D": (dict(key=t(8)), ValueError, r"key has shape \(8,\).*at least two dims"),
    "value 1-D": (dict(value=t(6)), ValueError, r"value has shape \(6,\).*at least two dims"),
    "query 0-D": (dict(query=t()), ValueError, r"query has shape \(\)"),
    "hidden sizes": (dict(key=t(2, 5, 7)), ValueError, r"query has 8 features and key has 7"),
    "hidden size 1": (dict(key=t(2, 5, 1)), ValueError, r"query has 8 features and key has 1"),
    "key and value": (dict(value=t(2, 4, 6)), ValueError, r"key has 5 positions and value has 4"),
    "one value": (dict(value=t(2, 1, 6)), ValueError, r"key has 5 positions and value has 1"),
    "batches": (dict(key=t(3, 5, 8), value=t(3, 5, 6)), ValueError, r"leading dims .*\(2, 3, 8\)"),
    "weight size": (dict(weight=t(7)), ValueError, r"weight has shape \(7,\).*\(8,\)"),
    "weight size 1": (dict(weight=t(1)), ValueError, r"weight has shape \(1,\)"),
    "weight 0-D": (dict(weight=t()), ValueError, r"weight has shape \(\)"),
    "weight 3-D": (dict(weight=t(1, 1, 8)), ValueError, r"weight has shape \(1, 1, 8\)"),
    "weight column": (dict(weight=t(8, 1)), ValueError, r"weight has shape \(8, 1\)"),
    "heads": (dict(weight=t(3, 8)), ValueError, r"weight has shape \(3, 8\).*heads"),
    "float64 query": (dict(query=t(2, 3, 8, dtype=F64)), TypeError, r"query is torch.float64"),
    "half value": (dict(value=t(2, 5, 6, dtype=F16)), TypeError, r"value is torch.float16"),
    "half weight": (dict(weight=t(8, dtype=F16)), TypeError, r"weight is torch.float16"),
    "token ids": (dict(query=t(2, 3, 8).long()), TypeError, r"int64.*nn\.Embedding"),
    "token ids 2-D": (dict(query=t(2, 3).long()), TypeError, r"int64.*nn\.Embedding"),
    "mask per sequence": (dict(attn_mask=t(2, 5)), ValueError, r"\(2, 5\).*unsqueeze\(1\)"),
    "not a tensor": (dict(key=[[1.0]]), TypeError, r"key is a list"),
    "None": (dict(key=None), TypeError, r"key is a NoneType"),
    "nothing": (dict(key=None, query=None, value=None), TypeError, r"key is a NoneType"),
    "no weight": (dict(query=None, weight=None), TypeError, r"weight is a NoneType"),
    "no query, key 1-D": (dict(query=None, key=t(8)), ValueError, r"key has shape \(8,\)"),
    "no value, key 1-D": (dict(value=None, key=t(8)), ValueError, r"key has shape \(8,\)"),
    "no query, weight": (dict(query=None, weight=t(7)), ValueError, r"\(7,\), but a key"),
    "no query, heads": (dict(query=None, weight=t(3, 8)), ValueError, r"\(3, 8\), but a key"),
    "no value, sparse": (dict(value=None, key=t(5, 8).to_sparse()), TypeError, r"key is torch.sp"),
    "no value, nested": (dict(value=None, key=nested()), TypeError, r"key is nested"),
    "no value, dropout": (dict(value=None, dropout_p=0.1), ValueError, r"dropout_p is 0.1.*value"),
    "bias number": (dict(bias=0.5), TypeError, r"bias is a float.*torch.tensor"),
    "bias integer": (dict(bias=torch.tensor(1)), TypeError, r"bias has dtype torch.int64"),
    "bias per key": (dict(bias=t(5)), ValueError, r"bias has shape \(5,\).*attn_mask"),
    "bias 2-D": (dict(bias=t(1, 1)), ValueError, r"bias has shape \(1, 1\)"),
    "bias device": (dict(bias=t(1, device="meta")), RuntimeError, r"bias is on meta"),
    "padding float": (dict(key_padding_mask=t(2, 5)), TypeError, r"float32.*True = ignore"),
    "padding list": (
        dict(key_padding_mask=[[True]]), TypeError, r"key_padding_mask is a list.*as_tensor",
    ),
    "padding size": (dict(key_padding_mask=t(2, 4).bool()), ValueError, r"\(2, 4\).*\(2, 5\)"),
    "padding 1-D": (dict(key_padding_mask=t(5).bool()), ValueError, r"\(5,\).*\(2, 5\)"),
    "padding per query": (dict(key_padding_mask=t(2, 3, 5).bool()), ValueError, r"\(2, 3, 5\)"),
    "padding transposed": (dict(key_padding_mask=t(5, 2).bool()), ValueError, r"\.t\(\)"),
    "starts negative": (dict(starts=[-1, 2]), ValueError, r"starts holds values from -1 to 2"),
    "starts size": (dict(starts=[1, 2, 3]), ValueError, r"starts has shape \(3,\).*one start per"),
    "starts float": (dict(starts=[1.0, 2.0]), TypeError, r"starts has dtype torch.float32"),
    "integers": (
        {name: t(*shape, dtype=torch.int64) for name, shape in dict(
            query=(2, 3, 8), key=(2, 5, 8), value=(2, 5, 6), weight=(8,)).items()},
        TypeError, r"torch.int64",
    ),
    "complex": (
        {name: t(*shape, dtype=torch.complex64) for name, shape in dict(
            query=(2, 3, 8), key=(2, 5, 8), value=(2, 5, 6), weight=(8,)).items()},
        TypeError, r"torch.complex64",
    ),
    "meta key": (dict(key=t(2, 5, 8, device="meta")), RuntimeError, r"key is on meta"),
    "meta weight": (dict(weight=t(8, device="meta")), RuntimeError, r"weight is on meta"),
    "uint8 mask": (dict(attn_mask=t(3, 5, dtype=torch.uint8)), TypeError, r"uint8.*\.bool\(\)"),
    "int64 mask": (dict(attn_mask=t(3, 5, dtype=torch.int64)), TypeError, r"int64.*\.bool\(\)"),
    "double mask": (dict(attn_mask=t(3, 5, dtype=torch.float64)), TypeError, r"float64.*float32"),
    "list mask": (dict(attn_mask=[[True]]), TypeError, r"attn_mask is a list.*as_tensor"),
    "mask_mod": (dict(attn_mask=max), TypeError, r"a builtin_function.*create_block_mask"),
    "layer as weight": (dict(weight=nn.Linear(8, 1)), TypeError, r"a Linear.*its weight"),
    "mask size": (dict(attn_mask=t(3, 4)), ValueError, r"has shape \(3, 4\).*\(2, 3, 5\)"),
    "mask transposed": (dict(attn_mask=t(5, 3)), ValueError, r"\(5, 3\).*\.mT"),
    "mask of heads": (
        dict(query=t(2, 4, 3, 8), key=t(2, 1, 5, 8), value=t(2, 1, 5, 6), attn_mask=t(8, 3, 5)),
        ValueError, r"\(8, 3, 5\).*unflatten\(0, \(2, 4\)\)",
    ),
    "mask batch": (dict(attn_mask=t(3, 3, 5)), ValueError, r"attn_mask has shape \(3, 3, 5\)"),
    "mask rank": (dict(attn_mask=t(1, 2, 3, 5)), ValueError, r"has shape \(1, 2, 3, 5\)"),
    "mask device": (dict(attn_mask=t(3, 5, device="meta")), RuntimeError, r"attn_mask is on meta"),
    "lengths too long": (dict(lengths=torch.tensor([5, 6])), ValueError, r"from 5 to 6.*has 5"),
    "lengths negative": (dict(lengths=torch.tensor([-1, 2])), ValueError, r"from -1 to 2"),
    "lengths float": (dict(lengths=torch.tensor([1.0, 2.0])), TypeError, r"float32.*\.long\(\)"),
    "lengths bool": (dict(lengths=t(2, 5).bool()), TypeError, r"bool.*key_padding_mask"),
    "lengths text": (dict(lengths="12"), TypeError, r"lengths is '12', a str.*torch.tensor"),
    "lengths set": (dict(lengths={1, 2}), TypeError, r"lengths is \{1, 2\}, a set.*torch.tensor"),
    "lengths ragged": (dict(lengths=[[1], [1, 2]]), TypeError, r"lengths is \[\[1\].*a list"),
    "lengths list": (dict(lengths=[1, 2, 3]), ValueError, r"lengths has shape \(3,\).*\(2,\)"),
    "lengths number": (dict(lengths=3), ValueError, r"lengths has shape \(\)"),
    "lengths floats": (dict(lengths=[1.0, 2.0]), TypeError, r"lengths has dtype torch.float32"),
    "lengths None": (dict(lengths=[None, 2]), TypeError, r"lengths is \[None, 2\]"),
    "lengths size": (dict(lengths=torch.tensor([1, 2, 3])), ValueError, r"\(3,\).*\(2, 3\)"),
    "lengths 0-D": (dict(lengths=torch.tensor(1)), ValueError, r"lengths has shape \(\)"),
    "lengths rows": (dict(lengths=torch.ones(2, 4, dtype=torch.int64)), ValueError, r"\(2, 4\)"),
    "lengths 3-D": (dict(lengths=torch.ones(2, 1, 3).long()), ValueError, r"\(2, 1, 3\)"),
    "dropout 2": (dict(dropout_p=2.0), ValueError, r"dropout_p is 2.0.*between 0 and 1"),
    "dropout -0.1": (dict(dropout_p=-0.1), ValueError, r"dropout_p is -0.1"),
    "dropout nan": (dict(dropout_p=float("nan")), ValueError, r"dropout_p is nan"),
    "dropout text": (dict(dropout_p="0.1"), ValueError, r"dropout_p is '0.1'"),
    "scale inf": (dict(scale=float("inf")), ValueError, r"scale is inf"),
    "scale nan": (dict(scale=float("nan")), ValueError, r"scale is nan"),
    "scale None": (dict(scale=None), ValueError, r"scale is None"),
    "window -2": (dict(window=(-2, 0)), ValueError, r"window is \(-2, 0\).*-1"),
    "window int": (dict(window=3), ValueError, r"window is 3.*pair"),
    "window triple": (dict(window=(1, 2, 3)), ValueError, r"pair \(left, right\)"),
    "window float": (dict(window=(1.0, 2)), ValueError, r"integers"),
    "window bool": (dict(window=(True, 2)), ValueError, r"integers"),
    "window 2**63": (dict(window=(2**63, 0)), ValueError, r"below 2\*\*63"),
    "scale huge": (dict(scale=10**400), ValueError, r"finite factor"),
    "scale tensor": (dict(scale=torch.tensor(2.0)), ValueError, r"scale is tensor\(2.\).*a float"),
    "dropout bool": (dict(dropout_p=True), ValueError, r"dropout_p is True.*a float"),
    "dropout tensor": (dict(dropout_p=torch.tensor(0.1)), ValueError, r"dropout_p is tensor"),
    "flag text": (dict(need_weights="x"), TypeError, r"need_weights is 'x'.*True or False"),
    "causal text": (dict(is_causal="no"), TypeError, r"^is_causal is 'no', but must be True or"),
    "lse text": (dict(need_lse="no"), TypeError, r"^need_lse is 'no', but must be True or False"),
    "uint16 mask": (dict(attn_mask=t(3, 5, dtype=torch.uint16)), TypeError, r"\.bool\(\)"),
    "sparse key": (dict(key=t(2, 5, 8).to_sparse()), TypeError, r"key is torch.sparse_coo"),
    "sparse mask": (dict(attn_mask=t(3, 5).to_sparse()), TypeError, r"attn_mask is torch.sparse"),
    "nested key": (dict(key=nested()), TypeError, r"key is nested"),
    "nested mask": (dict(attn_mask=nested()), TypeError, r"attn_mask is nested"),
    "nested padding": (dict(key_padding_mask=nested().bool()), TypeError, r"mask is nested"),
    "nested lengths": (dict(lengths=nested().long()), TypeError, r"lengths is nested"),
    "nested starts": (dict(starts=nested().int()), TypeError, r"starts is nested"),
    "jagged key": (dict(key=nested(layout=torch.jagged)), ValueError, r"each nested along L"),
    "lengths of a subclass": (
        dict(lengths=torch.nn.Parameter(torch.tensor([99, -3]), requires_grad=False)),
        ValueError, r"from -3 to 99",
    ),
    "many lengths": (
        dict(query=t(2, 40, 8), lengths=torch.arange(80).reshape(2, 40)), ValueError, "0 to 79",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes,exception,sentence", CASES.values(), ids=CASES.keys())
def test_sentences(changes, exception, sentence):
    with pytest.raises(exception) as caught:
        call(**dict(changes))
    text = str(caught.value)
    assert re.search(sentence, text), text
    assert_sentence(text)


STEPS = {
    "query 0-D": (dict(query=t()), ValueError, r"query has shape \(\).*one dim: \(\.\.\., H\)"),
    "batches": (dict(query=t(3, 8)), ValueError, r"query \(3, 8\) as \(3, 1, 8\)"),
    "rows": (dict(query=t(2, 4, 8)), ValueError, r"query \(2, 4, 8\) as \(2, 4, 1, 8\)"),
    "one row": (dict(query=t(2, 1, 8)), ValueError, r"query has shape \(2, 1, 8\).*squeeze"),
    "mask": (dict(attn_mask=t(2, 4)), ValueError, r"attn_mask \(2, 4\) as \(2, 1, 4\)"),
    "lengths": (dict(lengths=[1, 2, 3]), ValueError, r"lengths has shape \(3,\)"),
    "list": (dict(query=[1.0]), TypeError, r"query is a list"),
    "mask list": (dict(attn_mask=[True]), TypeError, r"attn_mask is a list"),
}


@pytest.mark.parametrize("changes,exception,sentence", STEPS.values(), ids=STEPS.keys())
def test_sentences_of_a_step(changes, exception, sentence):
    inputs = make((2,), 1, 5, 8, 6)
    inputs["query"] = inputs["query"][:, 0]
    with pytest.raises(exception) as caught:
        additive_attention_step(**inputs | changes)
    assert re.search(sentence, str(caught.value)), str(caught.value)
    assert_sentence(str(caught.value).rstrip(")"))


SCORES = {
    "query": (dict(query=[1.0]), TypeError, r"query is a list"),
    "key": (dict(key=[1.0]), TypeError, r"key is a list"),
    "key None": (dict(key=None), TypeError, r"key is a NoneType"),
    "key 1-D": (dict(key=t(8)), ValueError, r"key has shape \(8,\)"),
    "features": (dict(key=t(2, 5, 7)), ValueError, r"query has 8 features and key has 7"),
    "batches": (dict(key=t(3, 5, 8)), ValueError, r"query \(2, 3, 8\) and key \(3, 5, 8\) do"),
    "dtype": (dict(key=t(2, 5, 8, dtype=F64)), TypeError, r"key is torch.float64"),
    "sparse": (dict(key=t(2, 5, 8).to_sparse()), TypeError, r"key is torch.sparse_coo"),
    "nested": (dict(key=nested()), TypeError, r"key is nested"),
    "jagged": (dict(key=nested(layout=torch.jagged)), TypeError, r"but key is nested\."),
    "device": (dict(key=t(2, 5, 8, device="meta")), RuntimeError, r"key is on meta"),
    "mask": (dict(attn_mask=t(2, 5)), ValueError, r"\(2, 5\).*unsqueeze\(1\)"),
    "causal": (dict(is_causal="no"), TypeError, r"^is_causal is 'no'"),
    "bias": (dict(bias=t(5)), ValueError, r"bias has shape \(5,\)"),
}


@pytest.mark.parametrize("changes,exception,sentence", SCORES.values(), ids=SCORES.keys())
def test_sentences_of_scores(changes, exception, sentence):
    inputs = make((2,), 3, 5, 8, 6)
    del inputs["value"]
    with pytest.raises(exception) as caught:
        additive_scores(**inputs | changes)
    assert re.search(sentence, str(caught.value)), str(caught.value)
    assert "value" not in str(caught.value)
    assert_sentence(str(caught.value))


def layer_cases():
    layer = AdditiveAttention(8, 4)
    x, memory = t(2, 3, 8), layer.project(t(2, 5, 8))
    return {
        "features": (lambda: layer(t(2, 3, 7), x), ValueError, "7 features.*query_dim=8"),
        "key features": (lambda: layer(x, t(2, 3, 9)), ValueError, "9 features.*key_dim=8"),
        "ranks": (lambda: layer(t(3, 8), x), ValueError, "3 dims .*2"),
        "1-D": (lambda: layer(t(8), t(8)), ValueError, "3 dims"),
        "4-D": (lambda: layer(*[t(1, 2, 3, 8)] * 2), ValueError, "3 dims.*additive_attention"),
        "step": (lambda: layer.step(x[None], memory), ValueError, "one query per sequence"),
        "step batch": (lambda: layer.step(t(3, 8), memory), ValueError, r"\(3, 8\).*\(2, 5, 4\)"),
        "step features": (lambda: layer.step(t(2, 7), memory), ValueError, "7 features"),
        "project": (lambda: layer.project(t(8)), ValueError, "3 dims"),
        "project value": (lambda: layer.project(x, t(2, 4, 8)), ValueError, "each key belongs"),
        "project lengths": (
            lambda: layer.project(x, lengths=torch.tensor([1, 4])), ValueError, "from 1 to 4",
        ),
        "padding dtype": (
            lambda: layer(x, x, key_padding_mask=t(2, 3, dtype=torch.uint8)), TypeError, "uint8",
        ),
        "padding float": (lambda: layer(x, x, key_padding_mask=t(2, 3)), TypeError, "float32"),
        "padding list": (lambda: layer(x, x, key_padding_mask=[True]), TypeError, "list"),
        "padding shape": (
            lambda: layer(x, x, key_padding_mask=t(3, 2, dtype=torch.bool)), ValueError,
            r"\(3, 2\).*\(2, 3\)",
        ),
        "project value dtype": (
            lambda: layer.project(x, x.double()), TypeError, "value is torch.float64",
        ),
        "project overflow": (
            lambda: layer.project(x, x + 7e4, dtype=F16), ValueError,
            "value holds 7e.04.*bfloat16",
        ),
        "project key overflow": (
            lambda: huge_keys().project(x + 1.0, dtype=F16), ValueError, "projected key holds",
        ),
        "kernel size": (
            lambda: LocationSensitiveAttention(8, 8, 8, kernel_size=5.0), TypeError,
            "kernel_size is 5.0, a float.*keys that a filter spans",
        ),
        "flag": (
            lambda: AdditiveAttention(8, 8, batch_first="no"), TypeError, "batch_first is 'no'",
        ),
        "time-major": (
            lambda: layer(t(7, 2, 8), t(9, 2, 8)), ValueError,
            r"\(7, 2, 8\).*\(9, 2, 8\).*batch_first=False",
        ),
        "time-major lengths": (
            lambda: layer(t(7, 2, 8), t(7, 2, 8), lengths=torch.tensor([3, 1])), ValueError,
            r"lengths \(2,\), one per sequence.*batch_first=False",
        ),
        "time-major list of lengths": (
            lambda: layer(t(7, 2, 8), t(7, 2, 8), lengths=[7, 1]), ValueError,
            r"lengths \(2,\), one per sequence.*batch_first=False",
        ),
        "time-major project": (
            lambda: layer.project(t(7, 2, 8), lengths=torch.tensor([3, 1])), ValueError,
            "batch_first=False",
        ),
        "batch-major": (
            lambda: AdditiveAttention(8, 4, batch_first=False)(t(2, 7, 8), t(2, 9, 8)), ValueError,
            r"\(2, 7, 8\).*\(2, 9, 8\).*batch_first=True",
        ),
        "batches": (lambda: layer(t(2, 7, 8), t(3, 9, 8)), ValueError, "dim 0.*Stack or expand"),
        "values": (lambda: layer(x, x, t(2, 4, 8)), ValueError, r"\(2, 4, 8\).*each key"),
        "values time-major": (
            lambda: AdditiveAttention(8, 4, batch_first=False)(x, x, t(4, 3, 8)), ValueError,
            r"\(4, 3, 8\).*each key",
        ),
        "token ids": (lambda: layer(x.long(), x), TypeError, "query is torch.int64.*nn.Embedding"),
        "token ids 2-D": (lambda: layer(t(2, 3).long(), x), TypeError, "int64.*nn.Embedding"),
        "token ids alone": (lambda: layer(*[t(2, 3).long()] * 2), TypeError, "nn.Embedding"),
        "token ids to project": (
            lambda: layer.project(t(2, 3).long()), TypeError, "key is torch.int64.*nn.Embedding",
        ),
        "token ids to a step": (
            lambda: layer.step(t(2, 1).long(), memory), TypeError, "int64.*nn.Embedding",
        ),
        "packed": (
            lambda: layer(x, nn.utils.rnn.pack_sequence([t(3, 8)])), TypeError,
            "key is a PackedSequence.*pad_packed_sequence",
        ),
        "packed project": (
            lambda: layer.project(nn.utils.rnn.pack_sequence([t(3, 8)])), TypeError,
            "key is a PackedSequence.*pad_packed_sequence",
        ),
        "memory in forward": (lambda: layer(x, memory), TypeError, r"key is a Pro\w+\. .*step"),
        "LSTM state": (lambda: layer.step((x, x), memory), TypeError, r"a tuple.*\(h, c\)"),
        "step list": (lambda: layer.step([1.0], memory), TypeError, "query is a list"),
        "mask per sequence": (
            lambda: layer(x, t(2, 5, 8), attn_mask=t(2, 5)), ValueError,
            r"attn_mask has shape \(2, 5\).*unsqueeze\(1\)",
        ),
        "hidden 0": (lambda: AdditiveAttention(8, 0), ValueError, "hidden_dim is 0"),
        "input 0": (lambda: AdditiveAttention(0, 8), ValueError, "input_dim is 0"),
        "dropout": (lambda: AdditiveAttention(8, 8, dropout=1.5), ValueError, "dropout is 1.5"),
        "dropout nan": (
            lambda: AdditiveAttention(8, 8, dropout=float("nan")), ValueError, "dropout is nan",
        ),
        "scale": (lambda: AdditiveAttention(8, 8, scale=float("nan")), ValueError, "scale is nan"),
        "padding device": (
            lambda: layer(x, x, key_padding_mask=t(2, 3, dtype=torch.bool, device="meta")),
            RuntimeError, "key_padding_mask is on meta",
        ),
        "query dtype": (lambda: layer(x.double(), x), TypeError, "query is torch.float64"),
        "key integers": (lambda: layer(x, x.long()), TypeError, "key is torch.int64"),
        "value dtype": (lambda: layer(x, x, x.double()), TypeError, "value is torch.float64"),
        "query device": (lambda: layer(x.to("meta"), x), RuntimeError, "query is on meta"),
        "energy device": (
            lambda: meta_energy()(x, x), RuntimeError, "weight is on meta",
        ),
        "key None": (lambda: layer(x, None), TypeError, "key is a NoneType"),
        "query list": (lambda: layer([1.0], x), TypeError, "query is a list"),
        "value array": (lambda: layer(x, x, array("f")), TypeError, "value is a array"),
        "sparse": (lambda: layer(x.to_sparse(), x), TypeError, "query is torch.sparse_coo"),
        "nested": (lambda: layer(x, nested()), TypeError, "key is nested"),
        "jagged": (lambda: layer(x, nested(layout=torch.jagged)), ValueError, "need_weights"),
        "hidden text": (lambda: AdditiveAttention(8, "8"), TypeError, "hidden_dim is '8', a str"),
        "hidden None": (lambda: AdditiveAttention(8, None), TypeError, "hidden_dim is None"),
        "input float": (lambda: AdditiveAttention(4.5, 8), TypeError, "input_dim is 4.5, a float"),
        "dropout None": (
            lambda: AdditiveAttention(8, 8, dropout=None), ValueError, "dropout is None",
        ),
        "dropout bool": (
            lambda: AdditiveAttention(8, 8, dropout=True), ValueError, "dropout is True",
        ),
        "merge None": (lambda: merge_attention(None, None), TypeError, "outs .* NoneType"),
        "merge arrays": (
            lambda: merge_attention([array("f")], [t(2, 3)]), TypeError, "outs .* array",
        ),
        "merge dtypes": (
            lambda: merge_attention([x, x.double()], [t(2, 3), t(2, 3, dtype=F64)]), TypeError,
            "float64",
        ),
        "merge integers": (
            lambda: merge_attention([x.long()], [t(2, 3)]), TypeError, "out of torch.int64",
        ),
        "merge devices": (
            lambda: merge_attention([x], [t(2, 3, device="meta")]), RuntimeError, "lse is on meta",
        ),
        "merge nothing": (lambda: merge_attention([], []), ValueError, "0 outs and 0 lses"),
        "merge counts": (lambda: merge_attention([x], []), ValueError, "1 outs and 0 lses"),
        "merge shapes": (
            lambda: merge_attention([x, x], [t(2, 3), t(2, 4)]), ValueError, r"\(2, 4\)",
        ),
    }  # fmt: skip


def huge_keys():
    layer = AdditiveAttention(8, 4)
    torch.nn.init.constant_(layer.key_layer.weight, 1e4)
    return layer


def meta_energy():
    layer = AdditiveAttention(8, 4)
    layer.energy_layer.to("meta")
    return layer


@pytest.mark.parametrize("name", layer_cases())
def test_module_sentences(name):
    function, exception, sentence = layer_cases()[name]
    with pytest.raises(exception) as caught:
        function()
    assert re.search(sentence, str(caught.value), re.S), caught.value
    assert_sentence(str(caught.value))


def later(size):
    return torch.ones(size, size, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    "options,sentence",
    [
        (dict(attn_mask=later(5)), "later keys only.*~attn_mask"),
        (
            dict(key_padding_mask=torch.arange(5) < torch.tensor([5, 3])[:, None]),
            "first key of every sequence.*~key_padding_mask",
        ),
    ],
    ids=["causal", "padding"],
)
def test_masks_of_the_other_polarity_warn_once(options, sentence):
    layer, x = AdditiveAttention(8, 4), t(2, 5, 8)
    with pytest.warns(UserWarning, match=sentence) as caught:
        layer(x, x, **options)
    assert caught[0].filename == __file__
    hooked = AdditiveAttention(8, 4)
    hooked.register_forward_hook(lambda *given: None)
    with pytest.warns(UserWarning, match=sentence) as caught:
        hooked(x, x, **options)
    assert caught[0].filename == __file__
    assert_sentence(str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, x, **options)
    if "key_padding_mask" in options:
        for around in (contextlib.nullcontext, torch.inference_mode):
            with pytest.warns(UserWarning, match=sentence) as caught, around():
                AdditiveAttention(8, 4).project(x, **options)
            assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "options,sentence",
    [
        (dict(attn_mask=~later(5)), "later keys only.*do not attend, as in.*~attn_mask\\.$"),
        (
            dict(key_padding_mask=torch.arange(5) < torch.tensor([5, 3])[:, None]),
            "first key of every sequence.*~key_padding_mask",
        ),
    ],
    ids=["causal", "padding"],
)
def test_masks_of_the_other_polarity_warn_once_with_heads(options, sentence):
    layer, x = MultiheadAdditiveAttention(8, 2, batch_first=True), t(2, 5, 8)
    with pytest.warns(UserWarning, match=sentence) as caught:
        layer(x, x, x, **options)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, x, x, **options)
        usual = MultiheadAdditiveAttention(8, 2, batch_first=True)
        usual(x, x, x, **{name: ~mask for name, mask in options.items()})


@pytest.mark.parametrize(
    "options",
    [
        dict(attn_mask=~later(5)),
        dict(attn_mask=torch.rand(5, 5) < 0.5),
        dict(attn_mask=nn.Transformer.generate_square_subsequent_mask(5)),
        dict(key_padding_mask=torch.arange(5) >= torch.tensor([5, 3])[:, None]),
        dict(key_padding_mask=torch.arange(5) < torch.tensor([0, 3])[:, None]),
        dict(key_padding_mask=torch.ones(2, 5, dtype=torch.bool)),
    ],
    ids=["causal", "random", "float", "right", "left", "all"],
)
def test_usual_masks_do_not_warn(options):
    layer, x = AdditiveAttention(8, 4), t(2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, x, **options)


def step_cases():
    layer, x = AdditiveAttention(8, 4), t(2, 5, 8)
    memory = layer.project(x, lengths=torch.tensor([5, 2]))
    single = layer.project(x[0])
    mask = t(2, 1, 5, dtype=torch.int64)
    return {
        # a memory -> (exception, what the sentence names)
        "value dtype": (memory._replace(value=x.double()), TypeError, "value is torch.float64"),
        "key dtype": (memory._replace(key=memory.key.double()), TypeError, "key is torch.float64"),
        "one feature": (memory._replace(key=t(2, 5, 1)), ValueError, r"\(2, 5, 1\).*is 4"),
        "another layer": (AdditiveAttention(8, 6).project(x), ValueError, "that this layer"),
        "value batch": (memory._replace(value=t(3, 5, 8)), ValueError, "the batch"),
        "value rank": (memory._replace(value=t(5, 8)), ValueError, "one query per sequence"),
        "value size": (memory._replace(value=t(2, 4, 8)), ValueError, "value has 4"),
        "value device": (memory._replace(value=x.to("meta")), RuntimeError, "value is on meta"),
        "no value": (memory._replace(value=None), TypeError, "value is a NoneType"),
        "lengths range": (memory._replace(lengths=torch.tensor([[9], [1]])), ValueError, "1 to 9"),
        "lengths dtype": (memory._replace(lengths=t(2, 1)), TypeError, "lengths has dtype"),
        "lengths shape": (memory._replace(lengths=torch.arange(3)), ValueError, "lengths has"),
        "mask shape": (
            memory._replace(attn_mask=torch.ones(2, 5).bool()), ValueError, "attn_mask has shape",
        ),
        "mask dtype": (memory._replace(attn_mask=mask), TypeError, "attn_mask has dtype"),
        "mask device": (
            memory._replace(attn_mask=mask.to("meta").bool()), RuntimeError, "mask is on meta",
        ),
        "unbatched": (single._replace(value=t(1, 5, 8)), ValueError, "one query per sequence"),
        "tuple": (tuple(memory), TypeError, "memory that is a tuple.*project"),
    }  # fmt: skip


@pytest.mark.parametrize("name", step_cases())
def test_step_checks_what_forward_checks(name):
    memory, exception, sentence = step_cases()[name]
    with pytest.raises(exception) as caught:
        AdditiveAttention(8, 4).step(t(2, 8), memory)
    assert re.search(sentence, str(caught.value), re.S), caught.value
    assert_sentence(str(caught.value))


def test_step_and_project_refuse_other_settings():
    layer, x = AdditiveAttention(8, 4), t(2, 5, 8)
    memory = layer.project(x)
    layer.dropout = 2.0
    for attend in (lambda: layer(x, x), lambda: layer.step(x[:, 0], memory)):
        with pytest.raises(ValueError, match=r"dropout_p is 2\.0"):
            attend()
    with pytest.raises(RuntimeError, match="value is on meta"):
        layer.project(x, x.to("meta"))
    for key, lengths in ((x, torch.ones(2, 3).long()), (x[0], torch.tensor([3, 3]))):
        with pytest.raises(ValueError, match="one length per"):
            layer.project(key, lengths=lengths)


def test_operators_refuse_tensors_on_several_devices():
    """A single meta tensor would dispatch the whole call to the shape functions, and the result
    would be unwritten memory."""
    inputs = make((2,), 3, 5, 8, 6)
    tensors = [*inputs.values(), *[None] * 5]
    options = -1, -1, None, 0.0, 1.0
    saved = dispatch.forward(*tensors, *options, False)[2]
    mixed = [*tensors[:2], tensors[2].to("meta"), *tensors[3:]]
    with pytest.raises(RuntimeError, match=r"query is on cpu.*value is on meta"):
        dispatch.forward(*mixed, *options, False)
    with pytest.raises(RuntimeError, match=r"query is on cpu.*value is on meta"):
        dispatch.backward(t(2, 3, 6), None, None, *mixed, *options, saved, *[True] * 5)
    empty = [x.to("meta") for x in inputs.values()]
    assert dispatch.forward(*empty, *[None] * 5, *options, True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_lengths(dtype):
    lengths = torch.tensor([5, 2])
    assert torch.equal(call(lengths=lengths.to(dtype)), call(lengths=lengths))


def test_numbers_of_other_types():
    numpy = pytest.importorskip("numpy")
    assert torch.equal(call(scale=numpy.float32(2)), call(scale=2))
    layer = AdditiveAttention(numpy.int64(8), numpy.int32(4), dropout=numpy.float32(0.5))
    assert type(layer.hidden_dim) is int and layer.dropout == 0.5
    assert torch.equal(call(window=(numpy.int64(1), 0)), call(window=(1, 0)))
    memory = layer.project(torch.randn(2, 3, 8)).expand(numpy.int64(2))
    assert type(memory.beams) is int and memory.beams == 2
    packed, ends, most = torch.randn(5, 4), torch.tensor([0, 2, 5]), numpy.int64(3)
    out = varlen_additive_attention(packed, packed, packed, packed[0], ends, ends, most, most)
    assert out.shape == (5, 4)
    with pytest.raises(TypeError, match=r"key_padding_mask is a ndarray.*torch.as_tensor"):
        call(key_padding_mask=numpy.zeros((2, 5), bool))


def test_arrays_with_masked_entries():
    """A tensor that is made from a masked array loses the mask, so such arrays raise."""
    numpy = pytest.importorskip("numpy")
    array = numpy.ma.masked_array([5, 3], mask=[False, True])
    with pytest.raises(TypeError, match=r"lengths is masked_array(.|\n)*must be integers"):
        call(lengths=array)
    heads = MultiheadAdditiveAttention(8, 2)
    for refused in (
        lambda: call(query=array), lambda: call(attn_mask=array),
        lambda: call(key_padding_mask=array),
        lambda: heads(t(3, 2, 8), t(5, 2, 8), t(5, 2, 8), key_padding_mask=array),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"is a MaskedArray.*drop its mask"):
            refused()


def test_floats_of_eight_bits():
    layer = LocationSensitiveAttention(8, 8, 4)
    memory = layer.project(t(2, 5, 8))
    state = layer.initial_state(memory)
    narrow = state._replace(previous=state.previous.to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"state.previous of torch.float8_e4m3fn"):
        layer.step(t(2, 8), memory, narrow)
    with pytest.raises(TypeError, match=r"coverage has dtype torch.float8_e4m3fn"):
        coverage_loss(state.previous, narrow.previous)


def test_padding_may_be_beyond_sixteen_bits():
    """Masked values may be any numbers, and infinities propagate."""
    layer, value = AdditiveAttention(8, 4), t(2, 5, 8)
    value[0, 3:], value[1, :2] = 1e5, torch.inf
    for options in (
        {"lengths": [3, 5]},
        {"key_padding_mask": value[..., 0].isfinite() & (value[..., 0] > 0)},
    ):
        memory = layer.project(t(2, 5, 8), value, dtype=F16, **options)
        context, _ = layer.step(t(2, 8), memory)
        assert torch.equal(context[0], t(8)) and context[1].isinf().all()
    with pytest.raises(ValueError, match=r"value holds 1e.05"):
        layer.project(t(2, 5, 8), value, dtype=F16, lengths=[4, 5])


BAD_MASKS = {
    "uint8": (t(3, 3, dtype=torch.uint8), TypeError, "attn_mask has dtype"),
    "int32": (t(3, 3, dtype=torch.int32), TypeError, "attn_mask has dtype"),
    "double": (t(3, 3, dtype=torch.float64), TypeError, "attn_mask has dtype"),
    "list": ([[True]], TypeError, "attn_mask is a list"),
    "shape": (t(3, 4), ValueError, "attn_mask has shape"),
    "bool shape": (t(3, 4, dtype=torch.bool), ValueError, "attn_mask has shape"),
    "batch": (t(3, 3, 3), ValueError, "attn_mask has shape"),
    "rank": (t(1, 2, 3, 3), ValueError, "attn_mask has shape"),
    "device": (t(3, 3, device="meta"), RuntimeError, "attn_mask is on meta"),
}


@pytest.mark.parametrize("mask,exception,sentence", BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_module_refuses_masks_also_beside_padding(mask, exception, sentence):
    """The layer combines the two masks before the public function can check them."""
    layer, x = AdditiveAttention(8, 4), t(2, 3, 8)
    with pytest.raises(exception, match=sentence):
        layer(x, x, key_padding_mask=t(2, 3, dtype=torch.bool), attn_mask=mask)


def test_a_failed_call_leaves_the_generator_alone():
    state = torch.get_rng_state()
    with pytest.raises(ValueError):
        call(dropout_p=0.5, window=(-3, 0))
    assert torch.equal(torch.get_rng_state(), state)


# The operators are public: no argument may crash the process.
RAW_CALLS = """
import itertools, torch
from additive_attn.ops import dispatch
t = torch.zeros
good = dict(query=t(2, 3, 8), key=t(2, 5, 8), value=t(2, 5, 6), weight=t(8), attn_mask=None,
            lengths=None, starts=None, block_table=None, block_tiles=None, left=-1, right=-1,
            seed=None, dropout_p=0.0, scale=1.0)
i64, i32, tiles = dict(dtype=torch.int64), dict(dtype=torch.int32), torch.ones(2, 2, 4).bool()
blocks = [
    dict(starts=t(2, 3)), dict(starts=t(4, **i64)), dict(starts=t(0, **i64)),
    dict(starts=torch.tensor([-7, 2**62, 5])), dict(starts=torch.tensor(-(2**63))),
    dict(starts=t(3, **i64, device="meta")), dict(block_table=t(2, 2, **i32)),
    dict(block_tiles=tiles), dict(block_table=t(2, 2), block_tiles=tiles),
    dict(block_table=t(2, 2, **i64), block_tiles=tiles),
    dict(block_table=t(3, 2, **i32), block_tiles=tiles),
    dict(block_table=t(2, **i32), block_tiles=tiles),
    dict(block_table=t(0, 0, **i32), block_tiles=tiles),
    dict(block_table=torch.full((2, 2), 9, **i32), block_tiles=tiles),
    dict(block_table=torch.full((2, 2), -(2**31), **i32), block_tiles=tiles),
    dict(block_table=torch.full((2, 2), 2**31 - 1, **i32), block_tiles=tiles),
    dict(block_table=t(2, 2, **i32), block_tiles=tiles.float()),
    dict(block_table=t(2, 2, **i32), block_tiles=t(2, 0, 4).bool()),
    dict(block_table=t(2, 2, **i32), block_tiles=t(2, 2, 0).bool()),
    dict(block_table=torch.full((2, 2), 2, **i32), block_tiles=t(0, 2, 4).bool()),
    dict(block_table=t(2, 2, **i32), block_tiles=t(2, 4).bool()),
    dict(block_table=t(2, 2, **i32), block_tiles=tiles.to("meta")),
]
bad = [
    dict(query=t(8)), dict(query=t(())), dict(key=t(5)), dict(value=t(6)), dict(weight=t(())),
    dict(key=t(2, 5, 7)), dict(weight=t(7)), dict(weight=t(9)), dict(weight=t(1)),
    dict(value=t(2, 4, 6)), dict(value=t(2, 1, 6)), dict(key=t(2, 1, 8)), dict(key=t(3, 5, 8)),
    dict(query=t(2, 3, 8, dtype=torch.int64)), dict(query=t(2, 3, 8, dtype=torch.complex64)),
    dict(key=t(2, 5, 8, dtype=torch.float64)), dict(value=t(2, 5, 6, dtype=torch.float16)),
    dict(weight=t(8, dtype=torch.int32)), dict(key=t(2, 5, 8, device="meta")),
    dict(weight=t(8, device="meta")), dict(attn_mask=t(3, 5, device="meta")),
    dict(attn_mask=t(5, 3)), dict(attn_mask=t(4)), dict(attn_mask=t(3, 3, 5)),
    dict(attn_mask=t(3, 5, dtype=torch.int64)), dict(attn_mask=t(3, 5, dtype=torch.uint8)),
    dict(attn_mask=t(3, 5, dtype=torch.float64)), dict(attn_mask=t(0)), dict(attn_mask=t(0, 5)),
    dict(lengths=t(2, 3)), dict(lengths=t(2, 3, dtype=torch.int32)), dict(lengths=t(4, **i64)),
    dict(lengths=t(3, 3, **i64)), dict(lengths=t(0, **i64)),
    dict(lengths=t(3, **i64, device="meta")),
    dict(lengths=torch.tensor([-7, 2**62, 5])), dict(lengths=torch.tensor(-(2**63))),
    dict(dropout_p=0.5), dict(dropout_p=float("nan")), dict(dropout_p=-1.0), dict(dropout_p=7.0),
    dict(seed=torch.tensor(1), dropout_p=float("nan")), dict(seed=torch.tensor(1), dropout_p=-3.0),
    dict(seed=torch.tensor(1), dropout_p=9.0), dict(seed=torch.tensor(1.5), dropout_p=0.5),
    dict(seed=t(3, **i64), dropout_p=0.5), dict(seed=t(2, 3, **i64), dropout_p=0.5),
    dict(seed=t(0, **i64), dropout_p=0.5), dict(seed=torch.tensor(1)),
    dict(left=-5, right=-7), dict(left=2**63 - 1, right=2**63 - 1), dict(left=-(2**63)),
    dict(left=2**62, right=-(2**63)), dict(left=0, right=0), dict(scale=float("nan")),
    dict(scale=float("inf")), dict(query=t(2, 0, 8)), dict(key=t(2, 0, 8)), dict(query=t(0, 3, 8)),
    dict(query=t(2, 3, 0), key=t(2, 5, 0), weight=t(0)), dict(value=t(2, 5, 0)),
]
refused = 0
for case in [{}, *bad, *blocks]:
    arguments = good | case
    try:
        out, weights, lse = dispatch.forward(*arguments.values(), True)
    except Exception as error:
        assert str(error) and case, error
        refused += 1
print("forward survived", refused)

saved = torch.zeros(2, 3)
grads = dict(grad_out=t(2, 3, 6), grad_weights=t(2, 3, 5), grad_lse=t(2, 3))
needs = [True] * 5
bad = [
    dict(grad_out=t(3, 6)), dict(grad_out=t(2, 3, 5)), dict(grad_out=t(2, 3, 1)),
    dict(grad_out=t(())),
    dict(grad_out=t(0)), dict(grad_out=t(2, 2, 6)), dict(grad_out=t(2, 3, 6, dtype=torch.int64)),
    dict(grad_weights=t(2, 3, 4)), dict(grad_weights=t(3, 5)), dict(grad_weights=t(0)),
    dict(grad_weights=t(2, 3, 5, device="meta")), dict(grad_lse=t(2, 4)), dict(grad_lse=t(3)),
    dict(grad_lse=t(2, 3, 1)), dict(grad_out=t(2, 3, 6, dtype=torch.float64)),
    dict(lse=t(2, 2)), dict(lse=t(3)), dict(lse=t(())), dict(lse=t(2, 3, dtype=torch.float64)),
    dict(lse=t(2, 3, dtype=torch.float16)), dict(lse=t(2, 3, device="meta")),
    dict(lse=t(2, 3, dtype=torch.int64)), dict(query=t(8)), dict(key=t(2, 5, 7)),
    dict(value=t(2, 4, 6)), dict(attn_mask=t(5, 3)), dict(attn_mask=torch.ones(3, 5).bool()),
    dict(attn_mask=t(5)), dict(attn_mask=t(())), dict(lengths=t(4, **i64)),
    dict(grad_out=None, grad_weights=None, grad_lse=None), dict(key=t(2, 0, 8), value=t(2, 0, 6)),
    dict(value=t(2, 5, 0)), dict(lse=torch.full((2, 3), float("nan"))),
    dict(lse=torch.full((2, 3), -float("inf"))),
]
refused = 0
for case in [{}, *bad, *blocks]:
    a = grads | good | {"lse": saved} | case
    order = [*(a[k] for k in grads), *(a[k] for k in good), a["lse"]]
    for need in ([True] * 5, [False] * 5, [True, False, False, False, False]):
        try:
            dispatch.backward(*order, *need)
        except Exception as error:
            assert str(error) and case, error
            refused += 1
print("backward survived", refused)
"""


def test_raw_operator_calls_do_not_crash():
    result = fresh.python(RAW_CALLS)
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-2000:]}"
    assert "forward survived" in result.stdout and "backward survived" in result.stdout
    assert int(re.search(r"forward survived (\d+)", result.stdout)[1]) > 20


def test_operator_clamps_lengths():
    """The public function raises for lengths out of range; the operator clamps them to the
    keys."""
    inputs = make((), 3, 5, 8, 6)
    wild = torch.tensor([-4, 99, 3])
    tame = torch.tensor([0, 5, 3])
    for ours, expected in zip(
        dispatch.forward(*Call(*inputs.values(), None, wild), True),
        dispatch.forward(*Call(*inputs.values(), None, tame), True),
        strict=True,
    ):
        assert torch.equal(ours, expected)
