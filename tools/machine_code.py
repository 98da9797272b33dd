"""Compiles the Triton kernels for GPUs, which need not be there, and reads their machine code.

    python -m tools.machine_code       registers, spills and instructions per tanh, to
                                       benchmarks/results/machine-code.csv, a row per kernel

Another version of Triton makes other code of the same source: the rows of the installed version
are replaced, those of others stay.
"""

from __future__ import annotations

import argparse
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
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from additive_attn.backends import triton as operators
from additive_attn.spec.call import lse_dtype

TRITON = importlib.metadata.version("triton")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA = {f"sm_{capability}": capability for capability in (80, 90, 100)}
AMD = ("gfx942",)

# The inner loops at a long sequence: special functions of one iteration, and tanh for each.
HOT = {"score_kernel": (16, 4), "query_kernel": (32, 2), "key_kernel": (32, 2)}
COLUMNS = (
    "triton", "target", "shape", "kernel", "registers", "spilled_bytes", "shared_bytes",
    "instructions_per_tanh", "special_functions_per_tanh",
)  # fmt: skip
LONG = 1, 512, 512, 128, 128  # (B, Lq, Lk, H, Dv)
STEP = 64, 1, 400, 512, 512
LOCATION = 32, 1, 270, 128, 512  # with 32 filters of 31 over two channels


@dataclass(frozen=True)
class Code:
    """Of an NVIDIA GPU, with the binary: to disassemble it takes longer than to compile it."""

    registers: int
    spilled: int
    shared: int
    cubin: bytes = b""

    @functools.cached_property
    def loops(self) -> list[Counter[str]]:
        """The instructions of each innermost loop, counted by their full names."""
        return _loops(self.cubin)

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

    def per_tanh(self) -> tuple[float, float]:
        """Of the hot loop: instructions, and special functions, per tanh."""
        reciprocals, group = HOT[self.name]
        return self.code.hot_loop(reciprocals).total() / (reciprocals * group), 1 / group


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


def call(
    batch: int, queries: int, keys: int, hidden: int, values: int, *,
    dtype: torch.dtype = torch.float32, mask: torch.dtype | None = None, lengths: bool = False,
    dropout_p: float = 0.0, need_weights: bool = True, left: int = -1, right: int = -1,
    upstream: Collection[str] = ("out",),
) -> Callable[[], None]:  # fmt: skip
    """Forward and backward, all gradients wanted, for ``compiled_calls``."""

    def function() -> None:
        inputs: list[Any] = [
            torch.zeros(batch, queries, hidden, dtype=dtype),
            torch.zeros(batch, keys, hidden, dtype=dtype),
            torch.zeros(batch, keys, values, dtype=dtype),
            torch.zeros(hidden, dtype=dtype),
            None if mask is None else torch.zeros(batch, queries, keys, dtype=mask),
            torch.zeros(batch, queries, dtype=torch.int64) if lengths else None,
            None, None, None, left, right,
            torch.zeros((), dtype=torch.int64) if dropout_p else None, dropout_p, 1.0,
        ]  # fmt: skip
        out, weights, lse = operators.forward(*inputs, need_weights)
        grads = [x if name in upstream else None for name, x in
                 (("out", out), ("weights", weights), ("lse", lse))]  # fmt: skip
        needs = (True, True, True, True, mask is not None and mask.is_floating_point)
        operators.backward(*grads, *inputs, lse, *needs)

    return function


def step_call(
    batch: int, queries: int, keys: int, hidden: int, values: int, *, filters: int = 0,
    dtype: torch.dtype = torch.float32, mask: torch.dtype | None = None, lengths: bool = False,
    dropout_p: float = 0.0,
) -> Callable[[], None]:  # fmt: skip
    """A decoder's step and its backward, with a location term and its features if ``filters``."""
    assert queries == 1

    def function() -> None:
        def zeros(*shape: int) -> Any:
            return torch.zeros(shape, dtype=dtype)

        location = location_weight = grad_key = None
        if filters:
            inputs, width = zeros(batch, 2, keys), zeros(filters, 2, 31)
            location = operators.location_features(inputs, width)
            operators.location_features_backward(location, inputs, width, True, True)
            location_weight = zeros(filters, hidden)
            grad_key = zeros(batch, keys, hidden).to(lse_dtype(dtype))
        arguments = (
            zeros(batch, 1, hidden), zeros(batch, keys, hidden), zeros(batch, keys, values),
            zeros(hidden), None, location, location_weight,
            None if mask is None else torch.zeros(batch, 1, keys, dtype=mask),
            torch.zeros(batch, 1, dtype=torch.int64) if lengths else None,
            torch.zeros((), dtype=torch.int64) if dropout_p else None, dropout_p, 1.0,
        )  # fmt: skip
        out, weights, lse = operators.step(*arguments)
        operators.step_backward(out, weights, lse, *arguments, weights, lse, grad_key)

    return function


def scores_call(
    batch: int, queries: int, keys: int, hidden: int, *, mask: torch.dtype | None = None,
    lengths: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """Scores and all their gradients."""

    def function() -> None:
        arguments = (
            torch.zeros(batch, queries, hidden), torch.zeros(batch, keys, hidden),
            torch.zeros(hidden),
            None if mask is None else torch.zeros(batch, queries, keys, dtype=mask),
            torch.zeros(batch, queries, dtype=torch.int64) if lengths else None,
            None, None, None, -1, -1, 1.0,
        )  # fmt: skip
        scores = operators.scores(*arguments)
        operators.scores_backward(scores, *arguments, True, True, True, True)

    return function


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


def _loops(cubin: bytes) -> list[Counter[str]]:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in _read(cubin, "nvdisasm", "-c").splitlines():
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
    return [
        Counter(re.sub(r"^@!?U?P\w+\s+", "", x).split()[0] for x in instructions[start:end])
        for start, end in inner
    ]


def _amd(assembly: str, shared: int) -> Code:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, not to memory.
    spilled = field("vgpr_spill_count") + field("private_segment_fixed_size")
    return Code(field("vgpr_count"), spilled, shared)


def rows() -> list[dict[str, object]]:
    """Every kernel of a long sequence, of one query per entry and of a decoder's step with a
    location term, for every target."""
    calls = {LONG: call(*LONG), STEP: call(*STEP), LOCATION: step_call(*LOCATION, filters=32)}
    found: list[dict[str, object]] = []
    for target in (*NVIDIA, *AMD):
        for shape, function in calls.items():
            for kernel in compiled_calls(target, function):
                row: dict[str, object] = {
                    "triton": TRITON, "target": target, "shape": "x".join(map(str, shape)),
                    "kernel": kernel.name, "registers": kernel.code.registers,
                    "spilled_bytes": kernel.code.spilled, "shared_bytes": kernel.code.shared,
                }  # fmt: skip
                if shape == LONG and kernel.name in HOT and target in NVIDIA:
                    instructions, special_functions = kernel.per_tanh()
                    row["instructions_per_tanh"] = f"{instructions:.2f}"
                    row["special_functions_per_tanh"] = f"{special_functions:g}"
                found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.machine_code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "machine-code.csv")
    path = parser.parse_args().output
    kept: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [dict(row) for row in csv.DictReader(file) if row["triton"] != TRITON]
    found = sorted([*kept, *rows()], key=lambda row: str(row["triton"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
