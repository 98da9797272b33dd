"""The accuracy rule against a wider type, so that float64 is judged as strictly as float32.

The plain layer's formula is that of oracle.py.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from oracle import INPUTS, OUTPUTS, fused, generator, gradients, plain, plain_masked


def exact(inputs, upstream, scale):
    """Outputs and gradients in a wider type, by the formula and its derivative."""
    wide = np.float64 if inputs["query"].dtype == torch.float32 else np.longdouble
    q, k, v, w = (inputs[name].cpu().numpy().astype(wide) for name in INPUTS)
    up = {name: x.cpu().numpy().astype(wide) for name, x in upstream.items()}
    energy = np.tanh(q[..., :, None, :] + k[..., None, :, :])
    score = scale * (energy @ w)
    top = score.max(-1, keepdims=True)
    total = np.exp(score - top).sum(-1, keepdims=True)
    p = np.exp(score - top) / total
    outputs = {"out": p @ v, "weights": p, "lse": (top + np.log(total))[..., 0]}
    dp = np.zeros_like(p)
    if "out" in up:
        dp = dp + up["out"] @ v.swapaxes(-1, -2)
    dp = dp + up.get("weights", 0)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + up.get("lse", np.zeros(1))[..., None]) * scale
    slope = ds[..., None] * w * (1 - energy) * (1 + energy)
    grads = {
        "query": slope.sum(-2),
        "key": slope.sum(-3),
        "value": p.swapaxes(-1, -2) @ up["out"] if "out" in up else np.zeros_like(v),
        "weight": (ds[..., None] * energy).reshape(-1, w.size).sum(0),
    }
    return outputs, grads


@functools.lru_cache(maxsize=64)
def _judges(key, scale, upstream_size, upstream_of):
    """Returns upstream gradients, exact results, and errors of the plain layer: the same for every
    path."""
    inputs = _INPUTS[key]
    dtype = inputs["query"].dtype
    shapes = plain(*inputs.values())
    g = generator(0)
    upstream = {
        name: upstream_size * torch.randn(shapes[name].shape, generator=g, dtype=dtype)
        for name in upstream_of
    }
    truth = exact(inputs, upstream, scale)
    theirs = gradients(lambda x: plain_masked(x, scale=scale), inputs, upstream)
    errors = [
        {
            name: float(abs(theirs[which][name].cpu().numpy() - want).max())
            for name, want in x.items()
        }
        for which, x in enumerate(truth)
    ]
    return upstream, truth, errors


_INPUTS: dict[int, dict[str, torch.Tensor]] = {}


def judge(
    cases, upstream_of=OUTPUTS, scale=1.0, size=1.0, upstream_size=1.0, slope=1.0, only=None
):
    """Asserts the rule: the error of outputs is within 2x, of gradients within 3x the plain
    layer's error, plus roundings of terms of ``size`` (gradients: times ``upstream_size`` and
    ``slope``). The largest errors over all cases are compared. ``only``: the one result that is
    judged."""
    found = {}
    for inputs in cases:
        eps = torch.finfo(inputs["query"].dtype).eps
        key = hash(tuple(x.cpu().contiguous().numpy().tobytes() for x in inputs.values()))
        _INPUTS[key] = inputs
        upstream, truth, errors = _judges(key, scale, upstream_size, tuple(upstream_of))
        ours = gradients(lambda x: fused(x, scale=scale), inputs, upstream)
        for which, factor, terms in ((0, 2, size), (1, 3, size * upstream_size * slope)):
            for name, want in truth[which].items():
                mine = float(abs(ours[which][name].cpu().numpy() - want).max())
                floor = eps * float(abs(want).max()) + 8 * eps * terms
                record = found.setdefault(f"{'d' * which}{name}", [0.0, 0.0, 0.0, factor])
                record[0] = math.inf if math.isnan(mine) else max(record[0], mine)
                record[1] = max(record[1], errors[which][name])
                record[2] = max(record[2], floor)
    bad = [
        f"{name}: error {mine:.3g}, plain {other:.3g}, floor {floor:.3g}"
        for name, (mine, other, floor, factor) in found.items()
        if only in (None, name) and not mine <= factor * other + floor
    ]
    assert not bad, "; ".join(bad)


def inputs_of(seed, dtype, queries, keys, hidden, values=8, *, batch=(), spread=1.0, weight=0.3):
    g = generator(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = {
        "query": spread * randn(*batch, queries, hidden),
        "key": spread * randn(*batch, keys, hidden),
        "value": randn(*batch, keys, values),
        "weight": weight * randn(hidden),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}
