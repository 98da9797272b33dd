"""Compiles the Triton kernels for GPUs that need not be present, and reads their machine code.

    python -m tools.machine_code       registers, spills and instructions per tanh, to
                                       benchmarks/results/machine-code.csv, a row per kernel

Versions of Triton compile the same source to different code: rows of the installed version and the
chosen targets are replaced, others stay.
"""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.arguments import parser_of
from tools.control_flow import Graph, number
from tools.kernel_calls import Call, call, step_call
from tools.kernel_work import PER_ROW, WORK, Work

TRITON = importlib.metadata.version("triton")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA = {f"sm_{capability}": capability for capability in (80, 90, 100)}
AMD = ("gfx942",)

# Instructions that no hot loop may hold: barriers, shared memory, local memory (spills).
SLOW = ("BAR", "LDS", "STS", "LDL", "STL")
# Per tanh, and SLOW: instructions of the hot loop. In all: of everything that grows with the
# pairs, of all threads of all launches.
IN_ALL = "in_all_per_tanh"
COLUMNS = (
    "triton", "target", "shape", "dtype", "kernel", "registers", "spilled_bytes", "shared_bytes",
    "instructions_per_tanh", "special_functions_per_tanh", *SLOW, IN_ALL,
)  # fmt: skip
LONG = 1, 1024, 2048, 128, 128  # (B, Lq, Lk, H, Dv)
WIDE = 1, 1024, 2048, 128, 512
STEP = 64, 1, 400, 512, 512
LOCATION = 32, 1, 270, 128, 512  # with 32 filters of 31 over two channels


@dataclass(frozen=True)
class Code:
    """Machine code; of NVIDIA GPUs with the binary. Disassembling takes longer than compiling."""

    registers: int
    spilled: int
    shared: int
    cubin: bytes = b""

    @functools.cached_property
    def graph(self) -> Graph:
        return Graph(_read(self.cubin, "nvdisasm", "-c"))


@dataclass(frozen=True)
class Launch:
    programs: int
    arguments: SimpleNamespace  # by name; True in place of a tensor


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its name, the arguments it was compiled for, and its launches."""

    name: str
    arguments: str
    code: Code
    launches: tuple[Launch, ...]

    @property
    def programs(self) -> int:
        """The most programs of one launch."""
        return max(launch.programs for launch in self.launches)

    @property
    def tanh(self) -> int:
        """How many a thread computes in one iteration of the hot loop; 0 where there is none."""
        return 0 if self.name in PER_ROW else self._work(self.launches[0]).tanh

    def _work(self, launch: Launch) -> Work:
        return WORK[self.name](launch.arguments)

    def hot_loop(self) -> Counter[str]:
        """What one iteration executes."""
        return self.code.graph.loop(self._work(self.launches[0]).through[0])

    def per_tanh(self, loop: Counter[str], name: str = "") -> float:
        """Instructions of the hot loop per tanh, or those with this name."""
        return number(loop, name) / self.tanh

    def path(self, launch: Launch) -> Counter[str]:
        """What a thread executes, on the cheapest path."""
        try:
            return self.code.graph.executed(self._work(launch).through)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {error}") from error

    def executed(self) -> float:
        """Instructions of all threads of all launches."""
        return sum(
            launch.programs * 32 * launch.arguments.num_warps * self.path(launch).total()
            for launch in self.launches
        )


def per_pair(kernels: Collection[Kernel], pairs: int) -> float:
    """Instructions of all threads for each pair of a query and a key, of everything that grows
    with the number of pairs; what is done once for each row or key (``PER_ROW``) is left out."""
    return sum(kernel.executed() for kernel in kernels if kernel.name not in PER_ROW) / pairs


class _Device:
    """What Triton needs of a driver to compile, without a GPU."""

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
    """The kernels that ``function`` would run on a GPU: every launch compiles for ``target``,
    by the arguments of the call, and runs nothing. Results stay uninitialised."""
    launched: dict[int, tuple[Any, Any, list[Launch]]] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        built = run(kernel, *arguments, grid=grid, warmup=True, **options)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        # Tensors would be kept alive.
        numbers = {
            name: x if x is None or isinstance(x, (int, str)) else True
            for name, x in named.items()
        }
        numbers["num_warps"] = built.metadata.num_warps
        numbers["arch"] = built.metadata.target.arch
        found = launched.setdefault(id(built), (kernel, built, []))
        found[2].append(Launch(grid[0], SimpleNamespace(**numbers)))
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
        Kernel(kernel.__name__, str(built.metadata), _code(built, target), tuple(launches))
        for kernel, built, launches in launched.values()
    ]


class _TorchKernels(TorchDispatchMode):
    """The names of torch's own operators that run a kernel: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        nothing = isinstance(result, torch.Tensor) and result.numel() == 0
        if not (nothing or func.is_view or name in ("detach", "_unsafe_view") or "empty" in name):
            self.names.append(name)
        return result


