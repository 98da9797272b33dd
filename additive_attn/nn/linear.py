"""Projects with the Linears of a layer, and reads the energy's vector from one. Linears without
hooks avoid the cost of nn.Module; any other module is called, so that hooks and tools take effect.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules import module as nn_module
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from additive_attn.ops.checks import has_values
from additive_attn.ops.layer_checks import check_energy, refuse_backward_hooks, refuse_energy
from additive_attn.ops.writes import Watched, parameter_state, version

_linear_forward = nn.Linear.forward
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
# The state in which a module was last found to be affine, and its parameters at that time.
_affine: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Watched]] = WeakKeyDictionary()


def _bare(layer: nn.Module, forward: Any = _linear_forward) -> bool:
    """Whether a module computes what nn.Linear does, and has no hooks."""
    own = layer.__dict__
    return (
        type(layer).forward is forward
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        and not (nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)
    )


def projected(layer: Any, tensor: Tensor) -> Tensor:
    """Returns ``layer(tensor)``. On few rows, a third of a Linear's time is spent in nn.Module."""
    if type(layer) is nn.Linear and _bare(layer) and not _is_compiling():
        parameters: dict[str, Any] = layer._parameters
        # A replica of nn.DataParallel has them as attributes; a trace records the modules.
        if len(parameters) == 2 and _tracing_state() is None:
            return linear(tensor, parameters["weight"], parameters["bias"])
    output: Tensor = layer(tensor)
    return output


def bare_parameters(
    layer: Any, kind: type[nn.Module] = nn.Linear
) -> tuple[nn.Parameter, nn.Parameter | None] | None:
    """Returns weight and bias of a Linear, or another ``kind``, that has no hooks; None for any
    other module."""
    if type(layer) is not kind or not _bare(layer, kind.forward):
        return None
    parameters = layer._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    plain = type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    return (weight, bias) if plain and weight is not None else None


def energy_of(layer: nn.Module, features: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the weight ``(1, features)`` of an affine module, and the bias that must get a zero
    gradient.

    A Linear's weight is read. Any other module is called, with the unit vectors and with zero, so
    that hooks, adapters, quantisation, offloading and sharding take effect.
    """
    if _bare(layer):
        parameters = layer._parameters
        # None where it is parametrized, and in a replica of nn.DataParallel.
        weight: Any = parameters.get("weight")
        if weight is None:
            weight = layer.weight
        kind = type(weight)
        if kind in (nn.Parameter, Tensor, type(like)) or kind.__module__.startswith(
            "torch._subcl"
        ):
            check_energy(layer, weight.shape, (1, features))
            return weight, parameters.get("bias")
    elif layer._backward_hooks or layer._backward_pre_hooks:
        refuse_backward_hooks()
    return _called(layer, features, like), None


def _called(layer: nn.Module, features: int, like: Tensor) -> Tensor:
    rows = torch.eye(features + 1, features, dtype=like.dtype, device=like.device)
    outputs = layer(rows)
    check_energy(layer, getattr(outputs, "shape", ()), (features + 1, 1))
    weight, bias = (outputs[:-1] - outputs[-1:]).transpose(0, 1), outputs[-1]
    if has_values(like) and not _is_known(layer):
        # Dropout modules are searched for, since on few rows they may drop nothing by chance.
        if any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in layer.modules()):
            refuse_energy(layer)
        with torch.no_grad():
            # The energies with the largest scores, and two others.
            waves = torch.arange(2 * features, device=like.device).cos().reshape(2, -1)
            rows = torch.cat([weight.sign(), -weight.sign(), waves]).to(like.dtype)
            expected = (rows * weight).sum(-1, keepdim=True) + bias
            # Quantised activations are off by up to 1 in 255.
            allowed = 0.02 * ((rows * weight).abs().sum(-1, keepdim=True) + bias.abs())
            if ((layer(rows) - expected).abs() > allowed).any():
                refuse_energy(layer)
        _affine[layer] = _state(layer), Watched(_plain_parameters(layer))
    return weight


def _is_known(layer: nn.Module) -> bool:
    """Whether a module was found to be affine, and has not changed since."""
    state, parameters = _affine.get(layer, ((), None))
    return parameters is not None and state == _state(layer) and parameters.unchanged()


def _state(layer: nn.Module) -> tuple[int, ...]:
    """Numbers that change when a module may cease to be affine. An adapter that starts at zero is
    affine at first, and a hook that clamps leaves small numbers as they are."""
    state = [*nn_module._global_forward_hooks, *nn_module._global_forward_pre_hooks]
    for module in layer.modules():
        forward = type(module).forward, module.__dict__.get("forward")
        state += [id(module), *map(id, forward), module.training]
        state += [*module._forward_hooks, *module._forward_pre_hooks]
    versions = sum(version(p) for p in layer.parameters())
    return (*state, versions, *parameter_state(_plain_parameters(layer)))


def _plain_parameters(layer: nn.Module) -> tuple[Tensor, ...]:
    return tuple(p for p in layer.parameters() if type(p) is nn.Parameter)


def renew_parameters(layer: nn.Module) -> None:
    """Pruning and the older norms of torch recompute parameters in a pre-hook of ``forward``. This
    runs these hooks before another method."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm)):
            hook(layer, ())
