"""Splits a call into pieces that fit the workspace, with their keys, and a reduced index into
ranges."""

from __future__ import annotations

from typing import NamedTuple

from additive_attn.backends.triton import tiles


class Piece(NamedTuple):
    """Some rows of some entries."""

    entry: int
    entries: int
    row: int
    rows: int


def workspace_pieces(
    entries: int, rows: int, keys: int, left: int, right: int, wide: bool, row_block: int = 1,
    features: int = 0,
) -> list[Piece]:  # fmt: skip
    """Returns pieces whose scores, padded to whole blocks, fit the workspace, and whose sums of
    ``features`` numbers per key, except those of one tile of rows, fit twice as much. Two rows
    count as fitting: the quads of queries hold twins (``quad_layout.py``), which no two pieces may
    share."""
    budget = tiles.WORKSPACE_ELEMENTS
    key_block = tiles.score_tile(rows, wide).keys

    def size(some_rows: int) -> int:
        some_keys = max(1, min(keys, some_rows + left + right))
        scores = -(-some_rows // row_block) * row_block * (-(-some_keys // key_block) * key_block)
        tile = tiles.gradient_tile(some_rows, features, wide)
        further_tiles = -(-some_rows // (tile["RX"] * tile["TX"])) - 1
        return max(scores, further_tiles * some_keys * features // 2)

    some_rows = rows
    while some_rows > 2 and size(some_rows) > budget:
        some_rows = -(-some_rows // 4) * 2
    if some_rows < rows and some_rows > 64:
        some_rows = some_rows // 64 * 64
    some_entries = 1
    if some_rows == rows:
        some_entries = max(1, min(entries, budget // size(rows)))
    return [
        Piece(n, min(some_entries, entries - n), i, min(some_rows, rows - i))
        for n in range(0, entries, some_entries)
        for i in range(0, rows, some_rows)
    ]


def key_range(row_begin: int, row_end: int, keys: int, left: int, right: int) -> tuple[int, int]:
    """Returns the keys that rows [row_begin, row_end) may attend to, regardless of lengths and
    mask."""
    # A multiple of four, since dropout factors are drawn by fours, and of what is loaded at once.
    low = min(max(0, row_begin - left), keys) // 16 * 16
    return low, max(low, min(keys, row_end + right))


def splits(programs: int, length: int, block: int, processors: int) -> tuple[int, int]:
    """Returns into how many ranges of whole blocks a reduced index is split, and how long they
    are, so that every multiprocessor has work."""
    wanted = max(1, min(4 * processors // max(programs, 1), length // (4 * block)))
    per_split = max(1, -(-length // (wanted * block))) * block
    return max(1, -(-length // per_split)), per_split


def pass_splits(programs: int, length: int, block: int, resident: int) -> tuple[int, int]:
    """Returns ``splits`` where ``resident`` programs run at a time, each to its end: one round of
    them, or two where that leaves fewer idle."""
    programs = max(programs, 1)
    once, twice = max(1, resident // programs), max(1, 2 * resident // programs)
    fill = [n * programs / (-(-n * programs // resident) * resident) for n in (once, twice)]
    wanted = min(twice if fill[1] > 1.2 * fill[0] else once, max(1, length // (2 * block)))
    per_split = max(1, -(-length // (wanted * block))) * block
    return max(1, -(-length // per_split)), per_split


def decode_splits(
    programs: int, keys: int, processors: int, located: bool = False
) -> tuple[int, int]:
    """Returns ``splits`` of the keys of one query per entry. There are three times as many where
    no more than 64 are merged, so that the last programs leave fewer processors idle; not with a
    location term, whose parts are large. A range has at most 64 blocks: more would be added up one
    after the other, each with a rounding of the whole sum."""
    block = tiles.DECODE_KEYS
    wanted, _ = splits(programs, keys, block, processors)
    if keys > 4 * block and not located:
        wanted = max(wanted, min(64, 12 * processors // max(programs, 1), keys // block))
    per_split = min(max(1, -(-keys // (wanted * block))), 64) * block
    return max(1, -(-keys // per_split)), per_split
