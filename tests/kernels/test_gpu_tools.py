"""The tools for a GPU, as far as they run without one: the tuner's table gives the package's block
sizes, and a check continues after a failed part."""

from __future__ import annotations

import csv
import os
import re
import sys
import time

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from additive_attn.backends import triton as operators
from additive_attn.backends.triton import tiles, tuned
from benchmarks import gpu
from tools import gpu_check, tune
from tools.kernel_calls import call
from tools.machine_code import compiled_calls


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, tune.COLUMNS)
        writer.writeheader()
        for name, changes, ratio in rows:
            writer.writerow({"name": name, "changes": changes, "ratio": ratio})


def test_what_the_tuner_takes(tmp_path):
    path, to = tmp_path / "tuning.csv", tmp_path / "tuned.py"
    table(path, [
        (tune.OWN, "", "1.000"), (tune.OWN, "", "1.000"),
        ("score_tile", "{'RN': 8}", "0.800"), ("score_tile", "{'RN': 8}", "0.900"),
        ("score_tile", "{'RN': 2}", "0.700"), ("score_tile", "{'RN': 2}", "1.100"),  # slower once
        ("gradient_tile", "{'RX': 4}", "0.980"),  # noise
        ("gradient_tile", "{'RX': 8}", "0.500"), ("gradient_tile", "{'RX': 8}", ""),  # failed once
        ("WORKSPACE_ELEMENTS", "4194304", "0.900"),
    ])  # fmt: skip
    with open(tuned.__file__) as file:
        to.write_text(file.read())
    tune.take(path, to)
    space = {}
    exec(to.read_text(), space)
    assert space["TUNED"] == {"score_tile": {"RN": 8}, "WORKSPACE_ELEMENTS": 4194304}
    table(path, [(tune.OWN, "", "1.000")])
    tune.take(path, to)
    exec(to.read_text(), space)
    assert space["TUNED"] == {}


def test_changed_tiles():
    """The changes apply to long rows of other dtypes than float64."""
    other = tiles.changed(tiles.score_tile, {"RN": 2})
    assert other(64) == tiles.Tile(8, 8, 2, 16)
    assert other(64, True) == tiles.score_tile(64, True)
    assert other(64, wide=True) == tiles.score_tile(64, True)
    assert other(7) == tiles.score_tile(7)
    assert tiles.changed(2**23, 2**22) == 2**22


def test_choices_are_those_of_tiles():
    for name in tune.CHOICES:
        if hasattr(tiles, name):
            with tune.chosen(name, tune.CHOICES[name][0]):
                pass
    assert sum(hasattr(tiles, name) for name in tune.CHOICES) >= 3


def test_a_check_continues_after_failed_parts(tmp_path):
    check = gpu_check.Check(tmp_path, 20, dry=True)
    begin = time.monotonic()

    def python(code):
        return check.command(sys.executable, "-c", code)

    def broken(limit):
        raise ValueError("a part")

    check.part("good", 0.5, python("print('fine')"))
    check.part("slow", 0.1, python("import time; print('begins', flush=True); time.sleep(60)"))
    assert "KeyboardInterrupt" not in (tmp_path / "log.txt").read_text()
    check.part("bad", 0.5, python("import sys; print('why'); sys.exit(3)"))
    check.part("broken", 0.5, broken)
    assert time.monotonic() - begin < 30
    results = [result for _, result, _ in check.results]
    assert results == ["ok", "took more than 2 s", "exit code 3", "ValueError: a part"]
    assert check.first.startswith("slow")
    log = (tmp_path / "log.txt").read_text()
    assert all(line in log for line in ("fine", "begins", "why"))
    late = gpu_check.Check(tmp_path, 1, dry=True)
    late.part("late", 0.5, broken)
    assert late.results == [("late", "no time left", 0.0)]


@pytest.mark.parametrize("problem", ["", "the kernels give another out"])
def test_kernels_that_fail_the_self_check_are_tested(tmp_path, monkeypatch, problem):
    seen = {}

    def part(self, name, share, run):
        self.results.append((name, (run(1) if name == "machine" else "") or "ok", 0.0))
        seen[name] = os.environ.get("ADDITIVE_ATTN_TEST_UNCHECKED")

    monkeypatch.setattr(gpu_check.Check, "part", part)
    monkeypatch.setattr(gpu_check, "machine", lambda check, limit: problem)
    monkeypatch.setenv("ADDITIVE_ATTN_TEST_UNCHECKED", "")
    gpu_check.parts(gpu_check.Check(tmp_path, 20, dry=True))
    assert seen["tests"] == ("1" if problem else "") and "questions" in seen


def test_what_is_tested_on_a_gpu():
    found = set(gpu_check.files())
    assert {"tests/kernels/test_triton.py", "tests/promises/test_gradients.py"} < found
    assert gpu_check.NOT_ON_A_GPU.isdisjoint(x.rpartition("/")[2] for x in found)
    said = ["E   AssertionError", "FAILED a.py", "passed by path: triton 2", "skipped 1: two GPUs"]
    said += ["1 failed, 2 passed in 3.00s", "== 2 passed, 1 skipped in 3.00s =="]
    assert all(re.match(gpu_check.SAID, x) for x in said)
    assert not re.match(gpu_check.SAID, "....s... [ 38%]")


def test_answers_end_in_tables(tmp_path, monkeypatch, capsys):
    def answer(case, mode, device):
        yield {"what": "fused", "value": "7", "unit": "us"}
        if mode == "full":
            yield {"what": "plain", "value": "9", "unit": "us"}

    monkeypatch.setattr(gpu, "QUESTIONS", {"host": answer})
    path = tmp_path / "a.csv"
    arguments = ["gpu", "--device", "cpu", "--quick", "--question", "host", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    shown = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [[x.strip() for x in line.split("|")][2:5] for line in shown if "-:" not in line] == [
        ["mode", "fused, us", "plain, us"], ["forward", "7", "-"], ["full", "7", "9"],
    ]  # fmt: skip


@pytest.mark.parametrize("command", [gpu_check, tune, gpu])
def test_commands_print_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command.__name__, "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    assert "python" in capsys.readouterr().out


@pytest.mark.skipif(
    torch.version.hip is not None or operators.interpreted(),
    reason="compiles for a target by name, which the interpreter and ROCm do not",
)
def test_launches_are_recorded_with_their_times(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    launches = []

    def function():
        with gpu.recorded(launches):
            call(1, 1, 10, 32, 20, need_weights=False, upstream=())()

    kernels = compiled_calls("sm_90", function)
    assert [name for name, _, _ in launches] == [kernel.name for kernel in kernels]
