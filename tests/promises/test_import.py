"""Promise 9: import needs torch alone; where parts are missing, calls fall back with one
warning."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
import torch
from oracle import ON_KERNEL, PACKAGE_PARENT

import additive_attn
from additive_attn import show_config
from additive_attn.ops import dispatch

TRY = """
import torch
from additive_attn import AdditiveAttention, additive_attention
import additive_attn
from additive_attn.ops import dispatch
layer = AdditiveAttention(6, 8)
x = torch.randn(2, 5, 6, requires_grad=True)
out, weights = layer(x, x, lengths=torch.tensor([5, 2]))
out.sum().backward()
assert torch.isfinite(x.grad).all() and out.shape == (2, 5, 6)
"""


def python(code, path=PACKAGE_PARENT, cpu=None, filters=()):
    env = {k: v for k, v in os.environ.items() if k != "ADDITIVE_ATTN_CPU"}
    env["PYTHONPATH"] = str(path)
    if cpu is not None:
        env["ADDITIVE_ATTN_CPU"] = cpu
    return fresh.python(code, path, env, filters)


def succeeded(result):
    assert result.returncode == 0, result.stderr
    return result


def test_import_loads_no_optional_package():
    """The import loads no Triton, plotting library, compiler or CUDA, and needs none of them."""
    code = """
import sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "matplotlib", "numpy", "tqdm", "setuptools"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
before = set(sys.modules)
import additive_attn
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not torch.cuda.is_initialized()
assert not new & {"triton", "matplotlib", "setuptools", "IPython"}, new
"""
    cpu = None if ON_KERNEL else "pytorch"
    succeeded(python(code + TRY + "assert not torch.cuda.is_initialized()\n", cpu=cpu))


def test_plot_without_matplotlib_is_a_sentence():
    code = """
import sys
sys.modules["matplotlib"] = None
import torch, additive_attn
try:
    additive_attn.plot_attention(torch.eye(3))
except ImportError as error:
    print(error)
"""
    assert "matplotlib" in succeeded(python(code)).stdout


@pytest.fixture
def copied(tmp_path):
    """A copy of the package without its compiled library."""
    source = Path(additive_attn.__file__).parent
    shutil.copytree(
        source, tmp_path / "additive_attn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


@pytest.mark.parametrize("library", ["missing", "broken"])
def test_falls_back_with_one_warning(copied, library):
    if library != "missing":
        broken = copied / "additive_attn" / "_C.abi3.so"
        broken.write_bytes(b"\x7fELF but no library at all" * 50)
    code = TRY + "import additive_attn; additive_attn.show_config(); print(dispatch.cpu_path())"
    result = succeeded(python(code, copied, filters=[("always", "Warning")]))
    assert result.stderr.count("UserWarning: additive_attn") == 1, result.stderr
    assert "pip install" in result.stderr and "ADDITIVE_ATTN_CPU=pytorch" in result.stderr
    assert result.stdout.strip().endswith("pytorch")
    reason = "does not load" if library != "missing" else "without its compiled library"
    assert reason in result.stdout and reason in result.stderr


def test_asking_for_the_fallback_is_silent():
    code = TRY + "print(dispatch.cpu_path(), dispatch.cpu_reason)"
    result = succeeded(python(code, cpu="pytorch", filters=[("error", "UserWarning")]))
    assert result.stdout.startswith("pytorch ADDITIVE_ATTN_CPU=pytorch")


def test_asking_for_a_library_that_is_missing(copied):
    result = python(TRY, copied, cpu="baseline")
    assert result.returncode != 0
    assert (
        "ImportError: ADDITIVE_ATTN_CPU=baseline asks for a compiled kernel, but" in result.stderr
    )


@pytest.mark.parametrize("variable", ["ADDITIVE_ATTN_CPU", "ADDITIVE_ATTN_GPU"])
def test_a_path_that_does_not_exist_is_refused_at_once(variable):
    result = python(f"import os\nos.environ[{variable!r}] = 'tritn'\n" + TRY)
    assert result.returncode != 0
    assert f"ImportError: {variable} is 'tritn', which names no path." in result.stderr


def test_an_empty_variable_is_unset():
    result = succeeded(python(TRY + "print(dispatch.cpu_path())", cpu=""))
    assert result.stdout == succeeded(python(TRY + "print(dispatch.cpu_path())")).stdout


REPAIR = """
import os, sys, warnings
{breaks}
try:
    import additive_attn
