"""The loop over features with and without shared memory, alone: what barriers cost on a GPU.

Both loops compute the same sums (docs/math.md, eq. 6) of a tile of 64 x 64 pairs. In one,
as in the package, every thread loads what it multiplies. In the other the tile's rows and keys are
loaded once, and reach the threads that need them through shared memory, with barriers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from additive_attn.backends.triton.launch import launch, target
from additive_attn.backends.triton.numerics import reciprocal, slices
from additive_attn.backends.triton.quads import difference_sums

Call = Callable[[], object]
RM, TM, RN, TN = 4, 16, 4, 16
TILE = 64


@triton.jit
def loop_kernel(
    a, b, weight, out, length, features,
    RM: tl.constexpr, TM: tl.constexpr, RN: tl.constexpr, TN: tl.constexpr,
    DIRECT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """out [length][length] = sum w (b - a) / (b + a). a and b: in quads if DIRECT, else
    [length][features]."""
    row0 = tl.program_id(0) % (length // (RM * TM)) * (RM * TM)
    key0 = tl.program_id(0) // (length // (RM * TM)) * (RN * TN)
    f = tl.arange(0, 4)
    ri = row0 + tl.arange(0, RM)[:, None] + RM * tl.arange(0, TM)[None, :]
    rj = key0 + TN * tl.arange(0, RN)[:, None] + tl.arange(0, TN)[None, :]
    none = tl.zeros([1, TM, TN, 1], tl.int32)
    if DIRECT:
        twin = row0 // 2 + tl.arange(0, RM // 2)[:, None] + RM // 2 * tl.arange(0, TM)[None, :]
        row_at = 8 * twin[:, :, None, None] + none + f[None, None, None, :]
        key_at = 4 * rj[:, None, :, None] + none + f[None, None, None, :]
        acc = difference_sums(
            a + row_at, b + key_at, weight, features // 4, 4 * length, 4 * length,
            RM, TM, RN, TN, False, TARGET,
        )  # fmt: skip
    else:
        acc = tl.zeros([RM, RN, TM, TN], tl.float32)
        for u in range(0, features // 4):
            a4 = tl.load(a + ri[:, :, None] * features + 4 * u + f[None, None, :])
            b4 = tl.load(b + rj[:, :, None] * features + 4 * u + f[None, None, :])
            a0, a1, a2, a3 = slices(a4, 4)
            b0, b1, b2, b3 = slices(b4, 4)
            w = weight + 4 * u
            y0 = a0[:, None, :, None] + b0[None, :, None, :]
            y1 = a1[:, None, :, None] + b1[None, :, None, :]
            y2 = a2[:, None, :, None] + b2[None, :, None, :]
            y3 = a3[:, None, :, None] + b3[None, :, None, :]
            z0 = (b0[None, :, None, :] - a0[:, None, :, None]) * tl.load(w)
            z1 = (b1[None, :, None, :] - a1[:, None, :, None]) * tl.load(w + 1)
            z2 = (b2[None, :, None, :] - a2[:, None, :, None]) * tl.load(w + 2)
            z3 = (b3[None, :, None, :] - a3[:, None, :, None]) * tl.load(w + 3)
            z01 = z0 * y1 + z1 * y0
            z23 = z2 * y3 + z3 * y2
            y01 = y0 * y1
            y23 = y2 * y3
            acc += (z01 * y23 + z23 * y01) * reciprocal(y01 * y23, TARGET)
    i = tl.reshape(ri, [RM, 1, TM, 1])
    j = tl.reshape(rj, [1, RN, 1, TN])
    tl.store(out + i * length + j, acc)


def run(a: Tensor, b: Tensor, weight: Tensor, direct: bool) -> Tensor:
    """sum w (b - a) / (b + a) of all pairs of rows; a and b as (length, features)."""
    length, features = a.shape
    out = a.new_empty(length, length)
    launch(
        loop_kernel, (length // TILE) ** 2, a, a, b, weight, out, length, features,
        RM=RM, TM=TM, RN=RN, TN=TN, DIRECT=direct, TARGET=target(), num_warps=8,
    )  # fmt: skip
    return out


def row_quads(x: Tensor) -> Tensor:
    """In the layout of the package's forward (``quad_layout.py``), with the shape that it had."""
    signs = x.new_tensor([1.0, -1.0, 1.0, -1.0])
    twins = x.view(len(x) // 2, 2, -1, 4) * signs
    return twins.permute(2, 0, 3, 1).contiguous().view_as(x)


def key_quads(x: Tensor) -> Tensor:
    """The same for keys."""
    return x.view(len(x), -1, 4).transpose(0, 1).contiguous().view_as(x)


def measured(device: torch.device, length: int, features: int = 128) -> dict[str, Call]:
    """A call of each, checked."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.empty(length, features, device=device).uniform_(0.5, 2.0, generator=generator)
        for _ in range(2)
    )
    weight = torch.randn(features, generator=generator, device=device)
    few = slice(0, TILE)
    first, second = a[few, None], b[None, few]
    expected = (weight * (second - first) / (second + first)).double().sum(-1)
    calls: dict[str, Call] = {}
    for name, direct in (("through shared memory", False), ("loaded directly", True)):
        rows, keys = (row_quads(a), key_quads(b)) if direct else (a, b)
        call = functools.partial(run, rows, keys, weight, direct)
        error = (call()[few, few].double() - expected).abs().max().item()
        assert error < 1e-3, f"the loop {name} is off by {error:.2e}"
        calls[name] = call
    return calls
