"""Benchmarks show numbers of this machine, name what was measured, and overwrite no file."""

from __future__ import annotations

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import ON_KERNEL

from benchmarks import heads, rows, run, second_order, sparse, table
from benchmarks.cases import SPEED, parse

ROOT = Path(__file__).resolve().parents[2]
OF_THE_KERNEL = pytest.mark.skipif(
    not ON_KERNEL, reason="plain PyTorch is not measured under the kernel's name"
)


def example(provider="fused", **changes):
    facts = {
        "device": "cpu", "name": "Z80", "threads": 1, "isa": "avx2", "torch": "2",
        "additive_attn": "0", "python": "3", "commit": "c", "mode": "forward",
        "date": "2026-01-02 03:04",
        "suite": "speed", "what": "", "B": 1, "Lq": 1, "Lk": 10, "H": 32, "Dv": 20, "options": "",
        "dtype": "float32", "provider": provider, "median_ms": 2.0, "q20_ms": 1.5, "q80_ms": 2.5,
    }  # fmt: skip
    return {**facts, **changes}


def test_plain_pytorch_is_not_measured_under_the_name_of_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(run.dispatch, "cpu_path", lambda: "pytorch")
    monkeypatch.setattr(sys, "argv", ["run", "--output", str(tmp_path / "rows.csv")])
    with pytest.raises(SystemExit, match="plain PyTorch under the name of the fused layer"):
        run.main()
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_asked_for_stands_in_the_rows(tmp_path):
    output = tmp_path / "rows.csv"
    options = "--suite 1x1x10x32x20 --modes forward --path pytorch --rounds 2 --budget 0.01"
    providers = ["--providers", "plain", "fused", "pytorch path"]
    command = [sys.executable, "-m", "benchmarks.run", *options.split(), *providers]
    result = subprocess.run(
        [*command, "--output", output], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    with output.open() as file:
        measured = {row["provider"]: row["isa"] for row in csv.DictReader(file)}
    ours = "pytorch path"
    assert measured.keys() == {"plain", ours} and measured[ours] == "pytorch"
    # The run prints its own table at the end.
    assert os.path.relpath(output, ROOT) in result.stdout and f"memory {ours}" in result.stdout
    assert " to " in result.stdout and "\r" not in result.stdout


def test_a_run_that_is_stopped_replaces_nothing(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    rows.write(path, [example()])
    before = path.read_text()

    def stopped():
        yield example(median_ms=3.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows.write(path, stopped())
    assert path.read_text() == before
    part = tmp_path / "rows.part.csv"
    assert str(part) in capsys.readouterr().err and len(rows.read(part)) == 1


def test_runs_go_to_files_that_git_ignores():
    command = ["git", "check-ignore", "-q", rows.LOCAL / "any.csv"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_the_newest_run_of_this_checkout_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    rows.write(tmp_path / "other" / "speed.csv", [example()])
    (tmp_path / "other" / "heads.csv").write_text("B,mode,provider\n1,full,fused\n")
    assert list(rows.chosen_files([])) == [tmp_path / "other" / "speed.csv"]
    assert "of other machines" in capsys.readouterr().out
    for age, name in enumerate(["new.csv", "old.csv", "newer.part.csv"]):
        rows.write(rows.LOCAL / name, [example()])
        os.utime(rows.LOCAL / name, times=(2e9 - age, 2e9 - age))
    assert list(rows.chosen_files([])) == [rows.LOCAL / "new.csv"]


def test_tables_name_their_file_and_their_cases(tmp_path, capsys):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    rows.write(first, [example(), example("plain", median_ms=8.0), example("plain", mode="full")])
    rows.write(second, [example(isa="avx512", median_ms=1.0), example("plain", median_ms=8.0)])
    table.show([first], spread=True)
    shown = capsys.readouterr().out
    assert str(first.name) in shown and "smallest call" in shown
    assert "2 ms (1.5 to 2.5)" in shown and "4x" in shown
    table.show([second, first], beside=True)
    shown = capsys.readouterr().out
    assert "AVX-512 fused" in shown and "AVX2 fused" in shown and "8x" in shown


def test_tables_of_a_gpu(tmp_path, capsys):
    path = tmp_path / "a.csv"
    about = {"device": "cuda", "name": "Card", "isa": "sm_90", "triton": "3.6"}
    sixteen = example(**about, dtype="bfloat16", median_ms=1.0)
    rows.write(path, [example(**about), sixteen])
    table.show([path], beside=True, dtype="bfloat16")
    shown = capsys.readouterr().out
    assert "Card (sm_90), torch 2, Triton 3.6, additive" in shown and "Card fused" in shown
    assert "20) bfloat16" in shown and "2 ms" not in shown
    with pytest.raises(SystemExit, match="no rows of float16"):
        table.show([path], dtype="float16")


def test_where_others_are_faster(tmp_path, capsys):
    path = tmp_path / "a.csv"
    others = (("plain", "bfloat16", 3.0), ("plain", "float32", 1.5), ("compile sum", "float64", 1))
    cases = [[example(dtype=d), example(p, dtype=d, median_ms=ms)] for p, d, ms in others]
    rows.write(path, [row for case in cases for row in case])
    table.show([path], slower=True)
    shown = capsys.readouterr().out
    assert "0.75x" in shown and "float64" in shown and "bfloat16" not in shown
    with pytest.raises(SystemExit, match="no rows of bfloat16, slower"):
        table.show([path], dtype="bfloat16", slower=True)


def test_figures_without_data_are_sentences(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    from benchmarks import plot

    path = tmp_path / "a.csv"
    rows.write(path, [example()])
    monkeypatch.setattr(sys, "argv", ["plot", str(path)])
    plot.main()
    shown = capsys.readouterr()
    assert shown.out.count("lacks") == 1 and not shown.err
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]


WRONG = {
    "suite": (["--suite", "spee"], "no suite and no shape"),
    "shape": (["--suite", "1x2x3"], "no suite and no shape"),
    "provider": (["--providers", "plane"], "invalid choice: 'plane' (choose from"),
    "dtype": (["--dtype", "float16x"], "invalid choice: 'float16x' (choose from"),
    "device": (["--device", "cudda"], "--device cudda"),
    "rounds": (["--rounds", "1"], "--rounds at least 2"),
}


@pytest.mark.parametrize("arguments,sentence", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_answered_in_a_sentence(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(run, "require_kernel", lambda device, path: False)
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code != 0
    assert sentence in f"{stopped.value.code}{capsys.readouterr().err}"


def test_every_case_has_a_name():
    assert all(case.what for _, case in parse("first-page,gpu,quick"))
    assert len({case.what for case in SPEED}) == len(SPEED)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n"])
def test_a_file_without_rows_is_named(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"x\.csv"):
        rows.read(path)


@pytest.fixture
def tiny(tmp_path, monkeypatch, capsys):
    """Runs the command of a module on tiny sizes, and returns what it prints."""

    def run(module, *options):
        arguments = ["--quick", *options, "--threads", "1", "--output", str(tmp_path / "a.csv")]
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        threads = module.torch.get_num_threads()
        try:
            module.main()
        finally:
            module.torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


@OF_THE_KERNEL
def test_heads_are_compared_before_they_are_timed(tiny, monkeypatch):
    shown = tiny(heads, "--rounds", "2", "--budget", "0.01")
    assert all(shown.count(f"{name} ") for name in heads.CASES) and "tiny: the layer" in shown
    monkeypatch.setattr(heads, "plain", lambda query, key, value, weight: query * 0)
    with pytest.raises(AssertionError, match="fused: 0 is off by"):
        list(heads.measure_case(heads.CASES["call"], 0.01, 2, quick=True))


@OF_THE_KERNEL
def test_second_order_is_compared_before_it_is_timed(tiny, monkeypatch):
    shown = tiny(second_order)
    assert all(f"{name} " in shown for name in second_order.CASES) and "tiny: forward" in shown
    monkeypatch.setattr(second_order, "plain", lambda query, key, value, weight: query * 1.0)
    with pytest.raises(AssertionError, match="fused: 0 is off by"):
        list(second_order.measure_case(second_order.CASES["jvp-1024"], quick=True))


def test_sparse_calls_are_compared_before_they_are_timed(monkeypatch):
    cases = [sparse.CASES[name] for name in ("window", "packed")]
    found = [row for case in cases for row in sparse.measure_case(case, quick=True, rounds=1)]
    assert len(found) == 8 and {x["provider"] for x in found} == {sparse.WHOLE, sparse.SPARSE}
    assert all(0 < float(x["share"]) < 1 and x["what"].startswith("tiny") for x in found)
    monkeypatch.setattr(sparse, "varlen_additive_attention", lambda query, *_: query * 1.0)
    with pytest.raises(AssertionError, match="not close"):
        list(sparse.measure_case(cases[1], quick=True))


WRONG_OF_CASES = {
    "quick": (["--quick", "--save"], "--quick measures other sizes"),
    "threads": (["--threads", "0"], "--threads is 0; it is at least 1"),
    "rounds": (["--rounds", "1"], "--rounds is 1; it is at least 2"),
    "budget": (["--budget", "nan"], "--budget is nan; it is positive"),
    "case": (["--case", "cal"], "invalid choice: 'cal'"),
    "table": (["--table", "missing.csv"], "missing.csv does not hold rows of benchmarks.heads"),
}


@pytest.mark.parametrize("arguments,sentence", WRONG_OF_CASES.values(), ids=WRONG_OF_CASES.keys())
def test_wrong_arguments_of_cases_too(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["heads", *arguments])
    with pytest.raises(SystemExit) as stopped:
        heads.main()
    assert stopped.value.code != 0
    assert sentence in f"{stopped.value.code}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    "module,arguments,status",
    [
        ("benchmarks.demo", ["--help"], 0),
        ("tools.doc_tables", ["--help"], 0),
        ("tools.doc_tables", ["README.md"], 2),
        ("tools.parallel_table", ["--device"], 2),
        ("tools.feature_table", [], 2),
        ("tools.feature_table", ["README.md"], "README.md does not hold rows of make features"),
    ],
)
def test_commands_read_their_arguments(module, arguments, status, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert str(stopped.value.code).startswith(str(status))
    assert not capsys.readouterr().out or "--help" in arguments
