"""Packed sequences give the results of each sequence alone, without padding, which would take time
and memory."""

from __future__ import annotations

import paths
import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, check_against_plain, gradients, make, random_upstream
from torch.autograd import gradcheck, gradgradcheck

from additive_attn import (
    AdditiveAttention,
    additive_attention,
    additive_scores,
    varlen_additive_attention,
)
from additive_attn.spec.dropout import keep_mask

QUERIES, KEYS = (3, 0, 130, 1, 40), (5, 4, 90, 0, 300)


def ends(lengths, dtype=torch.int32):
    return F.pad(torch.tensor(lengths, device=DEVICE).cumsum(0), (1, 0)).to(dtype)


def packed(heads=0, hidden=6, values=4, dtype=torch.float32):
    inputs = make((heads,) if heads else (), sum(QUERIES), sum(KEYS), hidden, values,
                  heads=bool(heads), dtype=dtype)  # fmt: skip
    if heads:
        turned = {name: inputs[name].transpose(0, 1).contiguous() for name in inputs}
        inputs = {**turned, "weight": inputs["weight"]}
    return inputs


def ours(inputs, **options):
    out, lse = varlen_additive_attention(
        *inputs.values(), ends(QUERIES), ends(KEYS, torch.int64), max(QUERIES), max(KEYS),
        need_lse=True, **options,
    )  # fmt: skip
    return {"out": out, "lse": lse}


def one_by_one(inputs, *, is_causal=False, window=None, scale=1.0):
    """Computes each sequence by the plain formula, with queries and keys aligned at their ends."""
    query, key, value, weight = inputs.values()
    left, right = window or (-1, -1)
    right = 0 if is_causal else right
    outs, lses, parts = [], [], (query.split(QUERIES), key.split(KEYS), value.split(KEYS))
    for q, k, v in zip(*parts, strict=True):
        i = torch.arange(len(q), device=DEVICE)[:, None] + len(k) - len(q)
        j = torch.arange(len(k), device=DEVICE)
        allowed = ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))
        if heads := q.dim() == 3:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        energy = torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3))
        score = scale * (energy @ weight[..., None, :, None]).squeeze(-1)
        any_key = allowed.any(-1, keepdim=True)
        score = torch.where(allowed, score, torch.where(any_key, -torch.inf, 0.0).to(score.dtype))
        weights = torch.where(allowed, torch.softmax(score, -1), 0.0)
        lse = torch.where(any_key[:, 0], torch.logsumexp(score, -1), -torch.inf)
        out = weights @ v
        outs.append(out.transpose(0, 1) if heads else out)
        lses.append(lse.transpose(0, 1) if heads else lse)
    return {"out": torch.cat(outs), "lse": torch.cat(lses)}


OPTIONS = {
    "all": {},
    "causal": dict(is_causal=True),
    "window": dict(window=(20, 3), scale=0.5),
    "huge window": dict(window=(2**62, 5)),
}


@pytest.mark.core
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_as_each_sequence_alone(options, heads):
    check_against_plain(
        [packed(heads)], upstream_of=("out", "lse"), function=ours, formula=one_by_one, **options
    )


@pytest.mark.triton
def test_in_tritons_interpreter():
    inputs = [torch.randn(n, 4) for n in (9, 11, 11)] + [torch.randn(4)]
    call = (*inputs, ends((3, 0, 6)), ends((5, 4, 2)), 6, 5)
    out = varlen_additive_attention(*call, is_causal=True)
    with paths.running("blocks"):
        torch.testing.assert_close(out, varlen_additive_attention(*call, is_causal=True))


