"""Runs the compiled Triton kernels on CPU tensors: ``pytest --compiled 80``.

The interpreter executes a kernel's Python. Layouts, inline assembly and barriers exist only in
compiled code. Here an emulator of PTX is the driver. It checks every access, and each fault fails
the test: races, reads of unwritten bytes, addresses out of bounds.

The emulator is looked for beside the checkout, or where ADDITIVE_ATTN_PTX says. PTX_NOISE=1 makes
approximate instructions as inexact as they are documented, PTX_BACKWARDS=1 runs threads in reverse
order, PTX_CONTRACT=1 fuses every product with the sum that it is a term of, and PTX_PLANS=1
repeats every call from its launch plan.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path(os.environ.get("ADDITIVE_ATTN_PTX") or ROOT.parent / "shared" / "tools" / "ptx")

SHAPE_ONLY = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
OPTIONS = ("PTX_NOISE", "PTX_BACKWARDS", "PTX_CONTRACT", "PTX_PLANS")

# A ticket of ``merging.is_last``. Without the rewriting below, the emulator would report a race.
TICKET = re.compile(
    r"(@!?%\w+\s+)?atom\.global\.gpu\.acq_rel\.add\.u32\s+(%\w+),\s*\[([^\]]*)\],\s*(%\w+);"
)
STACK = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\];")
# The emulator has mad.wide for 32 bits only, so 16 bits become a product and an addition.
WIDE = re.compile(r"(@!?%\w+\s+)?mad\.wide\.([us]16)\s+(%\w+),\s*([^;]*),\s*([^,;]+);")
# The emulator has no addresses of parameters, from which LLVM chooses in place of their numbers.
ADDRESS = re.compile(r"mov\.b(?:32|64)(\s+(%\w+),\s*)(\w+_param_\d+);")
CHOICE = re.compile(r"selp\.b(?:32|64)\s+(%\w+),\s*(%\w+),\s*(%\w+),[^;]*;")
CHOSEN = re.compile(r"ld\.param\.b32(\s+%\w+),\s*\[(%\w+)\];")
ORDERED = "same value written by two programs"  # a harmless race

# Tensors whose addresses kernels may be given in place of the tensors, as by launch plans; and
# memory that is made while an operator is ``tracked``.
memory: list[torch.Tensor] = []

_emulator: Any = None
_driver: Any = None


class Unusable(Exception):
    """There is no emulator, or it cannot be built."""


def _chosen(name: str) -> bool:
    return os.environ.get(name) == "1"


def install(capability: int) -> None:
    """Makes the emulator Triton's driver, for this process."""
    global _emulator, _driver
    if os.environ.get("TRITON_INTERPRET"):
        raise Unusable("TRITON_INTERPRET is set: the interpreter runs no compiled code")
    if not (PLACE / "driver.py").is_file():
        raise Unusable(f"no emulator of PTX at {PLACE}: name its folder in ADDITIVE_ATTN_PTX")
    # What is kept as machine code is the PTX, which must not meet a real GPU.
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "compiled")
    sys.path.insert(0, str(PLACE))
    _driver = importlib.import_module("driver")
    try:
        _driver.emulate.core()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unusable(f"the emulator of PTX at {PLACE} does not build ({error})") from error
    _driver.emulate.Program = program_class(_driver.emulate)
    _driver.Tracker = tracker_class(_driver)
    _driver.Emulator.launcher_cls = launcher_class(_driver)
    _driver._Utils = utils_class(_driver)
    _emulator = _driver.install(
        capability,
        strict=False,
        noise=_chosen("PTX_NOISE"),
        truncate_mma=_chosen("PTX_NOISE"),
        backwards=_chosen("PTX_BACKWARDS"),
        contract=_chosen("PTX_CONTRACT"),
    )


