"""Tests the promises of attention on a decoder's step with prepared keys, and on its backward.

The gradients of keys, values and weight are made from what the backward returns, as in
decoders."""

from __future__ import annotations

import math

import pytest
import torch
from layouts import every_second_feature, offset, row_padded, surrounded, transposed, unaligned
from oracle import (
    DEVICE,
    INPUTS,
    OUTPUTS,
    assert_all_same,
    assert_layout_free,
    assert_same,
    check_against_plain,
    dense_mask,
    generator,
    gradients,
    make,
    plain,
    random_upstream,
)

from additive_attn.ops import dispatch  # noqa: F401  registers the operators
from additive_attn.spec.dropout import keep_mask

operators = torch.ops.additive_attn
of_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="tests the CPU's kernel")
DTYPES = [torch.float32, torch.float64]
# (batch, Lk, H, Dv): sizes on both sides of vectors, groups and tiles of keys; splits; no keys; no
# values.
SHAPES = [
    ((), 1, 1, 1),
    ((2,), 31, 33, 20),
    ((2, 2), 33, 64, 6),
    ((2,), 127, 65, 33),
    ((3,), 129, 128, 70),
    ((), 200, 320, 5),
    ((1,), 4200, 12, 9),
    ((2,), 7, 20, 0),
]


class Step(torch.autograd.Function):
    """All gradients of one step, made as a decoder of one step makes them."""

    @staticmethod
    def forward(ctx, query, key, value, weight, prepare, masking, dropout, scale):
        prepared = operators.prepare_keys(key, weight) if prepare else None
        call = query, key, value, weight, prepared, None, None, *masking, *dropout, scale
        outputs = operators.step(*call)
        ctx.call, ctx.outputs = call, outputs
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *upstream):
        query, key, value, weight, *_, attn_mask, lengths, seed, _, scale = ctx.call
        _, weights, lse = ctx.outputs
        dq, grad_scores, kept, *_ = operators.step_backward(
            *upstream, *ctx.call, weights, lse, None
        )
        _, dk, dw, _ = operators.scores_backward(
            grad_scores, query, key, weight, attn_mask, lengths, None, None, None, -1, -1,
            scale, False, True, True, False,
        )  # fmt: skip
        kept = weights if seed is None else kept.to(value.dtype)
        dv = torch.zeros_like(value) if upstream[0] is None else kept.mT @ upstream[0].contiguous()
        grads = [x.sum_to_size(like.shape).to(like.dtype) for x, like in
                 ((dq, query), (dk, key), (dv, value), (dw, weight))]  # fmt: skip
        return *grads, None, None, None, None


def step(inputs, *, attn_mask=None, lengths=None, seed=None, dropout_p=0.0, scale=1.0,
         prepare=True):  # fmt: skip
    if lengths is not None and lengths.dim() < inputs["query"].dim() - 1:
        lengths = lengths.unsqueeze(-1)
    tensors = [inputs[name] for name in INPUTS]
    outputs = Step.apply(*tensors, prepare, (attn_mask, lengths), (seed, dropout_p), scale)
    return dict(zip(OUTPUTS, outputs, strict=True))


def inputs_of(batch, keys, hidden, values, **options):
    return make(batch, 1, keys, hidden, values, **options)


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_as_accurate_as_the_plain_layer(dtype, shape):
    cases = [inputs_of(*shape, dtype=dtype, seed=seed) for seed in range(3)]
    check_against_plain(cases, function=step, scale=0.7)


@pytest.mark.core
@pytest.mark.parametrize("prepare", [True, False], ids=["prepared", "from keys"])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 0.3, 3.0, 12.0, 40.0])
def test_at_every_magnitude(spread, prepare):
    cases = [inputs_of((2,), 70, 100, 5, spread=spread, seed=seed) for seed in range(4)]
    for case in cases:
        case["weight"] *= max(1.0, min(1e3, 0.1 / spread))

    def function(x, **options):
        return step(x, prepare=prepare, **options)

    check_against_plain(cases, function=function)


