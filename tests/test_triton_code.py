"""The GPU kernels compile for every target, spill nothing, and spend the instructions that the
algebra needs: read from the machine code, since no GPU is needed for that."""

from __future__ import annotations

import functools
import importlib.metadata

import pytest

pytest.importorskip("triton", minversion="3.6", reason="Triton brings compiler and disassembler")

from machine_code import AMD, INTEGERS, NVIDIA, SIZES, compiled, special

from additive_attn.triton import backward, configs, forward, prepare, scores

TRITON = importlib.metadata.version("triton")
# The same source becomes other instructions in another version of the compiler.
figures = pytest.mark.skipif(
    not TRITON.startswith("3.9."), reason=f"the figures are those of Triton 3.9; this is {TRITON}"
)
POINTERS = {"lengths": "*i64", "seed": "*i64", "mask": "*u8"}
TILE = configs.score_tile(4096)
FORM = {"FEW": False, "CENTRED": prepare.CENTRED_FEATURES, "MASK": "bool", "HAS_LENGTHS": True}
GRADIENT = {**configs.GRADIENT_TILE, "BLOCK": configs.GRADIENT_BLOCK, "padded": 128, "WIDE": False}
KERNELS = {
    "scores": (scores.score_kernel, {**TILE.sizes(), **FORM, "WIDE": False}, TILE.warps),
    "scores of one row": (
        scores.single_row_kernel,
        {"MASK": "bool", "HAS_LENGTHS": True, "BLOCK": 16, "FEATURES": 128},
        4,
    ),
    "lse": (forward._lse_kernel, {"BLOCK": 256, "NEED_WEIGHTS": True}, 2),
    "values": (
        forward._value_kernel,
        {"BM": 16, "BN": 32, "BD": 64, "DROPOUT": True, "PRECISION": "ieee"},
        4,
    ),
    "exponentials": (prepare._exp_kernel, {"SIGN": 1, "ROWS": 8, "BLOCK": 128}, 4),
    "weights": (prepare._weight_kernel, {"BLOCK": 128, "CENTRED": 32}, 4),
    "score gradients": (
        backward._gradient_kernel,
        {"BLOCK": 256, "GRAD_WEIGHTS": True, "GRAD_LSE": True, "DROPOUT": True},
        2,
    ),
    "query gradients": (backward.query_kernel, GRADIENT, 8),
    "key gradients": (backward.key_kernel, GRADIENT, 8),
}
HOT = {
    # Reciprocals of one iteration, tanh per reciprocal; instructions per tanh at most, on sm_90.
    "scores": (16, 4, 4.5),
    "query gradients": (32, 2, 6.6),
    "key gradients": (32, 2, 5.6),
}


@functools.cache
def build(name, target):
    kernel, constants, warps = KERNELS[name]
    if "TARGET" in kernel.arg_names:
        constants = {**constants, "TARGET": "hip" if target in AMD else "cuda"}
    return compiled(kernel, constants, POINTERS, target, warps)


def instructions_per_tanh(name, target):
    reciprocals, group, _ = HOT[name]
    return build(name, target).hot_loop(reciprocals).total() / (reciprocals * group)


@figures
@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
@pytest.mark.parametrize("name", HOT)
def test_no_spills_within_the_registers(name, target):
    code = build(name, target)
    assert code.spilled == 0
    assert code.registers <= (512 if target in AMD else 255)
    assert code.shared <= 48 * 1024


@figures
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", [name for name in KERNELS if name not in HOT])
def test_no_spills_in_the_other_kernels(name, target):
    code = build(name, target)
    assert code.spilled == 0
    assert code.shared <= 48 * 1024


@figures
@pytest.mark.parametrize("name", HOT)
def test_instructions_per_tanh(name):
    assert instructions_per_tanh(name, "sm_90") <= HOT[name][2]


@figures
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("name", HOT)
def test_instructions_on_other_gpus(name, target):
    assert instructions_per_tanh(name, target) <= 1.1 * instructions_per_tanh(name, "sm_90")


@figures
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name,most", [("scores", 0.3), ("query gradients", 0.5)])
def test_special_functions_per_tanh(name, most, target):
    reciprocals, group, _ = HOT[name]
    loop = build(name, target).hot_loop(reciprocals)
    assert special(loop) / (reciprocals * group) <= most


def variants():
    """(label, kernel, constants, pointer types, warps). The interpreter knows no types."""
    half = {name: "*fp16" for name in ("query", "key", "value", "out", "weights")}
    double = {
        name: "*fp64"
        for kernel in KERNELS.values()
        for name in kernel[0].arg_names
        if name not in {"lengths", "seed", "threshold", *SIZES} and not INTEGERS.search(name)
    }
    for rows in (4096, 12, 6, 3):
        for mask, few in (("none", True), ("float", False)):
            tile = configs.score_tile(rows)
            constants = {**tile.sizes(), **FORM, "WIDE": False, "MASK": mask, "FEW": few}
            yield f"{rows} rows, {mask}", scores.score_kernel, constants, half, tile.warps
        tile = configs.score_tile(rows, wide=True)
        constants = {**tile.sizes(), **FORM, "WIDE": True, "MASK": "float"}
        yield f"{rows} rows, float64", scores.score_kernel, constants, double, tile.warps
    for types, features in ((half, 128), (double, 64)):
        constants = {"MASK": "float", "HAS_LENGTHS": False, "BLOCK": 16, "FEATURES": features}
        yield f"one row, {features}", scores.single_row_kernel, constants, types, 4
    constants = {"BM": 16, "BN": 32, "BD": 64, "DROPOUT": False, "PRECISION": "tf32"}
    yield "values, tf32", forward._value_kernel, constants, half, 4
    yield "values, float64", forward._value_kernel, {**constants, "BM": 1}, double, 4
    for name in ("lse", "score gradients", "weights"):
        kernel, constants, warps = KERNELS[name]
        yield f"{name}, float64", kernel, constants, double, warps
    for kernel in (backward.query_kernel, backward.key_kernel):
        yield "96 features", kernel, {**GRADIENT, "padded": 96}, half, 8
        yield "gradients, float64", kernel, {**GRADIENT, "WIDE": True}, double, 8


VARIANTS = list(variants())


@pytest.mark.parametrize("label,kernel,constants,types,warps", VARIANTS, ids=lambda x: str(x)[:24])
def test_every_variant_compiles(label, kernel, constants, types, warps):
    if "TARGET" in kernel.arg_names:
        constants = {**constants, "TARGET": "cuda"}
    masks = {"mask": types["query"] if constants.get("MASK") == "float" else "*u8"}
    code = compiled(kernel, constants, {**POINTERS, **types, **masks}, "sm_90", warps)
    assert code.spilled == 0 or not TRITON.startswith("3.9.")
