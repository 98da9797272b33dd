"""context_parallel_additive_attention: shards of a sequence give the results of one process."""

from __future__ import annotations

import itertools
import resource

import processes
import pytest
import torch
import torch.distributed as dist
from oracle import make
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from additive_attn import additive_attention
from additive_attn.distributed import (
    attention,
    context_parallel_additive_attention,
    parts,
    shard_sequence,
    unshard_sequence,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def leaves(inputs):
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}


def whole(inputs, upstream, **options):
    """Outputs and gradients in one process."""
    torch.manual_seed(7)
    x = leaves(inputs)
    results = additive_attention(*x.values(), need_lse=True, **options)
    return results, torch.autograd.grad(results, list(x.values()), upstream)


def sharded(mesh, inputs, upstream, cut, **options):
    """Outputs and gradients of this process's shard. The gradient of the weight is summed over all
    processes."""
    torch.manual_seed(7 if mesh.get_rank() == 0 else 8)  # the first process's seed counts
    x = leaves({n: cut(t) if n != "weight" else t for n, t in inputs.items()})
    results = context_parallel_additive_attention(*x.values(), mesh, need_lse=True, **options)
    grads = torch.autograd.grad(results, list(x.values()), upstream)
    dist.all_reduce(grads[-1])
    return results, grads


def compare(mesh, inputs, balanced=False, exchange="ring", tolerance=None, **options):
    """Compares this process's shard of all results with those of the whole inputs."""
    out_shape = (*torch.broadcast_shapes(*(x.shape[:-2] for x in list(inputs.values())[:3])),
                 inputs["query"].shape[-2])  # fmt: skip
    g = torch.Generator().manual_seed(1)
    dtype = inputs["query"].dtype
    upstream = [
        torch.randn(*out_shape, inputs["value"].shape[-1], generator=g).to(dtype),
        torch.randn(out_shape, generator=g).to(dtype if dtype == torch.float64 else torch.float32),
    ]

    def cut(x, dim=-2):
        return shard_sequence(x, mesh, dim, balanced=balanced)

    single = {k: v for k, v in options.items() if v is not None}
    results, grads = whole(inputs, upstream, **single)
    finite = results[1] > -torch.inf
    upstream[1] = torch.where(finite, upstream[1], 0.0)
    results, grads = whole(inputs, upstream, **single)
    if (lengths := options.get("lengths")) is not None and lengths.dim() > 1:
        options = {**options, "lengths": cut(lengths, -1)}
    if (mask := options.get("attn_mask")) is not None and mask.shape[-2] > 1:
        options = {**options, "attn_mask": cut(mask, -2)}
    ours, our_grads = sharded(
        mesh, inputs, [cut(upstream[0]), cut(upstream[1], -1)], cut, balanced=balanced,
        exchange=exchange, **options,
    )  # fmt: skip
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    expected = [cut(results[0]), cut(results[1], -1), *map(cut, grads[:3]), grads[3]]
    names = ["out", "lse", "query", "key", "value", "weight"]
    for name, mine, right in zip(names, [*ours, *our_grads], expected, strict=True):
        scale = max(1.0, right[right.isfinite()].abs().max().item() if right.numel() else 0.0)
        torch.testing.assert_close(
            mine,
            right,
            atol=tolerance * scale,
            rtol=0,
            msg=lambda m, n=name: f"{n}, {options}: {m}",
        )


def check_masks(mesh, folder):
    """Masks apply to global positions, in both layouts, on the ring."""
    inputs = make((2,), 37, 37, 8, 6, dtype=torch.float64)
    lengths = torch.tensor([30, 9])
    rows = torch.randint(0, 38, (2, 37), generator=torch.Generator().manual_seed(3))
    masks = [
        {}, {"is_causal": True}, {"window": (5, 2)}, {"window": (3, -1), "is_causal": True},
        {"window": (-1, 0), "lengths": lengths}, {"lengths": lengths}, {"lengths": rows},
        {"lengths": lengths, "starts": torch.tensor([4, 9])}, {"window": (0, 0)},
        {"starts": torch.tensor([36, 0]), "window": (2**62, 2**62)},
    ]  # fmt: skip
    for options, balanced in itertools.product(masks, (False, True)):
        compare(mesh, inputs, balanced, **options)