def launches(target: str, call: Call) -> Counter[str]:
    """How often a call launches each kernel, torch's among them."""
    torchs, inputs = _TorchKernels(), call.inputs()

    def function() -> None:
        with torchs:
            call.run(*inputs)

    counted: Counter[str] = Counter()
    for kernel in compiled_calls(target, function):
        counted[kernel.name] += len(kernel.launches)
    return counted + Counter(torchs.names)


@functools.cache
def _code(built: Any, target: str) -> Code:
    if target in AMD:
        return _amd(built.asm["amdgcn"], built.metadata.shared)
    return _nvidia(built.asm["cubin"], built.metadata.shared)


def _read(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia(cubin: bytes, shared: int) -> Code:
    usage = _read(cubin, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, spilled = int(found[1]), int(found[2])
    if spilled:  # without a stack there is nothing to load from it
        assembly = _read(cubin, "nvdisasm", "-c")
        spilled = max(spilled, len(re.findall(r"\b(?:LDL|STL)\b", assembly)))
    return Code(registers, spilled, shared, cubin)


def _amd(assembly: str, shared: int) -> Code:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, not to memory: some versions still
    # reserve memory for them, which no instruction reads or writes.
    spilled = field("vgpr_spill_count")
    if re.search(r"\bscratch_(load|store)", assembly):
        spilled += field("private_segment_fixed_size")
    return Code(field("vgpr_count"), spilled, shared)


def rows(target: str) -> list[dict[str, object]]:
    """Every kernel of a long sequence, of one query per entry and of a decoder's step with a
    location term; and what a long call takes in all."""
    found: list[dict[str, object]] = []
    for shape, dtype, function in (
        (LONG, torch.float32, call(*LONG)),
        (LONG, torch.bfloat16, call(*LONG, dtype=torch.bfloat16)),
        (WIDE, torch.bfloat16, call(*WIDE, dtype=torch.bfloat16)),
        (STEP, torch.float32, call(*STEP)),
        (LOCATION, torch.float32, step_call(*LOCATION, filters=32)),
    ):
        about = {
            "triton": TRITON, "target": target, "shape": "x".join(map(str, shape)),
            "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        kernels = compiled_calls(target, function)
        found += [about | _row(kernel, shape, target) for kernel in kernels]
        if shape in (LONG, WIDE) and target in NVIDIA:
            tanh = shape[0] * shape[1] * shape[2] * shape[3]
            forward = call(*shape, dtype=dtype, need_weights=False, upstream=())
            both = call(*shape, dtype=dtype, need_weights=False)
            first, all_ = (per_pair(compiled_calls(target, x), tanh) for x in (forward, both))
            found.append(about | {"kernel": "forward in all", IN_ALL: f"{first:.2f}"})
            found.append(about | {"kernel": "backward in all", IN_ALL: f"{all_ - first:.2f}"})
    return found


def _row(kernel: Kernel, shape: tuple[int, ...], target: str) -> dict[str, object]:
    row: dict[str, object] = {
        "kernel": kernel.name, "registers": kernel.code.registers,
        "spilled_bytes": kernel.code.spilled, "shared_bytes": kernel.code.shared,
    }  # fmt: skip
    if shape in (LONG, WIDE) and target in NVIDIA and kernel.name in WORK:
        row[IN_ALL] = f"{per_pair([kernel], shape[0] * shape[1] * shape[2] * shape[3]):.2f}"
        if kernel.tanh:
            loop = kernel.hot_loop()
            row["instructions_per_tanh"] = f"{kernel.per_tanh(loop):.2f}"
            row["special_functions_per_tanh"] = f"{kernel.per_tanh(loop, 'MUFU'):g}"
            row |= {name: number(loop, name) for name in SLOW}
    return row


def main() -> None:
    parser = parser_of("tools.machine_code", __doc__)
    parser.add_argument("--target", nargs="+", choices=[*NVIDIA, *AMD], default=[*NVIDIA, *AMD])
    parser.add_argument("--output", type=Path, default=RESULTS / "machine-code.csv")
    args = parser.parse_args()
    kept: list[dict[str, object]] = []
    if args.output.exists():
        with args.output.open(newline="") as file:
            kept = [
                dict(row)
                for row in csv.DictReader(file)
                if row["triton"] != TRITON or row["target"] not in args.target
            ]
    found = kept + [row for target in args.target for row in rows(target)]
    found.sort(key=lambda row: (str(row["triton"]), str(row["target"])))
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