@pytest.mark.core
@pytest.mark.parametrize("heads", [0, 2])
def test_without_the_log_sum_exp(heads):
    """Plain PyTorch computes no lse unless it is returned."""
    own, sizes = (heads,) if heads else (), (4, 5, 5)
    flat = [torch.randn(2 * n, *own, 4, device=DEVICE) for n in sizes]
    weight, cu_seq = torch.randn(*own, 4, device=DEVICE), [ends((n, n)) for n in sizes[:2]]
    query, *memory = (x.unflatten(0, (2, -1)) for x in flat)
    memory = [torch.nested.as_nested_tensor(list(x), layout=torch.jagged) for x in memory]
    nested = [x.transpose(1, 2) if heads else x for x in (query, *memory)]
    for function, call in (
        (varlen_additive_attention, (*flat, weight, *cu_seq, 4, 5)),
        (additive_attention, (*nested, weight)),
    ):
        out, _ = function(*call, need_lse=True)
        torch.testing.assert_close(function(*call), out)


def test_derivatives_are_exact():
    query, key, value = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7, 2)
    inputs = [x.double().requires_grad_() for x in (query, key, value, torch.randn(3))]
    cu_seq_q, cu_seq_k = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 5, 7])

    def function(*tensors):
        return varlen_additive_attention(*tensors, cu_seq_q, cu_seq_k, 3, 4, is_causal=True)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.core
def test_sequences_are_independent():
    """NaN in one sequence reaches no other, and rows beyond the last sequence are empty."""
    inputs = packed()
    leaves = {name: x.clone() for name, x in inputs.items()}
    leaves["key"][: KEYS[0]] = torch.nan
    leaves["value"][: KEYS[0]] = torch.inf
    upstream = random_upstream(ours(inputs), ("out",))
    clean, spoilt = (gradients(ours, case, upstream) for case in (inputs, leaves))
    for name in ("out", "lse"):
        assert torch.equal(clean[0][name][QUERIES[0] :], spoilt[0][name][QUERIES[0] :])
    assert torch.equal(clean[1]["query"][QUERIES[0] :], spoilt[1]["query"][QUERIES[0] :])
    assert torch.equal(clean[1]["value"][KEYS[0] :], spoilt[1]["value"][KEYS[0] :])
    short = ends(QUERIES[:3]), ends(KEYS[:3])
    out = varlen_additive_attention(*inputs.values(), *short, 130, 90)
    assert (out[sum(QUERIES[:3]) :] == 0).all() and (out[:3] != 0).all()


@pytest.mark.core
def test_dropout_counts_rows_and_keys_of_the_packed_tensors():
    inputs, p = packed(hidden=3, values=sum(KEYS)), 0.4
    inputs["value"] = torch.eye(sum(KEYS), device=DEVICE)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=DEVICE)
    torch.manual_seed(3)
    dropped, kept = ours(inputs, dropout_p=p)["out"], ours(inputs)["out"]
    keep = keep_mask(seed, (), (0, sum(QUERIES)), (0, sum(KEYS)), p)
    torch.testing.assert_close(dropped, kept * keep / (1 - p))


def test_compiled_with_any_lengths():
    torch._dynamo.reset()

    def function(query, key, value, weight, cu_seq_q, cu_seq_k):
        return varlen_additive_attention(query, key, value, weight, cu_seq_q, cu_seq_k, 50, 50)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in (((3, 5), (7, 2)), ((4, 0, 9), (1, 30, 8))):
        inputs = [torch.randn(n, 4) for n in (sum(queries), sum(keys), sum(keys))]
        arguments = *inputs, torch.randn(4), ends(queries), ends(keys)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


