"""The plain layer, written out independently of the package, and comparisons by rule.

The rule: against the same formula in float64, the error of the fused layer is at most twice (the
gradient's at most three times) the error that the plain formula makes in the same dtype.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import paths
import torch
from paths import DEVICE
from torch import Tensor

import additive_attn
from additive_attn import additive_attention, additive_scores

ON_KERNEL = paths.native() != "pytorch"
PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(additive_attn.__file__)))
INPUTS = ("query", "key", "value", "weight")
OUTPUTS = ("out", "weights", "lse")
SCORED = ("query", "key", "weight")  # the inputs of scores

Tensors = dict[str, Tensor]


def generator(seed: int) -> torch.Generator:
    """Returns a generator of random tensors on DEVICE."""
    return torch.Generator(DEVICE).manual_seed(seed)


def make(
    batch: Sequence[int] = (),
    queries: int = 5,
    keys: int = 7,
    hidden: int = 8,
    values: int = 6,
    *,
    heads: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 1.0,
) -> Tensors:
    """Random inputs. With ``heads``, the weight has one row per entry of the last batch dim."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        """Returns the same numbers on every device."""
        return torch.randn(*shape, generator=g, device="cpu")

    inputs = {
        "query": spread * randn(*batch, queries, hidden),
        "key": spread * randn(*batch, keys, hidden),
        "value": randn(*batch, keys, values),
        # Scores have a usual spread: in a softmax that is nearly one-hot, a single error decides.
        "weight": randn(*((batch[-1], hidden) if heads else (hidden,)))
        * min(1.0, 4 / max(hidden, 1) ** 0.5),
    }
    return {name: x.to(DEVICE, dtype) for name, x in inputs.items()}


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float = 1.0,
) -> Tensors:
    """The formula, in the dtype of its inputs; builds the tensor (..., Lq, Lk, H)."""
    energy = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
    score = scale * (energy @ weight[..., None, :, None]).squeeze(-1)
    if bias is not None:
        score = score + bias
    if allowed is None:
        weights, lse = score.softmax(-1), score.logsumexp(-1)
    else:
        allowed = allowed.expand(score.shape)
        empty = ~allowed.any(-1, keepdim=True)
        score = score.masked_fill(~allowed, -torch.inf).masked_fill(empty, 0.0)
        weights = score.softmax(-1).masked_fill(~allowed, 0.0)
        lse = score.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    kept = weights
    if keep is not None:
        kept = weights * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return {"out": kept @ value, "weights": weights, "lse": lse}


def dense_mask(
    inputs: Mapping[str, Tensor],
    *,
    attn_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
) -> Tensor | None:
    """All kinds of masking as one bool tensor, True = attend."""
    queries, keys = inputs["query"].shape[-2], inputs["key"].shape[-2]
    rank = max(inputs[name].dim() for name in ("query", "key", "value"))
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if is_causal:
        allowed = allowed & (j <= i)
    if window is not None:
        left, right = window
        allowed = allowed & ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
    if lengths is not None:
        per_row = lengths.dim() == 2 or (rank == 2 and lengths.dim() == 1)
        while lengths.dim() < rank - 1:
            lengths = lengths[..., None, :] if per_row else lengths[..., None]
        allowed = allowed & (j < lengths[..., None].long())
    if attn_mask is not None:
        allowed = allowed & (
            attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        )
    masked = attn_mask is not None or lengths is not None or is_causal or window is not None
    return allowed if masked else None


def fused(inputs: Mapping[str, Tensor], **options: Any) -> Tensors:
    """All three outputs of the public function. A mask may be among the inputs, so that it gets a
    gradient."""
    tensors = [inputs[name] for name in INPUTS]
    if "attn_mask" in inputs:
        options["attn_mask"] = inputs["attn_mask"]
    outputs = additive_attention(*tensors, need_weights=True, need_lse=True, **options)
    return dict(zip(OUTPUTS, outputs, strict=True))


def plain_masked(inputs: Mapping[str, Tensor], *, scale: float = 1.0, **masking: Any) -> Tensors:
    """The plain formula under the public function's options; a mask as ``fused`` takes it."""
    tensors = [inputs[name] for name in INPUTS]
    if "attn_mask" in inputs:
        masking["attn_mask"] = inputs["attn_mask"]
    mask = masking.get("attn_mask")
    bias = mask if mask is not None and mask.dtype != torch.bool else None
    return plain(*tensors, bias=bias, allowed=dense_mask(inputs, **masking), scale=scale)


