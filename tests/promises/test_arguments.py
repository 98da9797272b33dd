"""Optional arguments, and arguments with the same meaning: a bias on the scores, padding, lists of
lengths, first keys, no value, no query, one query without a dim for it."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import DEVICE, assert_same, generator, make
from torch import nn

from additive_attn import (
    AdditiveAttention,
    MultiheadAdditiveAttention,
    additive_attention,
    additive_attention_step,
)
from additive_attn.ops.attend import filled

BATCHES = [(), (3,), (3, 2)]
LQ, LK, H, DV = 4, 7, 8, 6


def inputs_of(batch, dtype=torch.float32):
    return list(make(batch, LQ, LK, H, DV, dtype=dtype).values())


def all_of(function, tensors, upstream=None, **options):
    """Returns out, weights and lse, and the gradients of those tensors that are not None."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(*leaves, need_weights=True, need_lse=True, **options)
    total = sum((x.nan_to_num(neginf=0.0) * n).square().sum() for n, x in enumerate(outputs, 1))
    given = [x for x in leaves if x is not None]
    return [*outputs, *torch.autograd.grad(total, given, materialize_grads=True)]


def assert_equal(ours, expected):
    for n, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert_same(a.detach(), b.detach(), f"result {n}")


def padding_of(batch):
    """Returns a padding mask (B, Lk), True = ignore, that leaves one sequence without keys."""
    padding = torch.rand(*batch[:1], LK) < 0.4
    if batch:
        padding[1] = True
    return padding


@pytest.mark.core
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_key_padding_mask(batch, mask):
    tensors, padding = inputs_of(batch), padding_of(batch)
    attended = ~padding.reshape(*batch[:1], *(1,) * (len(batch) - 1), 1, LK)
    full, attn_mask = attended, None
    if mask == "bool":
        attn_mask = torch.rand(LQ, LK) < 0.7
        full = attended & attn_mask
    elif mask == "float":
        attn_mask = torch.randn(LQ, LK)
        full = torch.where(attended, attn_mask, -math.inf)
    ours = all_of(additive_attention, tensors, key_padding_mask=padding, attn_mask=attn_mask)
    assert_equal(ours, all_of(additive_attention, tensors, attn_mask=full))


def test_one_padding_for_all_sequences():
    tensors, padding = inputs_of((3, 2)), torch.rand(1, LK) < 0.4
    ours = additive_attention(*tensors, key_padding_mask=padding)
    assert_same(ours, additive_attention(*tensors, key_padding_mask=padding.expand(3, LK)))


@pytest.mark.core
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_starts(batch, per_query):
    """Starts and lengths are a window per sequence. A window is empty if it starts at its end or
    later."""
    tensors, shape = inputs_of(batch), batch[:1] + ((LQ,) if per_query else ())
    starts, lengths = torch.randint(0, LK + 1, (2, *shape))
    keys = torch.arange(LK)
    allowed = (keys >= starts[..., None]) & (keys < lengths[..., None])
    if not per_query:
        allowed = allowed.unsqueeze(-2)
    if len(batch) > 1:
        allowed = allowed.unsqueeze(1)
    ours = all_of(additive_attention, tensors, starts=starts, lengths=lengths)
    masked = all_of(additive_attention, tensors, attn_mask=allowed)
    for one, other in zip(ours, masked, strict=True):
        assert torch.equal(one, other)  # zeros of masked keys may differ in sign
    assert not ours[0][~allowed.any(-1).expand(ours[0].shape[:-1])].any()


def test_starts_combine_with_masks():
    tensors, starts = inputs_of((3,)), torch.tensor([0, 3, LK])
    allowed = torch.arange(LK) >= starts[:, None, None]
    mask = torch.randn(LQ, LK)
    ours = all_of(additive_attention, tensors, starts=starts, attn_mask=mask, is_causal=True)
    full = torch.where(allowed, mask, -math.inf)
    assert_equal(ours, all_of(additive_attention, tensors, attn_mask=full, is_causal=True))


@pytest.mark.parametrize(
    "kind",
    [list, tuple, "int32", "backwards", "of other bytes", "nothing masked", "numbers in a list"],
)
@pytest.mark.parametrize("name", ["lengths", "starts"])
def test_lists_of_integers(name, kind):
    tensors, numbers = inputs_of((3,)), [5, 0, LK]
    numpy = pytest.importorskip("numpy")
    arrays = {
        "int32": numpy.array(numbers, "int32"),
        "backwards": numpy.array(numbers[::-1])[::-1],
        "of other bytes": numpy.array(numbers, ">i8"),
        "nothing masked": numpy.ma.masked_array(numbers),
    }
    if kind in arrays:
        given = arrays[kind]
    elif kind == "numbers in a list":
        given = [torch.tensor(n, device="cpu") for n in numbers]
    else:
        given = kind(numbers)
    expected = additive_attention(*tensors, **{name: torch.tensor(numbers)})
    assert_same(additive_attention(*tensors, **{name: given}), expected)
    layer, x = AdditiveAttention(H, 5), torch.randn(3, LK, H)
    assert_same(layer(x, x, **{name: given})[0], layer(x, x, **{name: torch.tensor(numbers)})[0])


