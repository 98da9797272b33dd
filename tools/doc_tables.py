"""Renews the tables of the documentation that are made from csv rows.

python -m tools.doc_tables

A table lies between two comments, of which the first names the command that prints it:
<!-- table: python -m benchmarks.table FILE.csv --> and <!-- end of table -->.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

from benchmarks import heads, second_order, sparse, table
from benchmarks.arguments import parser_of
from benchmarks.decoders import table as decoders
from tools import feature_table, parallel_table

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("speed", "parallel", "features")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
TABLE = re.compile(
    r"(<!-- table: python -m ([\w.]+)(.*?) -->\n).*?(<!-- end of table -->)", re.DOTALL
)
MAKERS = {
    "benchmarks.table": table.main,
    "benchmarks.decoders.table": decoders.main,
    "benchmarks.heads": heads.main,
    "benchmarks.sparse": sparse.main,
    "benchmarks.second_order": second_order.main,
    "tools.feature_table": feature_table.main,
    "tools.parallel_table": parallel_table.main,
}


def renewed(page: Path) -> str:
    """The text of a page with its tables made again."""

    def made_again(match: re.Match[str]) -> str:
        sys.argv[1:] = match[3].split()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            MAKERS[match[2]]()
        *runs, rows = printed.getvalue().strip().split("\n\n")
        lines = []
        for run in runs:
            path, machine = run.strip().split("\n")
            lines.append(f"- [{path}]({os.path.relpath(ROOT / path, page.parent)}): {machine}")
        body = "\n\n".join([rows, *(["\n".join(lines)] if lines else [])])
        return f"{match[1]}\n{body}\n\n{match[4]}"

    return TABLE.sub(made_again, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser_of("tools.doc_tables", __doc__).parse_args()
    for page in PAGES:
        page.write_text(renewed(page), encoding="utf-8")
