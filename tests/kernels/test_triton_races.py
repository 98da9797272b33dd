"""No kernel reads what another thread of it may have written.

The threads of a program run side by side, and an element of a small tensor lies in several of
them: what one stores, another may still have to load, or may load too early. Triton's interpreter
runs one thread and shows nothing. So a kernel loads and stores one tensor only with a barrier
between the two, and the tensors of which that holds are listed here."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil

import pytest

pytest.importorskip("triton", minversion="3.6")

from additive_attn.backends import triton as package

WITH_BARRIER = {
    ("attend_kernel", "sums"),
    ("row_gradient_kernel", "scores"),
    ("forward_kernel", "scores"),
    ("location_kernel", "grad_key"),
}


def functions(source):
    """The functions of Triton's language in a source: name to (parameters, syntax tree)."""
    return {
        node.name: ([argument.arg for argument in node.args.args], node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }


def package_functions():
    modules = (m.name for m in pkgutil.iter_modules(package.__path__))
    sources = [
        inspect.getsource(importlib.import_module(f"{package.__name__}.{m}")) for m in modules
    ]
    return {name: found for source in sources for name, found in functions(source).items()}


def base(node):
    """What an address begins with: pointer + offsets, or a member of a tuple of pointers."""
    while True:
        if isinstance(node, ast.BinOp):
            node = node.left
        elif isinstance(node, ast.Call) and node.args:
            node = node.args[0]
        elif isinstance(node, ast.Attribute):
            return ast.unparse(node)
        else:
            return node.id if isinstance(node, ast.Name) else None


def is_call(node, name):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"tl.{name}"


def accesses(found, name):
    """(load, store or barrier; parameter) in the order of the text, callees inlined."""
    parameters, function = found[name]
    aliases = {parameter: parameter for parameter in parameters}
    events = []
    nodes = [node for node in ast.walk(function) if hasattr(node, "lineno")]
    for node in sorted(nodes, key=lambda x: (x.lineno, x.col_offset)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            begin = base(node.value)
            if begin is not None and node.targets[0].id not in parameters:
                aliases[node.targets[0].id] = aliases.get(begin, begin)
        elif is_call(node, "load") or is_call(node, "store"):
            begin = base(node.args[0])
            events.append((node.func.attr, aliases.get(begin, begin)))
        elif is_call(node, "debug_barrier"):
            events.append(("barrier", None))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            callee = node.func.id
            if callee in found:
                given = dict(zip(found[callee][0], node.args, strict=False))
                for kind, parameter in accesses(found, callee):
                    begin = base(given[parameter]) if parameter in given else parameter
                    events.append((kind, aliases.get(begin, begin)))
    return events


def racing(found, name):
    """The tensors that a kernel loads and stores: those with a barrier between, those without."""
    events = accesses(found, name)
    loaded = {tensor for kind, tensor in events if kind == "load"}
    both = {tensor for kind, tensor in events if kind == "store" and tensor in loaded}
    guarded = set()
    for tensor in both:
        order = [kind for kind, other in events if kind == "barrier" or other == tensor]
        turns = [i for i in range(1, len(order)) if {order[i - 1], order[i]} == {"load", "store"}]
        if not turns:
            guarded.add(tensor)
    return guarded, both - guarded


FUNCTIONS = package_functions()
KERNELS = [
    name
    for name, (_, node) in FUNCTIONS.items()
    if any(ast.unparse(decorator) == "kernel" for decorator in node.decorator_list)
]


def test_kernels_are_found():
    assert len(KERNELS) >= 11


@pytest.mark.parametrize("name", KERNELS)
def test_a_tensor_is_loaded_and_stored_only_across_a_barrier(name):
    guarded, unguarded = racing(FUNCTIONS, name)
    assert not unguarded
    assert guarded == {tensor for kernel, tensor in WITH_BARRIER if kernel == name}


def test_a_race_is_seen():
    """The one that this test was written for: G over dP, in place."""
    source = """
@kernel
def gradient_kernel(products, inverse, last, BLOCK: tl.constexpr):
    place = products + tl.program_id(0)
    for k0 in range(0, last, BLOCK):
        j = k0 + tl.arange(0, BLOCK)
        g = tl.load(place + j, mask=j < last, other=0.0)
        tl.store(products + j, g * inverse, mask=j < last)
"""
    assert racing(functions(source), "gradient_kernel") == (set(), {"products"})
    with_barrier = source.replace(
        "        tl.store", "        tl.debug_barrier()\n        tl.store"
    )
    assert racing(functions(with_barrier), "gradient_kernel") == ({"products"}, set())
