"""Promise 10, for every argument of every public callable: a bad one raises a sentence that names
it, and those that are accepted are listed here."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_sentence, make

from additive_attn import (
    AdditiveAttention,
    AttentionState,
    CoverageAttention,
    LocationSensitiveAttention,
    MultiheadAdditiveAttention,
    ProjectedMemory,
    additive_attention,
    additive_attention_step,
    additive_scores,
    coverage_loss,
    merge_attention,
    plot_attention,
    varlen_additive_attention,
)
from additive_attn.compat import replace_attention

B, LQ, LK, D, H = 2, 3, 5, 8, 4


def others(good: Any) -> dict[str, Any]:
    """Returns other arguments that a caller may pass by mistake instead of ``good``."""
    bad = {"None": None, "list": [1.5], "text": "no", "number": 2.5, "dict": {}}
    if isinstance(good, list) and isinstance(good[0], torch.Tensor):
        # Replaces one tensor of the list, and all.
        for kind, each in others(good[0]).items():
            bad |= {f"one {kind}": [*good[:-1], each], f"all {kind}": [each] * len(good)}
    elif isinstance(good, torch.Tensor):
        bad |= {
            "complex": torch.zeros(good.shape, dtype=torch.complex64),
            "floats" if good.dtype in (torch.bool, torch.int64) else "integers": torch.ones(
                good.shape, dtype=torch.int64 if good.is_floating_point() else torch.float32
            ),
            "number as tensor": torch.zeros((), dtype=good.dtype),
            "quantized": torch.quantize_per_tensor(torch.ones(good.shape), 0.1, 0, torch.qint8),
            "empty": good.new_empty(0),
            "more dims": good[None, None],
            "sparse": good.to_sparse(),
            "nested": torch.nested.nested_tensor(list(good)),
            "nested, more dims": torch.nested.nested_tensor([good, good]),
            "jagged": torch.nested.nested_tensor([good, good], layout=torch.jagged),
            "meta": good.to("meta"),
        }
        if good.is_floating_point():
            bad["double"] = good.double()
    else:
        bad |= {"tensor": torch.zeros(2, 3), "integer": -7}
    return bad


def layer_of(cls: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = (D, H) if cls is AdditiveAttention else (D, D, H)
    return cls(*sizes, **options)


TENSORS = make((B,), LQ, LK, D, 6)
LENGTHS, PADDING = torch.tensor([5, 2]), torch.zeros(B, LK, dtype=torch.bool)
MASKS = dict(lengths=LENGTHS, key_padding_mask=PADDING, starts=torch.tensor([0, 1]))
CALL = dict(
    **TENSORS, **MASKS, attn_mask=torch.ones(LQ, LK, dtype=torch.bool), is_causal=False,
    window=(3, 3), dropout_p=0.0, scale=1.0, need_weights=True, need_lse=False,
    bias=torch.zeros(1), key_weight=torch.randn(D, D),
)  # fmt: skip
STEP = {k: x for k, x in CALL.items() if k not in ("is_causal", "window")} | dict(
    query=TENSORS["query"][:, 0], attn_mask=torch.ones(B, LK, dtype=torch.bool)
)
SCORES = {
    k: x
    for k, x in CALL.items()
    if k not in ("value", "need_weights", "need_lse", "dropout_p", "key_weight")
}
PACKED = dict(
    query=torch.randn(6, D), key=torch.randn(9, D), value=torch.randn(9, 6), weight=torch.randn(D),
    cu_seq_q=torch.tensor([0, 2, 6]), cu_seq_k=torch.tensor([0, 5, 9]), max_q=4, max_k=5,
    is_causal=False, window=(3, 3), scale=1.0, dropout_p=0.0, need_lse=False,
)  # fmt: skip
INIT = dict(hidden_dim=H, dropout=0.0, bias=True, scale=1.0, batch_first=True, device="cpu",
            dtype=torch.float32)  # fmt: skip
X, Q = torch.randn(B, LK, D), torch.randn(B, D)


def stepped(cls: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns a step that has the fields of its memory and state as arguments."""
    heads = cls is MultiheadAdditiveAttention
    layer = cls(D, 2, batch_first=True) if heads else layer_of(cls)
    memory = layer.project(X, lengths=LENGTHS, key_padding_mask=PADDING)
    fields = memory._asdict() | {"query": Q}
    if heads or cls is AdditiveAttention:

        def step(query, **fields):
            return layer.step(query, memory._replace(**fields))

        return step, fields
    state = layer.initial_state(memory)

    def located(query, previous, cumulative, **fields):
        changed = any(fields[name] is not x for name, x in memory._asdict().items())
        mine = memory._replace(**fields) if changed else memory
        return layer.step(query, mine, AttentionState(previous, cumulative))

    return located, fields | state._asdict()