@pytest.mark.core
@pytest.mark.parametrize("query", [1e-3, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("key", [1e-3, 0.3, 8.0])
def test_queries_and_keys_of_other_magnitudes(query, key):
    cases = [inputs_of((2,), 70, 100, 5, seed=seed) for seed in range(4)]
    for case in cases:
        case["query"] *= query
        case["key"] *= key
        case["key"][..., ::5, :] *= 20  # neighbouring keys have several forms
    check_against_plain(cases, function=step)


@pytest.mark.core
@pytest.mark.parametrize("spread", [1e-3, 0.1])
@pytest.mark.parametrize("by", [0.4, 0.9, 5.0, 9.0, 15.0])
def test_opposite_queries_and_keys(by, spread):
    """All energies are small although queries and keys are not; large weights magnify their
    errors."""
    cases = [inputs_of((2,), 60, 100, 5, spread=spread, seed=seed) for seed in range(5)]
    for case in cases:
        case["query"] += by
        case["key"] -= by
        case["weight"] *= 30
    check_against_plain(cases, function=step)


@pytest.mark.core
@pytest.mark.parametrize("kind", ["lengths", "bool", "float", "half", "both", "shared"])
def test_masks_of_every_kind(kind):
    g = generator(3)
    batch, keys = (2, 3), 140
    masking = {}
    if kind in ("lengths", "both"):
        masking["lengths"] = torch.tensor([[[140], [1], [0]], [[129], [64], [32]]])
    if kind in ("bool", "both"):
        masking["attn_mask"] = torch.rand(*batch, 1, keys, generator=g) < 0.6
    if kind == "shared":
        masking["attn_mask"] = torch.rand(1, keys, generator=g) < 0.6
    bias = None
    if kind in ("float", "half"):
        bias = torch.randn(*batch, 1, keys, generator=g)
        bias[..., ::3] = -torch.inf
        bias = bias.half() if kind == "half" else bias
    cases = [inputs_of(batch, keys, 40, 6, seed=seed) for seed in range(2)]
    if bias is None:
        return check_against_plain(cases, function=step, **masking)

    # The operators do not return the mask's gradient, so the mask is no input here.
    def formula(inputs, scale):
        allowed = (bias > -torch.inf).expand(*batch, 1, keys)
        mask = bias.to(inputs["query"].dtype)
        return plain(**inputs, bias=mask, allowed=allowed, scale=scale)

    def function(inputs, scale):
        return step(inputs, attn_mask=bias, scale=scale)

    formula.__name__ += kind
    check_against_plain(cases, function=function, formula=formula)


@pytest.mark.core
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_is_that_of_attention(dropout_p):
    seed, batch, keys = torch.tensor(7), (2, 2), 150
    keep = keep_mask(seed, batch, (0, 1), (0, keys), dropout_p)
    lengths = torch.tensor([[[150], [40]], [[0], [130]]])

    def formula(inputs, scale):
        allowed = dense_mask(inputs, lengths=lengths)
        return plain(**inputs, allowed=allowed, keep=keep, dropout_p=dropout_p, scale=scale)

    def function(inputs, scale):
        return step(inputs, lengths=lengths, seed=seed, dropout_p=dropout_p, scale=scale)

    formula.__name__ += str(dropout_p)
    cases = [inputs_of(batch, keys, 20, 30, seed=seed) for seed in range(2)]
    check_against_plain(cases, function=function, formula=formula)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    cases = [inputs_of((3,), 140, 70, 20, dtype=dtype, seed=seed) for seed in range(3)]
    check_against_plain(cases, function=step, lengths=torch.tensor([140, 33, 0]))


def with_wide_queries(x, **options):
    """A memory in 16 bits beside a query and a weight in float32."""
    return step({**x, "query": x["query"].float(), "weight": x["weight"].float()}, **options)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [step, with_wide_queries])
@pytest.mark.parametrize("hidden", [1, 3, 100])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 0.3, 3.0, 12.0])
def test_keys_prepared_in_sixteen_bits(spread, hidden, function, dtype):
    """The roundings of prepared keys do not exceed those of the plain layer in 16 bits."""
    cases = [
        inputs_of((2,), 70, hidden, 5, spread=spread, dtype=dtype, seed=seed) for seed in range(4)
    ]
    for case in cases:
        case["weight"] *= max(1.0, min(1e3, 0.1 / spread))
    check_against_plain(cases, function=function)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", [0.5, 4.0])
