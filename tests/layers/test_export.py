"""Decoders in torch.export, with any number of sequences and keys: no size becomes a constant."""

from __future__ import annotations

import io

import fresh
import pytest
import torch
from torch import nn

from additive_attn import (
    AdditiveAttention,
    CoverageAttention,
    LocationSensitiveAttention,
    MultiheadAdditiveAttention,
)
from additive_attn.compat import espnet, tacotron2

D = 8
LAYERS = {
    "content": lambda: AdditiveAttention(D, D),
    "location": lambda: LocationSensitiveAttention(D, D, D, kernel_size=5, initial="uniform"),
    "coverage": lambda: CoverageAttention(D, D, D),
    "heads": lambda: MultiheadAdditiveAttention(D, 2, batch_first=True),
}


class Decoder(nn.Module):
    def __init__(self, layer, masking, beams):
        super().__init__()
        self.layer, self.masking, self.beams = layer, masking, beams

    def forward(self, keys, mask):
        return self.decoded(keys, mask, self.beams)

    def decoded(self, keys, mask, beams):
        layer, query = self.layer, keys[:, 0].repeat_interleave(beams, 0)
        memory = layer.project(keys, keys, **{self.masking: mask}).expand(beams)
        state = layer.initial_state(memory) if hasattr(layer, "initial_state") else None
        results = []
        for _ in range(2):
            if state is None:
                context, weights = layer.step(query, memory)
            else:
                context, weights, state = layer.step(query, memory, state)
            query = query + context
            results += [context, weights]
        return results


def given(masking, batch, keys):
    lengths = torch.arange(batch) % keys + 1
    mask = lengths if masking == "lengths" else torch.arange(keys) >= lengths[:, None]
    return torch.randn(batch, keys, D), mask