def test_lists_of_lists_and_numbers():
    tensors, rows = inputs_of((2,)), [[1, 2, 3, 4], [0, 5, 6, 7]]
    ours = additive_attention(*tensors, lengths=rows)
    assert_same(ours, additive_attention(*tensors, lengths=torch.tensor(rows)))
    tensors = inputs_of(())
    ours = additive_attention(*tensors, lengths=3)
    assert_same(ours, additive_attention(*tensors, lengths=torch.tensor(3)))
    empty = [x[:0] for x in inputs_of((2,))[:3]]
    assert additive_attention(*empty, torch.randn(H), lengths=[]).shape == (0, LQ, DV)


@pytest.mark.parametrize("numbers", [[LK + 1, 1], [-1, 2], (3, LK + 1)], ids=str)
def test_lists_are_checked_before_a_device_has_them(numbers):
    """The numbers of a tensor on a GPU are not read. Here meta tensors replace it."""
    x, weight = torch.empty(2, LK, H, device="meta"), torch.empty(H, device="meta")
    layers = (
        AdditiveAttention(H, H, device="meta"),
        MultiheadAdditiveAttention(H, 2, batch_first=True, device="meta"),
    )
    for name in ("lengths", "starts"):
        with pytest.raises(ValueError, match=f"{name} must lie between 0 and {LK}"):
            additive_attention(x, x, x, weight, **{name: numbers})
        additive_attention(x, x, x, weight, **{name: [LK, 0]})
    for layer in layers:
        with pytest.raises(ValueError, match=f"lengths must lie between 0 and {LK}"):
            layer.project(x, lengths=numbers)
        layer.project(x, lengths=[LK, 0])


def test_lists_for_the_memory_of_a_decoder():
    layer, x = AdditiveAttention(H, 5), torch.randn(3, LK, H)
    ours = layer.step(x[:, 0], layer.project(x, lengths=[5, 0, LK]))
    expected = layer.step(x[:, 0], layer.project(x, lengths=torch.tensor([5, 0, LK])))
    assert_equal(ours, expected)
    shared = layer.step(x[:, 0], layer.project(x[:1], lengths=[5, 0, LK]))
    many = layer.step(x[:, 0], layer.project(x[:1], lengths=torch.tensor([5, 0, LK])))
    assert_equal(shared, many)


@pytest.mark.core
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_without_value(batch):
    """Without a value, weights are returned, or weights and lse."""
    query, key, value, weight = inputs_of(batch)
    lengths = torch.randint(0, LK + 1, batch[:1])
    given = all_of(additive_attention, [query, key, value[..., :0], weight], lengths=lengths)

    def call(query, key, value, weight, need_weights, need_lse, **options):
        weights, lse = additive_attention(query, key, None, weight, need_lse=True, **options)
        return value.new_zeros(*batch, LQ, 0), weights, lse

    ours = all_of(call, [query, key, value[..., :0], weight], lengths=lengths)
    assert_equal(ours, given)
    assert_same(additive_attention(query, key, None, weight, lengths=lengths), ours[1].detach())


@pytest.mark.core
@pytest.mark.parametrize("batch,heads", [*((b, False) for b in BATCHES), ((3, 2), True)], ids=str)
def test_without_query(batch, heads):
    """Without a query, as in pooling, the results are those of a query of zeros."""
    _, key, value, weight = inputs_of(batch)
    if heads:
        weight = torch.randn(batch[-1], H)
    zeros = torch.zeros(*batch, 1, H)
    expected = all_of(additive_attention, [zeros, key, value, weight])
    ours = all_of(additive_attention, [None, key, value, weight])
    assert_equal(ours, expected[:3] + expected[4:])
    pooled = all_of(additive_attention_step, [None, key, value, weight])
    for a, b, dim in zip(pooled[:3], ours[:3], (-2, -2, -1), strict=True):
        assert_same(a, b.squeeze(dim))


def test_heads_of_a_weight_pool_one_set_of_keys():
    key, value, weight = torch.randn(2, 1, LK, H), torch.randn(2, 1, LK, DV), torch.randn(3, H)
    ours = additive_attention(None, key, value, weight)
    expected = additive_attention(torch.zeros(2, 3, 1, H), key, value, weight)
    assert_same(ours, expected)


