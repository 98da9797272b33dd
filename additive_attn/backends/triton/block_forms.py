"""Chooses the forms of the pairs of a block of G in the pass over features (math.md, section
2.2)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from additive_attn.backends.triton.prepare_rows import SAFE


@triton.jit
def _either(x, y):
    return x | y


@triton.jit
def _largest(G_place, size_i, sizes_j, k0, last_key):
    """Returns the largest |q|, |k| of pairs whose G is not 0; 0 where there are none."""
    G = tl.load(G_place)
    if cuda_capability_geq(10):
        # Key numbers that are invariant over blocks spill here. Numbers of fours of keys are
        # fewer. Up to three sizes beyond the last key are loaded, which exist.
        four = tl.minimum(k0 // 4 + tl.arange(0, G.shape[0]), last_key // 4)[:, None, None]
        size_j = tl.load(sizes_j + 4 * four + tl.arange(0, 4)[None, None, :])
    else:
        j = k0 + tl.reshape(tl.arange(0, 4 * G.shape[0]), [G.shape[0], 1, 4])
        size_j = tl.load(sizes_j + tl.minimum(j, last_key))
    some = tl.maximum(tl.maximum(size_i[:, :, None], size_j), 1e-30)
    return tl.max(tl.where(G != 0.0, some, 0.0))


@triton.jit
def forms_of_block(
    G, G_place, size_i, sizes_j, k0, last_key, flag, stride, count, FLAGS: tl.constexpr
):  # fmt: skip
    """Returns for a block of G, [BLOCK / 4, BX, 4]: whether a pair takes the direct form, whether
    one may be opposite (by FLAGS flags), whether no |q|, |k| is above 1, and whether all of G is
    0. A row or key counts only where its G is not 0. To find these keys takes long, and is done
    only where the largest of all keys could change a result."""
    j = k0 + tl.arange(0, 4 * G.shape[0])
    of_keys = tl.max(tl.load(sizes_j + tl.minimum(j, last_key)))
    bits = tl.reduce(G.to(tl.int32, bitcast=True), 2, _either) & 0x7FFFFFFF
    largest = tl.max(tl.where(bits != 0, tl.maximum(size_i, 1e-30), 0.0))
    skipped = largest == 0.0
    if (of_keys > SAFE) | ((of_keys > 1.0) & (largest <= 1.0)):
        largest = _largest(G_place, size_i, sizes_j, k0, last_key)
    if FLAGS == 1:
        opposite = tl.load(flag) != 0
    else:
        t = tl.minimum(tl.arange(0, FLAGS), count - 1)
        opposite = tl.max(tl.load(flag + t * stride)) != 0
    return largest > SAFE, opposite, largest <= 1.0, skipped
