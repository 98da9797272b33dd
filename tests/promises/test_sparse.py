"""Intervals and block tables: each composes with every other mask, and the pairs that they leave
out take no time and leak nothing. The oracle is the plain formula with a dense mask."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import (
    DEVICE,
    ON_KERNEL,
    OUTPUTS,
    PACKAGE_PARENT,
    assert_all_same,
    check_against_plain,
    generator,
    gradients,
    make,
    plain,
    random_upstream,
)  # fmt: skip

from additive_attn.ops.attend import attend
from additive_attn.spec.call import Call, Masking

ROWS, KEYS = 40, 150


def starts_of(batch, per_row, keys=KEYS, rows=ROWS):
    shape = (*batch, rows if per_row else 1)
    return torch.randint(-2, keys + 1, shape, generator=generator(2), device=DEVICE)


def lengths_of(starts, longest=60):
    """Returns the ends of ranges that are short, long, empty, or end before they start."""
    more = torch.randint(-20, longest, starts.shape, generator=generator(3), device=DEVICE)
    return (starts + more).clamp(0, KEYS)


def table_of(batch, rows=ROWS, keys=KEYS, block=(16, 24), tiles=5, density=0.5):
    """Returns random kinds of blocks. Numbers that name no tile count as 0."""
    g = generator(4)
    shape = (*batch, -(-rows // block[0]), -(-keys // block[1]))
    table = torch.randint(-1, tiles + 3, shape, generator=g, device=DEVICE, dtype=torch.int32)
    kept = torch.rand(shape, generator=g, device=DEVICE) < density
    table = torch.where(kept, table, 0)
    return table, torch.rand(tiles, *block, generator=g, device=DEVICE) < 0.5


def dense(masking, rows, keys, rank):
    """Returns the equivalent bool mask of ``rank`` dims, made pair by pair from the
    definitions."""
    _, lengths, starts, table, tiles, left, right = masking
    i = torch.arange(rows, device=DEVICE)[:, None]
    j = torch.arange(keys, device=DEVICE)
    allowed = ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))
    if lengths is not None:
        allowed = allowed & (j < lengths[..., None])
    if starts is not None:
        allowed = allowed & (j >= starts[..., None])
    if table is not None:
        count, block_rows, block_keys = tiles.shape
        codes = table.repeat_interleave(block_rows, -2).repeat_interleave(block_keys, -1)
        codes = codes[..., :rows, :keys]
        kept = codes == 1
        for t in range(count):
            tile = tiles[t].repeat(table.shape[-2], table.shape[-1])[:rows, :keys]
            kept = kept | ((codes == t + 2) & tile)
        allowed = allowed & kept
    return allowed.reshape((1,) * (rank - allowed.dim()) + allowed.shape)


def call_of(inputs, masking, scale):
    tensors = [inputs[name] for name in ("query", "key", "value", "weight")]
    masking = masking._replace(attn_mask=inputs.get("attn_mask", masking.attn_mask))
    return Call(*tensors, *masking, scale=scale)


def ours(inputs, *, masking, scale=1.0):
    return dict(zip(OUTPUTS, attend(call_of(inputs, masking, scale), True), strict=True))


def theirs(inputs, *, masking, scale=1.0):
    tensors = [inputs[name] for name in ("query", "key", "value", "weight")]
    mask = inputs.get("attn_mask", masking.attn_mask)
    rows, keys = inputs["query"].shape[-2], inputs["key"].shape[-2]
    allowed, bias = dense(masking, rows, keys, inputs["query"].dim()), None
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -torch.inf)
        bias = mask if mask.is_floating_point() else None
    return plain(*tensors, bias=bias, allowed=allowed, scale=scale)


PER_ROW, PER_ENTRY = starts_of((3, 1), True), starts_of((3, 1), False)
TABLE, TILES = table_of((3, 2))
FLOAT_MASK = torch.randn(3, 1, ROWS, KEYS, generator=generator(5), device=DEVICE)
MASKINGS = {
    "starts": Masking(starts=PER_ROW),
    "starts per entry": Masking(starts=PER_ENTRY, lengths=torch.tensor(100, device=DEVICE)),
    "ranges": Masking(starts=PER_ROW, lengths=lengths_of(PER_ROW)),
    "blocks": Masking(block_table=TABLE, block_tiles=TILES),
    "blocks of one entry": Masking(block_table=TABLE[0, 0], block_tiles=TILES),
    "whole blocks": Masking(block_table=TABLE.clamp(0, 1), block_tiles=TILES[:0]),
    "all of them": Masking(
        None, lengths_of(PER_ROW, 120), PER_ROW, TABLE.clamp(1), TILES, left=40, right=30
    ),
}  # fmt: skip


@pytest.mark.core
@pytest.mark.interpreter(masking=["ranges", "blocks", "all of them"], mask=["float"])
@pytest.mark.parametrize("mask", [None, "float"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_outputs_and_gradients(masking, mask):
    inputs, masking = make((3, 2), ROWS, KEYS, 6, 5, heads=True), MASKINGS[masking]
    if mask == "float":
        inputs["attn_mask"] = torch.where(FLOAT_MASK > 1.5, -torch.inf, FLOAT_MASK)
    check_against_plain([inputs], function=ours, formula=theirs, masking=masking, scale=0.7)


LONG = 700, 9000
WIDE_STARTS = torch.randint(0, LONG[1], (LONG[0],), generator=generator(6)).sort()[0]
LONG_MASKINGS = {
    "ranges": Masking(starts=WIDE_STARTS, lengths=(WIDE_STARTS + 500).clamp(0, LONG[1])),
    "apart": Masking(starts=WIDE_STARTS.roll(1) * (torch.arange(LONG[0]) % 2)),
    "blocks": Masking(None, None, None, *table_of((), *LONG, (64, 96), density=0.2)),
    "empty at first": Masking(lengths=LONG[1] * (torch.arange(LONG[0]) > 300)),
}


@pytest.mark.parametrize("masking", LONG_MASKINGS)
def test_pieces_of_a_long_backward(masking):
    """Rows that share no keys lie in pieces whose keys differ. Results are those of a dense
    mask."""
    inputs = make((), *LONG, 3, 2, dtype=torch.float64)
    masking, results = LONG_MASKINGS[masking], []
    mask = dense(masking, *LONG, 2)
    upstream = random_upstream(dict(zip(OUTPUTS, attend(Call(*inputs.values())), strict=True)))
    for given in (masking, Masking(attn_mask=mask)):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        out, _, lse = attend(Call(*leaves, *given))
        pairs = upstream["out"], torch.where(mask.any(-1), upstream["lse"], 0.0)
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, pairs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.core
def test_what_is_left_out_leaks_nothing():
    """Keys and values are NaN before all starts, or in blocks that no row attends to."""
    starts, lengths = torch.tensor([[40], [0], [150]]), torch.tensor([[120], [90], [150]])
    table, tiles = table_of((3,), block=(16, 30))
    table[..., 2] = 0
    masking = Masking(lengths=lengths, starts=starts, block_table=table, block_tiles=tiles)
    inputs = make((3,), ROWS, KEYS, 6, 5)
    clean = gradients(
        lambda x: ours(x, masking=masking), inputs, random_upstream(ours(inputs, masking=masking))
    )
    keys = torch.arange(KEYS)
    left_out = (keys < starts) | (keys >= lengths) | ((keys >= 60) & (keys < 90))
    dirty = dict(inputs)
    for name in ("key", "value"):
        dirty[name] = torch.where(left_out[..., None], torch.nan, inputs[name])
    spoilt = gradients(lambda x: ours(x, masking=masking), dirty, random_upstream(clean[0]))
    for before, after in zip(clean, spoilt, strict=True):
        assert_all_same(after, before)
    for name in ("key", "value"):
        assert (spoilt[1][name][left_out] == 0).all()


@pytest.mark.parametrize("mapped", ["table", "tiles", "starts", "all"])
def test_vmap(mapped):
    """Tiles have no batch dim, so mapped ones are joined to one set of tiles."""
    inputs = make((), 20, 30, 4, 3, dtype=torch.float64)
    tables, tiles = table_of((3,), 20, 30, (8, 7), tiles=2)
    tiles = torch.stack([tiles, ~tiles, tiles.flip(0)])
    starts = torch.randint(0, 20, (3, 20))
    each = {"table": tables, "tiles": tiles, "starts": starts}
    given = {name: x if mapped in (name, "all") else x[0] for name, x in each.items()}
    dims = tuple(0 if mapped in (name, "all") else None for name in each)

    def function(table, tiles, starts):
        masking = Masking(starts=starts, block_table=table, block_tiles=tiles)
        return attend(Call(*inputs.values(), *masking))[0]

    ours = torch.func.vmap(function, dims)(*given.values())
    for n in range(3):
        alone = function(
            *(x[n] if d == 0 else x for x, d in zip(given.values(), dims, strict=True))
        )
        torch.testing.assert_close(ours[n], alone)


MEASURE = """
import torch, torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask
from additive_attn import additive_attention, varlen_additive_attention