QUERY = torch.randn(6, 4)
BAD = {
    "floats": (dict(cu_seq_q=torch.tensor([0.0, 6.0])), TypeError, "cu_seq_q is torch.float32"),
    "a list": (dict(cu_seq_k=[0, 6]), TypeError, "cu_seq_k is a list"),
    "a matrix": (dict(cu_seq_q=torch.zeros(2, 2).long()), ValueError, r"\(sequences \+ 1,\)"),
    "nothing": (dict(cu_seq_q=torch.zeros(1).long()), ValueError, "at least one sequence"),
    "another device": (dict(cu_seq_q=torch.zeros(3).long().to("meta")), RuntimeError, "on meta"),
    "fewer": (dict(cu_seq_k=torch.tensor([0, 2])), ValueError, "3 sequences and cu_seq_k 1"),
    "no number": (dict(max_q=2.0), TypeError, "max_q is 2.0"),
    "padded": (dict(query=QUERY.reshape(1, 6, 4)), ValueError, "take additive_attention"),
    "a batch": (dict(query=QUERY.reshape(1, 1, 6, 4)), ValueError, r"\(total, heads, H\)"),
    "no tensor": (dict(query=None), TypeError, "query is a NoneType"),
    "no flag": (dict(is_causal=1), TypeError, "is_causal is 1"),
    "no window": (dict(window=3), ValueError, "window is 3"),
}  # fmt: skip
READ = {  # the check reads numbers, which would wait for a GPU
    "no 0": (dict(cu_seq_q=torch.tensor([1, 2, 4, 6])), ValueError, "begin with 0"),
    "falling": (dict(cu_seq_q=torch.tensor([0, 4, 3, 6])), ValueError, "not decrease"),
    "beyond": (dict(cu_seq_k=torch.tensor([0, 2, 4, 7])), ValueError, "within the 6 rows"),
    "longer": (dict(max_k=1), ValueError, "max_k is 1, but a sequence of cu_seq_k has length 2"),
}  # fmt: skip
if DEVICE == "cpu":
    BAD |= READ


@pytest.mark.parametrize("changed,kind,sentence", BAD.values(), ids=BAD.keys())
def test_sentences(changed, kind, sentence):
    cu_seq = torch.tensor([0, 2, 4, 6])
    arguments = dict(
        query=QUERY, key=QUERY, value=QUERY, weight=QUERY[0], cu_seq_q=cu_seq, cu_seq_k=cu_seq,
        max_q=2, max_k=2,
    ) | changed  # fmt: skip
    with pytest.raises(kind, match=sentence):
        varlen_additive_attention(**arguments)


def test_numbers_that_cannot_be_read_stay_within_the_tensors():
    """Where numbers are not read, as on a GPU, the ranges of any sequence numbers lie within the
    keys."""
    from additive_attn.ops.packed import ranges

    for _ in range(50):
        wild = torch.randint(-100, 100, (2, 5))
        starts, lengths = ranges(*wild, 20, 30, *torch.randint(-1, 40, (2,)).tolist(), True)
        assert starts.min() >= 0 and lengths.min() >= 0
        assert starts.max() <= 30 and lengths.max() <= 30


def test_as_padded_sequences_with_lengths():
    lengths = torch.tensor([5, 9, 2])
    padded = [torch.randn(3, 9, n) for n in (4, 4, 3)]
    weight, inside = torch.randn(4), torch.arange(9) < lengths[:, None]
    cu_seq = F.pad(lengths.cumsum(0), (1, 0))
    out = varlen_additive_attention(*(x[inside] for x in padded), weight, cu_seq, cu_seq, 9, 9)
    torch.testing.assert_close(out, additive_attention(*padded, weight, lengths=lengths)[inside])


