"""Functions of numbers that the kernels share: the same on every GPU and in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(bits):
    """Returns the float64 of these bits (``launch.bits``). Triton takes a Python number as
    float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def weight_exponent(largest):
    """Returns the exponent of the largest |w|, bounded so that its reciprocal is a normal
    number."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.where(largest == 0.0, 0, tl.maximum(tl.minimum(exponent, 125), -125))


@triton.jit
def power(exponent):
    """Returns 2^exponent, in float32."""
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(x, TARGET: tl.constexpr):
    """Returns 1 / x in float32 to 1 ulp, for 2^-126 < x < 2^126. A division would scale x
    first."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    elif TARGET == "hip":
        return tl.inline_asm_elementwise(
            "v_rcp_f32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def fused(x, y, z, TARGET: tl.constexpr):
    """Returns x y + z in float32, rounded once."""
    if TARGET == "none":  # the interpreter of Triton 3.6 and 3.7 rounds twice in fma
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def exact_reciprocal(x, TARGET: tl.constexpr):
    """``reciprocal`` to 0.5 ulp: a step of Newton removes the error of the instruction."""
    r = reciprocal(x, TARGET)
    # The interpreter divides exactly, and that of Triton 3.6 and 3.7 rounds twice in fma.
    return r if TARGET == "none" else tl.fma(tl.fma(-x, r, 1.0), r, r)


@triton.jit
def exp(x, TARGET: tl.constexpr):
    """Returns e^x for x <= 0. ``tl.exp`` would scale x first, lest the result be subnormal."""
    if TARGET == "cuda" and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.exp(x)


@triton.jit
def exp_with_error(x):
    """Returns e^x in float32 for |x| <= 20 to 0.7 ulp, and what its rounding leaves out.
    ``tl.exp`` rounds x log2(e) first, which at x = 20 costs 20 ulp."""
    n = (x * 1.4426950408889634 + 12582912.0) - 12582912.0
    high = x - n * 0.693145751953125
    r = high - n * 1.42860682030941723e-06
    error = (high - r) - n * 1.42860682030941723e-06
    p = 1.9841270114e-4
    p = p * r + 1.3888889225e-3
    p = p * r + 8.3333337680e-3
    p = p * r + 4.1666667908e-2
    p = p * r + 1.6666667163e-1
    p = p * r + 0.5
    low = p * (r * r) + error
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    u = r + 1.0
    v = (r - (u - 1.0)) + low
    scaled = power * u
    e = power * v + scaled
    return e, power * v - (e - scaled)


@triton.jit
def tanh(x, TARGET: tl.constexpr):
    """tanh(x) to 2 ulp; NaN stays NaN. In float64 by exp, and near 0, where that would cancel, by
    Pade's approximant; in float32 by the rational function of the CPU kernel."""
    if x.dtype == tl.float64:
        u = x * x
        near = (
            x
            * (135135.0 + u * (17325.0 + u * (378.0 + u)))
            / (135135.0 + u * (62370.0 + u * (3150.0 + u * 28.0)))
        )
        e = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0.0, -far, far))
    else:
        x = tl.where(x > 9.0, 9.0, tl.where(x < -9.0, -9.0, x))
        u = x * x
        z = u * 1.3354552e-8 + 2.0609001e-5
        z = z * u + 3.4955831e-3
        z = z * u + 0.13381021
        z = (z * u + 1.0) * x
        y = u * 7.7765128e-7 + 3.2856266e-4
        y = y * u + 2.5876964e-2
        y = y * u + 0.46714336
        y = y * u + 1.0
        # Triton's own division has an error of 2 ulp.
        return z * exact_reciprocal(y, TARGET)


@triton.jit
def tanh_slope(x, t):
    """Returns 1 - t^2 of t = tanh(x) without the cancellation of the difference at large x."""
    e = tl.exp(-2.0 * tl.abs(x))
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(tl.abs(x) < 0.5, 1.0 - t * t, slope)


@triton.jit
def _slices4(x):
    even, odd = tl.split(tl.reshape(x, x.shape[:-1] + (2, 2)))  # noqa: RUF005
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def slices(x, N: tl.constexpr):
    """Returns the N slices [...] of [..., N], for N = 2, 4 or 8."""
    if N == 2:
        return tl.split(x)
    elif N == 4:
        return _slices4(x)
    else:
        even, odd = tl.split(tl.reshape(x, x.shape[:-1] + (4, 2)))  # noqa: RUF005
        x0, x2, x4, x6 = _slices4(even)
        x1, x3, x5, x7 = _slices4(odd)
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def opposite_limit(square, hidden):
    """Returns the squared distance from -k below which a query with this square is opposite to a
    key. It is so small that ordinary rows and keys, which can differ only in ``hidden`` features,
    hardly ever are."""
    share = tl.where(hidden >= 16, 0.04, tl.where(hidden >= 8, 0.01, 0.0025))
    share = tl.where(hidden >= 4, share, tl.where(hidden >= 2, 1e-5, 0.0))
    return share * tl.minimum(2.0 * square, 1.0)


@triton.jit
def anew(x, key0):
    """Returns x >= 0, computed again for each tile of keys. What is invariant over tiles takes
    registers throughout, or spills to local memory."""
    return tl.maximum(x, -key0)


@triton.jit
def unknown(x, TARGET: tl.constexpr):
    """Returns x, of int32, and hides its origin from the compiler for NVIDIA GPUs."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return x
