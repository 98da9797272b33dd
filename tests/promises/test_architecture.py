"""Imports run one way, public -> ops -> backends -> spec; backends do not import each other."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import fresh
import pytest

import additive_attn

PACKAGE = Path(additive_attn.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    ): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
LAYERS = ("spec", "backends", "ops")  # everything above them is public
# The modules that may import other packages than Python's own library and torch.
OPTIONAL = {"triton": "additive_attn.backends.triton", "matplotlib": "additive_attn.plot",
            "numpy": "additive_attn.plot", "onnxscript": "additive_attn.onnx",
            "onnx": "additive_attn.onnx"}  # fmt: skip


def imports(module: str, at_import: bool = False) -> set[str]:
    """The modules that ``module`` imports, anywhere in it or only while it is imported itself."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} imports by a relative name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            found |= submodules or {node.module}
        late = isinstance(node, ast.FunctionDef) or "TYPE_CHECKING" in ast.dump(node)[:80]
        if not (at_import and late):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def layer(module: str) -> int:
    name = module.split(".")[1] if "." in module else ""
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


def backend(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["backends"] and len(parts) > 2 else None


def wrong(module: str, name: str) -> str | None:
    """Why ``module`` must not import ``name``."""
    top = name.split(".")[0]
    if top == "additive_attn":
        if layer(name) > layer(module):
            return "which is above it"
        if backend(module) and backend(name) not in (None, backend(module)):
            return "which is another backend"
    elif top not in sys.stdlib_module_names | {"torch"}:
        owner = OPTIONAL.get(top)
        if owner is None or not module.startswith(owner):
            return f"which {owner or 'nothing'} alone may import"
    return None


def test_imports_run_one_way():
    found = [
        f"{module} imports {name}, {why}"
        for module in MODULES
        for name in sorted(imports(module))
        if (why := wrong(module, name))
    ]
    assert not found, "\n".join(found)


def test_no_import_cycles():
    """Forbids all cycles, also those that Python can import."""
    graph = {module: imports(module, at_import=True) & MODULES.keys() for module in MODULES}
    TopologicalSorter(graph).prepare()


ALONE = """
import importlib, sys, types
package = types.ModuleType("additive_attn")
package.__path__ = [{path!r}]
sys.modules["additive_attn"] = package  # not its __init__, which imports everything
for module in {modules!r}:
    importlib.import_module(module)
print(*(name for name in sys.modules if name.startswith("additive_attn.")))
"""


@pytest.mark.parametrize("name", ["spec", "backends.plain", "backends.triton", "ops"])
def test_a_layer_imports_none_above_it(name):
    """Imports the layer in a fresh process, where nothing has been imported before."""
    if name == "backends.triton":
        pytest.importorskip("triton", minversion="3.6")
    own = f"additive_attn.{name}"
    modules = [module for module in MODULES if module == own or module.startswith(own + ".")]
    assert modules
    code = ALONE.format(path=str(PACKAGE), modules=modules)
    done = fresh.python(code)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert set(modules) <= set(loaded)
    above = [name for name in loaded if layer(name) > layer(own)]
    beside = [
        name for name in loaded if backend(own) and backend(name) not in (None, backend(own))
    ]
    assert not above and not beside


def sources(*patterns: str) -> list[Path]:
    folders = ("additive_attn", "csrc", "benchmarks", "examples", "tools")
    return [
        file
        for folder in folders
        for pattern in patterns
        for file in sorted((ROOT / folder).rglob(pattern))
    ]


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")
def test_files_and_functions_are_short():
    """A file has at most 400 lines, a function 80, a Triton kernel 120."""
    long = []
    for file in sources("*.py", "*.cpp", "*.h"):
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 400:
            long.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)) if file.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kernel = any(re.search("jit|kernel", ast.dump(x)) for x in node.decorator_list)
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > (120 if kernel else 80):
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {length} lines")
    for file in sources("*.cpp", "*.h"):
        for function, length in functions_of(file.read_text(encoding="utf-8")):
            if length > 80:
                long.append(f"{file.relative_to(ROOT)}: {function} has {length} lines")
    assert not long, "\n".join(long)


def functions_of(text: str) -> list[tuple[str, int]]:
    """Names and lengths of C++ functions, whose last line is a brace indented as the first is."""
    found = []
    for start in re.finditer(r"^( *)(?!namespace|struct|class|enum)\w[^;{}#]*\([^;{}]*\{$",
                             text, re.MULTILINE):  # fmt: skip
        end = re.compile(rf"^{start[1]}\}}", re.MULTILINE).search(text, start.end())
        name = re.search(r"(\w+)\s*\(", start[0])
        if end and name:
            found.append((name[1], text.count("\n", start.start(), end.start()) + 1))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_nested_function_calls_itself(module):
    """Such a function would keep itself and all variables around it alive, tensors among them,
    until Python collects cycles."""
    for outer in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        for inner in ast.walk(outer) if isinstance(outer, ast.FunctionDef) else ():
            if isinstance(inner, ast.FunctionDef) and inner is not outer:
                names = {x.id for x in ast.walk(inner) if isinstance(x, ast.Name)}
                assert inner.name not in names, inner.name
