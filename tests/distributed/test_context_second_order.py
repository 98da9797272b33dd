"""Gradients of gradients of sharded sequences are those of one process."""

from __future__ import annotations

import itertools

import processes
import pytest
import torch
import torch.distributed as dist
from oracle import make

from additive_attn import additive_attention
from additive_attn.distributed import context_parallel_additive_attention, shard_sequence


def twice(attend, x, mask, upstream, directions, **options):
    """Returns outputs, gradients, and the gradients of the product of gradients and ``directions``
    with respect to inputs, mask and upstream gradients."""
    torch.manual_seed(7)
    x = [t.detach().clone().requires_grad_() for t in x]
    wanted = list(x)
    if mask is not None:
        if mask.is_floating_point():
            mask = mask.detach().clone().requires_grad_()
            wanted.append(mask)
        options["attn_mask"] = mask
    upstream = [u.detach().clone().requires_grad_() for u in upstream]
    results = attend(*x, need_lse=True, **options)
    first = torch.autograd.grad(results, wanted, upstream, create_graph=True)
    total = sum((g * d).sum() for g, d in zip(first, directions, strict=False))
    second = torch.autograd.grad(total, [*wanted, *upstream], create_graph=True)
    # The product of a third derivative and the same directions.
    total = sum((g * d).sum() for g, d in zip(second[:4], directions[:4], strict=True))
    return [*results, *first, *second], torch.autograd.grad(total, x)


def compare(mesh, inputs, exchange, balanced, mask=None, third=False, **options):
    def cut(t, dim=-2):
        return shard_sequence(t, mesh, dim, balanced=balanced)

    def cut_mask(t):
        return t if t.shape[-2] == 1 else cut(t)

    g = torch.Generator().manual_seed(3)
    like = [*inputs.values(), *([] if mask is None else [mask])]
    directions = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in like]
    batch, rows = inputs["query"].shape[:-2], inputs["query"].shape[-2]
    values = inputs["value"].shape[-1]
    upstream = [torch.randn(*batch, rows, n, generator=g, dtype=torch.float64)
                for n in (values, 1)]  # fmt: skip
    empty = additive_attention(**inputs, attn_mask=mask, need_lse=True, **options)[1].isinf()
    upstream[1] = upstream[1].squeeze(-1).masked_fill(empty, 0.0)
    whole = twice(additive_attention, inputs.values(), mask, upstream, directions, **options)

    def attend(*x, **given):
        return context_parallel_additive_attention(
            *x, mesh, balanced=balanced, exchange=exchange, **given
        )

    x = [t if n == "weight" else cut(t) for n, t in inputs.items()]
    own = [cut(directions[0]), cut(directions[1]), cut(directions[2]), directions[3]]
    own += [] if mask is None else [cut_mask(directions[4])]
    given = None if mask is None else cut_mask(mask)
    found = twice(attend, x, given, [cut(upstream[0]), cut(upstream[1], -1)], own, **options)
    floating = mask is not None and mask.is_floating_point()
    count = 4 + floating
    # out and lse; gradients; the gradients of these, and of upstream gradients.
    kinds = ["out", "lse", *["query", "key", "value", "weight", "mask"][:count]]
    kinds += [*kinds[2:], "out", "lse"]
    for number, (kind, mine, right) in enumerate(zip(kinds, found[0], whole[0], strict=True)):
        check(number, kind, mine, right, cut, cut_mask, mesh)
    if third:
        for kind, mine, right in zip(kinds[2:6], found[1], whole[1], strict=True):
            check("third", kind, mine, right, cut, cut_mask, mesh)


def check(number, kind, mine, right, cut, cut_mask, mesh):
    summed = kind == "weight" or (kind == "mask" and right.shape[-2] == 1)
    if summed:
        mine = mine.clone()
        dist.all_reduce(mine)
    else:
        right = cut_mask(right) if kind == "mask" else cut(right, -1 if kind == "lse" else -2)
    finite = right[right.isfinite()]
    scale = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(
        mine, right, rtol=0, atol=1e-12 * scale, msg=lambda m: f"{number}, {kind}: {m}"
    )


def check_exchanges(mesh, folder):
    inputs = make((2,), 13, 13, 8, 6, dtype=torch.float64)
    for exchange, balanced in itertools.product(("ring", "keys", "queries"), (False, True)):
        compare(mesh, inputs, exchange, balanced, third=True)
        compare(mesh, inputs, exchange, balanced, is_causal=True, window=(6, -1))
        compare(mesh, inputs, exchange, balanced, dropout_p=0.4)


