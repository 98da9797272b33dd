"""Calls that are sharded over two processes, in every dtype on every path, keep the accuracy rule.
They are rows of the table in docs/features.md."""

from __future__ import annotations

import json
from functools import partial

import features
import paths
import processes
import pytest
import test_second_order
import torch
from oracle import check_against_plain, plain, plain_masked
from test_features import BATCH, KEYS, ROWS, cases
from torch.distributed.tensor import DTensor, Replicate, Shard

from additive_attn import additive_attention
from additive_attn.distributed import context_parallel_additive_attention
from additive_attn.spec.dropout import draw_seed, keep_mask

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
OUTPUTS = ("out", "lse")
ROW, KEY = torch.arange(ROWS)[:, None], torch.arange(KEYS)
MASK = torch.rand(*BATCH, ROWS, KEYS, generator=torch.Generator().manual_seed(3)) < 0.6
SECOND = "second derivatives"


def attended(inputs, scale, allowed=None):
    results = plain_masked(inputs, attn_mask=allowed, scale=scale)
    return {name: results[name] for name in OUTPUTS}


def dropped(inputs, scale):
    torch.manual_seed(5)
    keep = keep_mask(draw_seed(torch.device("cpu")), BATCH, (0, ROWS), (0, KEYS), 0.4)
    results = plain(**inputs, keep=keep, dropout_p=0.4, scale=scale)
    return {name: results[name] for name in OUTPUTS}


def formula(name, allowed=None):
    return test_second_order.named(partial(attended, allowed=allowed), f"sharded {name}")


# The dim along which each input is sharded; options; and the plain formula.
SEQUENCE, HEADS = dict(query=2, key=2, value=2), dict(query=1, key=1, value=1, weight=0)
BATCHES, VALUES = dict(query=0, key=0, value=0), dict(value=3)
RUNS = {
    "sequence, ring": (SEQUENCE, {"exchange": "ring"}, formula("whole")),
    "sequence, keys gathered": (SEQUENCE, {"exchange": "keys"}, formula("whole")),
    "sequence, queries gathered": (SEQUENCE, {"exchange": "queries"}, formula("whole")),
    "sequence, is_causal": (
        SEQUENCE, {"exchange": "ring", "is_causal": True}, formula("causal", KEY <= ROW),
    ),
    "sequence, window": (
        SEQUENCE, {"exchange": "ring", "window": (2, 3)},
        formula("window", (KEY >= ROW - 2) & (KEY <= ROW + 3)),
    ),
    "sequence, lengths": (
        SEQUENCE, {"exchange": "ring", "lengths": torch.tensor([19, 7])},
        formula("lengths", KEY < torch.tensor([19, 7])[:, None, None, None]),
    ),
    "sequence, bool mask": (
        SEQUENCE, {"exchange": "ring", "attn_mask": MASK}, formula("mask", MASK),
    ),
    "sequence, dropout": (SEQUENCE, {"exchange": "ring", "dropout_p": 0.4}, dropped),
    f"sequence, {SECOND}": (SEQUENCE, {"exchange": "ring"}, formula("whole")),
    "batch, DTensor": (BATCHES, {}, formula("whole")),
    "heads, DTensor": (HEADS, {}, formula("whole")),
    "features of the values, DTensor": (VALUES, {}, formula("whole")),
}  # fmt: skip


def run(mesh, placements, options, inputs, scale):
    """Shards whole tensors, which all processes have, and returns whole results."""
    placed = {
        name: DTensor.from_local(x, mesh, [Replicate()]).redistribute(
            mesh, [Shard(placements[name]) if name in placements else Replicate()]
        )
        for name, x in inputs.items()
    }
    options = {"scale": scale, "need_lse": True, **options}
    if placements is SEQUENCE:
        if (mask := options.get("attn_mask")) is not None:
            rows = ROWS - ROWS // 2  # the size of torch.chunk, which Shard uses
            options["attn_mask"] = mask.split(rows, -2)[mesh.get_local_rank()]
        torch.manual_seed(5)
        results = context_parallel_additive_attention(**placed, mesh=mesh, **options)
    else:
        results = additive_attention(**placed, **options)
    return {name: x.full_tensor() for name, x in zip(OUTPUTS, results, strict=True)}


def check(name, mesh, folder):
    """Asserts the accuracy rule for one run, and writes its cells of the table."""
    features.record()
    placements, options, theirs = RUNS[name]
    second, judged, cells = name.endswith(SECOND), {"upstream_of": OUTPUTS}, []
    ours = partial(run, mesh, placements, options)
    if second:
        judged = {"upstream_of": ["dquery", "dkey", "dvalue", "dweight"], "magnitude": 4.0}
        ours, theirs = map(test_second_order.gradient_map, (ours, theirs))
        theirs = test_second_order.named(theirs, "sharded gradients")
    with paths.running((folder / "path").read_text()):
        for dtype in DTYPES:
            features.clear()
            check_against_plain(cases(dtype), function=ours, formula=theirs, **judged)
            kind = str(dtype).removeprefix("torch.")
            for feature, computing, _, direction in features.passed():
                if (feature == SECOND) == second:
                    cells.append((f"sharded: {name}", computing, kind, direction))
    if mesh.get_local_rank() == 0:
        (folder / f"{name}.cells").write_text(json.dumps(cells))


globals().update({name: partial(check, name) for name in RUNS})  # for processes.run


@pytest.mark.sweep
@pytest.mark.core
@pytest.mark.interpreter
def test_features(tmp_path, path):
    additive_attention(*cases(torch.float32)[0].values())  # the path must have run in this process
    (tmp_path / "path").write_text(path)
    processes.run(__name__, 2, tmp_path, list(RUNS))
    features.clear()
    for name in RUNS:
        cells = json.loads((tmp_path / f"{name}.cells").read_text())
        features.passed().update(map(tuple, cells))
