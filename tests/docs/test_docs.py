"""The documentation is true: its code runs, its links have targets, its equations exist."""

from __future__ import annotations

import csv
import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.table import duration, loses
from tools import doc_tables, feature_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

pytestmark = pytest.mark.skipif(not PAGES[0].is_file(), reason="README.md is not here")


def code_blocks(text: str) -> list[re.Match[str]]:
    return list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


WITH_CODE = [page for page in PAGES if page.is_file() and code_blocks(page.read_text("utf-8"))]


def test_the_pages_that_users_start_from_have_code():
    assert {page.name for page in WITH_CODE} >= {"README.md", "usage.md", "migration.md"}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_python_code_runs(page, tmp_path, monkeypatch):
    """Runs the blocks of a page in order and in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)  # some write files
    monkeypatch.setenv("MPLBACKEND", os.environ.get("MPLBACKEND", "Agg"))
    text = page.read_text(encoding="utf-8")
    if "plot_attention" in text:
        pytest.importorskip("matplotlib")
    if "import onnxruntime" in text:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in code_blocks(text):
        # Leading blank lines make tracebacks show line numbers of the page.
        lines_before = text.count("\n", 0, block.start(1))
        code = compile("\n" * lines_before + block[1], str(page), "exec")
        exec(code, namespace)
        # The replacement example states these results in a comment.
        if "# (1, 20) and (1, 10)" in block[1]:
            assert namespace["out"].shape == (1, 20)
            assert namespace["weights"].shape == (1, 10)


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_within_the_project(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        goal = (page.parent / name) if name else page
        assert goal.exists(), f"{page.name} links to {target}, which is missing"
        if anchor:
            assert anchor in anchors(goal), f"{page.name} links to {target}, which is no heading"


def test_architecture_names_what_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    folders = ("additive_attn", "csrc", "tests", "tools", "benchmarks")
    found = itertools.chain.from_iterable((ROOT / name).rglob("*") for name in folders)
    files = [path for path in found if path.suffix in {".py", ".h", ".cpp", ".inc"}]
    named = set(re.findall(r"\w+\.(?:py|h|cpp|inc)\b", text))
    assert named <= {path.name for path in files}
    whole = ("ops", "backends/triton", "spec", "distributed")
    for folder in (*(ROOT / "additive_attn" / name for name in whole), ROOT / "csrc"):
        there = {path.name for path in files if path.is_relative_to(folder)}
        assert there - {"__init__.py"} <= named, folder


def test_cited_equations_exist():
    """The code cites equations of docs/math.md by number."""
    defined = set(re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs" / "math.md").read_text("utf-8")))
    assert defined == {str(number) for number in range(1, len(defined) + 1)}
    for folder in ("csrc", "additive_attn"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in {".h", ".cpp", ".inc", ".py"}:
                continue
            text = path.read_text(encoding="utf-8")
            for cited in re.findall(r"math\.md, eqs?\. ([\d, and]+\d|\d+)", text):
                numbers = set(re.findall(r"\d+", cited))
                assert numbers <= defined, f"{path} cites equation {cited}, which is not there"


@pytest.mark.parametrize("page", doc_tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_csv_files(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["doc_tables"])
    text = page.read_text("utf-8")
    assert "<!-- table:" in text
    assert doc_tables.renewed(page) == text, "renew them with: python -m tools.doc_tables"


def test_prose_about_the_gpu_has_the_figures_of_the_csv_files():
    folder = ROOT / "benchmarks" / "results" / "nvidia-h200"
    known = {(each.shape, each.dtype, each.mode): each for each in rows.read(folder / "speed.csv")}

    def found(mode, shape=(1, 4096, 4096, 128, 128)):
        case = known[shape, "float32", mode]
        return case.milliseconds("fused"), case.milliseconds("compile sum")

    fused, compiled = found("forward")
    forward, rate = f"{compiled / fused:.1f}", 4096**2 * 128 / fused / 1e9
    fused, compiled = found("full")
    full = f"{compiled / fused:.0f}"
    readme, speed = (
        " ".join((ROOT / name).read_text("utf-8").split())
        for name in ("README.md", "docs/speed.md")
    )
    assert f"{forward} times as fast as `torch.compile` forward and {full} times" in readme
    words = "takes {}, and {} under `torch.compile`"
    assert words.format(*map(duration, found("forward", (32, 50, 50, 1024, 1024)))) in readme
    assert "no call of the table is slower" in readme and not any(map(loses, known.values()))
    assert f"{rate:.1f}e12 tanh per second" in speed
    assert f"It is {forward} times as fast as `torch.compile`; the aim" in speed
    assert f"Forward + backward is {full} times as fast." in speed

    def noted(name, mode, what, shape):
        with (folder / f"{name}-ea58f24.csv").open(newline="") as file:
            (value,) = (
                float(row["value"]) for row in csv.DictReader(file)
                if (row["shape"], row["mode"], row["what"]) == (str(shape), mode, what)
                and row["unit"] in ("us", "us on the GPU")
            )  # fmt: skip
        return value

    score = noted("kernels", "full", "score_kernel", (1, 4096, 4096, 128, 128))
    assert f"computes {4096**2 * 128 / score / 1e6:.1f}e12 (`score_kernel`)" in speed
    once, both = (
        noted("host", mode, "fused returned", (1, 1, 10, 32, 20)) for mode in ("forward", "full")
    )
    assert f"takes {once:.0f} µs of its time forward and {both:.0f} µs forward + backward" in speed


def test_no_feature_is_left_out_without_a_reason():
    cells = feature_table.read(str(ROOT / "benchmarks" / "results" / "features.csv"))
    holes = set(feature_table.holes(cells))
    bad = holes - feature_table.REASONS.keys()
    assert len(cells) > 40 and not bad, "renew it with: make features"
    assert holes == feature_table.REASONS.keys()
