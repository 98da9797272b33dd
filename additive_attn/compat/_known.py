"""The layers that :func:`replace_attention` swaps: how to read their sizes, and a trial that shows
whether two of them compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from additive_attn.compat import coqui, espnet, espnet_heads, gnmt, opennmt, speechbrain, tacotron2

KEYS, LENGTHS = 7, (7, 4)


class Known(NamedTuple):
    """``arguments`` of the constructor, read from a layer; ``trial`` returns all its results for
    small random inputs."""

    ours: type[nn.Module]
    arguments: Callable[[Any], tuple[Any, ...]]
    trial: Callable[[Any, Callable[..., Tensor]], list[Any]]


def _shape(module: Any) -> tuple[int, ...]:
    """The shape of a layer's weight: (out, in, ...)."""
    while not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        module = next(module.children())
    return tuple(module.weight.shape)


def _refused(reason: str) -> Any:
    raise ValueError(reason)


def _ignored(like: Tensor) -> Tensor:
    lengths = torch.tensor(LENGTHS, device=like.device)
    return torch.arange(KEYS, device=like.device) >= lengths[:, None]


def _tacotron2_arguments(layer: Any) -> tuple[Any, ...]:
    (hidden, query), (_, memory) = _shape(layer.query_layer), _shape(layer.memory_layer)
    filters, _, width = _shape(layer.location_layer.location_conv)
    return query, memory, hidden, filters, width


def _tacotron2_trial(layer: Any, randn: Callable[..., Tensor]) -> list[Any]:
    query, memory_dim, *_ = _tacotron2_arguments(layer)
    memory, weights = randn(2, KEYS, memory_dim), randn(2, 2, KEYS)
    key, mask = layer.memory_layer(memory), _ignored(memory)
    return [layer(randn(2, query), memory, key, weights, mask) for _ in range(2)]


def _espnet_arguments(layer: Any) -> tuple[Any, ...]:
    sizes: tuple[Any, ...] = layer.eprojs, layer.dunits
    conv = getattr(layer, "loc_conv", None)
    if hasattr(layer, "aheads"):
        sizes += layer.aheads, layer.att_dim_k, layer.att_dim_v
        conv = None if conv is None else conv[0]
    else:
        sizes += (layer.att_dim,)
    if conv is not None:
        sizes += _shape(conv)[0], _shape(conv)[-1] // 2
    return (*sizes, layer.han_mode)


def _espnet_trial(layer: Any, randn: Callable[..., Tensor]) -> list[Any]:
    memory, name = randn(2, KEYS, layer.eprojs), type(layer).__name__
    weights = (~_ignored(memory)).to(memory.dtype)
    weights = weights / weights.sum(1, keepdim=True)
    state: Any = weights
    if "Cov" in name:
        state = [weights]
    elif name == "AttLocRec":
        state = weights, (randn(2, layer.att_dim), randn(2, layer.att_dim))
    elif hasattr(layer, "aheads"):
        state = [weights] * layer.aheads
    layer.reset()
    outputs: list[Any] = []
    for _ in range(2):
        context, state = layer(memory, list(LENGTHS), randn(2, layer.dunits), state)
        outputs += [context, list(state) if isinstance(state, list) else state]
    layer.reset()
    return outputs


def _speechbrain_arguments(layer: Any) -> tuple[Any, ...]:
    (hidden, encoder), (_, decoder) = _shape(layer.mlp_enc), _shape(layer.mlp_dec)
    sizes = encoder, decoder, hidden, _shape(layer.mlp_out)[0]
    if hasattr(layer, "conv_loc"):
        filters, _, width = _shape(layer.conv_loc)
        sizes += filters, width // 2  # type: ignore[assignment]
    return (*sizes, layer.scaling)


def _speechbrain_trial(layer: Any, randn: Callable[..., Tensor]) -> list[Any]:
    encoder, decoder, *_ = _speechbrain_arguments(layer)
    memory = randn(2, KEYS, encoder)
    lengths = torch.tensor(LENGTHS, device=memory.device, dtype=memory.dtype)
    layer.reset()
    outputs = [layer(memory, lengths, randn(2, decoder)) for _ in range(2)]
    layer.reset()
    return outputs