def test_opposite_keys_in_sixteen_bits(by, dtype):
    cases = [inputs_of((2,), 60, 100, 5, spread=0.1, seed=seed) for seed in range(4)]
    for case in cases:
        case["query"] += by
        case["key"] -= by
        case["weight"] *= 3
    cases = [{name: x.to(dtype) for name, x in case.items()} for case in cases]
    check_against_plain(cases, function=step)


@pytest.mark.core
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_padding_cannot_leak(bad):
    """Masked keys and values may be any numbers: they change no bit, and their gradients are 0."""
    inputs = inputs_of((3,), 140, 40, 20)
    lengths = torch.tensor([77, 0, 139])
    padding = ~dense_mask(inputs, lengths=lengths).squeeze(-2)
    dirty = {name: x.clone() for name, x in inputs.items()}
    dirty["key"][padding] = dirty["value"][padding] = bad
    upstream = random_upstream(step(inputs))
    upstream["lse"][1] = 0.0

    def run(x):
        return gradients(lambda y: step(y, lengths=lengths), x, upstream)

    outputs, grads = run(inputs)
    dirty_outputs, dirty_grads = run(dirty)
    assert_all_same(dirty_outputs, outputs)
    assert_all_same(dirty_grads, grads)
    assert not grads["key"][padding].any() and not grads["value"][padding].any()
    assert not any(grads[name][1].any() for name in ("query", "key", "value"))


@pytest.mark.core
@pytest.mark.parametrize("name", ["query", "key", "value", "weight"])
def test_nonfinite_numbers_propagate(name):
    inputs = inputs_of((2,), 140, 40, 20)
    inputs[name][..., 0] = math.nan
    outputs, grads = gradients(step, inputs, random_upstream(step(inputs_of((2,), 140, 40, 20))))
    if name != "value":
        assert outputs["weights"].isnan().all() and outputs["lse"].isnan().all()
    assert outputs["out"].isnan().any() and grads["query"].isnan().all()


@pytest.mark.core
def test_empty_rows_and_no_keys():
    for inputs, lengths in (
        (inputs_of((2,), 40, 12, 5), torch.tensor([0, 0])),
        (inputs_of((2,), 0, 12, 5), None),
    ):
        upstream = random_upstream(step(inputs))
        outputs, grads = gradients(lambda x, n=lengths: step(x, lengths=n), inputs, upstream)
        assert not outputs["out"].any() and not outputs["weights"].any()
        assert (outputs["lse"] == -math.inf).all()
        assert not any(grad.any() for grad in grads.values())


