"""Compiles Triton kernels for GPUs, which need not be there, and reads their machine code."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA = {f"sm_{capability}": capability for capability in (80, 90, 100)}
AMD = ("gfx942",)


@dataclass(frozen=True)
class Code:
    """``loops``: the instructions of each innermost loop, counted by their full names."""

    registers: int
    spilled: int
    shared: int
    loops: list[Counter[str]]

    def hot_loop(self, reciprocals: int) -> Counter[str]:
        """Of the innermost loops with so many reciprocals, the shortest."""
        found = [loop for loop in self.loops if special(loop) == reciprocals]
        assert found, [special(loop) for loop in self.loops]
        return min(found, key=Counter.total)


def special(loop: Counter[str]) -> int:
    """Operations of the special-function unit."""
    return sum(count for name, count in loop.items() if name.startswith("MUFU"))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its name, the arguments it was compiled for, and how many programs of it
    a launch would have started at most."""

    name: str
    arguments: str
    programs: int
    code: Code


class _Device:
    """What Triton asks a driver for, without a GPU."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target  # the key of Triton's cache

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if self.target in AMD:
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", NVIDIA[self.target], 32)


def compiled_calls(target: str, function: Callable[[], None]) -> list[Kernel]:
    """The kernels that ``function`` would run on a GPU: every launch compiles for ``target``, as
    the arguments of the call ask for, and runs nothing. What the kernels would have written is
    left unwritten."""
    launched: dict[int, tuple[Any, Any, int]] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        built = run(kernel, *arguments, grid=grid, warmup=True, **options)
        most = max(grid[0], launched.get(id(built), (None, None, 0))[2])
        launched[id(built)] = kernel, built, most
        return built

    before = triton.runtime.driver._active
    hip = torch.version.hip
    triton.runtime.driver.set_active(_Device(target))
    JITFunction.run = compile_only
    torch.version.hip = "compiled for" if target in AMD else None
    try:
        function()
    finally:
        triton.runtime.driver._active = before
        JITFunction.run = run
        torch.version.hip = hip
    return [
        Kernel(kernel.__name__, str(built.metadata), programs, _code(built, target))
        for kernel, built, programs in launched.values()
    ]


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, of those made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen or not size:
            return
        self._seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


@functools.cache
def _code(built: Any, target: str) -> Code:
    if target in AMD:
        return _amd(built.asm["amdgcn"], built.metadata.shared)
    return _nvidia(built.asm["cubin"], built.metadata.shared)


def _nvidia(cubin: bytes, shared: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, *options: str) -> str:
            command = [str(TOOLS / tool), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        assembly, usage = run("nvdisasm", "-c"), run("cuobjdump", "-res-usage")
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert registers is not None, usage
    instructions: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1])
            branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", code[1])
            if branch and branch[1] in labels:
                spans.append((labels[branch[1]], len(instructions)))
    inner = [
        (start, end)
        for start, end in spans
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans)
    ]
    loops = [
        Counter(re.sub(r"^@!?U?P\w+\s+", "", x).split()[0] for x in instructions[start:end])
        for start, end in inner
    ]
    local = sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in instructions)
    return Code(int(registers[1]), max(int(registers[2]), local), shared, loops)


def _amd(assembly: str, shared: int) -> Code:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, not to memory.
    spilled = field("vgpr_spill_count") + field("private_segment_fixed_size")
    return Code(field("vgpr_count"), spilled, shared, [])
