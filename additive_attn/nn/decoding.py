"""The memory that a decoder attends to, and its steps."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from additive_attn.nn.linear import energy_of
from additive_attn.ops.autocast import autocast, autocast_dtype
from additive_attn.ops.checks import (
    has_values,
    refuse_flags,
    refuse_layouts,
    refuse_types,
    require,
)
from additive_attn.ops.decoding import attend_apart, attend_step
from additive_attn.ops.layer_checks import (
    check_beams,
    check_index,
    check_memory,
    explain_projection,
    refuse_ranks,
)
from additive_attn.ops.memory import Lent, computed_whole, lend, widened
from additive_attn.ops.memory_checks import explain_memory
from additive_attn.ops.writes import Watched, count_writes, parameter_state

_is_compiling = torch.compiler.is_compiling
# Queries per sequence in a step of prepared keys. With more, an ordinary call is as fast.
MOST_ROWS = 16


class _Memory(NamedTuple):
    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    attn_mask: Tensor | None = None


class ProjectedMemory(_Memory):
    """Keys and values that all steps of a decoder attend to, prepared by
    :meth:`AdditiveAttention.project`: a named tuple.

    Attributes:
        key: projected keys ``(B, Lk, hidden_dim)``, or ``(Lk, hidden_dim)`` unbatched.
        value: values ``(B, Lk, Dv)``, or ``(Lk, Dv)`` unbatched.
        lengths: number of leading keys to attend to, int64 ``(B, 1)``, or ``()`` unbatched. You
            may also pass ``(B,)``, and any integer dtype.
        attn_mask: keys to attend to, bool ``(B, 1, Lk)``, or ``(1, Lk)`` unbatched; True =
            attend. You may also pass float, which is added to the scores.
        beams: queries per sequence, 1 unless :meth:`expand` has set more.
    """

    beams: int = 1
    prepared: Prepared | None = None
    whole: Any = None  # of whole_steps.py

    # The compiler of torch 2.10 reads only the fields and methods of a named tuple.
    def _beams(self) -> int:
        return type(self).beams

    def _prepared(self) -> Prepared | None:
        return None if _is_compiling() else self.prepared

    def _whole(self) -> Any:
        return None if _is_compiling() else self.whole

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is not a node of this graph.
        return _memory_of, (tuple(self), self.beams)

    def _replace(self, **fields: Any) -> ProjectedMemory:
        """Returns a copy with other fields. Its steps are ordinary calls."""
        return _memory_of(super()._replace(**fields), self._beams())

    def expand(self, beams: int) -> ProjectedMemory:
        """Returns the memory for a beam search: a step takes ``(B * beams, query_dim)``, the
        queries of a sequence side by side, and reads the keys of a sequence once for all of them.

        Raises:
            TypeError: beams is not an integer.
            ValueError: beams is below 1, or the memory has been expanded already.
        """
        if isinstance(beams, bool) or not isinstance(beams, (Integral, torch.SymInt)):
            raise TypeError(f"beams is {beams!r}; it must be an integer, the beams per sequence.")
        beams = beams if isinstance(beams, torch.SymInt) else int(beams)
        own = self._beams()
        if beams < 1 or own != 1:
            raise ValueError(
                f"A memory of {own} beams per sequence cannot be expanded to {beams}. Expand the "
                "memory that project() returned, to 1 or more beams."
            )
        memory = _memory_of(self, beams)
        memory.prepared = self._prepared()
        memory.whole = self._whole() if beams == 1 else None
        return memory

    def reorder(self, index: Tensor) -> ProjectedMemory:
        """Returns the memory after beams were chosen.

        Args:
            index: integers ``(N,)``: for each query to come, the number among the ``B * beams`` of
                the query that it continues. If every sequence stays in its place, no key is
                copied.

        Returns:
            This memory, or one of the chosen sequences.

        Raises:
            TypeError: index is not a tensor of integers.
            ValueError: index is not of rank 1, is out of range, or does not hold ``beams`` numbers
                for each sequence.
        """
        check_memory("reorder", *self)
        batched, beams = self.key.dim() == 3, self._beams()
        sequences = self.key.shape[0] if batched else 1
        check_index(index, sequences * beams, self.key, waits=True)
        chosen = index.long() // beams
        if index.numel() % beams:
            raise ValueError(
                f"index has {index.numel()} entries, and a sequence has {beams} beams: give "
                "an index for every beam."
            )
        if beams > 1:
            chosen = chosen.reshape(-1, beams)
            require(
                (chosen == chosen[:, :1]).all(),
                f"index puts beams of different sequences side by side; keep the {beams} "
                "beams of a sequence together, since they share its keys.",
            )
            chosen = chosen[:, 0]
        if (not batched or has_values(chosen)) and chosen.numel() == sequences:
            own = torch.arange(sequences, device=chosen.device)
            if not has_values(chosen) or bool((chosen == own).all()):
                return self
        if not batched:
            raise ValueError("index repeats the only sequence of an unbatched memory; expand it.")
        return _memory_of(self._chosen(sequences, chosen), beams)

    def _chosen(self, sequences: int, chosen: Tensor) -> Iterator[Tensor | None]:
        """Yields the fields of the chosen sequences."""
        for name, x in self._asdict().items():
            other = x is not None and (x.dim() == 0 or x.shape[0] != sequences)
            if other and x.dim() and x.shape[0] != 1 and (x.shape[0] < 1 or sequences != 1):
                raise ValueError(
                    f"reorder got a memory of {sequences} sequences, whose {name} has shape "
                    f"{tuple(x.shape)}: dim 0 must be {sequences}, or 1."
                )
            shared = x is None or (other and (x.dim() == 0 or x.shape[0] == 1))
            yield x if shared else x.index_select(0, chosen)


class _AnyBeams(ProjectedMemory):
    """A memory in a graph for any number of beams. The number does not leave the graph: a named
    tuple that is flattened and rebuilt keeps only its class and its fields."""

    _number: int

    def _beams(self) -> int:
        return self._number if _is_compiling() else self.beams

    @property
    def beams(self) -> int:  # type: ignore[override]
        if "_number" not in self.__dict__:
            raise ValueError(
                "This memory comes from a program that was exported for any number of beams, and "
                "its own number is lost. Return the memory before expand, and expand it outside."
            )
        return self._number


def _memory_of(fields: Iterable[Any], beams: int) -> ProjectedMemory:
    if _is_compiling():
        # Imported here, since it imports sympy.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not has_static_value(beams):
            memory = _AnyBeams(*fields)
            memory._number = beams
            return memory
    return ProjectedMemory(*fields) if beams == 1 else _class_of(beams)(*fields)


_classes: dict[int, type[ProjectedMemory]] = {}  # by beams


def _class_of(beams: int) -> type[ProjectedMemory]:
    """Returns the class for a number of beams. Where torch flattens and rebuilds a named tuple, as
    in FSDP2, torch.func and torch.export, it keeps only the class and the fields."""
    _make_class(beams)
    return _classes[beams]


def _make_class(beams: int) -> None:
    if beams not in _classes:
        made = type("ProjectedMemory", (ProjectedMemory,), {"beams": beams})
        if _classes.setdefault(beams, made) is made:  # threads get the same class
            name = f"additive_attn.ProjectedMemory.beams{beams}"
            _register_namedtuple(made, serialized_type_name=name)


# As torch.compiler.assume_constant_result sets it, which imports the compiler. A trace then calls
# the function, since the compiler cannot create classes.
_make_class._dynamo_marked_constant = True  # type: ignore[attr-defined]
# For torch.export.save and load of memories as inputs and outputs. A fresh process has the classes
# of up to 64 beams.
_register_namedtuple(ProjectedMemory, serialized_type_name="additive_attn.ProjectedMemory")
_register_namedtuple(_AnyBeams, serialized_type_name="additive_attn.ProjectedMemory.any_beams")
for _beams in range(2, 65):
    _make_class(_beams)
torch.serialization.add_safe_globals([_memory_of])


def counting_writes(project: Callable[..., ProjectedMemory]) -> Callable[..., ProjectedMemory]:
    """Runs ``project`` outside of inference mode, whose tensors do not count writes: steps must
    detect writes to a memory."""

    @functools.wraps(project)
    def run(*arguments: Any) -> ProjectedMemory:
        if _is_compiling() or not torch.is_inference_mode_enabled():
            return project(*arguments)
        with torch.inference_mode(False), torch.no_grad():
            return project(*arguments)

    return run


class Prepared(NamedTuple):
    """A memory's lent form, the parameters that it was made with, and their state at that time."""

    lent: Lent
    parameters: tuple[nn.Parameter | None, ...]
    state: tuple[int, ...]
    trained: bool  # whether the lent form was made with gradients
    copied: Watched | None = None  # of the parameters of which it has copies

    def is_of(self, layer: Any) -> bool:
        """Whether ``layer`` still has these parameters, unchanged, and steps may use them."""
        parameters = layer._lent_parameters()
        return (
            parameters is not None
            and len(parameters) == len(self.parameters)
            and all(map(operator.is_, parameters, self.parameters))
            and self.lent.scale == layer.scale
            and self.state == parameter_state(parameters)
            and (self.trained or not torch.is_grad_enabled())
            and (self.copied is None or self._has_fresh_copies(self.copied))
        )

    def _has_fresh_copies(self, copied: Watched) -> bool:
        """Whether no byte has changed, and no backward pass has run, without which no optimizer
        steps: on a GPU only the latter is checked."""
        node = self.lent.node
        return copied.unchanged() and (node is None or not node.spent)


