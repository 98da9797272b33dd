"""Splits the time of a decoder: self times of the profiler, by the part of the decoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

NODE = "autograd::engine::evaluate_function: "
PART = "part: "
PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::convolution", "aten::mkldnn")
GROUPS = (
    "attention forward", "attention backward", "projections", "cells", "accumulation", "engine",
)  # fmt: skip


def split(run: Callable[[], Any], by_operator: bool) -> dict[str, float]:
    """Returns the milliseconds of one run in each group. A node of the backward belongs to the
    part whose forward made it. Projections are marked in the originals. In compiled code and in
    the package they are recognised by their operators (``by_operator``): products of matrices
    without a batch."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events: Any = profile.events()
    parts: dict[int, str] = {}
    for event in events:
        part, node = place(event)
        if part and node is None and event.sequence_nr >= 0:
            parts[event.sequence_nr] = part
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        totals[group(event, parts, by_operator)] += event.self_cpu_time_total / 1e3
    return {name: totals[name] for name in GROUPS}


def place(event: Any) -> tuple[str, Any]:
    """Returns the innermost marked part that contains an event, and the node of the backward."""
    while event is not None:
        if event.name.startswith(NODE):
            return "", event
        if event.name.startswith(PART):
            return event.name.removeprefix(PART), None
        event = event.cpu_parent
    return "", None


def group(event: Any, parts: dict[int, str], by_operator: bool) -> str:
    part, node = place(event)
    if event.name.startswith((NODE, PART)):
        return "engine"
    if node is not None:
        if "AccumulateGrad" in node.name:
            return "accumulation"
        # Outside the node's own function, the engine adds up gradients of one tensor.
        if event.cpu_parent is node and event.name in ("aten::add", "aten::add_"):
            return "accumulation"
        part = parts.get(node.sequence_nr, "")
    if part == "cell":
        return "cells"
    if part == "projection":
        return "projections"
    if part == "attention":
        if by_operator and event.name in PRODUCTS:
            return "projections"
        return f"attention {'forward' if node is None else 'backward'}"
    return "engine"
