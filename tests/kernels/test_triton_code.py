"""The GPU kernels compile for every target, spill nothing, and spend the instructions that the
algebra needs: read from the machine code, since no GPU is needed for that."""

from __future__ import annotations

import functools
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", minversion="3.6", reason="Triton brings compiler and disassembler")

from triton.runtime.jit import JITFunction

from additive_attn.backends import triton as operators
from additive_attn.backends.triton import arguments, tiles
from additive_attn.backends.triton.batch import BatchShape
from additive_attn.backends.triton.prepare import prepare
from tools import machine_code
from tools.control_flow import number
from tools.kernel_calls import call, scores_call, step_call
from tools.machine_code import (
    AMD,
    LOCATION,
    LONG,
    SLOW,
    STEP,
    TRITON,
    compiled_calls,
    per_pair,
)

# The same source becomes other instructions in another version of the compiler.
VERSION = tuple(map(int, TRITON.split(".")[:2]))
figures = pytest.mark.skipif(
    VERSION > (3, 9), reason=f"the figures are those of Triton 3.6 to 3.9; this is {TRITON}"
)
pytestmark = pytest.mark.skipif(
    torch.version.hip is not None or operators.interpreted(),
    reason="compiles for targets by name, which the interpreter and ROCm do not",
)


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


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that calls launch, which do not even compile."""
    names = []

    def run(kernel, *arguments, **options):
        names.append(kernel.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    return names


EVERYTHING = dict(
    mask=torch.bool, lengths=True, dropout_p=0.1, left=200, right=100,
    upstream=("out", "weights", "lse"),
)  # fmt: skip
STEPPED = dict(mask=torch.float32, lengths=True, dropout_p=0.1)
CALLS = {
    "usual": call(*LONG),
    "usual forward, bfloat16": call(*LONG, dtype=torch.bfloat16, upstream=()),
    "usual forward, bfloat16, without weights": call(
        *LONG, dtype=torch.bfloat16, need_weights=False, upstream=()
    ),
    "everything": call(2, 200, 300, 128, 64, **EVERYTHING),
    "float mask": call(2, 200, 300, 128, 64, mask=torch.float32),
    "sizes of one": call(2, 5, 7, 1, 1, mask=torch.bool),
    "single, sizes of one": call(2, 1, 7, 1, 1, mask=torch.bool),
    "odd sizes": call(3, 67, 131, 33, 17, need_weights=False),
    "96 features": call(1, 80, 80, 96, 64),
    "few rows": call(2, 12, 100_000, 128, 64),
    "few tiles": call(2, 8, 64, 512, 64, need_weights=False),
    "few tiles of many rows": call(1, 50, 50, 1024, 64, need_weights=False),
    "6 rows": call(2, 6, 40, 40, 64, mask=torch.bool),
    "16 rows": call(1, 16, 700, 64, 64, need_weights=False),
    "few keys": call(2, 300, 3, 128, 64),
    "half": call(2, 80, 90, 128, 64, dtype=torch.float16, mask=torch.float16),
    "bfloat16": call(2, 80, 90, 48, 64, dtype=torch.bfloat16, **EVERYTHING),
    "float64": call(2, 70, 80, 40, 64, dtype=torch.float64, mask=torch.float64),
    "float64, everything": call(2, 5, 6, 40, 64, dtype=torch.float64, **EVERYTHING),
    "single": call(*STEP),
    "single, smallest": call(1, 1, 10, 32, 20),
    "single, wide values": call(2, 1, 70, 128, 1024, **EVERYTHING),
    "single, everything": call(2, 1, 5000, 128, 300, **EVERYTHING),
    "single, half": call(2, 1, 5000, 128, 300, dtype=torch.float16, mask=torch.float16),
    "single, float64": call(2, 1, 500, 128, 300, dtype=torch.float64, **EVERYTHING),
    "scores": scores_call(200, torch.bool),
    "single, scores": scores_call(1, torch.float32),
    "step": step_call(*STEP),
    "step, location": step_call(*LOCATION, filters=32),
    "step, coverage": step_call(8, 1, 400, 512, 512, filters=1),
    "step, many filters": step_call(2, 1, 500, 320, 320, filters=100),
    "step, everything": step_call(2, 1, 5000, 128, 300, filters=10, **STEPPED),
    "step, half": step_call(2, 1, 500, 128, 300, filters=32, dtype=torch.float16),
    "step, float64": step_call(2, 1, 500, 40, 300, filters=3, dtype=torch.float64, **STEPPED),
}
# No hot loop of these may read or write local memory.
USUAL = tuple(label for label in CALLS if label.startswith("usual"))
OTHERS = ("sm_80", "sm_100", "gfx942")
# The same kernels as of other calls, specialised otherwise.
VARIANTS = {
    "float mask", "sizes of one", "odd sizes", "96 features", "few rows", "6 rows", "16 rows",
    "few keys", "half", "bfloat16", "float64, everything",
}  # fmt: skip
# Bytes that are spilled at most, outside of innermost loops, where the assembler of Triton 3.6 to
# 3.8 holds a kernel to fewer registers than it needs at one place. With 3.9, the pass over
# features alone does.
SPILLS = {
    ("forward_kernel", "sm_90"): 32,
    ("feature_kernel", "sm_90"): 8,
    ("feature_kernel", "sm_100"): 48,
}
FEATURE_SPILLS = {"sm_90": 320, "sm_100": 32}
# Of one query per entry: four programs on a multiprocessor with these were faster on an H200 than
# three, or larger ones, without.
DECODE_SPILLS = {"forward_kernel": 128, "probability_kernel": 40, "merge_kernel": 8}
# The same of kernels that need more registers than there are around their hot loop. What that
# costs on the usual path is counted in all. More pairs in a thread spill more, and are faster all
# the same on an H200: they share what is loaded.
HELD = {"attend_kernel": 2304, "score_kernel": 640, "row_pass_kernel": 768}
# Accesses to local memory of a turn of attend_kernel's hot loop in calls that are not usual, at
# most: bf16 with every feature has two with 3.9, and more calls some before.
LOCAL = 2 if VERSION >= (3, 9) else 8
# Of a hot loop on sm_90, at most: instructions per tanh, special functions per tanh, and what
# SLOW names.
BARS = {
    "score_kernel": (4.3, 0.25, 0),
    "attend_kernel": (4.3, 0.25, 0),
    # Sums over eight lanes in place of two: more instructions, a quarter of the bytes.
    "feature_kernel": (7.5, 0.75, 0),
}
# Instructions per tanh in all, on sm_90, at most: everything that a call does for each pair; with
# versions before 3.9, which spill more around the hot loop.
FORWARD = {
    "float32": (call(*LONG, need_weights=False, upstream=()), 4.95, 4.95),
    "bfloat16": (call(*LONG, dtype=torch.bfloat16, need_weights=False, upstream=()), 4.75, 4.8),
    "512 values": (
        call(*LONG[:4], 512, dtype=torch.bfloat16, need_weights=False, upstream=()), 5.25, 5.35
    ),
}  # fmt: skip
# Of 16 bits the sums of values are in memory, half of them at a time.
BARRIERS = {"float32": 12, "bfloat16": 27}
BACKWARD = 12.75 if VERSION >= (3, 9) else 12.95  # float32, scores computed again


@functools.cache
def kernels(label, target):
    return compiled_calls(target, CALLS[label])


def hot_loops(name, target):
    """The kernels of the usual call with this name, each with its hot loop."""
    found = [kernel for kernel in kernels("usual", target) if kernel.name == name]
    return [(kernel, kernel.hot_loop()) for kernel in found]


def instructions_per_tanh(name, target):
    return max(kernel.per_tanh(loop) for kernel, loop in hot_loops(name, target))


@pytest.mark.parametrize(
    "label,target",
    [
        *((label, "sm_90") for label in CALLS if label not in VARIANTS),
        *(pytest.param(label, "sm_90", marks=pytest.mark.sweep) for label in sorted(VARIANTS)),
        *(
            pytest.param(label, target, marks=pytest.mark.sweep)
            for label in (
                *USUAL,
                "everything",
                "single",
                "single, everything",
                "step, location",
            )
            for target in OTHERS
        ),
    ],
)
def test_calls_compile_without_spills(label, target):
    found = kernels(label, target)
    least = 3 if label.startswith(("single", "step")) else 4
    assert len(found) >= (2 if label.startswith("usual forward") else least)
    for kernel in found:
        code = kernel.code
        assert code.registers <= (512 if target in AMD else 255), kernel.name
        one_pass = kernel.name == "attend_kernel"
        assert code.shared <= (80 if one_pass else 48) * 1024, kernel.name
        assert 0 < kernel.programs < 2**31, kernel.name
        features = kernel.name == "feature_kernel"
        most = FEATURE_SPILLS.get(target, 0) if features else 0
        if VERSION < (3, 9):
            most = SPILLS.get((kernel.name, target), 0)
        few = DECODE_SPILLS.get(kernel.name, 0)
        assert code.spilled <= HELD.get(kernel.name, max(most, few)), kernel.name
        if code.spilled > few and target not in AMD:
            loops = [code.graph.iteration(loop) for loop in code.graph.innermost]
            local = LOCAL if one_pass else 0
            for loop in [kernel.hot_loop()] if kernel.name in HELD else loops:
                assert number(loop, "LDL|STL") <= local, kernel.name
        if label in USUAL and target not in AMD and kernel.tanh:
            assert number(kernel.hot_loop(), "LDL|STL") == 0, kernel.name


@figures
@pytest.mark.parametrize("name", BARS)
def test_hot_loops(name):
    instructions, special_functions, slow = BARS[name]
    for kernel, loop in hot_loops(name, "sm_90"):
        assert kernel.per_tanh(loop) <= instructions
        assert kernel.per_tanh(loop, "MUFU") <= special_functions
        assert number(loop, "|".join(SLOW)) <= slow


@figures
@pytest.mark.parametrize("name", ["score_kernel", "attend_kernel"])
def test_hot_loops_load_lines_ahead(name):
    """Each thread loads a number that it does not need, besides quads."""
    for _kernel, loop in hot_loops(name, "sm_90"):
        assert number(loop, r"LDG\.E$") == 1


def in_all(kernels):
    batch, queries, keys, hidden, _ = LONG
    return per_pair(kernels, batch * queries * keys) / hidden


@figures
@pytest.mark.parametrize("label", FORWARD)
def test_instructions_in_all(label):
    function, most, before = FORWARD[label]
    assert in_all(compiled_calls("sm_90", function)) <= (most if VERSION >= (3, 9) else before)


@figures
@pytest.mark.parametrize("label", BARRIERS)
def test_barriers_of_a_tile(label):
    """How often threads wait for one another in attention, for each tile of keys. On an H200 they
    waited a tenth of the time when a tile of float32 had 83 barriers."""
    for kernel in compiled_calls("sm_90", FORWARD[label][0]):
        if kernel.name == "attend_kernel":
            launch = kernel.launches[0]
            tile = launch.arguments.RN * launch.arguments.TN
            barriers = number(kernel.path(launch), "BAR")
            assert barriers <= BARRIERS[label] * launch.arguments.keys / tile


@figures
def test_instructions_in_all_backward():
    forward = compiled_calls("sm_90", FORWARD["float32"][0])
    both = compiled_calls("sm_90", call(*LONG, need_weights=False))
    assert in_all(both) - in_all(forward) <= BACKWARD


@figures
@pytest.mark.sweep
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("name", BARS)
def test_instructions_on_other_gpus(name, target):
    # The assembler of Triton 3.6 to 3.8 moves numbers about to pair them for sm_100.
    most = 1.1 if VERSION >= (3, 9) or target != "sm_100" else 1.2
    assert instructions_per_tanh(name, target) <= most * instructions_per_tanh(name, "sm_90")


def test_flags_are_of_whole_blocks_of_the_pass_over_features():
    """Which the compiler asserts, and the interpreter does not."""
    for sizes in itertools.product((1, 6, 40), (2, 7, 12, 20, 50, 300), (3, 30, 64, 70, 2000),
                                   (8, 96, 256, 1024), (16, 128), (2, 4), (4, 132)):  # fmt: skip
        _, rows, keys, features, *_ = sizes
        tile = tiles.row_pass_tile(*sizes)
        for flags in filter(None, (tile, tiles.score_tile(rows))):
            assert flags.keys % tiles.gradient_block(keys) == 0, sizes
            gradient = tiles.gradient_tile(rows, features)
            one = gradient["RX"] * gradient["TX"]
            assert one % flags.rows == 0 or flags.rows % one == 0, sizes


@pytest.mark.parametrize("large", ["query", "key"])
def test_a_large_tensor_beside_small_ones_compiles_for_amd(large):
    """Triton marks tensors below 2 GiB, and before 3.9 it fails where one that is marked and
    another one may be chosen."""
    sizes = dict.fromkeys(("query", "key"), 2 * 9 * 96)
    sizes[large] = 2**29 + 1  # allocated, never touched
    query, key = (torch.empty(n).as_strided((2, 9, 96), (864, 96, 1)) for n in sizes.values())

    def function():
        prepare(query, key, torch.empty(96), BatchShape((2,)), 1.0, exponential=True, quads=True)

    (kernel,) = compiled_calls("gfx942", function)
    assert kernel.name == "prepare_kernel" and kernel.code.spilled == 0


def test_lengths_share_kernels(monkeypatch):
    """50 lengths, odd ones too, and many batch sizes compile a bounded number of kernels: which,
    Triton's keys say before it compiles."""
    target = SimpleNamespace(arch=90)

    def compile_nothing(kernel, key, *_more):
        return built.setdefault(
            (kernel, key), SimpleNamespace(metadata=SimpleNamespace(num_warps=1, target=target))
        )

    def several(sizes):
        built.clear()
        for batch, queries, keys in sizes:
            compiled_calls("sm_90", call(batch, queries, keys, 32, 16, need_weights=False))
        return set(built)

    built: dict[Any, SimpleNamespace] = {}
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(machine_code, "_code", lambda built, target: None)

    # Few tiles of rows are smaller than many. Rows of keys have a kernel per power of two, small
    # calls others than large ones.
    sizes = [((1, 2, 16, 48)[i % 4], 17 + 29 * i, 20 + 33 * i) for i in range(25)]
    seen = several(sizes)
    more = [(50 - i, 18 + 29 * i, 19 + 31 * i) for i in range(25)]
    assert len(seen | several(more)) <= 20
    singles = [(1 + i, 1, 5 + 7 * i) for i in range(50)]
    assert len(several(singles)) <= 17