def lent_of(layer: Any, memory: ProjectedMemory) -> Lent:
    """Returns what ``attend_step`` takes. An expanded memory has entries (B, beams)."""
    prepared, entries = memory._prepared(), _Memory(*memory)
    if memory._beams() > 1 and memory.key.dim() == 3:
        rows: Any = (x if x is None else x.unsqueeze(1) for x in memory)
        entries = _Memory(*rows)
    if prepared is not None and prepared.is_of(layer):
        if prepared.lent.source.key.dim() != entries.key.dim():
            memory.prepared = prepared = prepare(layer, entries)
        if prepared is not None:
            return prepared.lent
    weight, bias = energy_of(layer._modules["energy_layer"], layer.hidden_dim, memory.key)
    return lend(
        entries.key, entries.value, weight.squeeze(0), lengths=entries.lengths,
        attn_mask=entries.attn_mask, scale=layer.scale, score_bias=bias, deferred=False,
    )  # fmt: skip


def prepare(layer: Any, memory: _Memory) -> Prepared | None:
    """Lends a memory with the layer's parameters, so that the gradients of all steps are computed
    at once; None where tools have replaced the modules, which every step must call, and where
    plain PyTorch computes small steps."""
    if computed_whole(memory.key):
        return None
    parameters = layer._lent_parameters()
    if parameters is None or hasattr(
        type(layer), "unshard"
    ):  # FSDP2 frees parameters between calls
        return None
    energy: Any = parameters[0]
    weight: Tensor = energy.squeeze(0)
    if layer.normalize:
        weight = layer.energy_gain * weight / weight.norm()
    query_weight, query_bias = parameters[2], parameters[3]
    computing, copied = autocast_dtype(memory.key.device.type), [memory.key]
    if computing is not None:
        query_weight = query_bias = None  # each query is projected under autocast
        if autocast(memory.value, computing) is not memory.value:
            return None
    if computing is not None or layer.normalize:
        copied += [x for x in parameters if x is not None]
    if not count_writes(copied):
        return None  # writes to them could not be detected
    watched = [energy] if computing is not None or layer.normalize else []
    if layer.normalize:
        watched += [layer.energy_gain, layer.energy_offset, parameters[3]]
    if query_weight is not None and layer.normalize:
        offset = layer.energy_offset
        query_bias = offset if query_bias is None else query_bias + offset
    lent = lend(
        memory.key, memory.value, weight, lengths=memory.lengths, attn_mask=memory.attn_mask,
        scale=layer.scale, query_weight=query_weight, query_bias=query_bias,
        score_bias=parameters[1],
    )  # fmt: skip
    if lent.prepared is None:
        return None
    return Prepared(
        lent, parameters, parameter_state(parameters), torch.is_grad_enabled(),
        Watched(watched) if watched else None,
    )  # fmt: skip


