"""The Triton kernels as the compiler makes them, on CPU tensors: ``pytest --compiled 80``.

The interpreter executes a kernel's Python. Layouts, inline assembly and barriers exist only in
compiled code. Here an emulator of PTX is the driver. It checks every access, and what it finds
fails the test: races, reads of bytes that nobody wrote, addresses out of bounds.

The emulator lies beside the checkout, or where ADDITIVE_ATTN_PTX says. PTX_NOISE=1 makes
approximate instructions as inexact as they are documented, PTX_BACKWARDS=1 runs threads in reverse
order, PTX_CONTRACT=1 fuses every product with the sum that takes it, and PTX_PLANS=1 repeats every
call from its launch plan.
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

# A ticket of ``merging.is_last``; as another kind of race it would be none.
TICKET = re.compile(
    r"(@!?%\w+\s+)?atom\.global\.gpu\.acq_rel\.add\.u32\s+(%\w+),\s*\[([^\]]*)\],\s*(%\w+);"
)
STACK = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\];")
# Which the emulator knows of 32 bits alone: as a product and an addition.
WIDE = re.compile(r"(@!?%\w+\s+)?mad\.wide\.([us]16)\s+(%\w+),\s*([^;]*),\s*([^,;]+);")
ORDERED = "same value written by two programs"  # which is harmless

# Whose addresses kernels may be given in place of tensors, as by launch plans; and memory that is
# made while an operator is ``tracked``.
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


def program_class(emulate: Any) -> type:
    """With the instructions that the emulator does not know."""

    class Program(emulate.Program):
        def __init__(self, ptx: str, *more: Any, **options: Any) -> None:
            """Programs run one after the other, so a ticket is a load, an addition and a store. A
            stack that nothing accesses is left out."""
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
            """What a program does that has drawn a ticket comes after what others have stored: had
            one of them not run yet, bytes would be read that nobody wrote."""
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
            # The sign of the first, the other bits of the second.
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
    """What the compiled kernel takes: the fields of tuples, without what is constant."""
    for kind, argument, name in zip(signature, arguments, names, strict=True):
        if isinstance(kind, tuple):
            fields = getattr(argument, "_fields", range(len(kind)))
            yield from _flat(kind, argument, [f"{name}.{field}" for field in fields])
        elif kind != "constexpr":
            pointer = str(kind).startswith("*") and isinstance(argument, int)
            yield at(argument) if pointer else argument, name


def at(address: int) -> torch.Tensor | None:
    """The bytes from an address to the end of the tensor that holds it."""
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
    """Memory that nobody has written yet."""
    _emulator.defined[start] = _driver.np.zeros(size, _driver.np.uint8)


def gone(start: int, with_: torch.Tensor | None = None) -> None:
    """That memory, at once or with a tensor."""
    if with_ is None:
        del _emulator.defined[start]
    else:
        weakref.finalize(with_.untyped_storage(), _emulator.defined.pop, start, None)


# What a function of the driver stands for: a compiled kernel, and its launcher.
functions: dict[int, tuple[Any, Any]] = {}


def run(function: int, grid: tuple[int, ...], values: list[Any], names: list[str]) -> None:
    program, launcher = functions[function]
    missing = len(program.kernel.parameters) - len(values)
    assert missing in (0, 1, 2), (len(values), program.kernel.parameters)
    values, names = [*values, *[None] * missing], [*names, *["scratch"] * missing]
    _emulator.launch(program, grid, launcher.metadata, values, names)


def launcher_class(driver: Any) -> type:
    """Named as what launch plans know."""

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
            """A number takes the place of the kernel that the last launcher was made for."""
            module, program, *rest = super().load_binary(*arguments)
            number = len(functions) + 1
            functions[number] = program, driver.Emulator.launcher_cls.last
            return (module, number, *rest)

    return Utils


def tracker_class(driver: Any) -> type:
    """Reads no numbers of what gives only its shape, dtype and device."""

    class Tracker(driver.Tracker):
        def check(self, x: torch.Tensor, what: str) -> None:
            if not what.startswith(tuple(f"aten.{name}." for name in SHAPE_ONLY)):
                super().check(x, what)

    return Tracker


def tracked(operator: Callable[..., Any]) -> Callable[..., Any]:
    """``operator`` while it is followed which bytes have been written: torch's own operators read
    no others, and none of the results' is missing."""

    def call(*arguments: Any) -> Any:
        tracker = _driver.Tracker(_emulator)
        with tracker:
            results = operator(*arguments)
        for n, x in enumerate((results,) if isinstance(results, torch.Tensor) else results):
            tracker.check(x, f"result {n}")
        return results

    return call


def operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of the package in the emulator."""
    if _chosen("PTX_PLANS"):
        function = importlib.import_module("emulated_libcuda").with_plans(function)
    return tracked(function)


def unwritten() -> type[Exception]:
    """What is raised where an operator of torch reads what nobody wrote."""
    error: type[Exception] = _driver.UndefinedRead
    return error


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Compiled kernels run; what the emulator has found is an error."""
    _emulator.problems.clear()
    yield
    found = [str(problem) for problem in _emulator.problems if not problem.harmless]
    assert not found, "the emulator found\n" + "\n".join(found[:5])


def launched() -> list[str]:
    """The kernels that have run."""
    return [name for name, *_ in _emulator.launches]


def described() -> str:
    """Of what is compiled by what, and how it is executed."""
    version = importlib.import_module("triton").__version__
    chosen = [name for name in OPTIONS if _chosen(name)]
    return " ".join([f"compiled for sm_{_emulator.capability} by Triton {version}", *chosen])