def first_state(**fields: Any) -> Any:
    return layer_of(CoverageAttention).initial_state(ProjectedMemory(**fields))


def plotted(**options: Any) -> Any:
    plt = pytest.importorskip("matplotlib.pyplot")
    try:
        return plot_attention(**options)
    finally:
        plt.close("all")


@functools.cache
def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    layer = layer_of(AdditiveAttention)
    located, covered = layer_of(LocationSensitiveAttention), layer_of(CoverageAttention)
    heads = MultiheadAdditiveAttention(D, 2, batch_first=True)
    memory = located.project(X)
    state = located.initial_state(memory)
    index = torch.tensor([1, 0])
    forward = dict(
        query=torch.randn(B, LQ, D), key=X, value=X, need_weights=True, is_causal=False,
        attn_mask=torch.ones(LQ, LK, dtype=torch.bool), window=(1, 1), **MASKS,
    )  # fmt: skip
    project = dict(key=X, value=X, lengths=LENGTHS, key_padding_mask=PADDING, dtype=torch.float32)
    sizes = dict(query_dim=D, key_dim=D)
    return {
        "additive_attention": (additive_attention, CALL),
        "additive_attention_step": (additive_attention_step, STEP),
        "additive_scores": (additive_scores, SCORES),
        "merge_attention": (
            merge_attention,
            dict(outs=[torch.randn(2, 3)] * 2, lses=[torch.randn(2)] * 2),
        ),
        "varlen_additive_attention": (varlen_additive_attention, PACKED),
        "coverage_loss": (coverage_loss, dict(weights=X[..., 0], coverage=X[..., 0])),
        "AdditiveAttention": (
            AdditiveAttention, dict(input_dim=D, **sizes, normalize=False, **INIT),
        ),
        "AdditiveAttention.forward": (layer.forward, forward),
        "AdditiveAttention.project": (layer.project, project),
        "AdditiveAttention.step": (
            layer.step, dict(query=Q, memory=layer.project(X), need_weights=True),
        ),
        "LocationSensitiveAttention": (
            LocationSensitiveAttention,
            dict(**sizes, filters=3, kernel_size=3, inputs=("previous",), initial="zeros", **INIT),
        ),
        "LocationSensitiveAttention.project": (located.project, project),
        "LocationSensitiveAttention.step": (
            located.step, dict(query=Q, memory=memory, state=state),
        ),
        "LocationSensitiveAttention.forward": (
            located.forward, dict(query=Q, memory=memory, state=state),
        ),
        "LocationSensitiveAttention.initial_state": (located.initial_state, dict(memory=memory)),
        "CoverageAttention": (CoverageAttention, dict(**sizes, initial="zeros", **INIT)),
        "CoverageAttention.step": (
            covered.step, dict(query=Q, memory=covered.project(X), state=state),
        ),
        "ProjectedMemory.expand": (memory.expand, dict(beams=2)),
        "ProjectedMemory.reorder": (memory.reorder, dict(index=index)),
        "AttentionState.reorder": (state.reorder, dict(index=index)),
        "fields of a memory": stepped(AdditiveAttention),
        "fields with location": stepped(LocationSensitiveAttention),
        "fields with coverage": stepped(CoverageAttention),
        "Multihead fields": stepped(MultiheadAdditiveAttention),
        "fields at first": (
            first_state,
            {k: x for k, x in stepped(CoverageAttention)[1].items()
             if k in ("key", "value", "lengths", "attn_mask")},
        ),
        "MultiheadAdditiveAttention": (
            MultiheadAdditiveAttention,
            dict(embed_dim=D, num_heads=2, dropout=0.0, bias=True, add_bias_kv=False,
                 add_zero_attn=False, kdim=D, vdim=D, batch_first=True, device="cpu",
                 dtype=torch.float32, hidden_dim=D),
        ),
        "MultiheadAdditiveAttention.forward": (
            heads.forward,
            dict(query=X, key=X, value=X, key_padding_mask=PADDING, need_weights=True,
                 attn_mask=torch.zeros(LK, LK, dtype=torch.bool), average_attn_weights=True,
                 is_causal=False),
        ),
        "MultiheadAdditiveAttention.project": (heads.project, project),
        "MultiheadAdditiveAttention.step": (
            heads.step, dict(query=Q, memory=heads.project(X), need_weights=True),
        ),
        "plot_attention": (plotted, dict(
            weights=torch.rand(B, 2, LQ, LK), source_tokens=list("abcde"),
            target_tokens=list("abc"), ax=None, source_length=4, target_length=2, batch=0, head=1,
            style="matrix", cmap="viridis", vmin=0.0, vmax=1.0, colorbar=False, max_ticks=5,
            title="a",
        )),
        "replace_attention": (replace_attention, dict(model=torch.nn.Linear(2, 2))),
    }  # fmt: skip


