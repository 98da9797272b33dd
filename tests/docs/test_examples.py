"""Examples run, raise sentences for bad input, and print commands that can be pasted."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from oracle import make

from additive_attn import additive_attention

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("tqdm", reason="the example needs tqdm")

WRONG = {
    "beam": ("pronounce.py --beam 0 cat", "argument --beam: 0 is not between 1"),
    "picture": ("pronounce.py --plot x.bad cat", "argument --plot: x.bad does not end in .png"),
    "no model": ("pronounce.py --model none.pt cat", "There is no model at none.pt. To train one"),
    "other file": ("pronounce.py --model README.md cat", "README.md is no model of train.py"),
    "dictionary": ("compare.py --dictionary none.txt", "there is no file none.txt"),
    "other text": ("train.py --dictionary README.md", "README.md is no dictionary of this format"),
    "no time": ("train.py --time-limit 0", "argument --time-limit: 0 is not between 0.001"),
    "device": ("train.py --device cudda", "there is no device cudda"),
    "no folder": ("pronounce.py --plot README.md/x.png cat", "no file can be made at README.md/x"),
    "save": ("train.py --save examples", "argument --save: no file can be made at examples"),
    "threads": ("train.py --threads 0", "argument --threads: 0 is not between 1"),
}


@pytest.fixture
def scripts(monkeypatch, request):
    """Puts the folder of the scripts on the path, and removes their modules afterwards."""
    folder = ROOT / "examples" / getattr(request, "param", "g2p")
    names = [path.stem for path in folder.glob("*.py")]
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(ROOT)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
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


MORE = {
    "lr": ("long_documents", "train.py --lr nan", "--lr is nan"),
    "csv": ("long_documents", "train.py --csv none/x.csv", "no file can be made at none/x.csv"),
    "other table": ("long_documents", "train.py --csv README.md", "README.md is no table of"),
    "no folder": ("long_keys", "pool.py --file none/bag", "--file: there is no folder none"),
    "a file of the user": ("long_keys", "pool.py --file README.md", "README.md is no bag of this"),
}


@pytest.mark.parametrize("scripts,line,sentence", MORE.values(), ids=MORE, indirect=["scripts"])
def test_also_of_the_other_examples(scripts, monkeypatch, capsys, line, sentence):
    before = (ROOT / "README.md").read_bytes()
    test_bad_input_is_answered_in_a_sentence(scripts, monkeypatch, capsys, line, sentence)
    assert (ROOT / "README.md").read_bytes() == before


def test_commands_are_those_of_the_current_folder(scripts):
    arguments = __import__("arguments")
    line = arguments.command("pronounce.py", "--model", arguments.RUNS / "a b.pt", "cat")
    python, script, _, model, _ = shlex.split(line)
    assert (python, script) == ("python", "examples/g2p/pronounce.py")
    assert model == "examples/g2p/runs/a b.pt"


@pytest.mark.parametrize("scripts", ["long_keys"], indirect=True)
def test_long_keys(scripts, monkeypatch, tmp_path, capsys):
    """Chunks give the gradients of one call, and the script trains and prints the result."""
    pool = __import__("pool")
    bag = pool.make_bag(tmp_path / "bag", 2500, 1000, 0)
    layer = pool.Pool()
    out = layer(bag, 2500, 700, "")
    grads = torch.autograd.grad(out[0, pool.MARK], list(layer.parameters()))
    whole = bag[:2500]
    expected = additive_attention(None, layer.to_key(whole), whole, layer.energy)
    torch.testing.assert_close(out, expected)
    expected = torch.autograd.grad(expected[0, pool.MARK], list(layer.parameters()))
    torch.testing.assert_close(grads, expected)

    line = "pool.py --instances 5000 --chunk 1000 --steps 5 --file".split()
    monkeypatch.setattr(sys, "argv", [*line, str(tmp_path / "other")])
    pool.main()
    steps = [row for row in capsys.readouterr().out.splitlines() if row.startswith("step ")]
    missed = [1.5 - float(row.split()[3]) for row in steps]
    assert len(steps) == 5 and missed[-1] < missed[0] / 2


@pytest.mark.parametrize("scripts", ["long_documents"], indirect=True)
def test_long_documents(scripts, monkeypatch, capsys):
    """Window and global tokens share one softmax, and the script trains on files of this
    machine."""
    model = __import__("model")
    layer = model.WindowAndGlobal(8, 2, window=3)
    inputs = make((2,), 20, 4, 8, 8)
    tokens, globals_, lengths = inputs["query"], inputs["key"], torch.tensor([20, 13])
    (q, k, v), (gq, gk, gv) = layer.split(tokens), layer.split(globals_)
    place = torch.arange(20)
    mask = ((place - place[:, None]).abs() <= 3) & (place < lengths[:, None, None])
    mask = torch.cat([torch.ones(2, 20, 4, dtype=torch.bool), mask], -1)[:, None]
    keys, values = torch.cat([gk, k], -2), torch.cat([gv, v], -2)
    expected = (
        additive_attention(q, keys, values, layer.energy, attn_mask=mask),
        additive_attention(gq, keys, values, layer.energy, lengths=lengths + 4),
    )
    ours = layer(tokens, globals_, lengths)
    torch.testing.assert_close(ours, tuple(layer.joined(x) for x in expected))

    data, train = __import__("data"), __import__("train")
    documents = data.read_documents(classes=2, most=8)
    line = "train.py --tokens 128 --epochs 6 --batch-size 4".split()
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(train, "read_documents", lambda: documents)
    train.main()
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("epoch")]
    losses = [float(row.split()[3].rstrip(",")) for row in rows]
    assert len(losses) == 3 and min(losses[1:]) < losses[0]
