"""Several heads: a step with one query per sequence gives a row of a call."""

from __future__ import annotations

import pickle

import pytest
import torch
from heads import F64, STEPS, E, N, S, made, padded, plain_heads

from additive_attn import ProjectedMemory


@pytest.mark.usefixtures("steps_leave_records")
@pytest.mark.parametrize("masking", ["none", "lengths", "padding", "both", "float padding"])
@pytest.mark.parametrize(
    "options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 5, "vdim": 5},
                {"hidden_dim": 12, "bias": False}],
    ids=["packed", "added", "kdim", "hidden_dim"],
)  # fmt: skip
def test_steps_are_rows_of_a_call(options, masking, passes):
    layer = made(**options)
    query = torch.randn(N, STEPS, E, dtype=F64, requires_grad=True)
    key = torch.randn(N, S, layer.kdim, dtype=F64, requires_grad=True)
    padding, given = None, {}
    if masking in ("lengths", "both"):
        given["lengths"], padding = [7, 4, 0], padded()
    if masking in ("padding", "both"):
        given["key_padding_mask"] = torch.rand(N, S) < 0.4
        padding = given["key_padding_mask"] | (padded() if padding is not None else False)
    if masking == "float padding":
        padding = torch.randn(N, S, dtype=F64).masked_fill(padded(), -torch.inf)
        given["key_padding_mask"] = padding
    memory = layer.project(key, **given)
    assert isinstance(memory, ProjectedMemory) and memory.prepared is not None
    steps = [
        layer.step(query[:, i], memory, average_attn_weights=bool(i % 2)) for i in range(STEPS)
    ]
    results = []
    out = torch.stack([x for x, _ in steps], 1)
    expected, weights = plain_heads(layer, query, key, key, padding, averaged=False)
    for i, (_, found) in enumerate(steps):
        rows = weights[:, :, i]
        torch.testing.assert_close(found, rows.mean(1) if i % 2 else rows)
    upstream = torch.randn_like(out)
    leaves = [query, key, *layer.parameters()]
    for each in (out, expected):
        results.append([each, *torch.autograd.grad(each, leaves, upstream, allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert passes == [STEPS]  # one pass made the gradients of all steps


def test_steps_of_several_queries_beams_and_unbatched_memories():
    layer = made(batch_first=False)
    key, query = torch.randn(S, N, E, dtype=F64), torch.randn(N, STEPS, E, dtype=F64)
    memory = layer.project(key, lengths=torch.tensor([7, 4, 0]))
    expected = plain_heads(
        layer, query.transpose(0, 1), key, key, padded(), averaged=False
    )  # (STEPS, N, E)
    out, weights = layer.step(query, memory, average_attn_weights=False)
    torch.testing.assert_close((out.transpose(0, 1), weights), expected)
    rows = expected[1].transpose(1, 2).flatten(0, 1)
    beams = memory.expand(STEPS)
    for averaged in (True, False):
        found = layer.step(query.flatten(0, 1), beams, average_attn_weights=averaged)
        torch.testing.assert_close(found[0], expected[0].transpose(0, 1).flatten(0, 1))
        torch.testing.assert_close(found[1], rows.mean(1) if averaged else rows)
    turned = beams.reorder(torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]))
    again = layer.step(query[[1, 0]].flatten(0, 1), turned)[0]
    torch.testing.assert_close(again.unflatten(0, (2, STEPS)), out[[1, 0]])
    alone = layer.project(key[:, 1], lengths=4)
    torch.testing.assert_close(layer.step(query[1, 0], alone)[0], out[1, 0])
    found = layer.step(query[1], alone, average_attn_weights=False)
    torch.testing.assert_close(found, (out[1], weights[1]))
    assert layer.step(query[1, 0], alone, need_weights=False)[1] is None


@pytest.mark.usefixtures("steps_leave_records")
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"bias": False}], ids=str)
def test_gradients_of_single_several_and_beams_are_made_at_once(options, heads, passes):
    layer = made(num_heads=heads, hidden_dim=32 * heads, **options)
    query = torch.randn(N, STEPS, E, dtype=F64, requires_grad=True)
    key = torch.randn(N, S, E, dtype=F64, requires_grad=True)
    memory, padding = layer.project(key, lengths=[7, 4, 0]), padded()
    for averaged in (True, False):
        expected = plain_heads(layer, query, key, key, padding, averaged=averaged)
        single = layer.step(query[:, 0], memory, average_attn_weights=averaged)
        some = layer.step(query[:, 1:], memory, average_attn_weights=averaged)
        flat = layer.step(query.flatten(0, 1), memory.expand(STEPS), average_attn_weights=averaged)
        rows = expected[1] if averaged else expected[1].transpose(1, 2)
        torch.testing.assert_close(single, (expected[0][:, 0], rows[:, 0]))
        torch.testing.assert_close(some, (expected[0][:, 1:], expected[1][..., 1:, :]))
        torch.testing.assert_close(flat, (expected[0].flatten(0, 1), rows.flatten(0, 1)))
    leaves = [query, key, *layer.parameters()]
    ours = (torch.cat([single[0][:, None], some[0]], 1) + 2 * flat[0].unflatten(0, (N, -1))).sin()
    ours = ours.sum() + some[1].square().sum() + flat[1].square().sum()
    theirs = (3 * expected[0]).sin().sum() + expected[1][..., 1:, :].square().sum()
    theirs = theirs + expected[1].square().sum()
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, retain_graph=True),
        torch.autograd.grad(theirs, leaves, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    assert passes == [3]
    twice = torch.autograd.grad(ours, leaves[:2], create_graph=True)
    other = torch.autograd.grad(theirs, leaves[:2], create_graph=True)
    penalty, wanted = (sum(x.square().sum() for x in grads) for grads in (twice, other))
    for mine, right in zip(
        torch.autograd.grad(penalty, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(mine, right)


def test_steps_follow_parameters_that_change_and_drop_as_a_call_does():
    layer = made(dropout=0.5)
    key, query = torch.randn(N, S, E, dtype=F64), torch.randn(N, E, dtype=F64)
    memory = layer.project(key)
    torch.manual_seed(3)
    out, weights = layer.step(query, memory, average_attn_weights=False)
    assert 0.2 < (weights == 0).double().mean() < 0.8
    torch.manual_seed(3)
    torch.testing.assert_close(layer.step(query, memory, need_weights=False)[0], out)
    layer.eval()
    with torch.no_grad():
        layer.energy_weight.mul_(-2.0)
    expected = plain_heads(layer, query[:, None], key, key)
    torch.testing.assert_close(layer.step(query, memory)[0], expected[0][:, 0])


def test_a_memory_of_sixteen_bits_and_a_copy_of_one():
    layer = made(dtype=torch.float32)
    key, query = torch.randn(N, S, E), torch.randn(N, E)
    expected = layer(query[:, None], key, key)[0][:, 0]
    memory = layer.project(key, dtype=torch.bfloat16)
    assert memory.key.dtype == memory.value.dtype == torch.bfloat16
    for each in (
        memory,
        memory._replace(),
        pickle.loads(pickle.dumps(layer.project(key.detach()))),
    ):
        torch.testing.assert_close(layer.step(query, each)[0], expected, atol=0.05, rtol=0.05)