def fused_scores(inputs: Mapping[str, Tensor], **options: Any) -> Tensors:
    """The scores before the softmax; a mask as ``fused`` takes it."""
    if "attn_mask" in inputs:
        options["attn_mask"] = inputs["attn_mask"]
    return {"scores": additive_scores(*(inputs[n] for n in SCORED), **options)}


def plain_scores(inputs: Mapping[str, Tensor], *, scale: float = 1.0, **masking: Any) -> Tensors:
    """The scores by the plain formula; builds the tensor (..., Lq, Lk, H)."""
    query, key, weight = (inputs[name] for name in SCORED)
    if "attn_mask" in inputs:
        masking["attn_mask"] = inputs["attn_mask"]
    energy = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
    score = scale * (energy @ weight[..., None, :, None]).squeeze(-1)
    if (mask := masking.get("attn_mask")) is not None and mask.dtype != torch.bool:
        score = score + mask
    allowed = dense_mask({"value": key, **inputs}, **masking)
    return {"scores": score if allowed is None else score.masked_fill(~allowed, -torch.inf)}


def random_upstream(outputs: Mapping[str, Tensor], names: Sequence[str] = OUTPUTS) -> Tensors:
    """Random upstream gradients: constant ones, as of sum(), cancel in a softmax."""
    g = generator(1)
    return {
        name: torch.randn(outputs[name].shape, generator=g).to(outputs[name].dtype)
        for name in names
    }


def gradients(
    function: Callable[[Tensors], Tensors], inputs: Mapping[str, Tensor], upstream: Tensors
) -> tuple[Tensors, Tensors]:
    """Outputs, and gradients with respect to all floating inputs."""
    leaves = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    outputs = function(leaves)
    # An upstream gradient of an empty row's lse would multiply an infinity: such rows get none.
    names = [name for name in upstream if outputs[name].requires_grad]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(
        [outputs[name] for name in names],
        list(wanted.values()),
        [upstream[name].to(outputs[name].dtype) for name in names],
        allow_unused=True,
        materialize_grads=True,
    )
    detached = {name: x.detach() for name, x in outputs.items()}
    return detached, dict(zip(wanted, grads, strict=True))


def largest(x: Tensor) -> float:
    """The largest finite absolute value."""
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def error(ours: Tensor, exact: Tensor) -> float:
    """The largest absolute error; infinities must agree."""
    assert ours.shape == exact.shape, f"{tuple(ours.shape)} instead of {tuple(exact.shape)}"
    if not ours.numel():
        return 0.0
    ours = ours.double()
    if math.isfinite(most := (ours - exact).abs().max().item()):
        return most  # so there is no infinity and no NaN
    infinite = exact.isinf()
    assert torch.equal(ours.isinf(), infinite), "infinities differ"
    assert torch.equal(ours[infinite], exact[infinite]), "signs of infinities differ"
    assert not ours.isnan().any(), "NaN"
    difference = (ours - exact)[~infinite].abs()
    return difference.max().item() if difference.numel() else 0.0


Results = tuple[Tensors, Tensors]  # outputs and gradients
Figures = dict[str, tuple[float, float]]


class Truth(NamedTuple):
    """The exact results that others are judged by. ``figures``, of outputs and of gradients: the
    error of the plain layer in the dtype of the inputs, and the largest element."""

    upstream: Tensors
    exact: Results
    figures: tuple[Figures, Figures]


_truths: dict[bytes, Truth] = {}  # of the last few cases: a test runs on all paths in turn


def truth(
    inputs: Tensors,
    upstream_of: Sequence[str],
    formula: Callable[..., Tensors] = plain_masked,
    **options: Any,
) -> Truth:
    """Returns the results of the plain formula in float64, with random upstream gradients. They
    are computed once for all paths."""
    digest = hashlib.blake2b()
    for name, x in [*inputs.items(), *options.items()]:
        digest.update(f"{formula.__name__} {name} {upstream_of} ".encode())
        if isinstance(x, Tensor):
            digest.update(f"{x.dtype} {x.shape} {x.device} ".encode())
            x = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(x if isinstance(x, bytes) else repr(x).encode())
    if (key := digest.digest()) not in _truths:
        doubled = {name: x.double() for name, x in inputs.items()}
        upstream = random_upstream(formula(doubled, **options), upstream_of)
        if (dtype := inputs["query"].dtype) != torch.float64:
            upstream = {name: x.to(dtype).double() for name, x in upstream.items()}
        exact, same = (
            gradients(lambda x: formula(x, **options), case, upstream)
            for case in (doubled, inputs)
        )
        if len(_truths) >= 8:
            del _truths[next(iter(_truths))]
        figures = tuple(
            {name: (error(theirs[name], x), largest(x)) for name, x in best.items()}
            for theirs, best in zip(same, exact, strict=True)
        )
        _truths[key] = Truth(upstream, exact, figures)
    return _truths[key]


