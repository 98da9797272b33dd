"""Finds the compiled library or, where there is none, says why and how to build it."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from urllib.request import url2pathname

import torch

PACKAGE = Path(__file__).resolve().parents[1]
# The order of the operators' arguments; csrc/bindings/library.cpp has the same.
_INTERFACE = b"additive_attn interface 4"
_REINSTALL = "pip install --force-reinstall --no-deps"


def find_library() -> tuple[Path | None, str]:
    """Loads the library. Returns its path and where it comes from, or None and the problem.

    A checkout hides the installed package from a Python that is started there. Without a library
    of its own, it loads that of the installed package if the Python sources are equal.
    """
    problems: list[str] = []
    path = _load_from(PACKAGE, problems)
    if path is not None:
        return path, ""
    installed = _hidden_package()
    if installed is not None and _is_same(installed):
        path = _load_from(installed, problems)
        if path is not None:
            return path, "of the installed package, which has the same sources"
    if problems:
        return None, f"the compiled library does not load ({'; '.join(problems)})"
    if installed is not None and any(installed.glob("_C*.so")):
        return None, (
            f"{PACKAGE} has no compiled library, and hides the installed package in {installed}, "
            "which has one but other sources and is found from another folder"
        )
    if _is_checkout():
        return None, f"no compiled library is built in the sources in {PACKAGE}"
    return None, "the package was installed without its compiled library"


def how_to_build() -> str:
    """Says how to build the library, for the way in which this package was installed."""
    if _is_checkout():
        folder = shlex.quote(str(PACKAGE.parent))
        command = f"pip install --no-deps --editable {folder}"
    else:
        command = f"{_REINSTALL} {_origin()}"
    return f"install a C++ compiler (g++ or clang++) and run: {command}"


def _load_from(package: Path, problems: list[str]) -> Path | None:
    """Tries the library with a stable ABI, then the newest: others may be left from old builds."""
    found = sorted(
        package.glob("_C*.so"),
        key=lambda path: (".abi3." in path.name, path.stat().st_mtime),
        reverse=True,
    )
    for path in found:
        if _INTERFACE not in path.read_bytes():
            problems.append(f"{path} was built from other sources")
            continue
        try:
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            problems.append(str(error))
        else:
            return path
    return None


def _hidden_package() -> Path | None:
    """The package that Python would import if this one did not come first on its path."""
    for folder in sys.path:
        package = Path(folder).resolve() / PACKAGE.name
        if package != PACKAGE and (package / "__init__.py").is_file():
            return package
    return None


def _is_same(other: Path) -> bool:
    """Whether both have the same Python sources: a library of other sources may take other
    arguments, which torch does not check."""

    def sources(package: Path) -> dict[Path, bytes]:
        return {path.relative_to(package): path.read_bytes() for path in package.rglob("*.py")}

    return sources(PACKAGE) == sources(other)


def _is_checkout() -> bool:
    return (PACKAGE.parent / "csrc").is_dir() and (PACKAGE.parent / "setup.py").is_file()


def _origin() -> str:
    """Returns the argument with which pip installs the package again from its origin."""
    try:
        record = importlib.metadata.distribution("additive-attn").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    origin = json.loads(record or "{}")
    url: str = origin.get("url", "")
    version_control = origin.get("vcs_info")
    if version_control:
        return f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
    # A wheel would bring back the same files, so only a folder of sources helps.
    folder = url2pathname(url.removeprefix("file://"))
    is_there = "dir_info" in origin and Path(folder).is_dir()
    return shlex.quote(folder) if is_there else "FOLDER_OF_THE_SOURCES"
