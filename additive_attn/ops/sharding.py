"""How the operators shard over a DeviceMesh: batch and head dims, and the features of the values.

Registered by the first call of DTensors, so that importing the package does not import
``torch.distributed``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from additive_attn.ops import dispatch
from additive_attn.spec.call import Call

Placements = list[Any]
Strategy = tuple[Placements, Placements]
# Dims of each tensor argument of a call that are not batch dims.
_RANKS = {
    "query": 2, "key": 2, "value": 2, "weight": 1, "attn_mask": 2, "lengths": 1, "starts": 1,
    "block_table": 2, "block_tiles": 3, "seed": 0,
}  # fmt: skip
_ORDER = tuple(name if name in _RANKS else None for name in Call._fields)
_SEED = _ORDER.index("seed")
_MASKING = "attn_mask", "lengths", "starts", "block_table", "block_tiles"
_DIFFERENTIABLE = "query", "key", "value", "weight", "attn_mask"
_SCORES = (*_ORDER[:2], *_ORDER[3:11], None)  # without the value, seed and dropout_p


@functools.cache
def register() -> None:
    """Registers the rules, once."""
    register_sharding(dispatch.forward)(_forward)
    register_sharding(dispatch.scores)(_scores)
    for operator, order, outputs, tangents in (
        (dispatch.backward, _ORDER, 3, False),
        (dispatch.tangent, _ORDER, 3, True),
        (dispatch.scores_backward, _SCORES, 1, False),
        (dispatch.scores_tangent, _SCORES, 1, True),
    ):
        register_sharding(operator)(functools.partial(_derivative, order, outputs, tangents))


def with_masks(call: Call) -> Call:
    """Returns a call of DTensors with its masks and lengths as DTensors. Plain ones are those of
    the whole batch, equal on all processes."""
    register()
    given: Any = {name: getattr(call, name) for name in _MASKING}
    for name, x in given.items():
        if isinstance(x, Tensor) and not isinstance(x, DTensor):
            given[name] = replicated(x, call.query)
    return call._replace(**given)


def replicated(tensor: Tensor, like: Any) -> Tensor:
    """Returns a tensor that is equal on all processes as a DTensor on the mesh of ``like``."""
    mesh = like.device_mesh
    made: Tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return made


def _batch_dims(arguments: Any, order: Sequence[str | None] = _ORDER) -> int:
    """The number of batch dims that the arguments of a call broadcast to."""
    given = zip(arguments, order, strict=True)
    return max(len(x.shape) - _RANKS[name] for x, name in given if name and x is not None)


def _on_batch_dim(
    arguments: Any, dims: int, d: int, order: Sequence[str | None] = _ORDER
) -> Placements:
    """Shards every argument that has batch dim ``d`` and does not broadcast along it."""
    placements: Placements = []
    for x, name in zip(arguments, order, strict=True):
        own = -1 if name is None or x is None else d - (dims - (len(x.shape) - _RANKS[name]))
        shards = own >= 0 and x.shape[own] != 1
        placements.append(
            None if x is None or name is None else Shard(own) if shards else Replicate()
        )
    return placements


def _replicated(arguments: Any) -> Placements:
    return [None if not hasattr(x, "shape") else Replicate() for x in arguments]


def _forward(*arguments: Any) -> list[Strategy]:
    call, need_weights = arguments[:14], arguments[14]
    strategies: list[Strategy] = [([Replicate()] * 3, [*_replicated(call), None])]
    if call[_SEED] is not None:
        return strategies  # weights are dropped by their position in the whole batch
    dims = _batch_dims(call)
    for d in range(dims):
        weights = Shard(d) if need_weights else Replicate()
        strategies.append(([Shard(d), weights, Shard(d)], [*_on_batch_dim(call, dims, d), None]))
    features = [*_replicated(call), None]
    features[2] = Shard(len(call[2].shape) - 1)
    strategies.append(([Shard(dims + 1), Replicate(), Replicate()], features))
    return strategies


def _of_mask(placement: Any, need: bool, attn_mask: Any) -> Any:
    """Placement of a mask's gradient. It has the mask's shape, summed over broadcast dims."""
    if not need or attn_mask is None:
        return Replicate()
    return placement if placement != Replicate() else Partial()


def _scores(*arguments: Any) -> list[Strategy]:
    dims = _batch_dims(arguments, _SCORES)
    return [
        ([Replicate()], _replicated(arguments)),
        *(([Shard(d)], _on_batch_dim(arguments, dims, d, _SCORES)) for d in range(dims)),
    ]


def _derivative(
    order: Sequence[str | None], outputs: int, tangents: bool, *arguments: Any
) -> list[Strategy]:
    """``arguments`` are upstream gradients, the call, lse if there are three of the former, the
    tangents of both if ``tangents``, and which results are needed, that of the mask last."""
    names = [name for name in order if name in _DIFFERENTIABLE] if tangents else []
    end = outputs + len(order)
    upstream, call, rest = arguments[:outputs], arguments[outputs:end], arguments[end:]
    lse = rest[: outputs == 3]
    rest = rest[len(lse) :]
    moved = rest[:outputs] if tangents else ()
    directions, needs = rest[len(moved) :][: len(names)], rest[len(moved) + len(names) :]
    given = [*_replicated([*upstream, *call, *lse, *moved, *directions]), *[None] * len(needs)]
    strategies: list[Strategy] = [([Replicate()] * len(needs), given)]
    if "seed" in order and call[order.index("seed")] is not None:
        return strategies
    dims, mask = _batch_dims(call, order), order.index("attn_mask")
    for d in range(dims):
        of_call = _on_batch_dim(call, dims, d, order)
        results: Placements = [Shard(d) if need else Replicate() for need in needs[:-1]]
        results.append(_of_mask(of_call[mask], needs[-1], call[mask]))
        whole = [[None if x is None else Shard(d) for x in xs] for xs in (upstream, lse, moved)]
        of_directions = _on_batch_dim(directions, dims, d, names)
        placements = [*whole[0], *of_call, *whole[1], *whole[2], *of_directions]
        strategies.append((results, [*placements, *[None] * len(needs)]))
    return strategies
