"""A layer's methods as nodes of a graph that torch.fx traces symbolically."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from additive_attn.ops.layer_checks import refuse_root


def is_symbolic(*arguments: Any) -> bool:
    return any(isinstance(each, fx.Proxy) for each in arguments)


def symbolic_call(layer: nn.Module, method: str, *arguments: Any) -> Any:
    """Returns a node that calls ``method`` of ``layer``, which cannot be traced through."""
    tracer: Any = next(each.tracer for each in arguments if isinstance(each, fx.Proxy))
    path = tracer.path_of_module(layer)
    if not path:
        refuse_root(layer)
    module = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_method", method, (module, *arguments), {})
