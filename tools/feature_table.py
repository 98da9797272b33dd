"""Which features the tests compute, on which paths and in which dtypes, from the csv file that
``make features`` writes.

python -m tools.feature_table benchmarks/results/features.csv
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator

from benchmarks.arguments import parser_of

PATHS = {
    "avx512": "AVX-512", "avx2": "AVX2", "baseline": "baseline", "plain": "plain PyTorch",
    "triton": "Triton, interpreted",
}  # fmt: skip
DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
GROUPS = {
    "": "attention", "scores": "`additive_scores`", "step": "a decoder's step",
    "sharded": "over processes",
}  # fmt: skip
Cells = dict[str, dict[tuple[str, str], set[str]]]  # feature: (path, dtype): directions
Hole = tuple[str, str, str]  # feature, path, dtype

_SIXTEEN = "keys have 16 bits, or those of the queries"
_PLAIN = "plain PyTorch on a GPU"
_COMPOSED = (
    *("forward mode", "forward mode of scores"),
    *("second derivatives", "second derivatives of scores"),
    "sharded: sequence, second derivatives",
)
# Why a feature does not run on a path in a dtype.
REASONS: dict[Hole, str] = {
    ("step: keys of fewer bits than queries", path, dtype): _SIXTEEN
    for path in PATHS
    for dtype in ("float64", "float32")
} | {(feature, "triton", dtype): _PLAIN for feature in _COMPOSED for dtype in DTYPES}


def read(file: str) -> Cells:
    cells: Cells = defaultdict(lambda: defaultdict(set))
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                cells[row["feature"]][row["path"], row["dtype"]].add(row["direction"])
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise SystemExit(f"{file} does not hold rows of make features: {error!r}") from None
    return cells


def holes(cells: Cells) -> Iterator[Hole]:
    """Where a feature did not run, or not in each direction in which it runs elsewhere."""
    for feature, found in cells.items():
        directions = set().union(*found.values())
        for path in PATHS:
            for dtype in DTYPES:
                if found.get((path, dtype), set()) != directions:
                    yield feature, path, dtype


def main() -> None:
    parser = parser_of("tools.feature_table", __doc__)
    parser.add_argument("file", help="csv file that make features writes")
    cells = read(parser.parse_args().file)
    missing = set(holes(cells))
    print(f"| of | feature | {' | '.join(PATHS.values())} |\n|---|---|{'---|' * len(PATHS)}")
    for feature in sorted(cells, key=lambda x: (x.rpartition(": ")[0], x.lower())):
        group, _, name = feature.rpartition(": ")
        reasons = {text for (of, *_), text in REASONS.items() if of == feature}
        columns = []
        for path in PATHS:
            ran = [
                short for dtype, short in DTYPES.items() if (feature, path, dtype) not in missing
            ]
            columns.append("all" if len(ran) == len(DTYPES) else ", ".join(ran) or "none")
        print(f"| {GROUPS[group]} | {'; '.join([name, *reasons])} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