@of_the_cpu
@pytest.mark.kernel
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("size", [1e-32, 1e33])
@pytest.mark.parametrize("by", [-8.0, 8.0])
def test_extreme_gradients_keep_their_digits(by, size, scale):
    """The product of |G| far from 1 and a prepared number neither underflows nor overflows."""
    inputs = inputs_of((2,), 50, 40, 20, spread=0.5)
    inputs["query"] += by
    inputs["key"] -= by
    inputs["weight"] /= scale
    upstream = random_upstream(step(inputs, scale=scale), ["out"])

    def query_gradient(factor):
        given = {"out": upstream["out"] * factor}
        return gradients(lambda x: step(x, scale=scale), inputs, given)[1]["query"].double()

    torch.testing.assert_close(
        query_gradient(size) / size, query_gradient(1.0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "layout", [transposed, row_padded, offset, surrounded, every_second_feature, unaligned]
)
def test_any_layout(layout):
    inputs = inputs_of((2, 3), 45, 37, 21)
    lengths = torch.tensor([[45, 33, 0], [1, 32, 44]])
    upstream = random_upstream(step(inputs))
    upstream["lse"][0, 2] = 0.0

    def run(x, given):
        outputs = step(x, lengths=lengths)
        wanted = [x[name] for name in INPUTS]
        grads = torch.autograd.grad(list(outputs.values()), wanted, list(given.values()))
        results = {name: y.detach() for name, y in outputs.items()}
        return results | dict(zip(INPUTS, grads, strict=True))

    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    others = {
        name: layout(x.detach()).requires_grad_() if x.dim() > 1 else x
        for name, x in leaves.items()
    }
    given = {name: layout(x) if x.dim() > 2 else x for name, x in upstream.items()}
    assert_layout_free(run(others, given), run(leaves, upstream))


def test_leading_dims_broadcast():
    """Beams share a memory, and each head has a weight."""
    inputs = inputs_of((2, 3), 45, 20, 6, heads=True)
    shared = dict(inputs, key=inputs["key"][:1], value=inputs["value"][:1, :1])
    full = {
        name: x if name == "weight" else x.expand(2, 3, *x.shape[-2:])
        for name, x in shared.items()
    }
    assert_all_same(step(shared), step(full))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prepare", [True, False], ids=["prepared", "from keys"])
@pytest.mark.parametrize(("beams", "keys"), [(2, 31), (5, 70), (3, 4200)])
def test_entries_that_share_a_memory_give_what_copies_give(beams, keys, prepare, dtype):
    """The bits are the same, with neighbouring keys of every form, and for any masks of the
    entries."""
    inputs = inputs_of((3, beams), keys, 70 if keys < 100 else 7, 37, dtype=dtype)
    inputs["key"] *= torch.logspace(-3, 1.5, keys)[:, None].to(dtype)
    inputs["query"][:, -1] *= 30
    copies = {
        name: x if name in ("query", "weight") else x[:, :1].expand(3, beams, *x.shape[2:])
        for name, x in inputs.items()
    }
    shared = {**copies, "key": inputs["key"][:, :1], "value": inputs["value"][:, :1]}
    copies = {name: x.contiguous() for name, x in copies.items()}
    lengths = torch.randint(keys + 1, (3, beams, 1))
    mask = torch.rand(3, beams, 1, keys) < 0.5
    seed = {"seed": torch.tensor(3), "dropout_p": 0.4}
    for options in ({}, {"lengths": lengths}, {"attn_mask": mask, "lengths": lengths}, seed):
        ours, expected = (step(x, prepare=prepare, **options) for x in (shared, copies))
        assert_all_same(ours, expected)
    shared["value"][0, 0, keys // 2] = copies["value"][0, :, keys // 2] = math.nan
    assert_all_same(*(step(x, prepare=prepare, attn_mask=mask) for x in (shared, copies)))


@pytest.mark.core
def test_repeats_bit_for_bit_on_any_number_of_threads(threads):
    inputs = inputs_of((2,), 5000, 40, 20)
    upstream = random_upstream(step(inputs))
    threads(1)
    outputs, grads = gradients(step, inputs, upstream)
    for number in (1, 2, 3):
        threads(number)
        again, grads_again = gradients(step, inputs, upstream)
        assert_all_same(again, outputs)
        assert_all_same(grads_again, grads)


@pytest.mark.kernel
def test_a_pair_does_not_depend_on_its_neighbours():
    """Among neighbouring keys of every form, each score is that of the key alone."""
    inputs = inputs_of((), 140, 100, 3)
    inputs["key"] *= torch.logspace(-3, 1.5, 140)[:, None]

    def log_odds(some):
        outputs = step(dict(inputs, key=inputs["key"][some], value=inputs["value"][some]))
        return outputs["lse"]

    alone = torch.stack([log_odds(slice(j, j + 1)) for j in range(140)])
    mask = torch.eye(140, dtype=torch.bool)
    together = torch.stack([step(inputs, attn_mask=row[None])["lse"] for row in mask])
    assert_same(together, alone)


def refused(change, sentence):
    inputs = inputs_of((2,), 12, 8, 4)
    prepared = operators.prepare_keys(inputs["key"])
    out, weights, lse = operators.step(
        *inputs.values(), prepared, None, None, None, None, None, 0.0, 1.0
    )
    arguments = {
        "grad_out": out, "grad_weights": None, "grad_lse": None, **inputs, "prepared": prepared,
        "location": None, "location_weight": None, "attn_mask": None, "lengths": None,
        "seed": None, "dropout_p": 0.0, "scale": 1.0, "weights": weights, "lse": lse,
        "grad_key": None,
    }  # fmt: skip
    operators.step_backward(**arguments)
    change(arguments)
    with pytest.raises(RuntimeError, match=sentence):
        operators.step_backward(**arguments)


def located(arguments, keys, filters):
    arguments.update(location=torch.zeros(2, 3, keys), location_weight=torch.zeros(filters, 8))


@pytest.mark.kernel
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: a.update(query=a["query"].expand(2, 3, 8)), "a step has one query"),
        (lambda a: a.update(key=a["key"][..., 1:]), "must agree"),
        (lambda a: a.update(weight=a["weight"][1:]), "must agree"),
        (lambda a: a.update(value=a["value"][:, 1:]), "rows for"),
        (lambda a: a.update(weights=a["weights"][..., 1:]), "weights has .*shape"),
        (lambda a: a.update(lse=a["lse"][:1]), "lse has .*shape"),
        (lambda a: a.update(grad_out=a["grad_out"][..., 1:]), "grad_out has .*shape"),
        (lambda a: a.update(dropout_p=0.5), "there is no seed"),
        (lambda a: a.update(location=a["key"]), "go together"),
        (lambda a: located(a, keys=11, filters=3), "location"),
        (lambda a: located(a, keys=12, filters=2), "location"),
    ],
)
def test_what_would_crash_is_refused(change, sentence):
    refused(change, sentence)


