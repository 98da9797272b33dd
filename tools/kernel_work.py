"""What one program of each Triton kernel does, for ``machine_code``: the loops on its path, and
how often each runs, from the arguments of a launch.

A new kernel gets a function here, named like it, or its name in ``PER_ROW``. ``a`` holds the
arguments that are numbers, constexprs among them, by their names in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from tools.control_flow import Through


@dataclass(frozen=True)
class Work:
    """``tanh``: how many one iteration of the first loop, the hot one, computes in each thread; 0
    if it computes none."""

    through: tuple[Through, ...]
    tanh: int = 0


# Their work grows with the rows or the keys, not with the pairs.
PER_ROW = {"prepare_kernel", "merge_kernel"}


def _scores(a: SimpleNamespace, *around: float) -> Through:
    """The loop over features, eight at a time, inside loops with these trips."""
    pairs = a.RM * a.RN
    if a.DIFFERENCE:  # the direct form has as many special functions, but few additions
        return Through({"MUFU": 2 * pairs, "FADD": 8 * pairs}, (a.padded / 8, *around))
    return Through({"MUFU": 2 * pairs, "MUFU.EX2": 0}, (a.padded / 8, *around))


def score_kernel(a: SimpleNamespace) -> Work:
    return Work((_scores(a),), 8 * a.RM * a.RN)


def attend_kernel(a: SimpleNamespace) -> Work:
    """The loop around all others runs again only where a value is not finite."""
    tanh = 8 * a.RM * a.RN
    tiles = min(a.keys_per_split, a.keys) / (a.RN * a.TN)
    flagged = min(a.FLAGS, tiles)  # so many tiles are searched at once for special pairs
    hot = _scores(a, tiles, 1)
    # The product of their sketches is of float16 on all targets, that with values is not counted
    # where these are.
    special = Through({r"HMMA\.16816\.F32$": 1}, share=1 / flagged)
    if not a.MEMORY:
        return Work((hot, special), tanh)
    columns = a.values / a.BD
    products = Through({"HGMMA|HMMA|LDTM": 1, "MUFU": 0}, (columns, tiles, 1))
    results = Through({"LDG": 1, "STG": 1, "MUFU": 0}, (columns, 1))
    return Work((hot, special, products, results), tanh)


def row_pass_kernel(a: SimpleNamespace) -> Work:
    return Work((_scores(a, a.keys_per_split / (a.RN * a.TN)),), 8 * a.RM * a.RN)


def row_gradient_kernel(a: SimpleNamespace) -> Work:
    if a.WHOLE:
        return Work(())
    per_thread = a.ROWS * a.BLOCK // (32 * a.num_warps)
    trips = (min(a.keys_per_split, a.key_padded) / a.BLOCK,)
    sums, stores = Through({"MUFU": per_thread}, trips), Through({"STG": 1}, trips)
    return Work({0: (sums, stores), 1: (sums,), 2: (stores,)}[a.PHASE])


def feature_kernel(a: SimpleNamespace) -> Work:
    # Of four keys, two have one reciprocal for two features, and two have one for each. An
    # iteration takes two such fours, for some targets and where the kernel adds up all sums one.
    fours = 1 if a.arch == 100 or a.TILES else 2
    loop = {"MUFU": fours * 6 * a.RX, "MUFU.EX2": 0}
    keys = min(a.keys_per_split, a.key_count)
    return Work((Through(loop, (a.BLOCK / (4 * fours), keys / a.BLOCK)),), fours * 8 * a.RX)


def key_sum_kernel(a: SimpleNamespace) -> Work:
    return Work((Through({"LDG": 1, "FADD": 1}, (-(-a.row_tiles // a.TILES),)),))


WORK: dict[str, Callable[[SimpleNamespace], Work]] = {
    function.__name__: function
    for function in (
        score_kernel, attend_kernel, row_pass_kernel, row_gradient_kernel,
        feature_kernel, key_sum_kernel,
    )
}  # fmt: skip
