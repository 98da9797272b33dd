"""Examples answer bad input with a sentence, and print commands that can be pasted."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "g2p"
pytest.importorskip("tqdm", reason="the example needs tqdm")

WRONG = {
    "beam": ("pronounce.py --beam 0 cat", "argument --beam: 0 is not between 1"),
    "picture": ("pronounce.py --plot x.bad cat", "argument --plot: x.bad does not end in .png"),
    "no model": ("pronounce.py --model none.pt cat", "There is no model at none.pt. To train one"),
    "other file": ("pronounce.py --model README.md cat", "README.md is no model of train.py"),
    "dictionary": ("compare.py --dictionary none.txt", "there is no file none.txt"),
    "device": ("train.py --device cudda", "there is no device cudda"),
    "threads": ("train.py --threads 0", "argument --threads: 0 is not between 1"),
}


@pytest.mark.parametrize("line,sentence", WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_answered_in_a_sentence(line, sentence):
    script, *arguments = line.split()
    result = subprocess.run(
        [sys.executable, EXAMPLE / script, *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, env=None,
    )  # fmt: skip
    assert result.returncode != 0
    assert sentence in result.stderr and "Traceback" not in result.stderr


def test_commands_are_those_of_the_current_folder(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "arguments", raising=False)
    arguments = __import__("arguments")
    monkeypatch.chdir(ROOT)
    line = arguments.command("pronounce.py", "--model", arguments.RUNS / "a b.pt", "cat")
    python, script, _, model, _ = shlex.split(line)
    assert (python, script) == ("python", "examples/g2p/pronounce.py")
    assert model == "examples/g2p/runs/a b.pt"
