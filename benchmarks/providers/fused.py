"""This package: its kernel, or its plain PyTorch path as a separate provider."""

from __future__ import annotations

from functools import partial
from typing import Any

from additive_attn import AdditiveAttention, additive_attention
from benchmarks.cases import Case, Inputs
from benchmarks.providers.runner import Provider, Runner, layer_runner


def fused_runner(case: Case, inputs: Inputs) -> Runner:
    if case.module:
        return layer_runner(AdditiveAttention(case.value_dim, case.hidden), inputs)

    options: dict[str, Any] = {}
    if case.is_causal:
        options["is_causal"] = True
    if case.window is not None:
        options["window"] = case.window
    if inputs.lengths is not None:
        options["lengths"] = inputs.lengths
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p

    function = partial(additive_attention, **options) if options else additive_attention
    return Runner(function, [inputs.query, inputs.key, inputs.value, inputs.weight], [])


# A process measures one of the two: additive_attn chooses its path when it is imported.
FUSED = Provider("fused", fused_runner)
PYTORCH_PATH = Provider("pytorch path", fused_runner)