def test_what_is_left_out_takes_no_memory():
    _, key, _, weight = inputs_of((3, 2))
    made = filled(None, key, None, weight, 0.0)
    assert made.query.untyped_storage().nbytes() == H * key.itemsize
    assert made.value.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    assert made.value.shape == (3, 2, LK, 0) and not made.value.requires_grad


@pytest.mark.core
@pytest.mark.parametrize("shape", [(), (1,), (2,)], ids=str)
def test_bias(shape):
    """A bias cancels in the softmax, where its gradient is zero, and shifts lse."""
    tensors, bias = inputs_of((3, 2)), torch.randn(shape, requires_grad=True)
    if shape == (2,):
        tensors[3] = torch.randn(2, H)
    plain = additive_attention(*tensors)
    out = additive_attention(*tensors, bias=bias)
    assert_same(out, plain)
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    assert grad.shape == shape and not grad.any()
    lengths = torch.tensor([0, 3, LK])
    expected = additive_attention(*tensors, lengths=lengths, need_lse=True)[1]
    lse = additive_attention(*tensors, lengths=lengths, need_lse=True, bias=bias)[1]
    shift = bias.detach()[:, None] if shape == (2,) else bias.detach()
    torch.testing.assert_close(lse, expected + shift)
    upstream = torch.randn_like(lse)
    upstream[0] = math.nan  # of empty rows
    (grad,) = torch.autograd.grad(lse, bias, upstream)
    rows = upstream[1:].sum((0, 2)) if shape == (2,) else upstream[1:].sum()
    torch.testing.assert_close(grad, rows.reshape(shape))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("queries,keys", [(1, LK), (1, 200), (LQ, LK)])
def test_a_bias_of_any_float_dtype(queries, keys, shape, dtype):
    """A bias takes no part in the computation, so it changes neither results nor their dtype."""
    tensors = list(make((3,), queries, keys, H, DV, dtype=dtype).values())
    tensors = [x.requires_grad_() for x in tensors]
    expected = additive_attention(*tensors)
    expected = [expected, *torch.autograd.grad(expected.sum(), tensors)]
    for other in (dtype, torch.float64, torch.bfloat16):
        bias = torch.randn(shape, dtype=other, requires_grad=True)
        out = additive_attention(*tensors, bias=bias)
        *gradients, zeros = torch.autograd.grad(out.sum(), [*tensors, bias])
        bound = 4 * torch.finfo(dtype).eps  # plain PyTorch sums in another order
        for a, b in zip([out, *gradients], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)
        assert zeros.dtype == other and zeros.shape == shape and not zeros.any()


@pytest.mark.core
@pytest.mark.parametrize("batch", [(3,), (2, 3)], ids=str)
def test_a_value_that_all_share(batch):
    """Entries share a value, also one with as many keys as there are sequences."""
    query, key, value, weight = inputs_of(batch)
    key, value = key[..., :3, :], value[(0,) * len(batch)][:3]
    out = additive_attention(query, key, value, weight)
    assert_same(out, additive_attention(query, key, value.expand(*batch, 3, DV), weight))


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_bias_beside_a_mask(mask):
    tensors, bias = inputs_of((3,)), torch.randn((), requires_grad=True)
    hidden = torch.rand(LQ, LK) < 0.4
    attn_mask = ~hidden if mask == "bool" else torch.randn(LQ, LK).masked_fill(hidden, -math.inf)
    expected = additive_attention(*tensors, attn_mask=attn_mask, need_lse=True)
    ours = additive_attention(*tensors, attn_mask=attn_mask, need_lse=True, bias=bias)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1] + bias)
    (grad,) = torch.autograd.grad(ours[1].clamp(-1e9).sum(), bias)
    torch.testing.assert_close(grad, ours[1].isfinite().sum().to(grad.dtype))