def check_masks(mesh, folder):
    inputs = make((2,), 13, 13, 8, 6, dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    pairs = torch.rand(2, 13, 13, generator=g, dtype=torch.float64)
    pairs[0, 3] = 0.0  # an empty row
    floats = (3 * pairs).masked_fill(pairs < 0.3, -torch.inf)
    lengths = torch.tensor([11, 0])
    for balanced, options in itertools.product((False, True), (
        {"lengths": lengths}, {"lengths": lengths, "starts": torch.tensor([2, 0])},
        {"window": (0, 0)}, {"mask": pairs > 0.3}, {"mask": floats}, {"mask": floats[:1, :1]},
        {"mask": floats, "dropout_p": 0.4, "is_causal": True},
    )):  # fmt: skip
        compare(mesh, inputs, "ring", balanced, **options)


def check_shapes(mesh, folder):
    """Tests heads, shared keys, and processes without queries or keys."""
    heads = make((2, 2), 7, 9, 8, 5, heads=True, dtype=torch.float64)
    shared = make((3,), 6, 10, 8, 6, dtype=torch.float64)
    shared = {**shared, "key": shared["key"][:1], "value": shared["value"][:1]}
    few = make((2,), 1, 5, 4, 4, dtype=torch.float64)
    for inputs in (heads, shared, few, make((2,), 5, 1, 4, 4, dtype=torch.float64)):
        compare(mesh, inputs, "ring", False)


def check_padding(mesh, folder):
    """NaN in masked keys and values reaches no gradient of a gradient."""
    inputs, results = make((2,), 8, 12, 8, 6, dtype=torch.float64), []
    for garbage, p in itertools.product((0.0, float("nan")), (0.0, 0.4)):
        x = {n: t.clone() for n, t in inputs.items()}
        for name in ("key", "value"):
            x[name][0, 7:] = garbage
            x[name][1] = garbage
        x = [t if n == "weight" else shard_sequence(t, mesh) for n, t in x.items()]
        x = [t.detach().requires_grad_() for t in x]
        torch.manual_seed(7)
        out = context_parallel_additive_attention(
            *x, mesh, lengths=torch.tensor([7, 0]), dropout_p=p
        )
        first = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        assert all(t.isfinite().all() for t in (*first, *second))
        results.append([*first, *second])
    for clean, dirty in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def check_some_inputs(mesh, folder):
    """Some inputs need no gradient, and the gradient of a single input is differentiated."""
    inputs = make((2,), 9, 9, 8, 6, dtype=torch.float64)
    for needed in itertools.chain(*(itertools.combinations(inputs, n) for n in (1, 2, 4))):
        results = []
        for sharded in (False, True):
            x = {n: t.clone().requires_grad_(n in needed) for n, t in inputs.items()}
            own = x
            if sharded:
                own = {n: t if n == "weight" else shard_sequence(t, mesh) for n, t in x.items()}
            options = {"mesh": mesh, "exchange": "ring"} if sharded else {}
            call = context_parallel_additive_attention if sharded else additive_attention
            out = call(*own.values(), **options)
            name = needed[0]
            (grad,) = torch.autograd.grad(out.pow(3).sum(), own[name], create_graph=True)
            direction = torch.ones_like(inputs[name])
            if sharded and name != "weight":
                direction = shard_sequence(direction, mesh)
            leaves = [x[n] for n in needed]
            second = torch.autograd.grad((grad * direction).sum(), leaves, allow_unused=True)
            if sharded:  # each process has the gradients at its own positions
                [dist.all_reduce(t) for t in second]
            results.append(second)
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


def check_two_layers(mesh, folder):
    """One layer follows another, and a third is independent of it. All processes send in the same
    order, also one without positions."""
    for length in (7, 1):
        inputs = make((2,), length, length, 8, 8, dtype=torch.float64)
        results = []
        for sharded in (False, True):
            x = [t if n == "weight" or not sharded else shard_sequence(t, mesh)
                 for n, t in inputs.items()]  # fmt: skip
            q, k, v, w = (t.detach().clone().requires_grad_() for t in x)
            options = {"mesh": mesh, "exchange": "ring"} if sharded else {}
            call = context_parallel_additive_attention if sharded else additive_attention
            first = call(q, k, v, w, **options)
            second = call(first, first.tanh(), v * 2, w, is_causal=True, **options)
            total = second.pow(3).sum() + call(k, q, first, w, **options).square().sum()
            grads = torch.autograd.grad(total, (q, k, v), create_graph=True)
            found = torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, w))
            if sharded:
                dist.all_reduce(found[3])
            results.append([t if sharded or n == 3 else shard_sequence(t, mesh)
                            for n, t in enumerate([*found[:3], found[3]])])  # fmt: skip
        for ours, right in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.sweep), 3])
def test_second_order(world, tmp_path):
    processes.run(__name__, world, tmp_path)
