"""Splits a call for plain PyTorch into blocks of rows, with the keys that they may attend to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from additive_attn.spec.call import Call, Inputs, Masking, Options
from additive_attn.spec.dropout import keep_mask
from additive_attn.spec.formula import attended_pairs, keep_factors
from additive_attn.spec.masks import allowed_pairs, check_masking, mask_block

# Elements of a block's energies for each thread; one row of one entry is the least that a block
# can hold. More threads share larger blocks, since torch gives none of them a small part.
_BLOCK_ELEMENTS = 2**19
_MOST_THREADS = 32

Span = tuple[int, int]


class Block(NamedTuple):
    """Rows and keys of some entries, computed at one time."""

    dim: int  # the batch dim that is divided, counted from the last, which is 1
    entries: tuple[int, int]  # range of this dim
    rows: tuple[int, int]
    spans: tuple[Span, ...]  # of keys

    def of_entries(self, tensor: Tensor, rank: int) -> Tensor:
        """Returns the part of the entries; ``rank`` is the number of dims that are not of the
        batch."""
        dim = tensor.dim() - rank - self.dim
        if dim < 0 or tensor.shape[dim] == 1:
            return tensor
        first, last = self.entries
        return tensor.narrow(dim, first, last - first)

    def of_rows(self, tensor: Tensor) -> Tensor:
        return self.of_entries(tensor, 2)[..., slice(*self.rows), :]

    # With several spans, these return copies: ``write`` stores to the tensor itself.

    def of_keys(self, tensor: Tensor) -> Tensor:
        tensor = self.of_entries(tensor, 2)
        return self.joined(lambda span: tensor[..., slice(*span), :], -2)

    def of_pairs(self, tensor: Tensor) -> Tensor:
        tensor = self.of_entries(tensor, 2)[..., slice(*self.rows), :]
        return self.joined(lambda span: tensor[..., slice(*span)], -1)

    def of_features(self, tensor: Tensor) -> Tensor:
        """Returns the part of ``(..., features, keys)``."""
        tensor = self.of_entries(tensor, 2)
        return self.joined(lambda span: tensor[..., slice(*span)], -1)

    def of_mask(self, attn_mask: Tensor) -> Tensor:
        mask = self.of_entries(attn_mask, 2)
        if mask.dim() == 0 or mask.shape[-1] == 1:
            return mask_block(mask, self.rows, self.spans[0])
        return self.joined(lambda span: mask_block(mask, self.rows, span), -1)

    def joined(self, of_span: Callable[[Span], Tensor], dim: int) -> Tensor:
        if len(self.spans) == 1:
            return of_span(self.spans[0])
        return torch.cat([of_span(span) for span in self.spans], dim)

    def write(self, part: str, tensor: Tensor, numbers: Tensor, add: bool = True) -> None:
        """Adds ``numbers`` to ``of_keys`` or another part of keys, or overwrites it."""
        each = [numbers]
        if len(self.spans) > 1:
            sizes = [stop - start for start, stop in self.spans]
            each = list(numbers.split(sizes, -2 if part == "of_keys" else -1))
        for span, own in zip(self.spans, each, strict=True):
            place = getattr(self._replace(spans=(span,)), part)(tensor)
            if add:
                # Keys may be shared by entries, and a mask by rows too.
                place += own if own.shape == place.shape else own.sum_to_size(place.shape)
            else:
                place.copy_(own)

    def of_batch(self, batch: torch.Size) -> torch.Size:
        sizes = list(batch)
        if self.dim <= len(sizes):
            sizes[-self.dim] = self.entries[1] - self.entries[0]
        return torch.Size(sizes)

    def inputs(self, inputs: Inputs) -> Inputs:
        query, key, value, weight = inputs
        return Inputs(
            self.of_rows(query), self.of_keys(key), self.of_keys(value), self.of_entries(weight, 1)
        )

    def masks(self, masking: Masking, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Returns the part of the dense mask, and the attended pairs; None where all are."""
        attn_mask, lengths, starts, table = masking[:4]
        if attn_mask is not None:
            attn_mask = self.of_mask(attn_mask)
        masking = masking._replace(
            lengths=None if lengths is None else self.of_entries(lengths, 1),
            starts=None if starts is None else self.of_entries(starts, 1),
            block_table=None if table is None else self.of_entries(table, 2),
        )
        if len(self.spans) == 1:
            allowed = allowed_pairs(masking, self.rows, self.spans[0], device)
            return attn_mask, attended_pairs(attn_mask, allowed)

        def of_span(span: Span) -> Tensor:
            allowed = allowed_pairs(masking, self.rows, span, device)
            assert allowed is not None  # a block table makes several spans
            return allowed

        return attn_mask, attended_pairs(attn_mask, self.joined(of_span, -1))

    def factors(self, options: Options, batch: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Returns the dropout factors D of equation 15."""
        seed, dropout_p, _ = options
        if seed is None:
            return None
        numbers = torch.arange(batch.numel(), device=seed.device).reshape(batch)
        own, numbers = self.of_entries(seed, 0), self.of_entries(numbers, 0)

        def of_span(span: Span) -> Tensor:
            return keep_mask(own, (), self.rows, span, dropout_p, entries=numbers)

        return keep_factors(self.joined(of_span, -1), dropout_p, dtype)


def blocks_of(call: Call, batch: torch.Size, pairs: int | None = None) -> Iterator[Block]:
    """Yields blocks of all rows of some entries, or of some rows of one entry: of up to ``pairs``
    pairs, or of as many as fit with their energies."""
    query, key, value, _ = call.inputs
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if any(x is not None for x in call[4:9]):
        check_masking(call.masking, batch, num_queries, num_keys, query.device)
    if batch.numel() == 0 or num_queries == 0 or num_keys == 0:
        return
    # The first dim of more than one entry is divided.
    dim = next((len(batch) - i for i, size in enumerate(batch) if size > 1), len(batch) + 1)
    count = batch[-dim] if dim <= len(batch) else 1
    masking = call.masking
    keys = KeptKeys(masking, dim, count, num_keys)
    left, right = masking.left, masking.right
    span = num_keys if left < 0 or right < 0 else min(num_keys, left + right + 1)
    # Nonfinite masked values take a tensor (..., Lq, Lk, Dv).
    masked = left >= 0 or right >= 0 or any(x is not None for x in masking[:4])
    features = max(query.shape[-1], value.shape[-1] if masked else 1, 1)
    unit = batch.numel() // count * (1 if pairs else features)
    threads = torch.get_num_threads() if query.device.type == "cpu" else _MOST_THREADS
    elements = pairs or _BLOCK_ELEMENTS * min(threads, _MOST_THREADS)
    rows_at_once = min(max(1, elements // (unit * span)), num_queries)
    entries_at_once = max(1, elements // (unit * span * num_queries))
    for entry in range(0, count, entries_at_once):
        entries = entry, min(entry + entries_at_once, count)
        row = 0
        while row < num_queries:
            some = rows_at_once
            while row + some < num_queries:  # more rows fit where ranges are short
                spans = keys.of(entries, (row, min(row + 2 * some, num_queries)))
                if 2 * some * sum(stop - start for start, stop in spans) * unit > elements:
                    break
                some *= 2
            rows = row, min(row + some, num_queries)
            if spans := keys.of(entries, rows):
                yield Block(dim, entries, rows, spans)
            row = rows[1]


class KeptKeys:
    """The spans of keys outside of which no row of a block may attend."""

    def __init__(self, masking: Masking, dim: int, count: int, num_keys: int) -> None:
        self.left, self.right, self.keys = masking.left, masking.right, num_keys

        def listed(numbers: Tensor | None, reduce: Callable[..., Tensor]) -> list[list[int]]:
            """Returns for each index of the divided dim the numbers of the rows, or one for
            all."""
            if numbers is None:
                return []
            numbers = torch.atleast_1d(numbers).clamp(0, num_keys)
            divided = numbers.dim() - 1 - dim
            numbers = numbers.movedim(divided, 0) if divided >= 0 else numbers.unsqueeze(0)
            lists = reduce(numbers.reshape(numbers.shape[0], -1, numbers.shape[-1]), 1).tolist()
            return lists * count if len(lists) == 1 else lists

        self.starts = listed(masking.starts, torch.amin)
        self.stops = listed(masking.lengths, torch.amax)
        self.table, self.tiles = None, masking.block_tiles
        if masking.block_table is not None:
            table = masking.block_table != 0
            divided = table.dim() - 2 - dim
            table = table.movedim(divided, 0) if divided >= 0 else table.unsqueeze(0)
            self.table = table.reshape(table.shape[0], -1, *table.shape[-2:]).any(1).cpu()

    def of(self, entries: tuple[int, int], rows: tuple[int, int]) -> tuple[Span, ...]:
        start, stop = self.range(entries, rows)
        if start >= stop:
            return ()
        if self.table is None or self.tiles is None:
            return ((start, stop),)
        _, block_rows, block_keys = self.tiles.shape
        table = self.table if len(self.table) == 1 else self.table[slice(*entries)]
        row_blocks = slice(rows[0] // block_rows, (rows[1] - 1) // block_rows + 1)
        kept = table[:, row_blocks].flatten(0, 1).any(0).nonzero().squeeze(-1).tolist()
        spans: list[Span] = []
        for block in kept:
            first, last = max(block * block_keys, start), min((block + 1) * block_keys, stop)
            if first >= last:
                continue
            if spans and spans[-1][1] == first:
                first = spans.pop()[0]
            spans.append((first, last))
        return tuple(spans)

    def range(self, entries: tuple[int, int], rows: tuple[int, int]) -> Span:
        first, last = rows[0], rows[1] - 1
        start = max(first - self.left, 0) if self.left >= 0 else 0
        stop = min(last + self.right + 1, self.keys) if self.right >= 0 else self.keys
        own = slice(*entries)
        if self.starts:
            start = max(start, min(min(_part(x, rows)) for x in self.starts[own]))
        if self.stops:
            stop = min(stop, max(max(_part(x, rows)) for x in self.stops[own]))
        return min(start, stop), stop


def _part(numbers: list[int], rows: tuple[int, int]) -> list[int]:
    return numbers if len(numbers) == 1 else numbers[slice(*rows)]
