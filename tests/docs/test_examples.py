"""Examples answer bad input with a sentence, and print commands that can be pasted."""

from __future__ import annotations

import runpy
import shlex
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


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the scripts on the path, and none of their modules left behind."""
    names = [path.stem for path in EXAMPLE.glob("*.py")]
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(ROOT)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield EXAMPLE
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("line,sentence", WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_answered_in_a_sentence(scripts, monkeypatch, capsys, line, sentence):
    script, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(scripts / script), run_name="__main__")
    assert stopped.value.code != 0
    assert sentence in f"{stopped.value.code}{capsys.readouterr().err}"


def test_commands_are_those_of_the_current_folder(scripts):
    arguments = __import__("arguments")
    line = arguments.command("pronounce.py", "--model", arguments.RUNS / "a b.pt", "cat")
    python, script, _, model, _ = shlex.split(line)
    assert (python, script) == ("python", "examples/g2p/pronounce.py")
    assert model == "examples/g2p/runs/a b.pt"
