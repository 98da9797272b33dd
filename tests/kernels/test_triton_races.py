"""No kernel reads what another thread of it may have written.

The threads of a program run in parallel, and an element of a small tensor is in the registers of
several. One may store it before another has loaded the old number, and another may load it before
the new one is stored. Triton's interpreter runs one thread and finds no race. So a kernel loads
and stores one tensor only with a barrier between the two, and the tensors for which there is one
are listed here."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil

import pytest

pytest.importorskip("triton", minversion="3.6")

from additive_attn.backends import triton as package

WITH_BARRIER = {
    ("attend_kernel", "out"),
    ("attend_kernel", "sums"),
    ("attend_kernel", "tops"),
    ("attend_kernel", "totals"),
    ("feature_kernel", "key_sums"),
    ("feature_kernel", "totals.weight_parts"),
    ("feature_kernel", "weight_sums"),
    ("row_gradient_kernel", "scores"),
    ("row_pass_kernel", "products"),
    ("row_pass_kernel", "scores"),
    ("forward_kernel", "scores"),
    ("location_kernel", "grad_key"),
}


def functions(source):
    """Returns the functions of Triton's language in a source: name to (parameters, syntax
    tree)."""
    return {
        node.name: ([argument.arg for argument in node.args.args], node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(x) in ("kernel", "triton.jit") for x in node.decorator_list)
    }


def package_functions():
    modules = (m.name for m in pkgutil.iter_modules(package.__path__))
    sources = [
        inspect.getsource(importlib.import_module(f"{package.__name__}.{m}")) for m in modules
    ]
    modules = [functions(source) for source in sources]
    found = {name: function for own in modules for name, function in own.items()}
    for own in modules:
        for _, node in own.values():
            node.own = own  # of functions with one name, a call means that of its module
    return found


def base(node):
    """Returns the start of an address: the pointer of pointer + offsets, or a member of a tuple of
    pointers."""
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


def constant(test):
    """Whether the compiler decides a condition, whose names are all in capitals."""
    names = [node.id for node in ast.walk(test) if isinstance(node, ast.Name)]
    return bool(names) and all(name.isupper() for name in names)


def nodes_of(node, path=()):
    """Yields the nodes below that have a place in the text, each with the conditions that the
    compiler decides for it: (condition, whether it is true)."""
    if hasattr(node, "lineno"):
        yield node, path
    for field, value in ast.iter_fields(node):
        within = path
        if isinstance(node, ast.If) and constant(node.test) and field in ("body", "orelse"):
            within = (*path, (ast.unparse(node.test), field == "body"))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from nodes_of(child, within)


def accesses(found, name):
    """Returns (load, store or barrier; parameter; conditions) in the order of the text, with
    callees inlined."""
    parameters, function = found[name]
    found = {**found, **getattr(function, "own", {})}
    aliases = {parameter: parameter for parameter in parameters}
    events = []
    nodes = nodes_of(function)
    for node, path in sorted(nodes, key=lambda x: (x[0].lineno, x[0].col_offset)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            begin = base(node.value)
            if begin is not None and node.targets[0].id not in parameters:
                aliases[node.targets[0].id] = aliases.get(begin, begin)
        elif is_call(node, "load") or is_call(node, "store"):
            begin = base(node.args[0])
            events.append((node.func.attr, aliases.get(begin, begin), path))
        elif is_call(node, "debug_barrier"):
            events.append(("barrier", None, path))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            callee = node.func.id
            if callee in found:
                given = dict(zip(found[callee][0], node.args, strict=False))
                for kind, parameter, inner in accesses(found, callee):
                    begin = base(given[parameter]) if parameter in given else parameter
                    inner = tuple((f"{callee} {node.lineno}: {x}", holds) for x, holds in inner)
                    events.append((kind, aliases.get(begin, begin), (*path, *inner)))
    return events


def racing(found, name):
    """Returns the tensors that a kernel loads and stores: those with a barrier between, and those
    without."""
    events = accesses(found, name)
    guarded, unguarded = set(), set()
    for end, (kind, tensor, path) in enumerate(events):
        for begin, (before, other, early) in enumerate(events[:end]):
            if other != tensor or {before, kind} != {"load", "store"}:
                continue
            if any((text, not holds) in early for text, holds in path):
                continue  # the two are never compiled into one kernel
            known = {*early, *path}
            barriers = (e for e in events[begin:end] if e[0] == "barrier" and {*e[2]} <= known)
            (guarded if any(barriers) else unguarded).add(tensor)
    return guarded - unguarded, unguarded


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


def test_a_race_is_found():
    """The race is that of G, which is stored over dP in place."""
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


def test_branches_that_exclude_each_other_are_no_race():
    source = """
@kernel
def sum_kernel(sums, LAST: tl.constexpr):
    if LAST:
        total = tl.load(sums)
    else:
        tl.store(sums, 1.0)
"""
    assert racing(functions(source), "sum_kernel") == (set(), set())
    one_of = source.replace("    else:", "    if FIRST:")
    assert racing(functions(one_of), "sum_kernel") == (set(), {"sums"})