def jagged(parts):
    return torch.nested.nested_tensor(list(parts), layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("masking", [{}, dict(is_causal=True), dict(window=(2, 1))], ids=str)
@pytest.mark.parametrize("dense_query", [False, True])
def test_nested_tensors(dense_query, masking, heads):
    """Results are those of each sequence alone, aligned at the upper left. Gradients reach the
    nested inputs."""
    queries = (4, 4, 4) if dense_query else (3, 1, 8)
    own, keys = (heads,) if heads else (), (5, 2, 6)
    parts = [[torch.randn(n, *own, 4) for n in lengths] for lengths in (queries, keys, keys)]
    nested = [jagged(each) for each in parts]
    if dense_query:
        nested[0] = torch.stack(parts[0]).requires_grad_()
    given = [x.transpose(1, 2) for x in nested] if heads else nested
    weight = torch.randn(*own, 4)
    out, lse = additive_attention(*given, weight, need_lse=True, **masking)
    alone, leaves = [], [[x.clone().requires_grad_() for x in each] for each in parts]
    for q, k, v in zip(*leaves, strict=True):
        each = [x.transpose(0, 1) for x in (q, k, v)] if heads else (q, k, v)
        alone.append(additive_attention(*each, weight, need_lse=True, **masking))
    for mine, other in zip(zip(out.unbind(), lse.unbind(), strict=True), alone, strict=True):
        torch.testing.assert_close(mine, other)
    if not dense_query:
        assert out.is_nested and out.offsets() is given[0].offsets()
        assert (given[0] + out).is_nested  # they have the same lengths
    cost = sum(x.square().sum() for x in out.unbind())
    cost.backward()
    sum(x.square().sum() for x, _ in alone).backward()
    for tensor, each in zip(nested, leaves, strict=True):
        for mine, other in zip(tensor.grad.unbind(), each, strict=True):
            torch.testing.assert_close(mine, other.grad)


def test_nested_tensors_compiled():
    torch._dynamo.reset()
    nested = [jagged([torch.randn(n, 4) for n in (3, 1, 8)]) for _ in range(1)] * 3
    compiled = torch.compile(additive_attention, fullgraph=True, backend="aot_eager")
    weight = torch.randn(4)
    ours, theirs = compiled(*nested, weight), additive_attention(*nested, weight)
    torch.testing.assert_close(ours.values(), theirs.values())


def test_nested_tensors_with_holes():
    padded = torch.randn(2, 6, 4)
    firsts, lengths = torch.tensor([1, 0]), torch.tensor([3, 5])
    views = torch.nested.narrow(padded, 1, firsts, lengths, torch.jagged)
    out = additive_attention(views, views, views, QUERY[0])
    for each, part in zip(out.unbind(), (padded[0, 1:4], padded[1, :5]), strict=True):
        torch.testing.assert_close(each, additive_attention(part, part, part, QUERY[0]))


def test_sentences_about_nested_tensors():
    x = jagged([torch.randn(n, 4) for n in (3, 2)])
    other, three = (jagged([torch.randn(n, 4) for n in ns]) for ns in ((2, 3), (1, 2, 2)))
    heads = jagged([torch.randn(n, 2, 4) for n in (3, 2)])
    refused = [
        ((x, x, x), dict(lengths=[1, 1]), "lengths was passed beside nested tensors"),
        ((x, three, three), {}, "equal B"),
        ((heads, heads, heads), {}, "Heads come before"),
    ]
    if DEVICE == "cpu":  # on other devices lengths are not read
        refused.append(((x, x, other), {}, "different lengths"))
    for inputs, options, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            additive_attention(*inputs, QUERY[0], **options)
    with pytest.raises(TypeError, match="query is nested"):
        additive_scores(x, x, QUERY[0])
    strided = torch.nested.nested_tensor([torch.randn(n, 4) for n in (3, 2)])
    for inputs, sentence in (
        ((strided, x, x), "query is nested"), ((x, strided, strided), "key is nested"),
        ((x, x, torch.randn(2, 5, 4).to_sparse()), "value is torch.sparse"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=sentence):
            additive_attention(*inputs, QUERY[0])
    for given, batch_first in ((strided, True), (x, False)):
        layer = AdditiveAttention(4, 6, batch_first=batch_first)
        with pytest.raises(TypeError, match="query is nested"):
            layer(given, given, given, need_weights=False)


def test_layer_of_nested_tensors():
    layer, lengths = AdditiveAttention(4, 6), (3, 1, 8)
    x = jagged([torch.randn(n, 4) for n in lengths])
    out = layer(x, x, need_weights=False)[0]
    for mine, each in zip(out.unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(mine, layer(each[None], each[None], need_weights=False)[0][0])
