"""Promise 7: dropout by Philox, with one mask in forward, backward, recomputation and on every
path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import (
    DEVICE,
    assert_same,
    check_against_plain,
    error,
    fused,
    gradients,
    make,
    plain,
    random_upstream,
)
from torch.utils.checkpoint import checkpoint

from additive_attn import AdditiveAttention, additive_attention
from additive_attn.ops import dispatch
from additive_attn.ops.autograd import attend
from additive_attn.spec import dropout
from additive_attn.spec.call import Call, Masking
from additive_attn.spec.dropout import (
    draw_seed,
    drawn_factors,
    keep_mask,
    keep_threshold,
    philox,
)
from additive_attn.spec.formula import keep_factors


def philox_of_the_paper(counter, key):
    """Philox4x32-10 in plain integers (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


# The known-answer vectors of Random123: counter, key, output.
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def as_int64(unsigned):
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


@pytest.mark.parametrize("counter,key,words", KNOWN)
def test_known_answers(counter, key, words):
    assert philox_of_the_paper(counter, key) == words
    c0, c1, c2, c3 = counter
    entry = torch.tensor(as_int64(c2 + (c3 << 32)))
    seed = torch.tensor(as_int64(key[0] + (key[1] << 32)))
    got = philox(seed, torch.tensor(c0), torch.tensor(c1), entry)
    if c3 < 2**31:  # entries are counted in int64, so there are no negative ones
        assert tuple(int(w) for w in got) == words


SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


@pytest.mark.parametrize("seed", SEEDS)
def test_keep_mask_follows_the_counter(seed):
    p, batch, rows, keys = 0.4, (2, 3), 5, 11
    unsigned = seed % 2**64
    key = unsigned % 2**32, unsigned >> 32
    expected = torch.zeros(2, 3, rows, keys, dtype=torch.bool)
    for n in range(6):
        for i in range(rows):
            for j in range(keys):
                word = philox_of_the_paper((j // 4, i, n, 0), key)[j % 4]
                expected[n // 3, n % 3, i, j] = word >= int(p * 2**32)
    assert torch.equal(keep_mask(torch.tensor(seed), batch, (0, rows), (0, keys), p), expected)
    assert torch.equal(
        keep_mask(torch.tensor(seed), batch, (2, 4), (3, 10), p), expected[..., 2:4, 3:10]
    )


@pytest.mark.parametrize("seed", [*SEEDS, -1, 2**62 + 5, -(2**63)])
@pytest.mark.parametrize(
    "rows, keys", [((0, 1), (0, 1)), ((1, 2), (3, 10)), ((2, 5), (3, 10)), ((0, 4), (8, 31))]
)
def test_few_words_are_those_of_many(rows, keys, seed, monkeypatch):
    for batch, p in itertools.product(((), (1,), (2, 3)), (0.0, 0.4, 1.0)):
        arguments = torch.tensor(seed), batch, rows, keys, p
        few = keep_mask(*arguments)
        factors = [drawn_factors(*arguments, dtype) for dtype in (torch.float32, torch.float64)]
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "_FEW", 0)
            many = keep_mask(*arguments)
        assert few.shape == many.shape and torch.equal(few, many)
        for drawn in factors:
            assert torch.equal(drawn, keep_factors(many, p, drawn.dtype))


def kernel_mask(batch, queries, keys, seed, p, dtype=torch.float32, **masking):
    """The mask of the forward operator: with the identity as values, out is the kept weights."""
    inputs = make(batch, queries, keys, 4, 1, dtype=dtype)
    inputs["weight"] *= 0.1  # no weight underflows
    out, weights, _ = dispatch.forward(
        inputs["query"], inputs["key"], torch.eye(keys, dtype=dtype), inputs["weight"],
        *Masking(**masking), seed, p, 1.0, True,
    )  # fmt: skip
    return out, weights


@pytest.mark.kernel
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize(
    "shape", [((), 1, 10), ((2,), 3, 65), ((2, 3), 5, 33), ((), 130, 130)], ids=str
)
def test_kernel_drops_what_the_description_says(shape, p, seed):
    batch, queries, keys = shape
    seed = torch.tensor(seed)
    out, weights = kernel_mask(batch, queries, keys, seed, p)
    keep = keep_mask(seed, batch, (0, queries), (0, keys), p)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, weights * keep / (1 - p), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(*batch, queries))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_drops_the_same(dtype):
    seed = torch.tensor(77)
    out, _ = kernel_mask((2,), 9, 50, seed, 0.3, dtype)
    assert torch.equal(out != 0, keep_mask(seed, (2,), (0, 9), (0, 50), 0.3))


def test_masking_keeps_the_random_stream():
    """Skipped tiles draw no words, and split keys are counted from the first key."""
    seed = torch.tensor(5)
    lengths = torch.tensor([[200], [70]])
    allowed = (torch.arange(200) < lengths[..., None]) & (
        torch.arange(200) >= torch.arange(90)[:, None] - 9
    )
    out, _ = kernel_mask((2,), 90, 200, seed, 0.5, lengths=lengths, left=9)
    keep = keep_mask(seed, (2,), (0, 90), (0, 200), 0.5)
    assert torch.equal(out != 0, keep & allowed)

    keys = 5000
    inputs = make((), 1, keys, 4, 1)
    inputs["weight"] *= 0.1
    value = torch.randn(keys, 3)
    out, weights, _ = dispatch.forward(
        inputs["query"], inputs["key"], value, inputs["weight"], None, None,
        None, None, None, -1, -1, seed, 0.5, 1.0, True,
    )  # fmt: skip
    keep = keep_mask(seed, (), (0, 1), (0, keys), 0.5)
    torch.testing.assert_close(out, (weights * keep * 2) @ value, atol=1e-6, rtol=1e-4)


def test_seeds_per_entry():
    seeds = torch.tensor([[3], [-9]])
    out, _ = kernel_mask((2, 3), 4, 21, seeds, 0.5)
    assert torch.equal(out != 0, keep_mask(seeds, (2, 3), (0, 4), (0, 21), 0.5))


def test_entries_are_numbered_over_the_broadcast_batch():
    seed, p = torch.tensor(8), 0.5
    query, key = torch.randn(2, 1, 4, 6), torch.randn(3, 21, 6)
    out, _, _ = dispatch.forward(
        query,
        key,
        torch.eye(21),
        torch.randn(6) * 0.1,
        None,
        None,
        None,
        None,
        None,
        -1,
        -1,
        seed,
        p,
        1.0,
        True,
    )
    assert torch.equal(out != 0, keep_mask(seed, (2, 3), (0, 4), (0, 21), p))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [((2,), 33, 70), ((), 1, 40), ((2,), 3, 21)], ids=str)
@pytest.mark.parametrize("p", [0.25, 0.8])
def test_gradients_given_the_mask(p, shape, dtype):
    """Forward and backward drop the same weights, and scale those that they keep."""
    batch, queries, keys = shape
    seed = torch.tensor(42)
    keep = keep_mask(seed, batch, (0, queries), (0, keys), p)
    inputs = make(batch, queries, keys, 9, 6, dtype=dtype)

    def ours(x):
        outputs = attend(Call(*x.values(), seed=seed, dropout_p=p), True)
        return dict(zip(("out", "weights", "lse"), outputs, strict=True))

    doubled = {name: x.double() for name, x in inputs.items()}
    theirs = lambda x: plain(*x.values(), keep=keep, dropout_p=p)  # noqa: E731
    upstream = random_upstream(theirs(doubled))
    upstream = {name: x.to(dtype).double() for name, x in upstream.items()}
    exact, exact_grads = gradients(theirs, doubled, upstream)
    mine, grads = gradients(ours, inputs, upstream)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[dtype]
    for got, expected in ((mine, exact), (grads, exact_grads)):
        for name in got:
            size = expected[name].abs().max().item()
            assert error(got[name], expected[name]) <= 2 * tolerance * max(size, 1.0), name


def test_rate_and_mean():
    torch.manual_seed(1)
    inputs = make((4,), 200, 250, 4, 1)
    inputs["weight"] *= 0.0  # every weight is 1/250
    inputs["value"] = torch.ones(4, 250, 1)
    for p in (0.1, 0.5, 0.9):
        out = additive_attention(*inputs.values(), dropout_p=p)
        # The mean of 200000 kept or dropped weights, and its standard deviation.
        deviation = math.sqrt(p / (1 - p) / 200_000)
        assert abs(out.mean().item() - 1) < 5 * deviation
        seed = draw_seed(torch.device(DEVICE))
        rate = keep_mask(seed, (4,), (0, 200), (0, 250), p).float().mean().item()
        assert abs(rate - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 200_000)


def test_neighbours_are_independent():
    keep = keep_mask(torch.tensor(3), (4,), (0, 200), (0, 250), 0.5).float() - 0.5
    for a, b in [
        (keep[..., 1:], keep[..., :-1]),
        (keep[:, 1:], keep[:, :-1]),
        (keep[1:], keep[:-1]),
        (keep[..., 4:], keep[..., :-4]),
    ]:
        correlation = (a * b).mean().item() * 4
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_extreme_probabilities():
    inputs = make((2,), 5, 30, 6, 4)
    upstream = {"out": torch.randn(2, 5, 4), "weights": torch.randn(2, 5, 30)}
    outputs, grads = gradients(lambda x: fused(x, dropout_p=1.0), inputs, upstream)
    assert torch.equal(outputs["out"], torch.zeros(2, 5, 4))
    assert_same(outputs["weights"], fused(inputs)["weights"])
    assert torch.equal(grads["value"], torch.zeros_like(grads["value"]))
    _, expected = gradients(fused, inputs, {"weights": upstream["weights"]})
    for name in ("query", "key", "weight"):
        torch.testing.assert_close(grads[name], expected[name])
    # So small that all words but one in 2^32 are kept.
    torch.testing.assert_close(fused(inputs, dropout_p=1e-12)["out"], fused(inputs)["out"])
    assert keep_threshold(1.0) == 2**32 - 1 and keep_threshold(0.5) == 2**31


def test_no_dropout_draws_no_seed():
    inputs = make()
    get_state = (
        torch.get_rng_state if DEVICE == "cpu" else torch.get_device_module(DEVICE).get_rng_state
    )
    state = get_state()
    fused(inputs)
    assert torch.equal(get_state(), state)
    fused(inputs, dropout_p=0.1)
    assert not torch.equal(get_state(), state)


def test_seeds_come_from_torch_and_advance():
    inputs = make((2,), 10, 40, 6, 4)
    torch.manual_seed(5)
    first, second = (additive_attention(*inputs.values(), dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(additive_attention(*inputs.values(), dropout_p=0.5), first)
    torch.manual_seed(5)
    seed = draw_seed(torch.device(DEVICE))
    out = dispatch.forward(
        *inputs.values(), None, None, None, None, None, -1, -1, seed, 0.5, 1.0, False
    )[0]
    assert torch.equal(out, first)


def test_weights_are_returned_before_dropout():
    inputs = make((2,), 10, 40, 6, 4)
    assert_same(fused(inputs, dropout_p=0.5)["weights"], fused(inputs)["weights"])
    assert_same(fused(inputs, dropout_p=0.5)["lse"], fused(inputs)["lse"])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(use_reentrant):
    inputs = make((2,), 10, 40, 6, 4)
    upstream = torch.randn(2, 10, 4)
    results = []
    for wrap in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        torch.manual_seed(9)
        call = lambda *x: additive_attention(*x, dropout_p=0.5)  # noqa: E731
        out = checkpoint(call, *leaves, use_reentrant=use_reentrant) if wrap else call(*leaves)
        torch.rand(3)  # advances the generator before the backward
        out.backward(upstream)
        results.append([out.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_module_drops_in_training_only():
    layer = AdditiveAttention(6, 8, dropout=0.5)
    x = torch.randn(2, 9, 6)
    torch.manual_seed(0)
    trained = layer(x, x)[0]
    assert not torch.equal(trained, layer(x, x)[0])
    layer.eval()
    same = AdditiveAttention(6, 8)
    same.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, x)[0], same(x, x)[0])
    memory = layer.project(x)
    # Attention to a memory of another layer is an ordinary call, with other roundings.
    torch.testing.assert_close(layer.step(x[:, 0], memory)[0], same.step(x[:, 0], memory)[0])
    layer.train()
    assert not torch.equal(layer.step(x[:, 0], memory)[0], same.step(x[:, 0], memory)[0])


def test_without_dropout_accuracy_is_untouched():
    """p = 0 gives the bits of a call without dropout."""
    inputs = make((2,), 10, 40, 6, 4)
    assert torch.equal(
        additive_attention(*inputs.values(), dropout_p=0.0), additive_attention(*inputs.values())
    )
    check_against_plain([inputs])


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [((), 1, 1), ((3,), 2, 127), ((2, 3), 4, 129), ((2,), 0, 5)])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_operator_keeps_what_the_description_says(shape, p):
    batch, rows, keys = shape
    seed = torch.randint(-(2**62), 2**62, batch)
    for each in (seed, torch.tensor(-5)):
        ours = torch.ops.additive_attn.keep_mask(each, batch, rows, keys, p)
        assert torch.equal(ours, keep_mask(each, batch, (0, rows), (0, keys), p))