def without_addresses(ptx: str) -> str:
    """Returns PTX that loads parameters of 32 bits before it chooses among them."""
    addresses = {found[2] for found in ADDRESS.finditer(ptx)}
    for found in CHOICE.finditer(ptx):
        if {found[2], found[3]} <= addresses:
            addresses.add(found[1])
    if addresses:
        ptx = ADDRESS.sub(r"ld.param.b32\1[\3];", ptx)
        ptx = CHOSEN.sub(
            lambda found: f"mov.b32{found[1]}, {found[2]};" if found[2] in addresses else found[0],
            ptx,
        )
    return ptx


def program_class(emulate: Any) -> type:
    """Adds the instructions that the emulator lacks to its programs."""

    class Program(emulate.Program):
        def __init__(self, ptx: str, *more: Any, **options: Any) -> None:
            """Rewrites a ticket to a load, an addition and a store, which is the same since
            programs run one after the other. Removes a stack that is never accessed, and addresses
            of parameters."""
            ptx = without_addresses(ptx)
            ptx = STACK.sub(lambda found: found[0] if ptx.count(found[1]) > 1 else "", ptx)
            ptx, self.tickets = TICKET.subn(
                r"\1ld.global.b32 \2, [\3]; \1add.u32 %ticket1, \2, \4; "
                r"\1st.global.b32 [\3], %ticket1;",
                ptx,
            )
            ptx, wide = WIDE.subn(r"\1mul.wide.\2 %wide1, \4; \1add.u32 \3, %wide1, \5;", ptx)
            for name, number in (("ticket", self.tickets), ("wide", wide)):
                if number:
                    ptx = ptx.replace(".reg ", f".reg .b32 %{name}<2>;\n\t.reg ", 1)
            super().__init__(ptx, *more, **options)

        def _problem(self, found: Any, names: Any) -> Any:
            """Allows races after a program has drawn a ticket, since the stores of other programs
            come before it. If one of those had not run yet, the emulator would report a read of
            unwritten bytes."""
            problem = super()._problem(found, names)
            if self.tickets and "programs" in problem.kind:
                operands = [ins.operands for ins in self.kernel.instructions]
                drawn = next(n for n, x in enumerate(operands) if "%ticket1" in x) - 1
                problem.kind = ORDERED if found.ins >= drawn else problem.kind
            return problem

        def _fill(self, row: Any, ins: Any) -> None:
            if ins.name != "copysign.f32":
                name = ins.name.replace("ld.volatile.", "ld.")
                super()._fill(row, dataclasses.replace(ins, name=name))
                return
            # The result has the sign of the first operand and the other bits of the second.
            result, sign, number = ins.operands
            row["op"] = emulate.operations()["lop3.b32"]
            row["o"][:4] = (
                self._result(result, 4), self._operand(sign, "f32"),
                self._operand("0x80000000", "b32"), self._operand(number, "f32"),
            )  # fmt: skip
            row["imm"] = 0xE2  # a & b | ~b & c

    return Program


def installed() -> bool:
    return _emulator is not None


def _flat(signature: Any, arguments: Any, names: Any) -> Iterator[tuple[Any, str]]:
    """Yields the arguments of the compiled kernel: the fields of tuples, without constants."""
    for kind, argument, name in zip(signature, arguments, names, strict=True):
        if isinstance(kind, tuple):
            fields = getattr(argument, "_fields", range(len(kind)))
            yield from _flat(kind, argument, [f"{name}.{field}" for field in fields])
        elif kind != "constexpr":
            pointer = str(kind).startswith("*") and isinstance(argument, int)
            yield at(argument) if pointer else argument, name


def at(address: int) -> torch.Tensor | None:
    """The bytes from an address to the end of the tensor that contains it."""
    if address == 0:
        return None
    for storage in (x.untyped_storage() for x in memory):
        offset = address - storage.data_ptr()
        if 0 <= offset < storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            return whole[offset:]
    for start, written in _emulator.defined.items():
        if 0 <= address - start < written.size:
            whole = torch.frombuffer(
                (ctypes.c_uint8 * written.size).from_address(start), dtype=torch.uint8
            )
            return whole[address - start :]
    raise AssertionError(f"a kernel is given {address:#x}, which is in no tensor")


