"""The exponentials of the GPU's kernels, and the errors that they return with them."""

from __future__ import annotations

import contextlib

import paths
import pytest
import torch
from oracle import generator

pytest.importorskip("triton", minversion="3.6")

import triton
import triton.language as tl

from additive_attn.backends.triton.numerics import exp_with_error


@triton.jit
def kernel(x, power, error):
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    e, left = exp_with_error(tl.load(x + i))
    tl.store(power + i, e)
    tl.store(error + i, left)


def test_exp_and_what_its_rounding_leaves_out():
    x = (40 * torch.rand(8192, generator=generator(0)) - 20).to(paths.DEVICE)
    power, error = torch.empty_like(x), torch.empty_like(x)
    on_cpu = paths.DEVICE == "cpu"
    with paths._interpreted() if on_cpu else contextlib.nullcontext():
        kernel[(64,)](x, power, error)
    expected = x.double().exp()
    unit = torch.nextafter(power, torch.full_like(power, torch.inf)) - power
    assert ((power - expected).abs() / unit).max() <= 0.7
    assert ((power.double() + error - expected).abs() / unit).max() <= 0.25
