"""Records which features passing tests computed, on which paths and in which dtypes. With pytest
--features FILE they are written to a csv file, which docs/features.md shows."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import paths
import torch
from torch import Tensor

from additive_attn.backends.plain import whole
from additive_attn.spec.call import Call, TangentCall, backward_arguments, call_of_scores

Cell = tuple[str, str, str, str]  # feature, path, dtype, forward or backward
COLUMNS = ("feature", "path", "dtype", "direction")

# The operator that sums over the features in operators that are composed of others.
_COMPOSED = {"tangent": "pair_scores", "scores_tangent": "pair_scores"}
_cells: set[Cell] = set()  # those of the test that runs
_library: torch.library.Library | None = None
_NAMES = (
    "forward", "backward", "scores", "scores_backward", "tangent", "scores_tangent", "step",
    "step_backward", "location_features", "location_features_backward",
)  # fmt: skip


def record() -> None:
    """Starts recording in this process: the features of every operator call that returns, and of
    calls that plain PyTorch computes as a whole."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("additive_attn", "IMPL")
    for name in _NAMES:
        _library.impl(name, _recorded(name), "BackendSelect", with_keyset=True)
    for name, kind in (("attend", "forward"), ("score", "scores")):
        setattr(whole, name, _recorded_whole(getattr(whole, name), kind))


def _recorded(name: str) -> Any:
    operator = getattr(torch.ops.additive_attn, name).default
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

    def run(keyset: Any, *arguments: Any) -> Any:
        results = operator.redispatch(keyset & below, *arguments)
        if not any(isinstance(x, Tensor) and x.is_meta for x in arguments):
            _note(name, arguments)
        return results

    return run


def _recorded_whole(function: Any, kind: str) -> Any:
    """Records a function that autograd differentiates, so that its backward is found by a hook."""

    def run(call: Call, *arguments: Any) -> Any:
        results = function(call, *arguments)
        found = _of_call(call, kind == "scores")
        _add(found, call.query.dtype, "forward")
        output = results[0] if isinstance(results, tuple) else results
        if output.requires_grad:
            output.register_hook(lambda _: _add(found, call.query.dtype, "backward"))
        return results

    return run


def _note(name: str, arguments: tuple[Any, ...]) -> None:
    direction = "backward" if name.endswith("_backward") or name == "backward" else "forward"
    if name.startswith("location_features"):
        _add(["location features"], arguments[0].dtype, direction, name)
    elif name.startswith("step"):
        start = 3 if direction == "backward" else 0
        step = arguments[start : start + 12]
        _add(_of_step(*step), step[0].dtype, direction, name)
        if step[1].dtype != step[0].dtype:
            _add(["step: keys of fewer bits than queries"], step[1].dtype, direction, name)
    elif name.endswith("tangent"):
        made = TangentCall.of(arguments) if name == "tangent" else TangentCall.of_scores(arguments)
        second = any(x is not None for x in made.upstream)
        kind = "second derivatives" if second else "forward mode"
        _add([f"{kind} of scores" if name == "scores_tangent" else kind],
             made.call.query.dtype, "forward", _COMPOSED[name])  # fmt: skip
    elif name in ("forward", "backward"):
        call, extra = Call(*arguments[:14]), []
        if name == "backward":
            upstream, call, _, needs = backward_arguments(arguments)
            extra += ["gradient of weights"] * (upstream.weights is not None)
            extra += ["gradient of lse"] * (upstream.lse is not None)
            extra += ["gradient of a float mask"] * needs.mask
        elif arguments[14]:
            extra = ["weights returned"]
        _add([*_of_call(call, False), *extra], call.query.dtype, direction, name)
    else:
        given = arguments[direction == "backward" :]
        call = call_of_scores(*given[:11])
        _add(_of_call(call, True), call.query.dtype, direction, name)


def _of_call(call: Call, scores: bool) -> list[str]:
    """Features of attention, or of scores alone."""
    ranges = [x for x in (call.lengths, call.starts) if x is not None]
    batches = {x.shape[:-2] for x in call.inputs[:3]}
    found = {
        "one query": call.query.shape[-2] == 1,
        "several queries": call.query.shape[-2] > 1,
        "heads": call.weight.dim() > 1,
        "batch dims broadcast": len(batches) > 1,
        "bool mask": call.attn_mask is not None and call.attn_mask.dtype == torch.bool,
        "float mask": call.attn_mask is not None and call.attn_mask.dtype != torch.bool,
        "lengths": call.lengths is not None,
        "starts": call.starts is not None,
        "ranges per query": any(x.dim() > 0 and x.shape[-1] > 1 for x in ranges),
        "is_causal": call.right == 0,
        "window": call.left >= 0 or call.right > 0,
        "BlockMask": call.block_table is not None,
        "dropout": call.seed is not None,
    }
    names = [name for name, has in found.items() if has]
    return [f"scores: {name}" for name in names] if scores else names


def _of_step(*arguments: Any) -> list[str]:
    """Features of a decoder's step."""
    query, key, _, weight, prepared, location, location_weight, attn_mask, lengths, seed = (
        arguments[:10]
    )
    found = {
        "content": location is None,
        "prepared keys": prepared is not None,
        "location term": location is not None and location_weight.shape[-2] > 1,
        "coverage term": location is not None and location_weight.shape[-2] == 1,
        "heads": weight.dim() > 1,
        "keys shared by beams": key.shape[:-2].numel() < query.shape[:-2].numel(),
        "mask": attn_mask is not None,
        "lengths": lengths is not None,
        "dropout": seed is not None,
    }
    return [f"step: {name}" for name, has in found.items() if has]


def _add(
    features: Iterable[str], dtype: torch.dtype, direction: str, operator: str = "forward"
) -> None:
    path = paths.current()
    if path in paths.PLAIN or not _has_kernel(path, operator):
        path = "plain"
    _cells.update((x, path, str(dtype).removeprefix("torch."), direction) for x in features)


def _has_kernel(path: str, operator: str) -> bool:
    """Whether a path has a kernel for an operator, which plain PyTorch computes otherwise."""
    if path != "triton":
        return True
    from additive_attn.backends import triton

    return hasattr(triton, operator)


def clear() -> None:
    _cells.clear()


def passed() -> set[Cell]:
    return _cells


def write(file: str, cells: set[Cell]) -> None:
    with Path(file).open("w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerows([COLUMNS, *sorted(cells)])