def check_attention_masks(mesh, folder):
    """Masks apply to global positions, and have a gradient: bool and float masks, of all pairs and
    broadcast."""
    inputs = make((2,), 26, 33, 8, 6, dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    pairs = torch.rand(2, 26, 33, generator=g, dtype=torch.float64)
    pairs[0, 3] = 0.0  # an empty row
    floats = (3 * pairs).masked_fill(pairs < 0.3, -torch.inf)
    others = {"is_causal": True, "lengths": torch.tensor([31, 12])}
    for balanced, exchange in itertools.product((False, True), ("ring", "keys", "auto")):
        for mask in (pairs > 0.3, floats, floats[:1, :1], floats[..., :1]):
            compare(mesh, inputs, balanced, exchange, attn_mask=mask)
            compare(mesh, inputs, balanced, exchange, attn_mask=mask, dropout_p=0.4, **others)
        gradients = []
        for sharded in (False, True):
            mask = floats.clone().requires_grad_()
            x = leaves(inputs)
            if sharded:
                x = {n: t if n == "weight" else shard_sequence(t, mesh, balanced=balanced)
                     for n, t in x.items()}  # fmt: skip
                given = shard_sequence(mask, mesh, balanced=balanced)
                out = context_parallel_additive_attention(
                    *x.values(), mesh, attn_mask=given, balanced=balanced, exchange=exchange
                )
            else:
                out = additive_attention(*x.values(), attn_mask=mask)
            out.square().sum().backward()
            gradients.append(shard_sequence(mask.grad, mesh, balanced=balanced))
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def check_tiles(mesh, folder):
    """Backward stores the scores of a bounded number of rows and keys at one time."""
    before = parts._PAIRS, parts._KEYS
    parts._PAIRS, parts._KEYS = 2 * 6 * 5, 5
    mask = torch.rand(2, 37, 37, generator=torch.Generator().manual_seed(2)) < 0.8
    for options, balanced in itertools.product((
        {}, {"window": (5, 2)}, {"is_causal": True, "lengths": torch.tensor([30, 9])},
        {"attn_mask": mask, "starts": torch.tensor([3, 0])}, {"dropout_p": 0.4},
    ), (False, True)):  # fmt: skip
        compare(mesh, make((2,), 37, 37, 8, 6, dtype=torch.float64), balanced, **options)
    parts._PAIRS, parts._KEYS = before


def check_exchanges(mesh, folder):
    for options in ({}, {"is_causal": True, "window": (6, -1)}, {"dropout_p": 0.4}):
        for exchange, balanced in itertools.product(("keys", "queries", "auto"), (False, True)):
            compare(mesh, make((2,), 21, 21, 8, 6, dtype=torch.float64), balanced, exchange,
                    **options)  # fmt: skip


def check_shapes(mesh, folder):
    """Tests unbatched inputs, heads, cross-attention, shared keys, and fewer positions than
    processes."""
    for name, inputs in {
        "unbatched": make((), 19, 23, 8, 6),
        "heads": make((2, 3), 13, 26, 8, 5, heads=True),
        "few": make((2,), 3, 5, 4, 4),
        "one query": make((2,), 1, 30, 8, 6),
        "one key": make((2,), 30, 1, 8, 6),
        "tiles": make((1,), 300, 530, 16, 16),
    }.items():
        for balanced, exchange in itertools.product((False, True), ("ring", "queries")):
            compare(mesh, inputs, balanced, exchange, is_causal=name != "one query")
    shared = make((3,), 12, 20, 8, 6, dtype=torch.float64)
    shared = {**shared, "key": shared["key"][:1], "value": shared["value"][:1]}
    compare(mesh, shared, True)


def check_dropout(mesh, folder):
    """The weights that are dropped depend on the global position, and are those of one process."""
    for dtype, p in ((torch.float64, 0.3), (torch.float32, 0.5), (torch.float64, 1.0)):
        for balanced in (False, True):
            inputs = make((2, 2), 29, 31, 8, 6, dtype=dtype, heads=True)
            compare(mesh, inputs, balanced, dropout_p=p, is_causal=True)
            compare(mesh, inputs, balanced, dropout_p=p, window=(7, 3))


def check_uneven(mesh, folder):
    """Shards are successive parts of any size: one process has all queries, others have no
    keys."""
    inputs = make((2,), 10, 24, 8, 6, dtype=torch.float64)
    world, rank = mesh.size(), mesh.get_local_rank()
    queries, options = [10] + [0] * (world - 1), {"window": (-1, 5), "lengths": [20, 24]}
    expected = additive_attention(**inputs, **options).split(queries, -2)[rank]
    before = attention.GATHER_BYTES
    # All processes choose the same exchange, for any sizes of their own shards.
    for limit, exchange in ((before, "ring"), (before, "queries"), (0, "auto"), (3000, "auto")):
        for keys in ([7, *[0] * (world - 2), 17], [24, *[0] * (world - 1)]):
            attention.GATHER_BYTES = limit
            cuts = {"query": queries, "key": keys, "value": keys}
            own = {n: x.split(cuts[n], -2)[rank] if n in cuts else x for n, x in inputs.items()}
            ours = context_parallel_additive_attention(
                **own, mesh=mesh, exchange=exchange, **options
            )
            torch.testing.assert_close(ours, expected, atol=1e-13, rtol=0)
    attention.GATHER_BYTES = before


def check_sixteen_bits(mesh, folder):
    inputs = make((2,), 40, 50, 16, 8, dtype=torch.bfloat16)
    exact = additive_attention(*(x.double() for x in inputs.values()), is_causal=True)
    plain = additive_attention(**inputs, is_causal=True)
    x = {n: t if n == "weight" else shard_sequence(t, mesh) for n, t in inputs.items()}
    ours = context_parallel_additive_attention(**x, mesh=mesh, is_causal=True, exchange="ring")
    assert ours.dtype == torch.bfloat16
    allowed = 2 * (plain - exact).abs().max()
    assert (ours - shard_sequence(exact, mesh)).abs().max() <= allowed
    compare(mesh, inputs, tolerance=0.02, is_causal=True)


def check_padding(mesh, folder):
    """No result depends on masked keys and values, or on upstream gradients of empty rows."""
    inputs = make((2,), 20, 24, 8, 6, dtype=torch.float64)
    lengths = torch.tensor([15, 0])
    results = []
    for garbage in (0.0, float("nan")):
        x = {n: t.clone() for n, t in inputs.items()}
        for name in ("key", "value"):
            for b, n in enumerate(lengths.tolist()):
                x[name][b, n:] = garbage
        x = leaves({n: t if n == "weight" else shard_sequence(t, mesh) for n, t in x.items()})
        outputs = context_parallel_additive_attention(
            *x.values(), mesh, lengths=lengths, need_lse=True, exchange="ring"
        )
        upstream = [torch.ones_like(outputs[0]), torch.zeros_like(outputs[1])]
        upstream[0][1] = garbage
        results.append((*outputs, *torch.autograd.grad(outputs, list(x.values()), upstream)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert not results[0][0][1].any() and (results[0][1][1] == -torch.inf).all()


def check_dtensors(mesh, folder):
    """With DTensors as inputs, outputs are DTensors, and the gradient of the weight is that of all
    processes."""
    inputs = make((2,), 11, 14, 8, 6, dtype=torch.float64)

    def results(x, function, **options):
        x = {n: t.requires_grad_() for n, t in x.items()}
        out, lse = function(*x.values(), need_lse=True, is_causal=True, **options)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), list(x.values()))

    expected = results({n: x.clone() for n, x in inputs.items()}, additive_attention)
    placed = {
        n: distribute_tensor(x, mesh, [Replicate() if n == "weight" else Shard(1)])
        for n, x in inputs.items()
    }
    ours = results(placed, context_parallel_additive_attention, mesh=mesh, exchange="ring")
    assert ours[0].placements == (Shard(1),) == ours[3].placements
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.full_tensor(), right)


