"""The suite runs on all paths of this machine, and each path computes alone."""

from __future__ import annotations

import importlib.util

import paths
import pytest
import torch
from oracle import fused, make

from additive_attn.ops import dispatch


@pytest.mark.skipif(
    paths.DEVICE != "cpu" or len(paths.available()) == 1, reason="one path is asked for"
)
def test_no_path_is_missing():
    capability = torch.backends.cpu.get_cpu_capability()
    wanted = {"AVX512": {"avx512", "avx2"}, "AVX2": {"avx2"}}.get(capability, set())
    assert {*wanted, "pytorch"} <= set(paths.available())
    assert importlib.util.find_spec("triton") is None or "triton" in paths.available()


@pytest.mark.parametrize("name", paths.available())
def test_each_path_computes_alone(name, monkeypatch):
    """The functions that each path calls, and the library's name of the instruction set, show
    which one computes."""
    from additive_attn.backends.plain import whole

    called = []
    for function in ("energies", "attend"):
        real = getattr(whole, function)
        call = lambda *a, n=function, f=real: called.append(n) or f(*a)  # noqa: E731
        monkeypatch.setattr(whole, function, call)
    with paths.running(name):
        fused(make())
        assert paths.current() == name
        if name in paths.INSTRUCTION_SETS:
            assert torch.ops.additive_attn.cpu_isa() in (name, "neon")
    assert ("energies" in called) == (name in paths.PLAIN)
    assert ("attend" in called) == (name == "pytorch")
    assert paths.current() == paths.native() and dispatch.cpu_path() in (paths.native(), "neon")


@pytest.mark.skipif(paths.native() not in paths.INSTRUCTION_SETS, reason="no compiled kernel")
@pytest.mark.parametrize("name", sorted(dispatch.PLAIN))
def test_the_library_has_every_operator(name):
    """If it lacked one, plain PyTorch would silently compute instead."""
    for key in ("CPU", "CompositeExplicitAutograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"additive_attn::{name}", key)


def test_a_path_that_computes_nothing_is_an_error():
    if "pytorch" not in paths.available()[1:]:
        pytest.skip("there is no other path")
    with pytest.raises(AssertionError, match="nothing was computed by pytorch"):
        with paths.running("pytorch"):
            pass
