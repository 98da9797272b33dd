"""The operators as Triton kernels. Imported only for a GPU or for a test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from additive_attn.backends.triton import backward as _backward
from additive_attn.backends.triton import forward as _forward
from additive_attn.backends.triton import location_features as _location
from additive_attn.backends.triton import plans, steps
from additive_attn.backends.triton.launch import interpreted, matmul_precision
from additive_attn.backends.triton.plans import planned, repeated_backward, repeated_forward
from additive_attn.spec.call import Call, Inputs

__all__ = [
    "again", "backward", "forward", "interpreted", "location_features",
    "location_features_backward", "prepare_keys", "probe", "repeated", "scores",
    "scores_backward", "step", "step_backward",
]  # fmt: skip

forward, scores = planned(_forward.forward), planned(_forward.scores, single=True)
repeated = functools.partial(repeated_forward, _forward.forward)
again = functools.partial(repeated_backward, _backward.backward)
backward = planned(_backward.backward)
scores_backward = planned(_backward.scores_backward)
step, step_backward = planned(steps.step), planned(steps.step_backward)
prepare_keys = steps.prepare_keys
location_features = planned(_location.location_features, single=True)
location_features_backward = planned(_location.location_features_backward)

_NAMES = ("out", "weights", "lse", "grad query", "grad key", "grad value", "grad weight")
# Queries, keys, and whether weights are returned: together these take every way from the scores to
# the results. On every GPU, 600 keys are split into ranges. A kernel merges their results for one
# query, the last program to finish for several.
_SMALL_CALLS = ((5, 40, True), (1, 40, True), (5, 600, False), (1, 600, True))


@torch.no_grad()
def probe(
    device: torch.device,
    reference_forward: Callable[..., Any],
    reference_backward: Callable[..., Any],
    warn: Callable[[str], None],
) -> None:
    """Runs the kernels of several queries and of one, of few keys and of ranges of keys, forward
    and backward, and compares them with a reference. Raises where Triton, its compiler or the
    driver fails, and RuntimeError where the results differ by more than rounding. Where only
    launch plans fail, they are disabled, and ``warn`` is called with the reason."""
    references = reference_forward, reference_backward
    plans.enabled = False
    try:
        _compare(device, *references)
    finally:
        plans.enabled = True
    try:
        # A first call, a second that is recorded, and a third that repeats it.
        for _ in range(3 if device.type == "cuda" or plans.on_cpu else 0):
            _compare(device, *references)
    except Exception as error:
        plans.enabled = False
        warn(
            f"additive_attn repeats no calls on {device} from launch plans, so small calls cost "
            f"several times as much: {type(error).__name__}: {error}"
        )


def _compare(
    device: torch.device,
    reference_forward: Callable[..., Any],
    reference_backward: Callable[..., Any],
) -> None:
    tolerance = 1e-2 if matmul_precision() == "tf32" else 1e-4
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    for queries, keys, need_weights in _SMALL_CALLS:
        inputs = Inputs(random(2, queries, 8), random(2, keys, 8), random(2, keys, 8), random(8))
        call = Call(*inputs)
        expected = reference_forward(*call, need_weights)
        upstream = [random(*x.shape) if x.numel() else None for x in expected]
        gradients = (*upstream, *call, expected[2], True, True, True, True, False)
        ours = (*forward(*call, need_weights), *backward(*gradients)[:4])
        expected = (*expected, *reference_backward(*gradients)[:4])
        for name, mine, other in zip(_NAMES, ours, expected, strict=True):
            if not other.numel():
                continue
            error = (mine - other).abs().max().item()
            if not error <= tolerance * (1 + other.abs().max().item()):
                raise RuntimeError(
                    f"the Triton kernels give another {name} than plain PyTorch on {device}: they "
                    f"differ by {error:.3g} in a small call of {queries} queries and {keys} keys"
                )