def test_bias_of_16_bits_beside_autocast():
    tensors, bias = inputs_of((3,)), nn.Parameter(torch.zeros(1))
    with torch.autocast(DEVICE, torch.bfloat16):
        out, lse = additive_attention(*tensors, bias=bias, need_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    (out.float().sum() + lse.sum()).backward()
    assert bias.grad.dtype == torch.float32 and bias.grad.shape == (1,)


MASKS = {
    "nothing": {},
    "lengths": dict(lengths=[5, 0, LK]),
    "starts": dict(starts=[5, 0, LK], lengths=LK),
    "padding": dict(key_padding_mask=torch.arange(LK) > torch.tensor([[3], [-1], [5]])),
    "mask": dict(attn_mask=torch.rand(3, LK, generator=generator(0)) < 0.6),
    "float mask": dict(attn_mask=torch.randn(LK, generator=generator(0))),
    "scalar mask": dict(attn_mask=torch.tensor(0.5)),
}


@pytest.mark.core
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
def test_step(options):
    """A step takes one query of each sequence, without a dim for it."""
    query, key, value, weight = inputs_of((3,))
    options = dict(options)
    if isinstance(options.get("lengths"), int):
        options["lengths"] = [options["lengths"]] * 3
    ours = all_of(additive_attention_step, [query[:, 0], key, value, weight], **options)
    if "attn_mask" in options and options["attn_mask"].dim():
        options["attn_mask"] = options["attn_mask"].unsqueeze(-2)
    expected = all_of(additive_attention, [query[:, :1], key, value, weight], **options)
    for a, b, dim in zip(ours[:4], expected[:4], (1, 1, 1, 1), strict=True):
        assert_same(a.detach(), b.detach().squeeze(dim))
    assert_equal(ours[4:], expected[4:])


def test_step_returns_what_the_function_returns():
    query, key, value, weight = inputs_of((3,))
    query = query[:, 0]
    out, weights, lse = additive_attention_step(
        query, key, value, weight, need_weights=True, need_lse=True
    )
    assert out.shape == (3, DV) and weights.shape == (3, LK) and lse.shape == (3,)
    assert_same(additive_attention_step(query, key, value, weight), out)
    assert_equal(additive_attention_step(query, key, value, weight, need_lse=True), (out, lse))
    pair = additive_attention_step(query, key, value, weight, need_weights=True)
    assert_equal(pair, (out, weights))
    assert_same(additive_attention_step(query, key, None, weight), weights)
    assert_equal(additive_attention_step(query, key, None, weight, need_lse=True), (weights, lse))


def test_steps_of_heads_and_shared_keys():
    query, key, value = torch.randn(3, 2, H), torch.randn(1, 2, LK, H), torch.randn(1, 2, LK, DV)
    weight = torch.randn(2, H)
    ours = additive_attention_step(query, key, value, weight)
    expected = additive_attention(query[:, :, None], key, value, weight)
    assert_same(ours, expected[:, :, 0])
    assert additive_attention_step(query[0, 0], key[0, 0], value[0, 0], weight[0]).shape == (DV,)


CALLS = {
    "bias": lambda q, k, v, w: additive_attention(q, k, v, w, bias=w[0]),
    "bias, lse": lambda q, k, v, w: additive_attention(q, k, v, w, bias=w[0], need_lse=True)[1],
    "padding": lambda q, k, v, w: additive_attention(
        q, k, v, w, key_padding_mask=torch.arange(LK) > 3
    ),
    "starts": lambda q, k, v, w: additive_attention(q, k, v, w, starts=2, lengths=5),
    "no value": lambda q, k, v, w: additive_attention(q, k, None, w),
    "no query": lambda q, k, v, w: additive_attention(None, k, v, w),
    "step": lambda q, k, v, w: additive_attention_step(q[0], k, v, w, lengths=5),
}


def batched(call):
    """Returns what ``vmap`` returns, computed in a loop."""
    return lambda q, k, v, w: torch.stack([call(q[n], k[n], v[n], w) for n in range(len(q))])


@pytest.mark.parametrize("name", CALLS)
def test_transforms(name):
    call, tensors = CALLS[name], inputs_of((3,), torch.float64)
    ours = torch.func.vmap(call, (0, 0, 0, None))
    torch.testing.assert_close(ours(*tensors), batched(call)(*tensors))
    results = []
    for function in (ours, batched(call)):
        loss = lambda *x, f=function: f(*x).square().sum()  # noqa: E731
        results.append(torch.func.grad(loss, (0, 1, 2, 3))(*tensors))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_compiled(name):
    torch._dynamo.reset()
    call, tensors = CALLS[name], [x[0] if x.dim() == 3 else x for x in inputs_of((3,))]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, call):
        leaves = [x.clone().requires_grad_() for x in tensors]
        total = function(*leaves).square().sum()
        results.append(torch.autograd.grad(total, leaves, materialize_grads=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    tensors = [x[0] if x.dim() == 3 else x for x in inputs_of((3,), torch.float64)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(CALLS[name], leaves)
    assert torch.autograd.gradgradcheck(CALLS[name], leaves, fast_mode=True)


class Traced(nn.Module):
    def forward(self, q, k, w, bias, padding, starts):
        weights = additive_attention(
            q, k, None, w, bias=bias, key_padding_mask=padding, starts=starts
        )
        return weights + additive_attention_step(None, k, k, w, lengths=starts)[0, 0]


def test_symbolic_trace():
    q, k, _, w = inputs_of((3,))
    arguments = q, k, w, torch.randn(1), torch.rand(3, LK) < 0.3, torch.tensor([0, 2, 5])
    graph = torch.fx.symbolic_trace(Traced())
    torch.testing.assert_close(graph(*arguments), Traced()(*arguments))