@of_the_cpu
@pytest.mark.kernel
def test_prepared_keys_of_other_keys_are_refused():
    refused(lambda a: a.update(prepared=a["prepared"][:, 1:]), "shape of key")
    refused(lambda a: a.update(prepared=a["prepared"].double()), "another dtype")


@of_the_cpu
@pytest.mark.kernel
def test_nothing_of_the_size_of_the_keys_is_written_per_step():
    inputs = inputs_of((4,), 4000, 256, 64)
    prepared = operators.prepare_keys(inputs["key"])
    call = (*inputs.values(), prepared, None, None, None, None, None, 0.0, 1.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        out, weights, lse = operators.step(*call)
        operators.step_backward(out, None, None, *call, weights, lse, None)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < inputs["key"].nbytes / 8


@of_the_cpu
@pytest.mark.kernel
def test_keys_are_prepared_for_the_weight_of_their_head():
    g = generator(0)
    key, weight = torch.randn(2, 3, 5, 40, generator=g), torch.randn(3, 40, generator=g)
    together = operators.prepare_keys(key, weight)
    for b, head in [(0, 0), (1, 2)]:
        alone = operators.prepare_keys(key[b, head], weight[head])
        assert_same(together[b, head], alone)
    # Entries of keys that would need several weights are rounded to the nearest, as without one.
    assert_same(operators.prepare_keys(key[:, :1], weight), operators.prepare_keys(key[:, :1]))
    with pytest.raises(RuntimeError, match=r"weight must be \(\.\.\., 40\)"):
        operators.prepare_keys(key, weight[:, 1:])
    assert not torch.equal(together, operators.prepare_keys(key))
