"""A decoder's step with a location term: sum_f x_fj M_fh is added to key j, inside the tanh."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import assert_same, error, generator
from paths import DEVICE

from additive_attn.backends.plain.steps import with_term
from additive_attn.ops import dispatch  # noqa: F401  registers the operators
from additive_attn.spec.dropout import keep_mask

operators = torch.ops.additive_attn
INPUTS = ("query", "key", "value", "weight", "location", "location_weight")
UPSTREAM = ("out", "weights", "lse")

# (batch, keys, hidden, features): those of Tacotron 2, ESPnet and coverage; on both sides of tiles
# and vectors; many features; more keys than one task computes.
SHAPES = [
    ((3,), 150, 128, 32), ((2,), 97, 320, 10), ((2,), 65, 96, 1), ((1,), 1, 1, 1),
    ((2,), 15, 33, 2), ((2,), 16, 31, 3), ((2,), 17, 64, 4), ((1,), 300, 20, 5),
    ((2, 3), 40, 48, 7), ((1,), 33, 8, 64), ((20,), 19, 17, 6), ((1,), 700, 40, 2),
]  # fmt: skip


def make(batch, keys, hidden, features, values=6, *, dtype=torch.float32, spread=1.0, seed=0):
    g = generator(seed)

    def randn(*shape: int, by: float = 1.0) -> torch.Tensor:
        return (by * torch.randn(shape, generator=g)).to(DEVICE, dtype)

    return {
        "query": randn(*batch, 1, hidden, by=spread),
        "key": randn(*batch, keys, hidden, by=spread),
        "value": randn(*batch, keys, values),
        "weight": randn(hidden, by=min(1.0, 4 / max(hidden, 1) ** 0.5)),
        "location": randn(*batch, features, keys, by=spread),
        "location_weight": randn(features, hidden, by=max(features, 1) ** -0.5),
    }


def upstream_of(outputs: tuple[torch.Tensor, ...], seed: int = 1) -> list[torch.Tensor]:
    g = generator(seed)
    grads = [torch.randn(x.shape, generator=g).to(DEVICE, x.dtype) for x in outputs]
    grads[2] = torch.where(outputs[2].isinf(), 0.0, grads[2])
    return grads


def fused(inputs: dict[str, Any], *, upstream=None, attn_mask=None, lengths=None, seed=None,
          dropout_p=0.0, scale=1.0, earlier=0.0) -> dict[str, torch.Tensor]:  # fmt: skip
    """Outputs, and gradients over the whole batch. That of the keys is added to ``earlier``."""
    query, key, value, weight, location, location_weight = (inputs[name] for name in INPUTS)
    call = (
        query, key, value, weight, operators.prepare_keys(key), location, location_weight,
        attn_mask, lengths, seed, dropout_p, scale,
    )  # fmt: skip
    outputs = operators.step(*call)
    out, weights, lse = outputs
    grads = upstream_of(outputs) if upstream is None else upstream
    computing = torch.float64 if query.dtype == torch.float64 else torch.float32
    grad_key = torch.full(
        (*weights.shape[:-2], *key.shape[-2:]), earlier, dtype=computing, device=DEVICE
    )
    names = ("query", "scores", "kept", "location", "location_weight", "weight")
    found = operators.step_backward(*grads, *call, weights, lse, grad_key)
    gradients = {f"grad_{name}": x for name, x in zip(names, found, strict=True)}
    return {"out": out, "weights": weights, "lse": lse, **gradients, "grad_key": grad_key}


def plain(inputs: dict[str, Any], upstream, *, attn_mask=None, lengths=None, seed=None,
          dropout_p=0.0, scale=1.0) -> dict[str, torch.Tensor]:  # fmt: skip
    """Computes the formula in the dtype of the inputs. Padding must be finite."""
    batch = upstream[1].shape[:-2]
    keys = inputs["key"].shape[-2]
    allowed = torch.ones((*batch, 1, keys), dtype=torch.bool, device=DEVICE)
    bias = 0.0
    if lengths is not None:
        allowed = allowed & (torch.arange(keys, device=DEVICE) < lengths[..., None])
    if attn_mask is not None:
        floating = attn_mask.is_floating_point()
        allowed = allowed & (attn_mask > -math.inf if floating else attn_mask)
        bias = torch.where(allowed, attn_mask, 0.0).to(upstream[1].dtype) if floating else 0.0
    leaves = {
        name: x.expand(*batch, *x.shape[-1 if name == "weight" else -2 :]).detach()
        for name, x in inputs.items()
    }
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    query, key, value, weight, location, location_weight = leaves.values()
    energy = torch.tanh(query + (key + location.mT @ location_weight))
    score = scale * (energy * weight.unsqueeze(-2)).sum(-1).unsqueeze(-2) + bias
    empty = ~allowed.any(-1, keepdim=True)
    score = score.masked_fill(~allowed, -math.inf).masked_fill(empty, 0.0)
    score.retain_grad()
    weights = score.softmax(-1).masked_fill(~allowed, 0.0)
    lse = score.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    kept = weights
    if seed is not None:
        keep = keep_mask(seed, batch, (0, 1), (0, keys), dropout_p)
        kept = weights * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    out = kept @ value
    torch.autograd.backward([out, weights, lse], [g.to(out.dtype) for g in upstream])
    grads = {f"grad_{name}": x.grad for name, x in leaves.items() if name != "value"}
    return {
        "out": out, "weights": weights, "lse": lse, **grads, "grad_scores": score.grad,
        "grad_kept": kept,
    }  # fmt: skip


def check(inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Asserts the accuracy rule: 2x the plain formula's error for outputs, 3x for gradients."""
    dtype = inputs["query"].dtype
    ours = fused(inputs, **options)
    upstream = upstream_of(tuple(ours[name] for name in UPSTREAM))
    doubled = {name: x.double() for name, x in inputs.items()}
    exact = plain(doubled, [g.double() for g in upstream], **options)
    same = plain(inputs, upstream, **options)
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    for name, best in exact.items():
        if name == "grad_kept" and options.get("seed") is None:
            continue
        best = best.detach()
        finite = best[best.isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        floor = torch.finfo(dtype).eps * largest + 8 * torch.finfo(computing).eps
        if dtype == torch.float64:
            floor = 64 * torch.finfo(dtype).eps * (largest + 1)
        mine, theirs = error(ours[name], best), error(same[name].detach(), best)
        factor = 3 if name.startswith("grad_") else 2
        assert mine <= factor * theirs + floor, f"{name}: {mine:.3g}, plain {theirs:.3g}"
    return ours


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_accuracy(dtype, shape, path):
    check(make(*shape, dtype=dtype), scale=0.7)


@pytest.mark.core
@pytest.mark.parametrize("spread", [1e-3, 0.1, 4.0, 30.0])
def test_small_and_large_activations(spread, path):
    check(make((2,), 37, 48, 5, spread=spread))


@pytest.mark.kernel
@pytest.mark.parametrize("features", [1, 5])
@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_extreme_gradients_keep_their_digits(size, features):
    """Saturated pairs contribute to the weight's gradient for a G of any size."""
    inputs = make((2,), 37, 48, features, spread=30.0)
    upstream = upstream_of(tuple(fused(inputs)[name] for name in UPSTREAM))
    wanted = fused(inputs, upstream=upstream)
    ours = fused(inputs, upstream=[size * grad for grad in upstream])
    for name in wanted:
        if name.startswith("grad_") and name != "grad_kept":
            expected = wanted[name].double()
            close = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(
                ours[name].double() / size, expected, rtol=1e-4, atol=close, msg=name
            )


def masks(kind, batch, keys):
    g = generator(3)
    if kind == "lengths":
        return {"lengths": torch.tensor([[keys // 2], [0], [keys - 1]], device=DEVICE)}
    mask = torch.rand((*batch, 1, keys), generator=g) < 0.6
    mask[1] = False
    if kind == "float":
        mask = torch.randn((*batch, 1, keys), generator=g).masked_fill(~mask, -math.inf)
    return {"attn_mask": mask.to(DEVICE)}


@pytest.mark.core
@pytest.mark.parametrize("kind", ["lengths", "bool", "float"])
def test_masks(kind, path):
    """One entry of the batch has no key to attend to."""
    ours = check(make((3,), 70, 40, 5), **masks(kind, (3,), 70))
    assert torch.equal(ours["lse"][1], torch.full_like(ours["lse"][1], -math.inf))
    for name, x in ours.items():
        if name not in ("lse", "grad_kept"):
            assert not x[1].any(), name


@pytest.mark.core
@pytest.mark.parametrize("kind", ["lengths", "bool", "float"])
@pytest.mark.parametrize("padding", [math.nan, math.inf])
def test_padding_cannot_leak(padding, kind, path):
    """Masked keys, values and features may be any numbers: no bit of any result changes."""
    inputs, options = make((3,), 70, 40, 5), masks(kind, (3,), 70)
    before = fused(inputs, **options)
    masked = before["weights"].squeeze(-2) == 0
    poisoned = {name: x.clone() for name, x in inputs.items()}
    poisoned["key"][masked] = padding
    poisoned["value"][masked] = padding
    poisoned["location"].mT[masked] = padding
    upstream = upstream_of(tuple(before[name] for name in UPSTREAM))
    upstream[1].squeeze(-2)[masked] = padding
    after = fused(poisoned, upstream=upstream, **options)
    for name, x in before.items():
        if path in ("pytorch", "blocks", "triton"):
            torch.testing.assert_close(after[name], x, msg=name)
        else:
            assert_same(after[name], x, name)


@pytest.mark.core
def test_nonfinite_features_propagate(path):
    inputs = make((2,), 40, 24, 3)
    inputs["location"][0, 1, 20] = math.nan
    ours = fused(inputs)
    assert ours["out"][0].isnan().all() and not ours["out"][1].isnan().any()
    assert ours["grad_location_weight"][0].isnan().all()
    assert not ours["grad_location_weight"][1].isnan().any()


@pytest.mark.core
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout(dropout_p, path):
    seed = torch.tensor(1234)
    check(make((2,), 70, 40, 5), seed=seed, dropout_p=dropout_p)


@pytest.mark.core
def test_the_gradient_of_the_keys_is_added(path):
    inputs = make((2,), 33, 24, 3)
    ours, added = fused(inputs), fused(inputs, earlier=2.0)
    torch.testing.assert_close(added["grad_key"], ours["grad_key"] + 2)
    for name, x in ours.items():
        if name != "grad_key":
            assert_same(added[name], x, name)


def broadcasts(kind):
    inputs = make((2, 3), 37, 24, 4)
    if kind == "heads":  # a location weight per head
        inputs["location_weight"] = torch.stack([inputs["location_weight"]] * 3)
        inputs["location_weight"] *= torch.tensor([1.0, -0.5, 2.0]).view(3, 1, 1)
        inputs["weight"] = torch.stack([inputs["weight"]] * 3)
        inputs["location"] = inputs["location"][:, :1]
    if kind == "beams":  # one memory, a state per beam
        inputs["key"], inputs["value"] = inputs["key"][:, :1], inputs["value"][:, :1]
    if kind == "location":  # the location alone has all dims
        for name in ("query", "key", "value"):
            inputs[name] = inputs[name][:1, :1]
    return inputs


@pytest.mark.core
@pytest.mark.parametrize("kind", ["heads", "beams", "location"])
def test_broadcasting(kind, path):
    check(broadcasts(kind))


@pytest.mark.core
@pytest.mark.parametrize("kind", ["turned", "sliced", "offset"])
def test_strides(kind, path):
    inputs = make((2,), 37, 24, 4)

    def other(x: torch.Tensor) -> torch.Tensor:
        if kind == "turned" and x.dim() > 1:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "sliced":
            return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    ours, wanted = fused({name: other(x) for name, x in inputs.items()}), fused(inputs)
    for name, x in wanted.items():
        torch.testing.assert_close(ours[name], x, msg=name)


@pytest.mark.core
@pytest.mark.parametrize("size", ["batch", "keys", "hidden", "features", "values"])
def test_nothing(size, path):
    sizes = {"batch": 2, "keys": 5, "hidden": 6, "features": 3, "values": 4, size: 0}
    inputs = make((sizes["batch"],), *(sizes[n] for n in ("keys", "hidden", "features", "values")))
    ours = fused(inputs)
    upstream = upstream_of(tuple(ours[name] for name in UPSTREAM))
    if size == "keys":  # the plain formula has no largest score to subtract
        assert torch.equal(ours["lse"], torch.full((2, 1), -math.inf, device=DEVICE))
        assert not any(x.any() for name, x in ours.items() if name != "lse")
        return
    for name, wanted in plain(inputs, upstream).items():
        if name != "grad_kept":
            torch.testing.assert_close(ours[name], wanted.detach(), msg=name)


@pytest.mark.core
def test_repeatable(path):
    """The bits are the same on any number of threads, which split entries or ranges of keys."""
    threads = torch.get_num_threads()
    for batch, keys in (9, 70), (1, 700):
        inputs = make((batch,), keys, 40, 5)
        try:
            torch.set_num_threads(1)
            alone = fused(inputs)
            if path in ("pytorch", "blocks", "triton"):
                torch.set_num_threads(threads)
            else:
                torch.set_num_threads(3)
            again = fused(inputs)
        finally:
            torch.set_num_threads(threads)
        for name, x in alone.items():
            assert_same(again[name], x, name)


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,), (2, 2)], ids=str)
def test_autocast_does_not_round_the_keys(batch, features):
    key, weight = torch.randn(*batch, 5, 8), torch.randn(features, 8)
    with torch.autocast("cpu", torch.bfloat16):
        added = with_term(key, torch.zeros(*batch, features, 5), weight)
    assert_same(added, key)
