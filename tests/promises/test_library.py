"""Promise 9: the compiled library is found where there is one; else the reason that is given is
true."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from additive_attn.ops import dispatch, library


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package in a folder that is no checkout, and is the only one on Python's path."""
    folder = tmp_path / "here" / "additive_attn"
    make(folder)
    monkeypatch.setattr(library, "PACKAGE", folder)
    monkeypatch.setattr(library.sys, "path", [str(folder.parent)])
    return folder


@pytest.fixture(autouse=True)
def loads(monkeypatch):
    """Makes files with the text "good" load. No library is loaded into this process."""

    def load(path):
        text = path.read_text().removesuffix(library._INTERFACE.decode())
        if text != "good":
            raise OSError(f"{path.name}: {text}")

    monkeypatch.setattr(torch.ops, "load_library", load)


def make(folder, *libraries, source="x = 1"):
    """Writes libraries, from the newest to the oldest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(source)
    for age, (name, text) in enumerate(libraries):
        path = folder / name
        path.write_text(text if text == OTHER else text + library._INTERFACE.decode())
        os.utime(path, times=(2e9 - age, 2e9 - age))
    return folder


def make_checkout(package):
    (package.parent / "csrc").mkdir()
    (package.parent / "setup.py").touch()


OTHER = "good, but its operators take other arguments"
STALE = "_C.cpython-39-x86_64-linux-gnu.so"
OLD = "_C.cpython-310-x86_64-linux-gnu.so"


@pytest.mark.parametrize(
    "files,chosen",
    [
        ([("_C.abi3.so", "good")], "_C.abi3.so"),
        # The newest is loaded, but one with the stable ABI precedes newer ones.
        ([(STALE, "good"), ("_C.abi3.so", "good")], "_C.abi3.so"),
        ([("_C.so", "stale"), (STALE, "stale"), ("_C.abi3.so", "good")], "_C.abi3.so"),
        ([("_C.abi3.so", "stale"), (STALE, "good")], STALE),
        ([(OLD, "good"), (STALE, "good")], OLD),
        ([(STALE, "good"), (OLD, "good")], STALE),
        ([(STALE, "stale"), (OLD, "good")], OLD),
        ([("_C.abi3.so", OTHER), (OLD, "good")], OLD),
    ],
)
def test_several_libraries(package, files, chosen):
    make(package, *files)
    assert library.find_library() == (package / chosen, "")


def test_a_library_of_another_interface_is_never_loaded(package):
    make(package, ("_C.abi3.so", OTHER))
    path, problem = library.find_library()
    assert path is None and f"{package / '_C.abi3.so'} was built from other sources" in problem


def test_the_compiled_library_has_the_interface():
    assert (
        dispatch.library_path is None
        or library._INTERFACE in Path(dispatch.library_path).read_bytes()
    )


def test_nothing_loads(package):
    make(package, ("_C.abi3.so", "no symbol f"), (STALE, "no symbol g"))
    path, problem = library.find_library()
    assert path is None
    assert problem == (
        f"the compiled library does not load (_C.abi3.so: no symbol f; {STALE}: no symbol g)"
    )


def test_no_library_anywhere(package):
    assert library.find_library() == (
        None,
        "the package was installed without its compiled library",
    )
    make_checkout(package)
    path, problem = library.find_library()
    assert path is None
    assert problem == f"no compiled library is built in the sources in {package}"


@pytest.mark.parametrize("own", [[], [(STALE, "stale")]], ids=["none", "stale"])
def test_a_checkout_does_not_hide_an_installed_library(package, tmp_path, monkeypatch, own):
    make(package, *own)
    make_checkout(package)
    installed = make(tmp_path / "site" / "additive_attn", ("_C.abi3.so", "good"))
    monkeypatch.setattr(library.sys, "path", [str(package.parent), str(tmp_path / "site")])
    path, origin = library.find_library()
    assert path == installed / "_C.abi3.so"
    assert "installed package" in origin


@pytest.mark.parametrize("change", ["edited", "more", "fewer"])
def test_the_library_of_other_sources_is_not_loaded(package, tmp_path, monkeypatch, change):
    """Its operators may have other arguments, for which torch would not raise."""
    installed = make(tmp_path / "site" / "additive_attn", ("_C.abi3.so", "good"))
    changed = {"edited": "__init__.py", "more": "more.py", "fewer": "fewer.py"}[change]
    folder = installed if change == "fewer" else package
    (folder / changed).write_text("x = 2")
    monkeypatch.setattr(library.sys, "path", [str(package.parent), str(tmp_path / "site")])
    path, problem = library.find_library()
    assert path is None
    assert problem.startswith(f"{package} has no compiled library, and hides the installed")
    assert str(installed) in problem


ORIGINS = {
    "git": (
        {"url": "https://host/attn.git", "vcs_info": {"vcs": "git", "commit_id": "1f2e"}},
        "git+https://host/attn.git@1f2e",
    ),
    "wheel": ({"url": "file:///w/a.whl", "archive_info": {}}, "FOLDER_OF_THE_SOURCES"),
    "folder that is gone": ({"url": "file:///gone", "dir_info": {}}, "FOLDER_OF_THE_SOURCES"),
    "folder": ({"url": "file:///usr", "dir_info": {}}, "/usr"),
    "index": (None, "FOLDER_OF_THE_SOURCES"),
    "not installed": (metadata.PackageNotFoundError(), "FOLDER_OF_THE_SOURCES"),
}


@pytest.mark.parametrize("record,source", ORIGINS.values(), ids=ORIGINS.keys())
def test_how_to_build_fits_the_way_of_installing(package, monkeypatch, record, source):
    def distribution(name):
        if isinstance(record, Exception):
            raise record
        return SimpleNamespace(read_text=lambda file: record and json.dumps(record))

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert library.how_to_build().endswith(f" {library._REINSTALL} {source}")
    make_checkout(package)
    assert library.how_to_build().endswith(f" --editable {package.parent}")
