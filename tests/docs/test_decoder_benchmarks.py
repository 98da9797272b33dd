"""Benchmarks of decoders compare layers with the same results, and name what they measured."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from dataclasses import replace

import pytest
import torch
from oracle import ON_KERNEL

from benchmarks.decoders import __main__ as main
from benchmarks.decoders import table
from benchmarks.decoders.cases import CASES, COMPILED
from benchmarks.decoders.problem import Problem, alternate, measured
from benchmarks.decoders.split import GROUPS, split

OF_THE_KERNEL = pytest.mark.skipif(
    not ON_KERNEL, reason="plain PyTorch is not measured under the kernel's name"
)


def without_compiler(case):
    problem = case.build(quick=True)
    return replace(problem, runs={k: run for k, run in problem.runs.items() if k != COMPILED})


@pytest.mark.parametrize("name", CASES)
def test_all_providers_of_a_case_compute_the_same(name):
    problem = without_compiler(CASES[name])
    assert len(problem.runs) >= 2
    with torch.set_grad_enabled(problem.grad):
        problem.check()


def test_what_computes_something_else_is_not_timed():
    right = torch.ones(3)
    results = {"plain": lambda: right, "fused": lambda: right + 0.1}
    problem = Problem(results, lambda found: {"out": found}, grad=False)
    with pytest.raises(AssertionError, match="fused: out is off by 1"):
        measured(problem, budget=0.1, rounds=2)


def test_gradients_are_compared_too():
    problem = without_compiler(CASES["attadd"])
    good = problem.runs["fused"]

    def bad():
        outputs = good()
        key = next(p for p in parameters if p.shape == (320, 320))
        key.grad.mul_(1.1)
        return outputs

    parameters = list(problem.results.__self__.parameters())
    with pytest.raises(AssertionError, match="gradient of"):
        replace(problem, runs={**problem.runs, "fused": bad}).check()


def test_all_providers_take_turns():
    order = []
    problem = Problem({name: lambda n=name: order.append(n) for name in "ab"}, lambda _: {})
    found = alternate(problem, budget=100.0, rounds=4)
    last = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert last[-8:] == list("abababab")
    assert found.keys() == {"a", "b"}
    assert all(row["q20_ms"] <= row["cpu_ms"] <= row["q80_ms"] for row in found.values())


def test_every_millisecond_of_a_profile_belongs_to_a_group():
    problem = CASES["gnmt-decoder"].build(quick=True)
    for name in ("plain", "fused"):
        groups = split(problem.runs[name], by_operator=name != "plain")
        assert tuple(groups) == GROUPS
        assert all(groups[each] > 0 for each in ("attention forward", "attention backward"))
        assert all(groups[each] > 0 for each in ("projections", "cells", "accumulation"))
    alone = split(CASES["attadd"].build(quick=True).runs["plain"], by_operator=False)
    assert alone["cells"] == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns the file of a run's rows, and its output."""
    path = tmp_path_factory.mktemp("run") / "rows.csv"
    options = ["--case", "gnmt-decoder", "step-32", "--quick", "--split", "--rounds", "2"]
    options += ["--budget", "0.01", "--threads", "1", "--output", str(path)]
    case = CASES["gnmt-decoder"]
    uncompiled = replace(
        case, make=lambda loop: without_compiler(replace(case, arguments=(loop,)))
    )
    threads, shown = torch.get_num_threads(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(sys, "argv", ["decoders", *options])
        patch.setitem(main.CASES, "gnmt-decoder", uncompiled)
        try:
            main.main()
        finally:
            torch.set_num_threads(threads)
    return path, shown.getvalue()


@OF_THE_KERNEL
def test_a_run_writes_rows_and_shows_them(written):
    path, shown = written
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"plain", "fused", "function"}
    assert all(row["what"].startswith("tiny: ") for row in rows)
    assert "step-32" in shown and "bar 1x: " in shown
    assert "accumulation" in shown and "vs plain" in shown and "compared with" in shown


@OF_THE_KERNEL
def test_the_figure_is_drawn_from_the_rows(written, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency")
    from benchmarks.decoders import plot

    figure = tmp_path / "figure.png"
    rows = table.read(written[0])
    assert plot.draw(rows, figure) and figure.stat().st_size > 5000
    assert not plot.draw([row for row in rows if not row["group"]], figure)


def test_bars_are_judged():
    case = replace(CASES["joeynmt"])
    times = {"plain": "30", COMPILED: "15", "fused": "10"}
    rows = [{"provider": k, "cpu_ms": v, "wall_ms": v} for k, v in times.items()]
    line = table.line(case, rows)
    assert "vs plain 3.00x (bar 2x: met)" in line
    assert f"vs {COMPILED} 1.50x (bar 1.6x: MISSED)" in line


def test_plain_pytorch_is_not_measured_under_the_name_of_the_kernel(monkeypatch, tmp_path):
    from additive_attn.ops import dispatch

    monkeypatch.setattr(dispatch, "cpu_path", lambda: "pytorch")
    monkeypatch.setattr(sys, "argv", ["decoders", "--output", str(tmp_path / "rows.csv")])
    with pytest.raises(SystemExit, match="plain PyTorch under the name of the fused layer"):
        main.main()
    assert not list(tmp_path.iterdir())


@OF_THE_KERNEL
def test_saving_a_case_keeps_the_rows_of_others(monkeypatch, tmp_path):
    """Saving also keeps the profile of a case of which only times are measured."""
    times = {"name": "old", "cpu_ms": 1}

    def measure(case, budget, rounds, profile, quick):
        yield {"case": case.name, "provider": "fused", **times}
        if profile:
            yield {"case": case.name, "provider": "fused", "group": "cells", **times}

    def save(*options):
        monkeypatch.setattr(sys, "argv", ["decoders", "--save", *options])
        threads = torch.get_num_threads()
        try:
            main.main()
        finally:
            torch.set_num_threads(threads)
        (path,) = tmp_path.rglob("*.csv")
        with path.open(newline="") as file:
            return [(row["case"], row["group"], row["name"]) for row in csv.DictReader(file)]

    monkeypatch.setattr(main.rows, "RESULTS", tmp_path)
    monkeypatch.setattr(main, "measure_case", measure)
    monkeypatch.setattr(table, "line", lambda case, found: "")
    monkeypatch.setattr(table, "show", lambda *_, **__: None)
    cases = ["attadd", "attloc", "joeynmt"]
    before = [(name, group, "old") for name in cases for group in ("", "cells")]
    assert save("--split", "--case", *cases) == before
    times["name"] = "new"
    after = [("attadd", "", "old"), before[1], ("attloc", "", "new"), *before[3:]]
    assert save("--case", "attloc") == after
    assert save("--case", "gnmt-decoder") == [*after, ("gnmt-decoder", "", "new")]


def test_loops_of_other_lengths_are_not_saved(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decoders", "--save", "--steps", "3"])
    with pytest.raises(SystemExit):
        main.main()
    assert "--steps measures other loops" in capsys.readouterr().err
