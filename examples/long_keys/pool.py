"""Attention over more keys than memory holds: a file is attended to in chunks, forward and
backward.

    python examples/long_keys/pool.py                     a million instances, about a minute
    python examples/long_keys/pool.py --instances 10000000 --steps 2

A bag of instances lies in a file that is mapped into memory. One instance in a thousand is marked,
by a pattern among its features, and the bag's label is what the marked ones hold on average.
Attention pools the bag, so it has to learn to tell them apart: from one number per step.

A chunk is read, projected and attended to by itself, and computed again in backward
(torch.utils.checkpoint), so that no projection is kept. Out and lse of the chunks are merged.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from additive_attn import additive_attention, merge_attention

try:
    from tqdm import tqdm
except ImportError:  # a line for each step is left

    def tqdm(rows, **_):
        return rows


FEATURES, HIDDEN = 32, 32
MARK = 4  # features that mark an instance; the fifth holds what counts
MARKED = 1000  # one in so many
# Tensors of a chunk take 32 MB: smaller ones leave gaps in the C library's heap, which adds up.
CHUNK = 2**18


def chunks(count: int, size: int, what: str) -> list[tuple[int, int]]:
    return tqdm(
        [(start, min(start + size, count)) for start in range(0, count, size)],
        desc=what, unit="chunk", leave=False,
    )  # fmt: skip


def make_bag(path: Path, count: int, spare: int, seed: int) -> Tensor:
    """Instances (count + spare, FEATURES) in a file; the spare ones at its end are NaN."""
    bag = torch.from_file(
        str(path), shared=True, size=(count + spare) * FEATURES, dtype=torch.float32
    ).view(-1, FEATURES)
    generator = torch.Generator().manual_seed(seed)
    for start, stop in chunks(count, CHUNK, "writing"):
        some = torch.randn(stop - start, FEATURES, generator=generator)
        marked = torch.arange(start, stop) % MARKED == 0
        some[marked, :MARK] += 2.0
        some[marked, MARK] += 1.5
        bag[start:stop] = some
    bag[count:] = torch.nan  # must affect no result
    return bag


class Pool(nn.Module):
    """Attention pooling: the learned query is the bias of the keys' projection."""

    def __init__(self) -> None:
        super().__init__()
        self.to_key = nn.Linear(FEATURES, HIDDEN)
        self.energy = nn.Parameter(torch.randn(HIDDEN) * 0.1)

    def chunk(self, instances: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """Out (1, FEATURES) and lse (1,) of a chunk, of whose instances the first are held."""
        instances = torch.where(instances.isfinite(), instances, 0.0)
        return additive_attention(
            None, self.to_key(instances), instances, self.energy, lengths=held, need_lse=True
        )

    def forward(self, bag: Tensor, count: int, size: int, what: str) -> Tensor:
        """A chunk beyond ``count`` has no instance: its lse is -inf, and merges exactly."""
        merged: tuple[Tensor, Tensor] | None = None
        for start, stop in chunks(len(bag), size, what):
            held = torch.tensor(max(0, min(count, stop) - start))
            part = checkpoint(self.chunk, bag[start:stop], held, use_reentrant=False)
            merged = part if merged is None else merge_attention(*zip(merged, part, strict=True))
        assert merged is not None
        return merged[0]


def memory() -> str:
    """Of this process, without the pages of the file."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
    return f", {kilobytes[0] / 1e3:,.0f} MB in memory" if kilobytes else ""


def train(bag: Tensor, count: int, options: argparse.Namespace) -> list[float]:
    torch.manual_seed(options.seed)
    pool = Pool()
    optimizer = torch.optim.Adam(pool.parameters(), lr=0.05)
    rows = torch.arange(0, count, MARKED)
    label = bag[rows, MARK].mean()
    losses = []
    for step in range(options.steps):
        start = time.perf_counter()
        out = pool(bag, count, options.chunk, f"step {step + 1}")
        loss = (out[0, MARK] - label).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds = time.perf_counter() - start
        print(f"step {step + 1}: pooled {out[0, MARK].item():.3f} for {label.item():.3f}, "
              f"{seconds:.1f} s{memory()}", flush=True)  # fmt: skip
    return losses


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=10**6, help="up to 10**7 (10**6)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=CHUNK, help=f"instances at a time ({CHUNK})")
    parser.add_argument("--file", type=Path, help="where to keep the bag; else a temporary file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min(options.instances, options.steps, options.chunk) < 1:
        parser.error("--instances, --steps and --chunk are 1 or more")
    file, size = options.file, (options.instances + options.chunk) * FEATURES * 4
    if file and not file.parent.is_dir():
        parser.error(f"--file: there is no folder {file.parent}")
    if file and file.exists() and not (file.is_file() and file.stat().st_size == size):
        parser.error(f"--file: {file} is no bag of this size, and would be overwritten")
    return options


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder, "bag.float32")
        bag = make_bag(path, options.instances, options.chunk, options.seed)
        gigabytes = bag.numel() * 4 / 1e9
        print(f"{options.instances:,} instances, {gigabytes:.2f} GB, in {path}")
        train(bag, options.instances, options)


if __name__ == "__main__":
    main()
