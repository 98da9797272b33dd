"""Promise 2: extra memory grows with Lq + Lk; with returned weights as Lq x Lk; never times H.

Each measurement is a process of its own, since the peak memory of a process never decreases.
"""

from __future__ import annotations

import sys

import fresh
import pytest
from oracle import ON_KERNEL

MEASURE = """
import torch
from additive_attn import additive_attention, additive_scores
torch.set_num_threads(2)

def inputs(rows, length):
    shapes = (rows, hidden), (length, hidden), (length, hidden), (hidden,)
    return [torch.randn(s).requires_grad_() for s in shapes]

def run(tensors, upstream):
    if only_scores:
        query, key, _, weight = tensors
        return additive_scores(query, key, weight).backward(upstream[-1])
    outputs = additive_attention(*tensors, need_weights=need_weights)
    if need_weights:
        torch.autograd.backward(outputs, upstream)
    else:
        outputs.backward(upstream[0])

def upstream(rows, length):
    grads = [torch.randn(rows, hidden)]
    return grads + [torch.randn(rows, length)] if need_weights or only_scores else grads

def resident(which):
    # Not getrusage: its maximum is inherited from the process that started this one.
    with open("/proc/self/status") as f:
        return int(f.read().split(which + ":")[1].split()[0]) / 1e3

run(inputs(8, 8), upstream(8, 8))
tensors, grads = inputs(queries, length), upstream(queries, length)
before = resident("VmRSS")
run(tensors, grads)
peak = resident("VmHWM")
assert all(torch.isfinite(t.grad).all() for t in tensors if t.grad is not None)
print(peak - before)
"""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc to measure peak memory"
)


def extra_megabytes(
    length: int,
    *,
    need_weights: bool = False,
    queries: int | None = None,
    scores: bool = False,
):
    """Peak growth of resident memory through one forward and backward, H = Dv = 128."""
    return megabytes(
        MEASURE, length=length, hidden=128, need_weights=need_weights, queries=queries or length,
        only_scores=scores,
    )  # fmt: skip


def megabytes(code: str, **settings: object) -> float:
    names = "".join(f"{name} = {setting!r}\n" for name, setting in settings.items())
    result = fresh.python(names + code)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@pytest.mark.skipif(not ON_KERNEL, reason="minutes on the fallback, whose memory is tested below")
@pytest.mark.parametrize("length", [8192, pytest.param(16384, marks=pytest.mark.sweep)])
def test_linear_growth(length):
    """The plain layer needs 34 GB at 8192, and 137 GB at 16384, for its energies alone."""
    short = extra_megabytes(length // 4)
    long = extra_megabytes(length)
    assert long < 300, f"{long:.0f} MB for {length} x {length}"
    # Four times the length takes four times the memory; sixteen times if it were quadratic.
    assert long < 5 * short + 20, f"{short:.0f} MB grew to {long:.0f} MB"


def test_never_the_energies():
    """The energies, Lq x Lk x H, would take 537 MB here (twice that with their gradient)."""
    assert extra_megabytes(1024) < 150


def test_returned_weights_cost_one_matrix_each():
    """Lq x Lk takes 16.8 MB: for the weights, and for the backward's results of the same size."""
    matrix = 2048 * 2048 * 4 / 1e6
    extra = extra_megabytes(2048, need_weights=True)
    assert extra < 8 * matrix + 40, f"{extra:.0f} MB"


def test_scores_cost_one_matrix_each():
    """The scores take a matrix; their gradient is allocated before the measurement."""
    matrix = 2048 * 2048 * 4 / 1e6
    extra = extra_megabytes(2048, scores=True)
    assert extra < 4 * matrix + 40, f"{extra:.0f} MB"


def test_one_query_over_many_keys():
    """In pooling, keys and values (51 MB each) are neither copied nor expanded per thread."""
    keys = 100_000 * 128 * 4 / 1e6
    extra = extra_megabytes(100_000, queries=1)
    # The gradients of key and value are two such matrices.
    assert extra < 3.5 * keys, f"{extra:.0f} MB"


STEPS = """
import ctypes
import torch
from additive_attn import AdditiveAttention
torch.set_num_threads(2)
if not holes:
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
layer = AdditiveAttention(32, 256)
key = torch.randn(4, 2000, 32)

def resident(which):
    with open("/proc/self/status") as f:
        return int(f.read().split(which + ":")[1].split()[0]) / 1e3

def decode(steps):
    memory, state = layer.project(key), torch.randn(4, 32)
    for _ in range(steps):
        if ours:
            context, _ = layer.step(state, memory)
        else:
            energy = torch.tanh(layer.query_layer(state)[:, None] + memory.key)
            weights = layer.energy_layer(energy).squeeze(-1).softmax(-1)
            context = (weights[:, None] @ key)[:, 0]
        state = state + context
    state.sum().backward()

decode(2)
before = resident("VmRSS")
decode(steps)
print(resident("VmHWM") - before)
"""


def test_decoder_steps():
    """A step saves 0.15 MB of weights, scores and rows here; keys or energies would take 8 MB. In
    plain PyTorch each step allocates energies and frees them, and glibc's heap keeps holes between
    them (docs/limits.md). So large tensors are allocated by mmap there."""
    settings = dict(steps=60, holes=ON_KERNEL)
    assert megabytes(STEPS, ours=False, **settings) > 60 * 8, "no energies were measured"
    assert megabytes(STEPS, ours=True, **settings) < 40 + 60 * 0.3