# Arguments that may be left out; and those that are accepted beside the usual ones.
OPTIONAL = {
    "query", "value", "lengths", "key_padding_mask", "starts", "attn_mask", "window", "bias",
    "device", "dtype", "input_dim", "query_dim", "key_dim", "source_tokens", "target_tokens",
    "key_weight", "kdim", "vdim", "ax", "source_length", "target_length", "vmax", "title",
}  # fmt: skip
TAKEN = {
    ("scale", "number"), ("scale", "integer"), ("vmin", "number"), ("vmin", "integer"),
    ("vmax", "number"), ("vmax", "integer"),
    ("attn_mask", "floats"), ("attn_mask", "number as tensor"),  # they broadcast to all pairs
    ("bias", "number as tensor"), ("bias", "double"),
    ("title", "text"), ("target_tokens", "text"),  # two letters for two rows
    ("cmap", "None"),  # matplotlib's default
    ("weights", "more dims"), ("weights", "integers"), ("weights", "double"),  # of plots
    ("query", "sparse"),  # a Linear accepts it
    ("index", "empty"),  # no beam is kept
}  # fmt: skip


HEADS = {
    ("hidden_dim", "None"), ("key_padding_mask", "floats"),
    # Fields of a memory with as many numbers.
    ("lengths", "number as tensor"), ("lengths", "more dims"), ("attn_mask", "more dims"),
}  # fmt: skip


def outcome(call: Callable[..., Any], arguments: dict[str, Any], name: str, kind: str) -> str:
    """Returns "went well", "refused", or the error if it is no sentence about the arguments."""
    try:
        call(**arguments)
    except Exception as error:
        text = str(error)
        words = set(re.findall(r"\w+", text))
        names, kind = (
            {name, name.removesuffix("s")},
            kind.removeprefix("one ").removeprefix("all "),
        )
        if kind in ("None", "more dims", "number as tensor", "tensor", "double", "empty") or (
            kind.startswith(("nested", "jagged")) and "nested tensors" in text
        ):
            # Then other arguments do not fit this one. For memories and states the sentence names
            # those.
            names |= {*arguments, "keys", "values", "state", "out", "lse"}
        if isinstance(error, (TypeError, ValueError, RuntimeError)) and names & words:
            with contextlib.suppress(AssertionError):
                assert_sentence(text.rstrip(")"))
                return "refused"
        return f"{type(error).__name__}: {text}"
    return "went well"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", calls())
def test_every_argument(name):
    call, good = calls()[name]
    assert outcome(call, good, "", "") == "went well"
    wrong = []
    for argument, value in good.items():
        for kind, bad in others(value).items():
            found = outcome(call, good | {argument: bad}, argument, kind)
            taken = (argument, kind) in TAKEN or (kind == "None" and argument in OPTIONAL)
            if name.startswith("Multihead"):  # floats may mask its keys
                taken |= (argument, kind) in HEADS
            if found != "refused" and not (taken and found == "went well"):
                wrong.append(f"{argument}={kind}: {found}")
    assert not wrong, "\n".join(wrong)
