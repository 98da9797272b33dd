"""The plain layer: the energies of all pairs at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from additive_attn import PlainAdditiveAttention
from benchmarks.cases import Case, Inputs
from benchmarks.providers.runner import Provider, Runner, layer_runner

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def energy(query: Tensor, key: Tensor) -> Tensor:
    return torch.tanh(query[..., :, None, :] + key[..., None, :, :])


def score_linear(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return F.linear(energy(query, key), weight[None]).squeeze(-1)


def plain_runner(
    case: Case, inputs: Inputs, score: Score = score_linear, compiled: bool = False
) -> Runner:
    if case.module:
        layer = PlainAdditiveAttention(case.value_dim, case.hidden)
        return layer_runner(layer, inputs, compiled)

    blocked, dropout_p = inputs.blocked, case.dropout_p

    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        scores = score(query, key, weight)
        if blocked is not None:
            scores = scores.masked_fill(blocked, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        if dropout_p:
            weights = F.dropout(weights, dropout_p)
        return weights @ value

    function = torch.compile(attend, dynamic=False) if compiled else attend
    return Runner(function, [inputs.query, inputs.key, inputs.value, inputs.weight], [])


PLAIN = Provider("plain", plain_runner, energy_copies={"forward": 2, "full": 3})