@pytest.mark.parametrize("masking,beams", [("lengths", 1), ("key_padding_mask", 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_any_number_of_sequences_and_keys(name, masking, beams):
    model = Decoder(LAYERS[name](), masking, beams).eval()
    batch, keys = torch.export.Dim("batch", min=1), torch.export.Dim("keys", min=1, max=512)
    shapes = {0: batch, 1: keys}, {0: batch} if masking == "lengths" else {0: batch, 1: keys}
    program = torch.export.export(model, given(masking, 3, 7), dynamic_shapes=shapes).module()
    for sizes in ((3, 7), (4, 9), (1, 2)):
        inputs = given(masking, *sizes)
        torch.testing.assert_close(program(*inputs), model(*inputs))


class Beginning(Decoder):
    """Returns the first memory and state of a decoder, or continues from them."""

    def forward(self, keys, mask, memory=None, state=None):
        if memory is None:
            memory = self.layer.project(keys, keys, **{self.masking: mask}).expand(self.beams)
            has_state = hasattr(self.layer, "initial_state")
            return memory, self.layer.initial_state(memory) if has_state else None
        query = keys[:, 0].repeat_interleave(self.beams, 0)
        return self.layer.step(query, memory, *([] if state is None else [state]))


def saved(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("masking,beams", [("lengths", 1), ("key_padding_mask", 3)])
@pytest.mark.parametrize("name", ["location", "heads"])
def test_memories_and_states_go_through_saved_programs(name, masking, beams, strict):
    model, inputs = Beginning(LAYERS[name](), masking, beams).eval(), given(masking, 3, 7)
    began = model(*inputs)
    first = saved(torch.export.export(model, inputs, strict=strict))(*inputs)
    assert [type(x) for x in first] == [type(x) for x in began]
    assert first[0].beams == beams
    torch.testing.assert_close(first, began, check_device=False)
    second = saved(torch.export.export(model, (*inputs, *began), strict=strict))
    torch.testing.assert_close(second(*inputs, *first), model(*inputs, *began))
    other = model.layer.project(*given(masking, 3, 7)[:1] * 2).expand(beams + 1)
    with pytest.raises(ValueError):
        second(*inputs, other, began[1])


def test_another_process_loads_programs_of_many_beams(tmp_path):
    model = Beginning(LAYERS["content"](), "lengths", 64).eval()
    inputs = given("lengths", 2, 5)
    torch.export.save(torch.export.export(model, inputs), tmp_path / "program.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""import additive_attn, torch
program = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
print(program(*torch.load({str(tmp_path / "inputs.pt")!r}))[0].beams)"""
    done = fresh.python(code)
    assert done.returncode == 0 and done.stdout.strip() == "64", done.stderr


class AnyBeams(Decoder):
    def forward(self, keys, mask, like):
        return self.decoded(keys, mask, like.shape[0])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name,masking", [("location", "key_padding_mask")])
def test_any_number_of_beams(name, masking, strict):
    model = AnyBeams(LAYERS[name](), masking, 1).eval()
    batch, beams = torch.export.Dim("batch", min=2), torch.export.Dim("beams", min=2)
    shapes = {0: batch}, {0: batch}, {0: beams}
    inputs = (*given(masking, 3, 7), torch.empty(4))
    program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict).module()
    for number, beams in ((3, 4), (4, 2), (2, 20)):
        inputs = (*given(masking, number, 7), torch.empty(beams))
        torch.testing.assert_close(program(*inputs), model(*inputs))


@pytest.mark.parametrize("strict", [False, True])
def test_a_memory_of_any_number_of_beams_is_not_taken_for_one(strict):
    """A memory that a program returns has no number of beams, since the graph does not contain
    it."""

    class Model(Beginning):
        def forward(self, keys, like):
            return self.layer.project(keys).expand(like.shape[0])

    model = Model(LAYERS["content"](), "lengths", 1)
    shapes = {}, {0: torch.export.Dim("beams", min=2)}
    inputs = torch.randn(2, 5, D), torch.empty(3)
    memory = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict).module()(
        *inputs
    )
    for use in (
        lambda: memory.beams, lambda: model.layer.step(torch.randn(2, D), memory),
        lambda: memory.expand(3), lambda: memory._replace(key=memory.key),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expand it outside"):
            use()


def test_memories_and_states_load_without_code():
    """torch.load accepts them with weights_only=True, its default."""
    layer, (keys, lengths) = LAYERS["location"](), given("lengths", 2, 5)
    memory = layer.project(keys, lengths=lengths).expand(3)
    file = io.BytesIO()
    torch.save((memory, layer.initial_state(memory)), file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded[0].beams == 3
    query = torch.randn(6, D)
    torch.testing.assert_close(layer.step(query, *loaded)[:2],
                               layer.step(query, memory, loaded[1])[:2])  # fmt: skip


class Reads(nn.Module):
    """Calls that read the values of ``given`` when they run."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        make = {"padding": lambda: tacotron2.Attention(D, D, D, 3, 3),
                "reorder": LAYERS["content"], "hint": LAYERS["heads"]}  # fmt: skip
        self.kind, self.layer = kind, make[kind]()

    def forward(self, x, given):
        if self.kind == "padding":
            key, last = self.layer.memory_layer(x), x.new_zeros(2, 2, 5)
            return self.layer(x[:, 0], x, key, last, given)[1]
        if self.kind == "reorder":
            return self.layer.step(x[:, 0], self.layer.project(x).reorder(given))[1]
        return self.layer(x, x, x, attn_mask=given, is_causal=True)[1]


LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.arange(5) >= torch.tensor([[5], [3]])


@pytest.mark.parametrize(
    "kind,given,other",
    [
        ("padding", PADDING, PADDING.flip(1)),
        ("reorder", torch.tensor([0, 1]), torch.tensor([1, 0])),
        ("hint", LATER, LATER.mT.contiguous()),
    ],
)
def test_a_trace_computes_with_other_values_than_it_was_made_with(kind, given, other):
    model, x = Reads(kind), torch.randn(2, 5, D)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x, given))
    for each in (given, other):
        torch.testing.assert_close(traced(x, each), model(x, each))


def test_other_code_bases_layers_trace_into_graphs_of_aten():
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = espnet.AttLoc(D, D, D, 2, 3)

    def steps(x):
        layer.reset()
        return layer(x, [5, 3], x[:, 0], None)[0]

    x = torch.randn(2, 5, D)
    torch.testing.assert_close(make_fx(steps)(x)(x), steps(x))
