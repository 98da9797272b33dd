"""Measures block-sparse and packed attention, writes csv rows and prints them as a table.

    python -m benchmarks.sparse                     everything (3 minutes)
    python -m benchmarks.sparse --case random window
    python -m benchmarks.sparse --table FILE.csv

Block masks keep about a tenth of the blocks of 8192 queries and keys, and the other provider is
the same call without a mask. Packed sequences have 10 to 1000 positions, and the other provider is
the same call on padded sequences with their lengths. Results are compared before anything is
timed, and both are timed round-robin. Rows go to a new file in benchmarks/results/local/, which
git ignores; --save replaces the rows of these cases in the file that git tracks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from additive_attn import additive_attention, varlen_additive_attention
from benchmarks import command, rows
from benchmarks.measure import peak_extra_bytes, quantiles
from benchmarks.rows import Row
from benchmarks.table import duration, markdown, ratio, size

COLUMNS = [
    *("device", "name", "threads", "isa", "torch", "additive_attn", "python", "commit", "date"),
    *("case", "what", *rows.SIZES, "mode", "share", "provider"),
    *("median_ms", "q20_ms", "q80_ms", "cpu_ms", "peak_extra_bytes"),
]
WHOLE, SPARSE = "whole", "sparse"
BLOCK, HIDDEN, SEQUENCES, LONGEST = 128, 128, 64, 1000
MODES = "forward", "full"


class Runs(NamedTuple):
    """Both calls with their inputs, which are leaves. Sparse computes ``share`` of the pairs."""

    whole: Callable[..., Tensor]
    whole_inputs: list[Tensor]
    sparse: Callable[..., Tensor]
    sparse_inputs: list[Tensor]
    share: float
    shape: tuple[int, ...]


def random_blocks(length: int) -> Callable[..., Tensor]:
    blocks = -(-length // BLOCK)
    kept = torch.rand(blocks, blocks) < 0.1
    return lambda b, h, q, k: kept[q // BLOCK, k // BLOCK]


def window(length: int) -> Callable[..., Tensor]:
    return lambda b, h, q, k: (q - k).abs() <= length // 28


def blocks_of(make: Callable[[int], Callable[..., Tensor]]) -> Callable[[bool], Runs]:
    def build(quick: bool) -> Runs:
        length = 512 if quick else 8192
        mask_mod = make(length)
        mask = create_block_mask(mask_mod, None, None, length, length, device="cpu")
        inputs = leaves(*((1, length, HIDDEN),) * 3, (HIDDEN,))
        check_blocks(make)
        kept = mask.kv_num_blocks.sum() + (
            0 if mask.full_kv_num_blocks is None else mask.full_kv_num_blocks.sum()
        )
        share = kept.item() / (-(-length // BLOCK)) ** 2
        shape = 1, length, length, HIDDEN, HIDDEN

        def sparse(*tensors: Tensor) -> Tensor:
            out: Tensor = additive_attention(*tensors, attn_mask=mask)
            return out

        return Runs(additive_attention, inputs, sparse, inputs, share, shape)

    return build


def check_blocks(make: Callable[[int], Callable[..., Tensor]]) -> None:
    mask_mod, tensors = make(300), leaves(*((1, 300, 8),) * 3, (8,))
    block, dense = (
        f(mask_mod, None, None, 300, 300, device="cpu") for f in (create_block_mask, create_mask)
    )
    ours = additive_attention(*tensors, attn_mask=block)
    torch.testing.assert_close(ours, additive_attention(*tensors, attn_mask=dense[0]))


def packed(spread: Callable[[Tensor], Tensor]) -> Callable[[bool], Runs]:
    def build(quick: bool) -> Runs:
        sequences, longest = (4, 50) if quick else (SEQUENCES, LONGEST)
        lengths = (10 + (longest - 9) * spread(torch.rand(sequences))).long()
        lengths[0] = longest
        total, cu_seq = int(lengths.sum()), F.pad(lengths.cumsum(0), (1, 0))
        inside = torch.arange(longest) < lengths[:, None]
        flat = leaves(*((total, HIDDEN),) * 3, (HIDDEN,))
        padded = [x.new_zeros(sequences, longest, HIDDEN) for x in flat[:3]]
        for to, x in zip(padded, flat, strict=False):
            to[inside] = x.detach()
        whole_inputs = [*(x.requires_grad_() for x in padded), flat[3]]

        def sparse(*tensors: Tensor) -> Tensor:
            query, key, value, weight = tensors
            out: Tensor = varlen_additive_attention(
                query, key, value, weight, cu_seq, cu_seq, longest, longest
            )
            return out

        def whole(*tensors: Tensor) -> Tensor:
            out: Tensor = additive_attention(*tensors, lengths=lengths)
            return out

        with torch.no_grad():
            torch.testing.assert_close(sparse(*flat), whole(*whole_inputs)[inside])
        share = lengths.double().square().sum().item() / (longest * total)
        shape = sequences, longest, longest, HIDDEN, HIDDEN
        return Runs(whole, whole_inputs, sparse, flat, share, shape)

    return build


def skewed(uniform: Tensor) -> Tensor:
    """Lengths whose logarithms are uniform, roughly as those of sentences."""
    return (100**uniform - 1) / 99


class Case(NamedTuple):
    name: str
    what: str
    build: Callable[[bool], Runs]


CASES = {
    case.name: case
    for case in (
        Case("random", "BlockMask, random blocks", blocks_of(random_blocks)),
        Case("window", "BlockMask, a window", blocks_of(window)),
        Case("packed", "packed, uniform lengths", packed(lambda uniform: uniform)),
        Case("packed-skewed", "packed, mostly short", packed(skewed)),
    )
}


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [
        (torch.randn(shape) / (4 if len(shape) == 1 else 1)).requires_grad_() for shape in shapes
    ]


def measure_case(case: Case, quick: bool = False, rounds: int = 3) -> Iterator[Row]:
    torch.manual_seed(0)
    runs = case.build(quick)
    about = rows.machine(torch.device("cpu")) | {"case": case.name, "share": f"{runs.share:.3g}"}
    about["what"] = f"tiny: {case.what}" if quick else case.what
    about |= dict(zip(rows.SIZES, runs.shape, strict=True))
    providers = {
        WHOLE: (runs.whole, runs.whole_inputs),
        SPARSE: (runs.sparse, runs.sparse_inputs),
    }
    for mode in MODES:
        samples: dict[str, list[tuple[float, float, int | None]]] = {WHOLE: [], SPARSE: []}
        for _ in range(rounds):
            for name, (function, tensors) in providers.items():
                samples[name].append(timed(function, tensors, mode))
        for name, found in samples.items():
            wall, cpu, peaks = zip(*found, strict=True)
            figures = *quantiles([*wall] * 2), quantiles([*cpu] * 2)[0]
            columns = ("median_ms", "q20_ms", "q80_ms", "cpu_ms")
            row = {key: float(f"{x:.5g}") for key, x in zip(columns, figures, strict=True)}
            peak = max((x for x in peaks if x is not None), default=None)
            yield about | {"mode": mode, "provider": name, **row, "peak_extra_bytes": peak}


def timed(
    function: Callable[..., Tensor], tensors: list[Tensor], mode: str
) -> tuple[float, float, int | None]:
    times = [0.0, 0.0]

    def run() -> None:
        start = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled(mode == "full"):
            out = function(*tensors)
        if mode == "full":
            torch.autograd.grad(out, tensors, out.detach())
        times[:] = time.perf_counter() - start[0], time.process_time() - start[1]

    peak = peak_extra_bytes(run, torch.device("cpu"))
    return times[0], times[1], peak


def show(path: Path) -> None:
    found = command.shown_rows(path, "sparse", CASES)
    names = ["call", "share of pairs", "mode", "whole", "sparse", "ratio", "its memory", "sparse"]
    table = [names]
    for name in CASES:
        for mode in MODES:
            of = {x["provider"]: x for x in found if (x["case"], x["mode"]) == (name, mode)}
            if not {WHOLE, SPARSE} <= of.keys():
                continue
            slow, fast = (float(of[each]["median_ms"]) for each in (WHOLE, SPARSE))
            peaks = (of[each]["peak_extra_bytes"] for each in (WHOLE, SPARSE))
            memory = [size(float(x)) if x else "" for x in peaks]
            line = [of[SPARSE]["what"], of[SPARSE]["share"], mode, duration(slow)]
            table.append([*line, f"**{duration(fast)}**", ratio(slow, fast), *memory])
    print(markdown(table))


def main() -> None:
    parser = command.parser("sparse", __doc__, CASES)
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="print it, measure nothing")
    args = command.parsed(parser)
    if args.table is not None:
        return show(args.table)
    path = command.begin(args, "sparse")

    def all_rows() -> Iterator[Row]:
        for name in args.case:
            for row in measure_case(CASES[name], args.quick):
                said: Any = (row[key] for key in ("case", "mode", "provider", "median_ms"))
                print(*said, "ms", flush=True)
                yield row

    command.write(path, all_rows(), COLUMNS, args, CASES)
    show(path)


if __name__ == "__main__":
    main()