def _opennmt_arguments(layer: Any) -> tuple[Any, ...]:
    if layer.attn_type != "mlp" or layer.attn_func != "softmax":
        _refused(
            f"its attn_type is {layer.attn_type!r} and its attn_func {layer.attn_func!r}; 'mlp' "
            "with 'softmax' is additive attention"
        )
    return layer.dim, hasattr(layer, "linear_cover"), "mlp"


def _opennmt_trial(layer: Any, randn: Callable[..., Tensor]) -> list[Any]:
    memory = randn(2, KEYS, layer.dim)
    lengths = torch.tensor(LENGTHS, device=memory.device)
    outputs = [layer(randn(2, 3, layer.dim), memory, lengths)]
    outputs.append(layer(randn(2, layer.dim), memory, lengths))
    if hasattr(layer, "linear_cover"):
        outputs += [layer(randn(2, layer.dim), memory, lengths, randn(2, KEYS)), memory]
    return outputs


def _gnmt_arguments(layer: Any) -> tuple[Any, ...]:
    (units, query), (_, key) = _shape(layer.linear_q), _shape(layer.linear_k)
    return query, key, units, layer.normalize, layer.batch_first


def _gnmt_trial(layer: Any, randn: Callable[..., Tensor]) -> list[Any]:
    query, key, *_ = _gnmt_arguments(layer)
    memory = randn(2, KEYS, key) if layer.batch_first else randn(KEYS, 2, key)
    layer.set_mask(torch.tensor(LENGTHS, device=memory.device), memory)
    queries = randn(2, 3, query) if layer.batch_first else randn(3, 2, query)
    return [layer(queries, memory), layer(randn(2, query), memory)]


def _coqui_arguments(layer: Any) -> tuple[Any, ...]:
    (hidden, query), (_, embedding) = _shape(layer.query_layer), _shape(layer.inputs_layer)
    filters, width = 0, 1
    if layer.location_attention:
        filters, _, width = _shape(layer.location_layer.location_conv1d)
    return (
        query, embedding, hidden, layer.location_attention, filters, width, layer.windowing,
        layer.norm, layer.forward_attn, layer.trans_agent, layer.forward_attn_mask,
    )  # fmt: skip


def _coqui_trial(layer: Any, randn: Callable[..., Tensor]) -> list[Any]:
    query, embedding, *_ = _coqui_arguments(layer)
    memory = randn(2, KEYS, embedding)
    layer.init_states(memory)
    for name in ("attention_weights", "attention_weights_cum", "alpha", "u"):
        if hasattr(layer, name):  # in the default dtype, whatever that of the parameters is
            setattr(layer, name, getattr(layer, name).to(memory.dtype))
    key, mask, outputs = layer.preprocess_inputs(memory), ~_ignored(memory), []
    for _ in range(2):
        outputs += [layer(randn(2, query), memory, key, mask), layer.attention_weights]
    return outputs


KNOWN: dict[str, Known] = {
    "BahdanauAttention": Known(gnmt.BahdanauAttention, _gnmt_arguments, _gnmt_trial),
    "GlobalAttention": Known(opennmt.GlobalAttention, _opennmt_arguments, _opennmt_trial),
    "OriginalAttention": Known(coqui.OriginalAttention, _coqui_arguments, _coqui_trial),
}
_FAMILIES: tuple[tuple[Any, Any, tuple[type[nn.Module], ...]], ...] = (
    (_tacotron2_arguments, _tacotron2_trial, (tacotron2.Attention, tacotron2._Attention)),
    (
        _speechbrain_arguments, _speechbrain_trial,
        (speechbrain.ContentBasedAttention, speechbrain.LocationAwareAttention),
    ),
    (
        _espnet_arguments, _espnet_trial,
        (
            espnet.AttAdd, espnet.AttLoc, espnet.AttCov, espnet.AttCovLoc, espnet.AttLocRec,
            espnet_heads.AttMultiHeadAdd, espnet_heads.AttMultiHeadLoc,
        ),
    ),
)  # fmt: skip
for _arguments, _trial, _classes in _FAMILIES:
    KNOWN |= {x.__name__: Known(x, _arguments, _trial) for x in _classes}
