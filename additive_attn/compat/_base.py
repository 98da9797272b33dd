"""What the classes of this package share: a memory that is lent once for the steps of a sequence.

The layers that they replace take keys and values at every step. A memory is looked up by the
identity of those tensors. No reference to them is held, so that they can be freed.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from additive_attn.nn.linear import bare_parameters, energy_of
from additive_attn.ops.checks import is_readable
from additive_attn.ops.compat_checks import check_keys
from additive_attn.ops.decoding import attend_step
from additive_attn.ops.location import location_features
from additive_attn.ops.memory import Lent, Shared, eager, lend
from additive_attn.ops.products import LentWeight
from additive_attn.ops.writes import Watched, count_writes, version

_hooks_of_saving = torch._C._autograd._top_saved_tensors_default_hooks
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Linear(nn.Module):
    """A Linear under the name ``linear_layer``, initialised as in speech synthesis."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, gain: str = "linear"
    ) -> None:
        super().__init__()
        self.linear_layer = nn.Linear(in_features, out_features, bias)
        nn.init.xavier_uniform_(self.linear_layer.weight, nn.init.calculate_gain(gain))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear_layer(x)
        return output


class Modules(NamedTuple):
    """Parts of a layer with one head. ``filters`` and ``dense`` compute the location term; without
    filters its inputs are the features."""

    energy: nn.Module
    query: nn.Module | None  # None: queries are projected already
    dense: nn.Module | None = None
    filters: nn.Module | None = None


class Lease(NamedTuple):
    """A lent memory, and what else its steps take."""

    lent: Lent
    location_weight: Tensor | None = None  # (F, H)
    filters: Tensor | None = None  # (F, C, K)
    output: LentWeight | None = None  # (out, heads * Dv), of the contexts of all heads


class Leases:
    """The last lease of a layer. A copy of the layer has none."""

    __slots__ = ("__weakref__", "_entry")

    def __init__(self) -> None:
        self._entry: Any = None

    def __reduce__(self) -> tuple[type[Leases], tuple[()]]:
        return Leases, ()

    def get(
        self,
        sources: tuple[Tensor, ...],
        parameters: Sequence[Tensor | None],
        scale: float,
        build: Callable[[], Lease],
    ) -> Lease:
        """Returns the lease of these tensors if they are unchanged since it was built, or a new
        one."""
        floats = [x for x in (*sources, *parameters) if x is not None and x.is_floating_point()]
        if not eager(floats, floats[0]) or saving() is not None or not count_writes(sources):
            return build()
        state = tuple(map(_state, (*sources, *parameters)))
        entry = self._entry
        if entry is not None:
            held, used, known, watched, graded, factor, lease = entry
            if (
                known == state
                and all(map(operator.is_, used, parameters))
                and factor == scale
                and graded >= torch.is_grad_enabled()
                and all(a() is b for a, b in zip(held, sources, strict=True))
                and watched.unchanged()
                and (lease := _revived(lease)) is not None
            ):
                return lease
        lease = build()
        entry = self._entry = None
        kept = _kept(lease)
        if kept is None:
            return lease

        def end(_: Any) -> None:
            if self._entry is entry:
                self._entry = None

        held = tuple(ref(x, end) for x in sources)
        graded, watched = torch.is_grad_enabled(), Watched((*sources, *parameters))
        entry = self._entry = held, tuple(parameters), state, watched, graded, scale, kept
        if lease.output is not None and lease.output.node is not None:
            # A backward pass frees the graph that made the output weight.
            owner = ref(self)
            lease.output.source.register_hook(lambda _: _drop(owner))
        return lease


def saving() -> Any:
    """Returns hooks on what is saved for backward. Checkpointing sets them, and needs a step to do
    the same each time it runs."""
    return _hooks_of_saving(True)


def _drop(owner: ref[Leases]) -> None:
    found = owner()
    if found is not None:
        found._entry = None


def _kept(lease: Lease) -> Any:
    """Returns the lease without its sources; None where each step is an ordinary call."""
    lent = lease.lent
    if lent.node is not None:
        # The graph of the steps holds the memory, as long as there is one.
        return lease._replace(lent=ref(lent))  # type: ignore[arg-type]
    if lent.prepared is None:
        return None
    # No step needs gradients for these; without their graph they hold no source.
    plain: Any = (None if x is None else x.detach() for x in lent.shared)
    lent.source = lent.shared = Shared(*plain)
    return lease


def _state(x: Tensor | None) -> tuple[int, ...] | None:
    """Numbers that change when a tensor is written to, frozen, or gets other memory."""
    if x is None:
        return None
    return version(x), x.requires_grad, x.data_ptr()


def _revived(lease: Any) -> Lease | None:
    """Returns a kept lease; None where its memory is freed, or its backward pass has run."""
    lent = lease.lent
    if isinstance(lent, Lent):
        found: Lease = lease
        return found
    lent = lent()
    return None if lent is None or lent.node.spent else lease._replace(lent=lent)


def leases(layer: nn.Module) -> Leases:
    own: Leases | None = layer.__dict__.get("_leases")
    if own is None:
        own = layer.__dict__["_leases"] = Leases()
    return own