@pytest.mark.parametrize(
    "sizes",
    [(1, 20_000, 20_000), (200_000, 2, 3), (1, 17, 300_000), (1, 300_000, 17), (100_000, 1, 12)],
    ids=str,
)
def test_extra_memory(sizes, launched, monkeypatch):
    """What one call needs beyond its inputs: workspaces of a fixed size, and as much as a few
    copies of the inputs, results included."""
    batch, queries, keys = sizes
    monkeypatch.setattr(arguments, "processors", lambda device: 132)
    with PeakMemory() as peak:
        call(*sizes, 8, 8, need_weights=False)()
    assert len(launched) >= 3
    inputs = 4 * batch * (queries + keys) * 16
    workspace = 4 * tiles.WORKSPACE_ELEMENTS
    assert peak.peak <= 4 * workspace + 10 * inputs


def test_a_mask_is_not_copied(launched):
    """Not even one that broadcasts in the middle of three batch dims."""
    batch, rows, keys = (4, 4, 3), 600, 700
    mask = torch.ones(4, 1, 1, 1, keys, dtype=torch.bool)
    inputs = [torch.zeros(*batch, n, 8) for n in (rows, keys, keys)]
    with PeakMemory() as peak:
        options = mask, *(None,) * 4, -1, -1, None, 0.0, 1.0, False
        operators.forward(*inputs, torch.zeros(8), *options)
    assert launched
    assert peak.peak <= 4 * tiles.WORKSPACE_ELEMENTS + 8 * sum(x.nbytes for x in inputs)