def check_against_plain(
    cases: Sequence[Mapping[str, Tensor]],
    *,
    upstream_of: Sequence[str] = OUTPUTS,
    magnitude: float = 1.0,
    scale: float = 1.0,
    function: Callable[..., Tensors] = fused,
    formula: Callable[..., Tensors] = plain_masked,
    **masking: Any,
) -> None:
    """Asserts the accuracy rule for outputs and gradients. Errors are the maxima over all cases
    (seeds).

    The plain formula can be exact by luck (one key: its weight is 1, its gradient 0), so there is
    a floor: one rounding of the largest exact element in the dtype, and a few roundings of terms
    of size ``magnitude`` in the dtype that is computed in.
    """
    dtype = cases[0]["query"].dtype
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    found: dict[str, list[float]] = {}
    options = dict(masking, scale=scale)
    mask = masking.get("attn_mask")
    float_mask = {} if mask is None or mask.dtype == torch.bool else {"attn_mask": mask}
    if float_mask:
        del options["attn_mask"]

    for case in cases:
        inputs = {**case, **float_mask}
        upstream, exact, figures = truth(inputs, upstream_of, formula, **options)
        ours = gradients(lambda x: function(x, **options), inputs, upstream)
        assert all(grad.dtype == inputs[name].dtype for name, grad in ours[1].items())

        for which, factor in ((0, 2), (1, 3)):
            for name, best in exact[which].items():
                label = f"gradient of {name}" if which else name
                theirs, most = figures[which][name]
                floor = torch.finfo(dtype).eps * most
                floor += 8 * torch.finfo(computing).eps * magnitude
                if dtype == torch.float64:  # the oracle is no more exact than the judged results
                    floor = 64 * torch.finfo(dtype).eps * (most + magnitude)
                record = found.setdefault(label, [0.0, 0.0, 0.0, factor])
                record[0] = max(record[0], error(ours[which][name], best))
                record[1] = max(record[1], theirs)
                record[2] = max(record[2], floor)

    bad = [
        f"{label}: error {mine:.3g}, plain {theirs:.3g}, allowed {factor} x plain + {floor:.3g}"
        for label, (mine, theirs, floor, factor) in found.items()
        if not mine <= factor * theirs + floor
    ]
    assert not bad, f"on {paths.current()}: " + "; ".join(bad)


def assert_same(ours: Tensor, other: Tensor, what: str = "") -> None:
    """Asserts that all bits are equal, those of NaN and the sign of zero included."""
    assert ours.shape == other.shape and ours.dtype == other.dtype, what
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[ours.itemsize]
    a, b = ours.contiguous().view(integers), other.contiguous().view(integers)
    assert torch.equal(a, b), f"{what}: {(a != b).sum().item()} of {a.numel()} elements differ"


def assert_all_same(ours: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert ours.keys() == other.keys()
    for name in ours:
        assert_same(ours[name], other[name], name)


def assert_layout_free(ours: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Asserts that another layout of the same numbers gives the same result.

    The CPU's kernel reads the same numbers in the same order, so no bit changes. On a GPU a tile's
    strides decide how it is spread over threads, and in the fallback they decide which matmul
    torch calls, so that roundings may change there.
    """
    assert ours.keys() == other.keys()
    for name in ours:
        if DEVICE == "cpu" and paths.current() in ("neon", *paths.INSTRUCTION_SETS):
            assert_same(ours[name], other[name], name)
        else:
            torch.testing.assert_close(ours[name], other[name], msg=lambda m, n=name: f"{n}: {m}")


def assert_sentence(text):
    """Asserts that an error is a sentence with an end: no assertion, no code, no bare name."""
    assert text.endswith(".") and len(text) > 40, text
    assert text[0].isupper() or text.split()[0].replace("_", "").split(".")[0].isidentifier(), text