def made(start: int, size: int) -> None:
    """Registers memory, of which no byte has been written."""
    _emulator.defined[start] = _driver.np.zeros(size, _driver.np.uint8)


def gone(start: int, with_: torch.Tensor | None = None) -> None:
    """Removes that memory, at once or when a tensor is freed."""
    if with_ is None:
        del _emulator.defined[start]
    else:
        weakref.finalize(with_.untyped_storage(), _emulator.defined.pop, start, None)


# The compiled kernel of each function of the driver, and its launcher.
functions: dict[int, tuple[Any, Any]] = {}


def run(function: int, grid: tuple[int, ...], values: list[Any], names: list[str]) -> None:
    program, launcher = functions[function]
    missing = len(program.kernel.parameters) - len(values)
    assert missing in (0, 1, 2), (len(values), program.kernel.parameters)
    values, names = [*values, *[None] * missing], [*names, *["scratch"] * missing]
    _emulator.launch(program, grid, launcher.metadata, values, names)


def launcher_class(driver: Any) -> type:
    """Returns a launcher under the name that launch plans look for."""

    class CudaLauncher(driver._Launcher):
        last: Any = None

        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            CudaLauncher.last = self

        def __call__(self, x: int, y: int, z: int, stream: Any, function: int, *more: Any) -> None:
            _packed, _launch_metadata, _enter, _leave, *arguments = more
            flat = list(_flat(self.signature, arguments, map(str, self.names)))
            run(function, (x, y, z), [value for value, _ in flat], [name for _, name in flat])

    return CudaLauncher


def utils_class(driver: Any) -> type:
    class Utils(driver._Utils):
        def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
            """Returns a number instead of the kernel that the last launcher was made for."""
            module, program, *rest = super().load_binary(*arguments)
            number = len(functions) + 1
            functions[number] = program, driver.Emulator.launcher_cls.last
            return (module, number, *rest)

    return Utils


def tracker_class(driver: Any) -> type:
    """Returns a tracker that does not check tensors of which only shape, dtype and device are
    read."""

    class Tracker(driver.Tracker):
        def check(self, x: torch.Tensor, what: str) -> None:
            if not what.startswith(tuple(f"aten.{name}." for name in SHAPE_ONLY)):
                super().check(x, what)

    return Tracker


def tracked(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``operator`` so that it is recorded which bytes have been written. Raises where
    torch's own operators read other bytes, or where the results have any."""

    def call(*arguments: Any) -> Any:
        tracker = _driver.Tracker(_emulator)
        with tracker:
            results = operator(*arguments)
        for n, x in enumerate((results,) if isinstance(results, torch.Tensor) else results):
            tracker.check(x, f"result {n}")
        return results

    return call


def operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an operator of the package that runs in the emulator."""
    if _chosen("PTX_PLANS"):
        function = importlib.import_module("emulated_libcuda").with_plans(function)
    return tracked(function)


def unwritten() -> type[Exception]:
    """The exception for an operator of torch that reads unwritten bytes."""
    error: type[Exception] = _driver.UndefinedRead
    return error


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Runs compiled kernels, and raises if the emulator has found a fault."""
    _emulator.problems.clear()
    yield
    found = [str(problem) for problem in _emulator.problems if not problem.harmless]
    assert not found, "the emulator found\n" + "\n".join(found[:5])


def launched() -> list[str]:
    """The names of the kernels that have run."""
    return [name for name, *_ in _emulator.launches]


def described() -> str:
    """The target, the compiler and the options of the emulator."""
    version = importlib.import_module("triton").__version__
    chosen = [name for name in OPTIONS if _chosen(name)]
    return " ".join([f"compiled for sm_{_emulator.capability} by Triton {version}", *chosen])