def step(
    layer: nn.Module,
    modules: Modules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding: Tensor | None = None,
    attended: Tensor | None = None,
    inputs: Tensor | None = None,
    window: Tensor | None = None,
    scale: float = 1.0,
    need_context: bool = True,
) -> tuple[Tensor, Tensor]:
    """One step of a layer with one head.

    Args:
        query: ``(B, query_dim)``, not projected.
        key: ``(B, Lk, H)``, projected; with value ``(B, Lk, Dv)`` the memory.
        padding, attended: bool ``(B, Lk)``, one of them: True = ignore, or True = attend.
        inputs: ``(B, C, Lk)``, of the location term.
        window: bool, broadcastable to ``(B, 1, Lk)``: True = this step may attend.
        need_context: if False, the values are not read. It is the same for all steps.

    Returns:
        context ``(B, Dv)``, or ``(B, 0)``, and weights ``(B, Lk)``.
    """
    energy, projection = affine(modules.energy), affine(modules.query)
    dense, filters = affine(modules.dense), filters_of(modules.filters)
    owner: Leases | None = leases(layer) if energy is not None else None
    if inputs is not None and (dense is None or (modules.filters is not None and filters is None)):
        # Tools have changed these modules: they are called.
        made = inputs if modules.filters is None else features(modules.filters, inputs)
        assert modules.dense is not None
        key, inputs, owner = key + modules.dense(made.mT), None, None
    if inputs is None:
        dense = filters = None

    def build() -> Lease:
        weight, bias = energy or energy_of(modules.energy, key.shape[-1], key)
        query_weight, query_bias = projection or (None, None)
        if dense is not None and dense[1] is not None and query_weight is not None:
            # The bias is the same for all keys, so it can be added to the query.
            query_bias = dense[1] if query_bias is None else query_bias + dense[1]
        lengths, attn_mask = masks(key, padding, attended)
        read = value if need_context else key.detach().narrow(-1, 0, 0)
        lent = lend(
            key, read, vector(weight, bias), lengths=lengths, attn_mask=attn_mask, scale=scale,
            query_weight=query_weight, query_bias=query_bias,
        )  # fmt: skip
        return Lease(lent, None if dense is None else dense[0].t(), kernels(filters))

    if owner is None:
        lease = build()
    else:
        sources = tuple(x for x in (key, value, padding, attended) if x is not None)
        parameters = [*(energy or ()), *(projection or ()), *(dense or ()), filters]
        lease = owner.get(sources, parameters, scale, build)
    lent = lease.lent if window is None else narrowed(lease.lent, window)
    if projection is None:
        query = query if modules.query is None else modules.query(query)
        if dense is not None and dense[1] is not None:
            query = query + dense[1]
    if inputs is not None and lease.filters is not None:
        inputs = location_features(inputs, lease.filters)
    out, weights = attend_step(lent, query, location=inputs, location_weight=lease.location_weight)
    return out, weights


def vector(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the energy's vector ``(H,)``. The bias gets a zero gradient, as a plain layer's."""
    weight = weight.squeeze(0)
    return weight if bias is None else torch.add(weight, bias, alpha=0)


def narrowed(lent: Lent, window: Tensor) -> Lent:
    """Returns the memory for one step that attends to fewer keys."""
    one = copy.copy(lent)
    one.attn_mask = window if lent.attn_mask is None else lent.attn_mask & window
    return one


def masks(
    key: Tensor, padding: Tensor | None, attended: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns lengths ``(B, 1)`` or attn_mask ``(B, 1, Lk)``. The kernel skips keys beyond a
    length. A mask on a GPU stays one: to find lengths in it would wait."""
    if attended is None:
        if padding is None:
            return None, None
        attended = padding.logical_not()
    check_keys(attended, key)
    if is_readable(attended):
        lengths = attended.sum(-1, keepdim=True)
        if torch.equal(attended, torch.arange(attended.shape[-1], device="cpu") < lengths):
            return lengths, None
    return None, attended.unsqueeze(-2)


def unhooked(module: nn.Module) -> bool:
    own = module.__dict__
    return "forward" not in own and not any(own[name] for name in _HOOKS)


def affine(module: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Returns weight and bias of a Linear without hooks, or of a module that only calls one."""
    if module is None:
        return None
    inner = module._modules.get("linear_layer")
    if inner is not None and unhooked(module):
        module = inner
    return bare_parameters(module)


def filters_of(module: nn.Module | None) -> Tensor | None:
    """Returns the weight of a convolution that keeps the number of keys and has no hooks."""
    if module is None:
        return None
    inner = module._modules.get("conv")
    if inner is not None and unhooked(module):
        module = inner
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or not unhooked(module):
        return None
    if type(module) not in (nn.Conv1d, nn.Conv2d) or module.bias is not None:
        return None
    weight = module._parameters.get("weight")
    ones = (1,) * (weight.dim() - 2) if weight is not None else ()
    same = (
        module.stride == ones
        and module.dilation == ones
        and module.groups == 1
        and module.padding_mode == "zeros"
        and weight is not None
        and module.padding == tuple(size // 2 for size in weight.shape[2:])
        and weight.shape[-1] % 2 == 1
        and weight.shape[2:-1].numel() == 1
    )
    return weight if same else None


def kernels(weight: Tensor | None) -> Tensor | None:
    """Returns the weight ``(F, C, K)`` of a convolution over one dim or two."""
    return weight.squeeze(2) if weight is not None and weight.dim() == 4 else weight


def features(filters: nn.Module, inputs: Tensor) -> Tensor:
    """``(B, C, Lk)`` -> ``(B, F, Lk)``."""
    weight = kernels(filters_of(filters))
    if weight is not None:
        return location_features(inputs, weight)
    wide = isinstance(filters, nn.Conv2d)
    output: Tensor = filters(inputs.unsqueeze(2)).squeeze(2) if wide else filters(inputs)
    return output
