"""The base of the layers: their projections, and the memory that a decoder attends to."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from additive_attn.nn.decoding import (
    ProjectedMemory,
    counting_writes,
    prepare,
)
from additive_attn.nn.linear import bare_parameters, projected
from additive_attn.nn.symbolic import is_symbolic, symbolic_call
from additive_attn.nn.whole_steps import Whole, found_whole, projected_with_bias
from additive_attn.ops.autocast import autocast, autocast_dtype
from additive_attn.ops.checks import (
    DTYPES,
    Integers,
    aligned_lengths,
    as_integers,
    checked_probability,
    checked_scale,
    is_dense,
    refuse_dtypes,
    refuse_layouts,
    refuse_types,
    require_one_device,
)
from additive_attn.ops.key_projection import projected_values, worth_sharing
from additive_attn.ops.layer_checks import (
    check_factory,
    check_flags,
    check_memory_dtype,
    check_narrowed,
    checked_number,
    explain_projection,
    explain_shapes,
    refuse_ranks,
    warn_of_polarity,
)
from additive_attn.ops.masking import attended_keys, with_padding

_is_compiling = torch.compiler.is_compiling


class ProjectingAttention(nn.Module):
    """A layer with three Linears: of queries, of keys, and of the energies."""

    normalize = False
    energy_offset: nn.Parameter  # of normalize=True
    _polarity_checked = False
    _usual: ClassVar[dict[str, Any]] = {
        "dropout": 0.0, "scale": 1.0, "normalize": False, "batch_first": True
    }  # fmt: skip

    def __init__(
        self, query_dim: int, key_dim: int, hidden_dim: int, dropout: float, bias: bool,
        normalize: bool, scale: float, batch_first: bool, factory: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        check_flags(bias=bias, batch_first=batch_first, normalize=normalize)
        check_factory(**factory)
        self.query_dim = query_dim = checked_number("query_dim", query_dim)
        self.key_dim = key_dim = checked_number("key_dim", key_dim)
        self.hidden_dim = hidden_dim = checked_number("hidden_dim", hidden_dim)
        self.dropout = checked_probability("dropout", dropout)
        self.scale = checked_scale(scale)
        self.batch_first = batch_first

        # The order is that of the plain layer, so that the same seed gives the same parameters.
        self.query_layer = nn.Linear(query_dim, hidden_dim, bias, **factory)
        self.key_layer = nn.Linear(key_dim, hidden_dim, bias, **factory)
        self.energy_layer = nn.Linear(hidden_dim, 1, bias and not normalize, **factory)

    def project(
        self,
        key: Tensor,
        value: Tensor | None = None,
        lengths: Integers | None = None,
        key_padding_mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> ProjectedMemory:
        """Prepares what a decoder attends to, once per sequence, for :meth:`step`.

        Args:
            key: ``(B, Lk, key_dim)``, or ``(Lk, key_dim)`` unbatched.
            value: ``(B, Lk, Dv)``, or ``(Lk, Dv)``; the key itself by default.
            lengths: integers ``(B,)``, or ``()``: number of leading keys to attend to; a tensor,
                or a list.
            key_padding_mask: bool ``(B, Lk)``, or ``(Lk,)``: **True = ignore**.
            dtype: of the memory, bfloat16 or float16 beside a float32 layer: a step then reads
                half as many bytes of values, and computes in float32 as before. On the CPU, a
                number that it cannot hold raises ValueError.

        Returns:
            The projected keys, the values, and lengths and mask in the form that :meth:`step`
            passes on. The values are not copied unless dtype or autocast converts them: later
            writes to them change the steps. Writes to the other arguments do not.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`forward`.
        """
        if value is None:
            value = key
        if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
            if not is_symbolic(key, value):
                refuse_types(key=key, value=value)
            return symbolic_call(self, "project", key, value, lengths, key_padding_mask, dtype)
        return self._memory(key, value, lengths, key_padding_mask, dtype)

    @counting_writes
    def _memory(
        self, key: Tensor, value: Tensor, lengths: Integers | None,
        key_padding_mask: Tensor | None, dtype: torch.dtype | None,
    ) -> ProjectedMemory:  # fmt: skip
        rank = key.dim()
        if not (2 <= rank <= 3 and value.dim() == rank):
            refuse_ranks(self._caller("project"), key=key, value=value)
        k, carried = projected_with_bias(self, key)
        if k is None:
            k = self._project("key", key)
        v, attn_mask, given = value, None, lengths
        if k.device != v.device:
            require_one_device(key=k, value=v)
        if not is_dense(v):
            refuse_layouts(value=v)
        if dtype is not None:
            check_memory_dtype(dtype, k)
        if (computing := autocast_dtype(v.device.type)) is not None:
            v = autocast(v, computing)
        if v.dtype not in (k.dtype, dtype) or k.dtype not in DTYPES:
            refuse_dtypes(key=k, value=v)
        if rank == 3 and not self.batch_first:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        try:
            batch = k.shape[:-2]
            if batch != v.shape[:-2]:
                batch = torch.broadcast_shapes(batch, v.shape[:-2])
            if k.shape[-2] != v.shape[-2]:
                raise ValueError
            if lengths is not None:
                lengths = as_integers("lengths", lengths, k.device, k.shape[-2])
                lengths = aligned_lengths(lengths, k, _shared(batch, lengths), 1).clone()
            if key_padding_mask is not None:
                self._check_polarity(None, key_padding_mask)
                batch = _shared(batch, key_padding_mask)
                attn_mask = with_padding(None, key_padding_mask, k, batch)
        except (RuntimeError, ValueError):
            explain_shapes(self._caller("project"), self.batch_first, given, key=key, value=value)
            raise
        if dtype is not None:
            attended = partial(attended_keys, k, lengths, attn_mask)
            wide, k = k, k.to(dtype)
            check_narrowed("The projected key", wide, k, attended)
            wide, v = v, v.to(dtype)
            check_narrowed("value", wide, v, attended)
        memory = ProjectedMemory(k, v, lengths, attn_mask)
        if k.shape[-1] == self.hidden_dim and not _is_compiling():
            if found_whole(memory):
                memory.whole = Whole(carried)
            else:
                memory.prepared = prepare(self, memory)
        return memory

    def extra_repr(self) -> str:
        shown = [
            f"{name}={getattr(self, name)}" for name in ("query_dim", "key_dim", "hidden_dim")
        ]
        options = {name: getattr(self, name) for name in self._usual}
        shown += [f"{name}={x!r}" for name, x in options.items() if x != self._usual[name]]
        return ", ".join(shown)

    def _caller(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"

    def _check_polarity(self, attn_mask: Any, key_padding_mask: Any) -> None:
        # Once per layer, since it reads the masks.
        if not (torch.compiler.is_compiling() or self._polarity_checked):
            warn_of_polarity(attn_mask, key_padding_mask)
            self._polarity_checked = True

    def _project(self, name: str, tensor: Tensor) -> Tensor:
        layer: Any = self._modules[f"{name}_layer"]
        try:
            output = projected(layer, tensor)
            return output + self.energy_offset if self.normalize and name == "query" else output
        except RuntimeError:
            explain_projection(layer, name, tensor, getattr(self, f"{name}_dim"))
            raise

    def _project_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns projected keys, and the values, which may be the same tensor as ``key``."""
        if worth_sharing(key, value):
            parameters = bare_parameters(self._modules["key_layer"])
            if parameters is not None:
                pair = projected_values(key, value, *parameters)
                if pair is not None:
                    return pair
        return self._project("key", key), value

    def _lent_parameters(self) -> tuple[nn.Parameter | None, ...] | None:
        """Returns weight and bias of energy and query, and those of normalize; None unless the
        energy layer is a bare Linear. A query layer that is not one is called at every step."""
        modules: Any = self._modules
        energy = bare_parameters(modules["energy_layer"])
        if energy is None:
            return None
        query = bare_parameters(modules["query_layer"]) or (None, None)
        if not self.normalize:
            return (*energy, *query)
        own = self._parameters.get("energy_gain"), self._parameters.get("energy_offset")
        plain = all(type(x) is nn.Parameter for x in own)
        return (*energy, *query, *own) if plain else None


def _shared(batch: torch.Size, masking: Any) -> torch.Size:
    """The batch of a memory and its masks. A memory of one sequence may have lengths or a mask for
    each query to come."""
    if tuple(batch) == (1,) and isinstance(masking, Tensor) and is_dense(masking):
        return masking.shape[:1] or batch
    return batch
