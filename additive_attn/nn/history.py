"""Attention whose scores depend on the weights of the steps before."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from additive_attn.backends.plain.steps import convolved, with_term
from additive_attn.nn.decoding import ProjectedMemory, flat_beams, lent_of
from additive_attn.nn.linear import bare_parameters
from additive_attn.nn.projection import ProjectingAttention
from additive_attn.nn.symbolic import is_symbolic, symbolic_call
from additive_attn.nn.whole_steps import whole_step
from additive_attn.ops.checks import DTYPES, is_dense, refuse_layouts, refuse_types
from additive_attn.ops.decoding import attend_step
from additive_attn.ops.layer_checks import (
    check_beams,
    check_index,
    check_masking,
    check_memory,
    check_state,
    explain_projection,
    refuse_memory,
    refuse_ranks,
)
from additive_attn.ops.location import location_features
from additive_attn.ops.masking import attended_keys
from additive_attn.ops.memory import Lent, lend, widened
from additive_attn.ops.memory_checks import explain_memory
from additive_attn.spec.call import lse_dtype

INITIAL = ("zeros", "uniform")


class AttentionState(NamedTuple):
    """The weights of the steps so far, ``(B, Lk)`` each, or ``(Lk,)`` unbatched.

    Attributes:
        previous: of the last step, the tensor that it returned.
        cumulative: their sum over all steps, float32 where weights have 16 bits. It is the
            coverage of See et al. 2017.
    """

    previous: Tensor
    cumulative: Tensor

    def reorder(self, index: Tensor) -> AttentionState:
        """Returns the state after beams were chosen: ``index (B * beams,)`` holds, for each query
        to come, the number of the query that it continues."""
        if not all(isinstance(x, Tensor) for x in self):
            refuse_types(previous=self.previous, cumulative=self.cumulative)
        if self.previous.dim() != 2 or self.cumulative.dim() != 2:
            raise ValueError(
                f"A state of {tuple(self.previous.shape)} is of one query, and index chooses "
                "among several: expand the memory to its beams before initial_state."
            )
        check_index(index, self.previous.shape[0], self.previous)
        return AttentionState(*(x.index_select(0, index.long()) for x in self))

    def detach(self) -> AttentionState:
        """Returns the state without its graph, for truncated back-propagation."""
        return AttentionState(*(x.detach() for x in self))


# For torch.export.save and load.
_register_namedtuple(AttentionState, serialized_type_name="additive_attn.AttentionState")
torch.serialization.add_safe_globals([AttentionState])


class HistoryAttention(ProjectingAttention):
    """A step adds a term inside the tanh: features of the weights so far, through a Linear."""

    _term_layer: ClassVar[str]  # the Linear's name
    initial: str

    def __init__(self, *arguments: Any, initial: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not isinstance(initial, str) or initial not in INITIAL:
            raise ValueError(f"initial is {initial!r:.60}, but must be one of {INITIAL}.")
        self.initial = initial

    def _location(self, state: AttentionState) -> tuple[Tensor, Tensor | None]:
        """Returns the features ``(N, F, Lk)`` of a state ``(N, Lk)``, and None; or the inputs of
        filters ``(N, C, Lk)``, and the filters. For a state ``(Lk,)``, N is 1."""
        raise NotImplementedError

    def _with_term(self, key: Tensor, state: AttentionState) -> Tensor | None:
        """The keys with the term of a state; None where tools have made something else of its
        layer."""
        bare = bare_parameters(self._modules[self._term_layer])
        if bare is None or bare[1] is not None or bare[0].dtype != key.dtype:
            return None
        location, filters = self._location(state)
        if location.dtype != key.dtype:
            return None
        if filters is not None:
            location = convolved(location, filters)
        return with_term(key, location if key.dim() == 3 else location.squeeze(0), bare[0].t())

    def forward(
        self, query: Tensor, memory: ProjectedMemory, state: AttentionState
    ) -> tuple[Tensor, Tensor, AttentionState]:
        """The same as :meth:`step`."""
        return self.step(query, memory, state)

    def initial_state(self, memory: ProjectedMemory) -> AttentionState:
        """Returns the state before the first step of a memory: zeros; or, with initial="uniform",
        1 / n for each of the n keys of a sequence that may be attended to.

        Raises:
            TypeError: memory is not a ProjectedMemory.
        """
        if not isinstance(memory, ProjectedMemory):
            if not is_symbolic(memory):
                refuse_memory(self._caller("initial_state"), memory)
            state: AttentionState = symbolic_call(self, "initial_state", memory)
            return state
        key = memory.key
        if memory._whole() is not None and memory.lengths is None:
            weights = key.new_zeros(key.shape[:-1])
        else:
            check_memory(self._caller("initial_state"), *memory)
            check_masking(*memory)
            weights = key.new_zeros(_state_shape(memory), dtype=lse_dtype(key.dtype))
        if self.initial == "uniform":
            attended = attended_keys(memory.key, memory.lengths, memory.attn_mask).to(
                weights.dtype
            )
            uniform = attended / attended.sum(-1, keepdim=True).clamp(min=1)
            beams = memory._beams()
            if beams > 1 and uniform.dim() == 2 and uniform.shape[0] > 1:
                uniform = flat_beams(uniform.unsqueeze(1).expand(-1, beams, -1))
            weights = weights + uniform
        return AttentionState(weights, weights.clone())

    def step(
        self, query: Tensor, memory: ProjectedMemory, state: AttentionState
    ) -> tuple[Tensor, Tensor, AttentionState]:
        """Attends with one query per sequence: a decoder step.

        Args:
            query: ``(B, query_dim)``, or ``(query_dim,)`` with an unbatched memory; with a memory
                that was expanded for beams, ``(B * beams, query_dim)``.
            memory: from :meth:`project`, of this layer.
            state: from :meth:`initial_state`, or from the step before.

        Returns:
            context ``(B, Dv)``, weights ``(B, Lk)`` and the state after this step. The weights,
            also those in the state, are before dropout.

        The gradients of keys, values and parameters are computed once for all steps of a memory,
        as by :meth:`AdditiveAttention.step`.

        Raises:
            TypeError, ValueError, RuntimeError: query, memory and state do not fit, or as
                :meth:`AdditiveAttention.forward`.
        """
        if not isinstance(memory, ProjectedMemory):
            if not is_symbolic(memory):
                refuse_memory(self._caller("step"), memory)
            traced: tuple[Tensor, Tensor, AttentionState] = symbolic_call(
                self, "step", query, memory, state
            )
            return traced
        if memory._whole() is not None and isinstance(state, AttentionState):
            found = whole_step(self, query, memory, state)
            if found is not None:
                return *found, AttentionState(found[1], state.cumulative + found[1])
        if not isinstance(query, Tensor):
            refuse_types(query=query)
        if query.is_nested:
            refuse_layouts(query=query)
        if memory._prepared() is None:
            check_memory(self._caller("step"), *memory)
        key, value, beams = memory.key, memory.value, memory._beams()
        rank = key.dim()
        alone = rank == 2 and beams == 1  # one query without a batch dim
        if not (2 <= rank <= 3 and value.dim() == rank and query.dim() == (1 if alone else 2)):
            refuse_ranks(self._caller("step"), query=query, key=key, value=value)
        split = beams > 1 and rank == 3
        if beams > 1:
            check_beams(self._caller("step"), query, key, beams)
        self._check_state(state, query, memory)
        lent, given = lent_of(self, memory), query
        if lent.source.query_weight is None:
            query = self._project("query", query)
        try:
            if split:
                query = query.unflatten(0, (-1, beams))
            lent, location, weight, filters = self._term(lent, state, query.shape[:-1])
            context, weights = attend_step(
                lent, query, location=location, location_weight=weight, filters=filters,
                dropout_p=self.dropout if self.training else 0.0,
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError):
            if lent.source.query_weight is not None:
                explain_projection(self.query_layer, "query", given, self.query_dim)
            explain_memory(self, given, *memory[:2], self.hidden_dim, beams)
            raise
        if split:
            context, weights = flat_beams(context), flat_beams(weights)
        return context, weights, AttentionState(weights, state.cumulative + weights)

    def _term(
        self, lent: Lent, state: AttentionState, batch: torch.Size
    ) -> tuple[Lent, Tensor | None, Tensor | None, Tensor | None]:
        """Returns the memory, location, location_weight and filters that ``attend_step`` takes for
        queries of this batch. Where tools have replaced the term's layer, it is called, and its
        term is added to the memory's keys."""
        location, filters = self._location(state)
        layer: Any = self._modules[self._term_layer]
        bare, dtype = bare_parameters(layer), lent.shared.weight.dtype
        if (bare is None or bare[1] is not None) and filters is not None:
            location, filters = location_features(location, filters), None
        if len(batch) == 2:
            location = location.unflatten(0, (-1, batch[-1]))
        elif not batch:
            location = location.squeeze(0)
        if bare is not None and bare[1] is None:
            filters = None if filters is None else filters.to(dtype)
            return lent, location.to(dtype), bare[0].t().to(dtype), filters
        dtype = lent.source.weight.dtype
        key, value = widened(lent.source.key, dtype), widened(lent.source.value, dtype)
        source = lent.source._replace(key=key + layer(location.to(dtype).mT), value=value)
        lent = lend(
            **source._asdict(), lengths=lent.lengths, attn_mask=lent.attn_mask, scale=self.scale,
            deferred=False,
        )  # fmt: skip
        return lent, None, None, None

    def _check_state(self, state: Any, query: Tensor, memory: ProjectedMemory) -> None:
        if not isinstance(state, AttentionState):
            raise TypeError(
                f"{self._caller('step')} got a state that is a {type(state).__name__}, but needs "
                "an AttentionState: begin with initial_state(memory)."
            )
        wanted, key = (*query.shape[:-1], memory.key.shape[-2]), memory.key
        for x in state:
            # Fast path: a state that the step before returned.
            if not (
                type(x) is Tensor
                and is_dense(x)
                and x.shape == wanted
                and x.dtype in DTYPES
                and lse_dtype(x.dtype) == lse_dtype(key.dtype)
                and x.device == key.device
            ):
                first = _state_shape(memory)
                check_state(self._caller("step"), state, query, key, first, memory._beams())
                break


def _state_shape(memory: ProjectedMemory) -> tuple[int, ...]:
    key, value, lengths, attn_mask = memory
    batch = torch.broadcast_shapes(key.shape[:-2], value.shape[:-2])
    if key.dim() == 3 and lengths is not None:
        batch = torch.broadcast_shapes(batch, lengths.shape[:1])
    if attn_mask is not None:
        batch = torch.broadcast_shapes(batch, attn_mask.shape[:-2])
    beams = memory._beams()
    if beams > 1:
        # Size.numel would make a symbolic size of torch.export a constant.
        return beams * math.prod(batch), key.shape[-2]
    return *batch, key.shape[-2]