except Exception as error:
    print("failed:", error)
{repairs}
import additive_attn, torch
from torch.func import grad
x, w = torch.randn(3, 4, requires_grad=True), torch.ones(4)
loss = lambda q: additive_attn.additive_attention(q, x, x, w).square().sum()
loss(x).backward()
torch.testing.assert_close(grad(lambda q: loss(q))(x), grad(loss)(x))
"""
UNSET = "del os.environ['ADDITIVE_ATTN_CPU']"
FORGET = "for m in [m for m in sys.modules if 'additive_attn' in m]: del sys.modules[m]"
BREAKS = {
    "wrong variable": ("os.environ['ADDITIVE_ATTN_CPU'] = 'avx'", UNSET),
    "no interpreter": ("os.environ['ADDITIVE_ATTN_CPU'] = 'triton'", UNSET),
    "forgotten modules": ("", FORGET),
    "warning as error": ("warnings.simplefilter('error')", "warnings.simplefilter('ignore')"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_failed_import_can_be_repeated(case, copied):
    """What a failed or an earlier import has registered does not make the next one fail."""
    breaks, repairs = BREAKS[case]
    code = REPAIR.format(breaks=breaks, repairs=repairs)
    result = succeeded(python(code, copied if case == "warning as error" else PACKAGE_PARENT))
    assert ("failed:" in result.stdout) == (case != "forgotten modules"), result.stdout


def test_a_value_that_names_nothing():
    value = "AVX2"
    result = python(TRY, cpu=value)
    assert result.returncode != 0
    assert f"ImportError: ADDITIVE_ATTN_CPU is {value!r}" in result.stderr
    assert "avx512, avx2, baseline, pytorch" in result.stderr


@pytest.mark.skipif(not ON_KERNEL, reason="there is no kernel to choose")
@pytest.mark.parametrize("value", ["avx512", "baseline"])
def test_forced_paths_run_or_say_why_not(value):
    result = python(TRY + "print(dispatch.cpu_path())", cpu=value)
    if result.returncode == 0:
        assert result.stdout.strip() in (value, "neon")
    else:
        assert f"ADDITIVE_ATTN_CPU asks for the {value} kernels" in result.stderr
        assert value != "baseline"


def test_show_config(capsys):
    text = show_config()
    assert capsys.readouterr().out == text + "\n"
    assert (
        dispatch.cpu_path() in text and torch.__version__ in text and dispatch.cpu_reason in text
    )
    assert "the Triton kernels on one NVIDIA H200" in text


def test_module_prints_the_configuration():
    result = subprocess.run(
        [sys.executable, "-m", "additive_attn"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT}, cwd=PACKAGE_PARENT,
    )  # fmt: skip
    assert succeeded(result).stdout.strip() == show_config().strip()


def test_module_takes_no_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["additive_attn", "speed"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("additive_attn", run_name="__main__", alter_sys=True)
    assert "unrecognized arguments: speed" in capsys.readouterr().err


def test_works_in_forked_workers():
    """A fork does not copy OpenMP's threads; DataLoader workers run on one thread of their own."""
    code = """
import torch
from torch.utils.data import DataLoader
from additive_attn import additive_attention
torch.set_num_threads(2)
tensors = [torch.randn(300, 16), torch.randn(400, 16), torch.randn(400, 16), torch.randn(16)]
expected = additive_attention(*tensors)

class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return additive_attention(*tensors)

loader = DataLoader(Dataset(), num_workers=2, multiprocessing_context="fork", timeout=60)
for out in loader:
    assert torch.equal(out[0], expected)
"""
    succeeded(python(code))


def test_called_from_several_python_threads():
    code = """
import threading, torch
from additive_attn import additive_attention
shapes = (2, 60, 16), (2, 150, 16), (2, 150, 8), (16,)
leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
expected = additive_attention(*leaves)
grads = torch.autograd.grad(expected.sum(), leaves)
problems = []
def work():
    for _ in range(20):
        out = additive_attention(*leaves)
        if not torch.equal(out, expected):
            problems.append("out")
        for a, b in zip(torch.autograd.grad(out.sum(), leaves), grads):
            if not torch.equal(a, b):
                problems.append("grad")
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not problems, problems
"""
    succeeded(python(code))
