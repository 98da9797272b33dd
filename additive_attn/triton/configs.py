"""Block sizes, as plain functions of shape and target. Tuned by reading machine code: see
``tests/test_triton_code.py`` for what it must hold to."""

from __future__ import annotations

from dataclasses import dataclass

WORKSPACE_ELEMENTS = 2**22  # scores that are kept at a time: 16 MB in float32, which caches hold


@dataclass(frozen=True)
class Tile:
    """RM x RN pairs per thread, TM x TN threads."""

    RM: int
    TM: int
    RN: int
    TN: int

    @property
    def rows(self) -> int:
        return self.RM * self.TM

    @property
    def keys(self) -> int:
        return self.RN * self.TN

    @property
    def warps(self) -> int:
        return max(1, self.TM * self.TN // 32)

    def sizes(self) -> dict[str, int]:
        return {"RM": self.RM, "TM": self.TM, "RN": self.RN, "TN": self.TN}


def score_tile(rows: int, wide: bool = False) -> Tile:
    """For tiles of scores; ``wide``: in float64, whose numbers take two registers."""
    if wide:
        return Tile(2, 8, 2, 16) if rows > 8 else Tile(2, 2, 2, 64)
    if rows >= 24:
        return Tile(4, 16, 4, 16)
    if rows > 8:
        return Tile(4, 4, 4, 32)
    return Tile(4, 2, 2, 64) if rows > 4 else Tile(2, 2, 2, 64)


def splits(programs: int, keys: int, block: int, processors: int) -> int:
    """Into how many ranges the keys are split, so that every multiprocessor has work."""
    wanted = -(-2 * processors // max(programs, 1))
    return max(1, min(wanted, keys // (4 * block)))


# In the passes over features: RX rows (or keys) by 2 RH features per thread, TX by TH threads.
GRADIENT_TILE = {"RX": 4, "TX": 16, "RH": 2, "TH": 16}
GRADIENT_BLOCK = 64  # keys (or rows) between two additions of partial sums
