"""Block sizes, as plain functions of shape and target. Tuned by reading machine code: see
``tests/test_triton_code.py`` for what it must hold to."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from additive_attn.backends.triton.tuned import TUNED

WORKSPACE_ELEMENTS = 2**24  # scores that are kept at a time: 64 MB in float32

# Up to so many pairs a backward is few launches: with more the host takes longer than the device.
SMALL_PAIRS = 2**22

SUMMED_KEYS = 2**14  # tiles of rows times keys: with more, programs of their own add up dk

DIFFERENCE_MAX_FEATURES = 64  # more take the matched form

# So many features are shared out over groups of threads where tiles of pairs are few: by whole
# blocks of features, and each group takes an even number of quads.
SHARED_FEATURES, SPLIT = 256, 4

LONG = 24  # shorter rows or columns have tiles of their own, which are not tuned


def power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least n and 1."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """RM x RN pairs per thread, TM x TN threads; so many times SPLIT, which share the features."""

    RM: int
    TM: int
    RN: int
    TN: int
    SPLIT: int = 1

    @property
    def rows(self) -> int:
        return self.RM * self.TM

    @property
    def keys(self) -> int:
        return self.RN * self.TN

    @property
    def warps(self) -> int:
        return max(1, self.SPLIT * self.TM * self.TN // 32)

    def sizes(self) -> dict[str, int]:
        return {"RM": self.RM, "TM": self.TM, "RN": self.RN, "TN": self.TN, "SPLIT": self.SPLIT}


def score_tile(rows: int, wide: bool = False) -> Tile:
    """Returns the tile of scores; ``wide``: in float64, whose numbers take two registers."""
    if wide:
        return Tile(2, 8, 2, 16) if rows > 8 else Tile(2, 2, 2, 64)
    if rows >= 24:
        return Tile(8, 8, 4, 16)
    if rows > 8:
        return Tile(4, 4, 4, 32)
    return Tile(4, 2, 2, 64) if rows > 4 else Tile(2, 2, 2, 64)


def attend_tile(rows: int, features: int, wide: bool, values: int, least: int, size: int) -> Tile:
    """For attention in one pass. A row lies within a warp, so that its softmax needs no other,
    unless tiles are few and warps share many features. ``least``: how many tiles of rows all
    multiprocessors need; ``size``: bytes of a number. Many rows share what is loaded of keys and
    values, but leave fewer registers for products."""
    if wide:
        return Tile(2, 8, 2, 16)
    shared = features >= SHARED_FEATURES
    if rows < 24:
        TM = 4 if rows > 8 else 2
        few = -(-rows // (4 * TM)) < least
        return Tile(4, TM, 2, 16, SPLIT) if few and shared else Tile(4, TM, 4, 32)
    RM = 8 if size == 2 or values > 64 else 4
    while RM > 2 and -(-rows // (8 * RM)) < least:
        RM //= 2
    if RM == 8 and features > DIFFERENCE_MAX_FEATURES:
        # In the matched form a thread keeps more numbers of a row than of a key.
        return Tile(4, 16, 8, 8)
    return Tile(4, 4, 4, 16, SPLIT) if RM == 2 and shared else Tile(RM, 8, 4, 16)


def attend_columns(values: int, wide: bool, tile: Tile, size: int) -> int:
    """Returns how many numbers of a value are summed at a time: all of them, or some. If all are,
    the compiler stores to local memory what registers do not hold, once a tile. If some are, the
    kernel loads and stores the sums of each block of columns. With 16 bits and more than 64
    columns, the compiler would store numbers of the loop over features, so fewer are summed."""
    columns = power_of_two(max(values, 16))
    if wide or tile.keys > 64:
        return min(columns, 32)
    return columns if columns <= (64 if size == 2 else 128) else 64


def flag_tiles(tile: Tile, keys: int) -> int:
    """Returns of how many tiles a program of ``keys`` keys loads the flags at once, so that its
    threads wait once. More tiles would take more registers."""
    return max(1, min(256, power_of_two(keys)) // tile.keys)


def is_small(entries: int, rows: int, keys: int, row_tiles: int) -> bool:
    """Whether the pass over features adds up all sums."""
    return entries * rows * keys <= SMALL_PAIRS and row_tiles * keys <= SUMMED_KEYS


def row_pass_tile(
    entries: int, rows: int, keys: int, features: int, values: int, size: int, processors: int
) -> Tile | None:
    """Returns the tile for P and G of rows in one kernel, which is used where the host takes
    longer than the device, and where tiles of rows alone fill it or a row has few tiles; None
    elsewhere."""
    tile = attend_tile(rows, features, False, values, -(-processors // entries), size)
    # Its flags are of whole blocks of keys of the pass over features.
    tile = replace(tile, RN=max(tile.RN, gradient_block(keys) // tile.TN))
    few = entries * -(-rows // tile.rows) < processors and keys > 2 * tile.keys
    return None if few else tile


def row_pass_blocks(tile: Tile, values: int, padded_keys: int) -> dict[str, int]:
    """Returns the blocks of that kernel: BD numbers of a value, and ROWS x BLOCK pairs, 16 per
    thread."""
    BLOCK = min(512, power_of_two(max(padded_keys, 16)))
    ROWS = max(2, min(tile.rows, 512 * tile.warps // BLOCK))
    return {"BD": min(32, power_of_two(max(values, 16))), "ROWS": ROWS, "BLOCK": BLOCK}


def row_block(keys: int) -> dict[str, int]:
    """Returns the block of passes over rows of scores, one program each."""
    return {"BLOCK": 256, "num_warps": 2} if keys <= 4096 else {"BLOCK": 2048, "num_warps": 8}


def row_tile(padded_keys: int, wide: bool) -> dict[str, int]:
    """Returns the tile for G of ROWS rows: 16 numbers of each of two tensors per thread, fewer of
    short rows. WHOLE: a row at once."""
    BLOCK = min(1024 if wide else 4096, power_of_two(max(padded_keys, 16)))
    ROWS = max(2, min(8, 2048 // BLOCK))
    return {
        "ROWS": ROWS, "BLOCK": BLOCK, "WHOLE": BLOCK >= padded_keys,
        "num_warps": min(16, max(2, ROWS * BLOCK // 512)),
    }  # fmt: skip


def prepare_tile(padded: int) -> dict[str, int]:
    """Features of eight rows at a time, 16 or 32 numbers per thread. SEVERAL: a program takes
    several groups of rows, and sorts features once. Of many features an H200 waited for what it
    read of the code, when that was twice as long; of few, more and smaller programs took less
    time there."""
    BLOCK = min(1024, power_of_two(max(padded, 32)))
    SEVERAL = 512 < padded <= BLOCK
    return {
        "BLOCK": BLOCK,
        "WHOLE": BLOCK >= padded,
        "SEVERAL": SEVERAL,
        "num_warps": 16 if SEVERAL else max(min(2, BLOCK // 64), BLOCK // 128, 1),
    }


def gradient_tile(rows: int, padded: int, wide: bool = False) -> dict[str, int]:
    """Returns the tile of the pass over features: RX rows by two features per thread, TX by TF
    lanes of TW warps. Each tile of RX TX rows stores its sums of all keys."""
    TX = 8 if wide or rows >= 128 else 4 if rows >= LONG else 2
    TF = 32 // TX
    TW = min(4, power_of_two(-(-padded // (2 * TF))))
    if not wide and padded % (2 * TW * TF):
        TW = min(2, TW)
    RX = 8 if rows > 8 else 4 if rows > 4 else 2
    return {"RX": 2 if wide else RX, "TX": TX, "TW": TW, "TF": TF, "num_warps": TW}


# Of a thread of that pass, outside of float64: three programs run at a time, so that while one
# waits the others compute.
GRADIENT_REGISTERS = 168


def resident(threads: int, registers: int) -> int:
    """Returns how many programs a multiprocessor runs at a time, by their registers."""
    return max(1, 65536 // (threads * -(-registers // 8) * 8))


def key_sum_tile(keys: int, row_tiles: int, padded: int) -> dict[str, int]:
    """Returns the tile of the sums over tiles of rows: BLOCK keys by FEATURES, TILES of them
    loaded at a time. Up to 64 keys are one block, which also adds up dw."""
    if 16 < keys <= 64:
        return {"BLOCK": 64, "FEATURES": 32, "TILES": min(2, row_tiles), "num_warps": 4}
    TILES = 1 if row_tiles == 1 else 8
    FEATURES = min(128 if row_tiles == 1 else 32, power_of_two(padded))
    return {"BLOCK": 16, "FEATURES": FEATURES, "TILES": TILES, "num_warps": 4}


def summed_tiles(tile: dict[str, int], row_tiles: int) -> int:
    """Returns the same for the pass over features: how many tiles of rows are loaded at a time, 32
    numbers per thread."""
    return 1 if row_tiles == 1 else 32 // tile["TF"]


def value_tile(values: int) -> dict[str, int]:
    """Returns the tile for dV of KEYS keys, beside the pass over features: ROWS rows at a time."""
    return {"KEYS": 32, "VALUES": 16 if values <= 16 else 32, "ROWS": 32}


def gradient_block(length: int) -> int:
    """Returns how many keys (or rows) lie between two additions of partial sums; lengths are
    padded to whole blocks."""
    return 64 if length > 16 else 16


DECODE_KEYS = 16  # one query per entry: ranges of keys are a multiple of it


@functools.cache
def decode_tile(
    hidden: int, values: int, wide: bool, size: int, summed: bool = True
) -> dict[str, int]:
    """All features of a block of keys at a time, if they are few, so that all loads, of numbers of
    ``size`` bytes, are on their way at once: about 32 KB. ``summed``: a program keeps sums over
    keys of all VALUES in registers."""
    FEATURES = min(power_of_two(max(hidden, 16)), 64 if wide else 512)
    VALUES = min(power_of_two(max(values, 16)), (256 if wide else 1024) if summed else FEATURES)
    return {
        "BLOCK": 16 if (FEATURES + VALUES) * size <= 2560 else 8,
        "FEATURES": FEATURES,
        "WHOLE": FEATURES >= hidden,
        "VALUES": VALUES,
        "num_warps": 4,
    }


def decode_registers(tile: dict[str, int], size: int) -> int:
    """Four programs of a multiprocessor take 128 per thread; 64 numbers of float32 in each thread
    take more."""
    numbers = tile["BLOCK"] * max(tile["FEATURES"], tile["VALUES"])
    return 128 if size < 8 and numbers * size <= 2**14 else 255


def merge_tile(values: int, splits: int, wide: bool) -> dict[str, int]:
    """Returns the tile of a merge, 16 numbers per thread: of many splits, or of several rows."""
    CHUNK = min(64, power_of_two(splits))
    VALUES = min(power_of_two(max(values, 16)), max(32, 1024 // CHUNK))
    ROWS = max(1, (1024 if wide else 2048) // (CHUNK * VALUES))
    return {
        "ROWS": ROWS, "VALUES": VALUES, "KEYS": max(16, 1024 // ROWS), "CHUNK": CHUNK,
        "num_warps": 4,
    }  # fmt: skip


def merged_ranges(tile: Tile, columns: int, values: int, splits: int) -> int:
    """Returns how many ranges of keys one program merges at a time, 64 numbers per thread; 0 where
    there are so many numbers that separate programs take less time."""
    if splits * tile.rows * values > 2**15:
        return 0
    return max(1, 2048 * tile.warps // (tile.rows * columns))


def sum_tile(splits: int) -> dict[str, int]:
    """Returns the tile of sums over splits alone."""
    CHUNK = min(64, power_of_two(splits))
    return {"CHUNK": CHUNK, "BLOCK": max(32, 1024 // CHUNK), "num_warps": 2}


def location_tile(hidden: int, filters: int) -> dict[str, int]:
    """The gradient of a location weight, FILTERS x FEATURES, is kept in registers; products of
    more features would take too many for their operands."""
    FILTERS = power_of_two(max(filters, 16))
    FEATURES = 32 if FILTERS <= 32 and hidden > 16 else 16
    return {
        "BLOCK": DECODE_KEYS,
        "FEATURES": FEATURES,
        "FILTERS": FILTERS,
        "num_warps": 4 if FILTERS <= 32 else 8,
    }


def correlation_tile(outputs: int) -> dict[str, int]:
    """Returns the tile of a correlation: BF outputs by BX places, TERMS of the sums at a time."""
    return {"BF": 32 if outputs > 16 else 16, "BX": 32, "TERMS": 16, "num_warps": 4}


def changed(kept: Any, change: Any) -> Any:
    """Returns a function like ``kept`` that returns something else for long rows and columns,
    outside of float64: ``change``, or what ``kept`` returns with these fields changed."""
    if not callable(kept):
        return change

    def function(length: int, *rest: Any, **options: Any) -> Any:
        own = kept(length, *rest, **options)
        if length < LONG or any(x is True for x in (*rest, *options.values())):
            return own
        if isinstance(own, Tile):
            return replace(own, **change)
        return {**own, **change} if isinstance(own, dict) else change

    return function


for _name, _change in TUNED.items():
    globals()[_name] = changed(globals()[_name], _change)
