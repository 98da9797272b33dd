"""Compiles Triton kernels for GPUs, which need not be there, and reads their machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA = {f"sm_{capability}": capability for capability in (80, 90, 100)}
AMD = ("gfx942",)
INTEGERS = re.compile(r"_(outer|inner|row|column|h)$")


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


def compiled(
    kernel: Any, constants: dict[str, Any], pointers: dict[str, str], target: str, warps: int
) -> Code:
    """``pointers``: types of the pointer parameters that are not float32. Pointers, and sizes that
    are padded, are divisible by 16, as in real calls."""
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
        elif name == "threshold":
            signature[name] = "i64"
        elif INTEGERS.search(name) or name in SIZES:
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_padded")
    }
    amd = target in AMD
    built = triton.compile(
        ASTSource(kernel, signature, constants, divisible),
        target=GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", NVIDIA[target], 32),
        options={
            "num_warps": warps // 2 if amd and warps > 1 else warps,
            "enable_fp_fusion": True,
        },
    )
    if amd:
        return _amd(built.asm["amdgcn"], built.metadata.shared)
    return _nvidia(built.asm["cubin"], built.metadata.shared)


SIZES = {
    "inner", "entry_begin", "entries", "rows", "row_begin", "row_count", "row_padded", "keys",
    "key_begin", "key_count", "key_padded", "hidden", "padded", "length", "length_padded",
    "values", "left", "right", "splits", "keys_per_split",
}  # fmt: skip


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
