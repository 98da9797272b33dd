"""Which positions of a sequence each process holds, and what a row may attend to among them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]  # [start, stop) of positions, in ascending order


def chunks(total: int, count: int) -> Ranges:
    """Splits ``total`` positions into ``count`` chunks whose sizes differ by one at most, as
    ``torch.tensor_split`` does."""
    size, rest = divmod(total, count)
    bounds = [size * i + min(i, rest) for i in range(count + 1)]
    return tuple(pairwise(bounds))


def balanced_layout(total: int, processes: int) -> tuple[Ranges, ...]:
    """Process r of N holds chunks r and 2N - 1 - r of 2N: causal attention costs each as much."""
    parts = chunks(total, 2 * processes)
    return tuple((parts[r], parts[-1 - r]) for r in range(processes))


def layout_of(sizes: Sequence[int], balanced: bool, name: str) -> tuple[Ranges, ...]:
    """Returns the layout of shards of these sizes, one per process."""
    total = sum(sizes)
    if not balanced:
        return tuple((part,) for part in pairwise(accumulate(sizes, initial=0)))
    layout = balanced_layout(total, len(sizes))
    wanted = [length(ranges) for ranges in layout]
    if list(sizes) != wanted:
        raise ValueError(
            f"The processes hold {list(sizes)} positions of {name}, but balanced shards of "
            f"{total} positions hold {wanted}. Make them with shard_sequence(..., balanced=True)."
        )
    return layout


def length(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def positions(ranges: Ranges, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(*x, device=device) for x in ranges])


class Bounds(NamedTuple):
    """The keys of a shard that some row of another shard may attend to, counted in the shard."""

    first: int
    last: int


class Masks(NamedTuple):
    """What the rows of this process may attend to, by positions in the whole sequence."""

    left: int  # -1 = unbounded, as is right
    right: int
    starts: Tensor | None  # (..., Lq or 1)
    lengths: Tensor | None

    def bounds(self, rows: Ranges, keys: Ranges) -> Bounds:
        """Bounds by the window alone: ``starts`` and ``lengths`` may be on a GPU."""
        if not length(rows) or not length(keys):
            return Bounds(0, 0)
        held = [x for x in rows if x[0] < x[1]]
        first = _before(held[0][0] - self.left, keys) if self.left >= 0 else 0
        last = _before(held[-1][1] + self.right, keys) if self.right >= 0 else length(keys)
        return Bounds(min(first, last), last)

    def intervals(
        self, rows: Ranges, keys: Ranges, bounds: Bounds, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the first key of each row, and the key after its last, counted from
        ``bounds.first``; None where that is the first and the last of all. Keys are in ascending
        order, so an interval of the sequence is one of the shard too."""
        starts, stops = self.starts, self.lengths
        if self.left >= 0 or self.right >= 0:
            row = positions(rows, device)
            # Beyond the last key of all, a larger number has no effect, and might overflow.
            end = keys[-1][1]
            if self.left >= 0:
                window = row - min(self.left, rows[-1][1])
                starts = window if starts is None else torch.maximum(starts, window)
            if self.right >= 0:
                window = row + min(self.right, end) + 1
                stops = window if stops is None else torch.minimum(stops, window)
        size = bounds.last - bounds.first
        return tuple(  # type: ignore[return-value]
            None if x is None else (_counted(x, keys) - bounds.first).clamp_(0, size)
            for x in (starts, stops)
        )


def _before(position: int, keys: Ranges) -> int:
    """The number of keys before a position."""
    return sum(min(max(position - start, 0), stop - start) for start, stop in keys)


def _counted(position: Tensor, keys: Ranges) -> Tensor:
    """The same for a tensor of positions."""
    counts = [(position - start).clamp(0, stop - start) for start, stop in keys]
    return torch.stack(counts).sum(0) if len(counts) > 1 else counts[0]


def cut(keys: Ranges, bounds: Bounds) -> Ranges:
    """The positions of the keys within ``bounds``."""
    found, before = [], 0
    for start, stop in keys:
        first = start + max(bounds.first - before, 0)
        last = start + min(bounds.last - before, stop - start)
        before += stop - start
        if first < last:
            found.append((first, last))
    return tuple(found)


def in_order(shards: Sequence[Tensor], layout: Sequence[Ranges]) -> Tensor:
    """Joins the shards of a sequence along the first dim, in the order of positions."""
    parts = {
        ranges: part
        for shard, held in zip(shards, layout, strict=True)
        for ranges, part in zip(held, shard.split([length((x,)) for x in held]), strict=True)
        if ranges[0] < ranges[1]
    }
    return torch.cat([parts[ranges] for ranges in sorted(parts)]) if parts else shards[0]