def check_repeatable(mesh, folder):
    inputs = make((2,), 33, 40, 16, 8)
    results = []
    for _ in range(2):
        x = leaves({n: t if n == "weight" else shard_sequence(t, mesh) for n, t in inputs.items()})
        out = context_parallel_additive_attention(*x.values(), mesh, exchange="ring")
        results.append([out, *torch.autograd.grad(out.square().sum(), list(x.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_sequences(mesh, folder):
    """shard_sequence and unshard_sequence are inverse, for any dim, length and dtype."""
    for total, balanced, dim in itertools.product((0, 1, 7, 32), (False, True), (0, 1, -1)):
        x = torch.arange(total * 6).view(2, 3, total).movedim(-1, dim)
        shard = shard_sequence(x, mesh, dim, balanced=balanced)
        assert torch.equal(unshard_sequence(shard, mesh, dim, balanced=balanced), x)
    place = shard_sequence(torch.arange(8 * mesh.size()), mesh, 0, balanced=True)
    rank, last = mesh.get_local_rank(), 8 * mesh.size() - 4 * mesh.get_local_rank()
    assert place.tolist() == [*range(4 * rank, 4 * rank + 4), *range(last - 4, last)]


def check_memory(mesh, folder):
    """The peak memory of a process, in shards, is the same for four processes and for eight: 9 to
    13, where the keys of all eight would take 27."""
    keys = 2**14
    shard = keys * 128 * 2 * 4  # bytes of its keys and values
    key, value = (torch.randn(1, keys, 128) for _ in range(2))
    x = [torch.randn(1, 32, 128), key, value, torch.randn(128)]
    [t.requires_grad_() for t in x]
    small = [x[0], key[:, :9], value[:, :9], x[3]]
    context_parallel_additive_attention(*small, mesh, exchange="ring").sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = context_parallel_additive_attention(*x, mesh, exchange="ring")
    out.square().sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 18 * shard, f"{grown / shard:.1f} shards"


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.sweep), 4])
def test_context_parallel(world, tmp_path):
    processes.run(__name__, world, tmp_path)


@pytest.mark.sweep
def test_memory_of_more_processes(tmp_path):
    processes.run(__name__, 8, tmp_path, ["check_memory"])