def step(
    layer: Any, query: Tensor, memory: ProjectedMemory, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """:meth:`AdditiveAttention.step`."""
    key, value, lengths, attn_mask = memory
    prepared, beams = memory._prepared(), memory._beams()
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        refuse_types(query=query, key=key, value=value)
    if type(need_weights) is not bool:
        refuse_flags(need_weights=need_weights)
    rank = key.dim()
    if prepared is not None and query.dim() == rank - 1 and beams == 1 and prepared.is_of(layer):
        return _prepared_step(layer, query, memory, prepared.lent, need_weights)
    if not (2 <= rank <= 3 and value.dim() == rank and rank - 1 <= query.dim() <= rank):
        refuse_ranks(layer._caller("step"), query=query, key=key, value=value)
    several, flat = query.dim() == rank, beams > 1 and query.dim() < rank == 3
    if flat or (beams > 1 and rank == 2):
        check_beams(layer._caller("step"), query, key, beams)
    if several and query.is_nested:
        refuse_layouts(query=query)
    # Queries per sequence: of beams, or several; 0 where it has one query, without a dim for it.
    number = beams if flat else query.shape[-2] if several else 0
    if prepared is not None and 0 < number <= MOST_ROWS and prepared.is_of(layer):
        rows = query.unflatten(0, (-1, beams)) if flat else query
        out, weights = _prepared_step(layer, rows, memory, prepared.lent, need_weights, True)
        if flat:
            return out.flatten(0, 1), None if weights is None else weights.flatten(0, 1)
        return out, weights
    q = layer._project("query", query)
    if not several:
        q = q.unflatten(0, (-1, beams)) if flat else q.unsqueeze(-2)
    key, value = widened(key, q.dtype), widened(value, q.dtype)
    try:
        masking = attn_mask, lengths, False, None
        # ``number`` is compared only under dropout, since a graph is then specialised to it.
        apart = layer.training and layer.dropout > 0.0 and 0 < number <= MOST_ROWS
        more = {"compute": attend_apart} if apart else {}
        out, weights = layer._attend(q, key, value, *masking, need_weights, **more)
    except (RuntimeError, TypeError, ValueError):
        explain_memory(layer, query, *memory[:2], layer.hidden_dim, beams)
        raise
    if several:
        return out, weights
    if flat:
        return flat_beams(out), None if weights is None else flat_beams(weights)
    return out.squeeze(-2), None if weights is None else weights.squeeze(-2)


def flat_beams(x: Tensor) -> Tensor:
    """Returns ``(B, beams, ...)`` as ``(B * beams, ...)``."""
    if _is_compiling():  # flatten(0, 1) alone makes torch.export before 2.13 guard on the sizes
        return x.flatten().view(x.shape[0] * x.shape[1], *x.shape[2:])
    return x.flatten(0, 1)


def _prepared_step(
    layer: Any,
    query: Tensor,
    memory: ProjectedMemory,
    lent: Lent,
    need_weights: bool,
    several: bool = False,
) -> tuple[Tensor, Tensor | None]:
    try:
        if lent.source.query_weight is None:
            query = layer._project("query", query)
        dropout_p = layer.dropout if layer.training else 0.0
        out, weights = attend_step(lent, query, dropout_p=dropout_p, several=several)
    except (RuntimeError, TypeError, ValueError):
        if lent.source.query_weight is not None:
            explain_projection(layer.query_layer, "query", query, layer.query_dim)
        explain_memory(layer, query, *memory[:2], layer.hidden_dim, memory.beams)
        raise
    return out, weights if need_weights else None
