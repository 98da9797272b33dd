"""An installation stops where the kernel cannot be built, unless the kernel is left out on
purpose."""

from __future__ import annotations

import runpy
import sys
import sysconfig
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools", reason="setup.py needs setuptools")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(monkeypatch):
    """Runs setup.py with a command and a setting; returns what it passes to setuptools."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a checkout")
    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.delenv("ADDITIVE_ATTN_BUILD_EXT", raising=False)

    def run(command, setting=None):
        if setting is not None:
            monkeypatch.setenv("ADDITIVE_ATTN_BUILD_EXT", setting)
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        runpy.run_path("setup.py")
        return given

    return run


def hide_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    monkeypatch.delattr("torch.utils.cpp_extension", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel", "build_ext"])
def test_without_torch_the_installation_stops(setup, monkeypatch, tmp_path, command):
    """It stops at dist_info, before pip downloads the dependencies."""
    hide_torch(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match="Install torch first") as stop:
        setup(command)
    assert "gigabytes" in str(stop.value) and "ADDITIVE_ATTN_BUILD_EXT=0" in str(stop.value)


def test_without_torch_a_source_archive_can_be_made(setup, monkeypatch, tmp_path):
    hide_torch(monkeypatch, tmp_path)
    assert setup("sdist") == setup("egg_info") == {}


def test_without_the_kernel_on_purpose(setup, monkeypatch, tmp_path):
    hide_torch(monkeypatch, tmp_path)
    assert setup("bdist_wheel", setting="0") == {}


def test_settings_that_mean_nothing(setup):
    with pytest.raises(SystemExit, match="ADDITIVE_ATTN_BUILD_EXT is 'yes'; it may be"):
        setup("bdist_wheel", setting="yes")


def test_a_compiler_that_fails_stops_the_installation(setup, monkeypatch):
    given = setup("build_ext")
    distribution = setuptools.Distribution({"name": "x", "ext_modules": given["ext_modules"]})
    command = given["cmdclass"]["build_ext"](distribution)
    command.ensure_finalized()
    with pytest.raises(SystemExit, match=r"does not compile: .*\n.*C\+\+20 compiler, g\+\+"):
        command.build_extensions()  # has no compiler yet


@pytest.mark.parametrize("disabled", [0, 1], ids=["usual", "free-threaded"])
def test_the_tag_of_the_wheel(setup, monkeypatch, disabled):
    """A free-threaded Python does not support the limited API, which the library does not need."""
    usual = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: disabled if "GIL" in name else usual(name)
    )
    given = setup("bdist_wheel")
    (extension,) = given["ext_modules"]
    assert extension.py_limited_api is not bool(disabled)
    assert given["options"] == ({} if disabled else {"bdist_wheel": {"py_limited_api": "cp310"}})