def resident(which):
    with open("/proc/self/status") as f:
        return int(f.read().split(which + ":")[1].split()[0]) / 1e3

torch.set_num_threads(1)
def run(inputs, **options):
    if packed:
        out = varlen_additive_attention(*inputs, *options.values())
    else:
        out = additive_attention(*inputs, **options)
    out.backward(torch.ones_like(out))

def leaves(length):
    return [torch.ones(*shape, requires_grad=True) for shape in ((length, 16),) * 3 + ((16,),)]

for packed in (False, True):
    if packed:
        cu_seq = torch.arange(0, 40001, 500)
        few, options = [0, 5], dict(q=cu_seq, k=cu_seq, max_q=500, max_k=500)
        start = dict(q=torch.tensor(few), k=torch.tensor(few), max_q=5, max_k=5)
    else:
        def mask(length):
            mod = lambda b, h, q, k: (q - k).abs() < 100
            return create_block_mask(mod, None, None, length, length, device="cpu")
        options, start = dict(attn_mask=mask(8192)), dict(attn_mask=mask(5))
    run(leaves(5), **start)
    inputs = leaves(40000 if packed else 8192)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the peak
    run(inputs, **options)
    print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="measures the CPU")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(not ON_KERNEL, reason="minutes on the fallback")
def test_memory_follows_what_is_kept():
    """As booleans, all pairs of 8192 positions take 67 MB, and of 40000 positions 1.6 GB. The
    tiles of 190 partial blocks take 3 MB, and the workspace 16 MB."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    blocks, packed = map(float, result.stdout.split())
    assert blocks < 50 and packed < 80, (blocks, packed)
