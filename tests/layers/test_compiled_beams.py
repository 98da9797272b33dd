"""Beams in graphs: the same choices, dropout and errors as without a graph."""

from __future__ import annotations

import pickle

import pytest
import torch
from oracle import DEVICE
from torch import nn

from additive_attn import (
    AdditiveAttention,
    CoverageAttention,
    LocationSensitiveAttention,
    MultiheadAdditiveAttention,
)

B, LK, D, BEAMS = 3, 7, 8, 2
LAYERS = {
    "content": lambda p: AdditiveAttention(D, D, dropout=p),
    "normalized": lambda p: AdditiveAttention(D, D, dropout=p, normalize=True),
    "location": lambda p: LocationSensitiveAttention(D, D, D, dropout=p, kernel_size=5),
    "coverage": lambda p: CoverageAttention(D, D, D, dropout=p),
    "heads": lambda p: MultiheadAdditiveAttention(D, 2, p, batch_first=True),
    "large heads": lambda p: MultiheadAdditiveAttention(D, 2, p, hidden_dim=64, batch_first=True),
}
GRAPHS = {("content", 3), ("location", "beams"), ("heads", 2)}
LENGTHS, MASK = torch.tensor([7, 3, 2]), torch.arange(LK) >= torch.tensor([[7], [3], [2]])
MASKS = pytest.mark.parametrize("masking", [{"lengths": LENGTHS}, {"key_padding_mask": MASK}])


@pytest.fixture(autouse=True, scope="module")
def dynamo():
    yield
    torch._dynamo.reset()


def stepped(layer, query, memory, **options):
    if hasattr(layer, "initial_state"):
        return layer.step(query, memory, layer.initial_state(memory))[:2]
    return layer.step(query, memory, **options)


def compiled(function, backend="eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


@MASKS
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [0, 2, 3, 17, "beams"])
def test_a_step_drops_the_same_weights_on_every_way(name, rows, masking):
    """The ways are keys prepared with and without gradients, an ordinary call, and a graph."""
    layer, key = LAYERS[name](0.4), torch.randn(B, LK, D)
    if rows not in (0, "beams") and hasattr(layer, "initial_state"):
        pytest.skip("a state is of one query")
    shape = {0: (B, D), "beams": (B * BEAMS, D)}.get(rows, (B, rows, D))
    query, found = torch.randn(shape), {}
    options = [{}]
    if "heads" in name:
        options = [{}, {"need_weights": False}]

    def projected(changed=lambda memory: memory):
        memory = changed(layer.project(key, **masking))
        return memory.expand(BEAMS) if rows == "beams" else memory

    def run(memory, **option):
        torch.manual_seed(5)
        return stepped(layer, query, memory, **option)[0]

    for n, option in enumerate(options):
        found["gradients", n] = run(projected(), **option)
        with torch.no_grad():
            found["none", n] = run(projected(), **option)
        found["replaced", n] = run(projected(lambda x: x._replace(key=x.key)), **option)
        found["pickled", n] = run(pickle.loads(pickle.dumps(projected())), **option)
        if (name, rows) in GRAPHS and "lengths" in masking and n == 0:
            torch.manual_seed(5)
            found["graph"] = compiled(lambda: stepped(layer, query, projected())[0])()
    first = found["gradients", 0]
    for way, out in found.items():
        torch.testing.assert_close(out, first, msg=lambda text, way=way: f"{way}: {text}")
    layer.eval()
    assert not torch.allclose(run(projected()), first)


def decoded(layer, key, query, index, masking):
    memory, results = layer.project(key, **masking).expand(BEAMS), []
    state = layer.initial_state(memory) if hasattr(layer, "initial_state") else None
    for _ in range(2):
        given = (query, memory) if state is None else (query, memory, state)
        context, weights, *rest = layer.step(*given)
        memory = memory.reorder(index)
        state = rest[0].reorder(index) if rest else None
        query = query[index] + context[index]
        results += [context, weights]
    return results


@pytest.mark.parametrize(
    "name,backend", [("content", "aot_eager"), ("location", "eager"), ("heads", "eager")]
)
def test_reorder_in_a_graph(name, backend):
    """One graph accepts every valid index, and raises when it runs with another."""
    layer, key, query = LAYERS[name](0.0), torch.randn(B, LK, D), torch.randn(B * BEAMS, D)
    masking = {"key_padding_mask": MASK} if name == "heads" else {"lengths": LENGTHS}
    graph = compiled(lambda index: decoded(layer, key, query, index, masking), backend)
    for index in ([1, 0, 2, 3, 5, 5], [2, 3, 0, 1, 5, 5], [0, 1, 2, 3, 4, 5]):
        index = torch.tensor(index)
        torch.testing.assert_close(graph(index), decoded(layer, key, query, index, masking))
    for index, sentence in {
        (0, 2, 2, 3, 5, 5): "different sequences side by side",
        (0, 1, 2, 3, 4, 6): "index holds numbers of queries",
        (0, 1, 2, 3, -1, -1): "index holds numbers of queries",
    }.items():
        if DEVICE == "cpu":  # a failed assertion on a GPU ends its use in the process
            with pytest.raises(RuntimeError, match=sentence):
                graph(torch.tensor(index))
        with pytest.raises(ValueError):
            decoded(layer, key, query, torch.tensor(index), masking)
    with pytest.raises(Exception, match="an index for every beam"):
        compiled(lambda index: layer.project(key).expand(2).reorder(index))(torch.zeros(3).long())


def test_reorder_of_one_sequence_in_a_graph():
    layer, key = LAYERS["content"](0.0), torch.randn(LK, D)
    for memory in (layer.project(key), layer.project(key[None])):
        expanded = memory.expand(3)
        graph = compiled(lambda index, memory=expanded: memory.reorder(index).key)
        torch.testing.assert_close(graph(torch.tensor([2, 0, 0])), memory.key)
        if DEVICE == "cpu":
            with pytest.raises(RuntimeError, match="index holds"):
                graph(torch.tensor([2, 0, 3]))
    with pytest.raises(Exception, match="expand it"):
        compiled(lambda index: layer.project(key).reorder(index))(torch.tensor([0, 0]))


@pytest.mark.parametrize("beams", [2, 70])
def test_a_graph_returns_a_memory_of_its_beams(beams):
    layer, key = LAYERS["content"](0.0), torch.randn(B, LK, D)
    graph = torch.compile(
        lambda key, n: layer.project(key).expand(n), fullgraph=True, backend="eager"
    )
    for number in (beams, beams + 1):
        memory = graph(key, number)
        assert memory.beams == number and memory.reorder(torch.arange(B * number)).beams == number


@pytest.mark.parametrize("on", ["meta", "fake"])
def test_reorder_without_values(on):
    """The shapes of a beam search need no values."""
    with torch.device("meta") if on == "meta" else torch._subclasses.FakeTensorMode():
        layer = AdditiveAttention(D, D)
        memory = layer.project(torch.empty(B, LK, D)).expand(BEAMS)
        index = torch.zeros(2 * BEAMS, dtype=torch.long)
        assert memory.reorder(index).key.shape == (2, LK, D)


def test_many_sizes_make_few_graphs():
    """Numbers of beams and sequences vary, under dropout too."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYERS["content"](0.4)

        def forward(self, key, query, like):
            memory = self.layer.project(key).expand(like.shape[0])
            return self.layer.step(query.repeat_interleave(like.shape[0], 0), memory)[0]

    model, made = Model(), []

    def backend(graph, _):
        made.append(graph)
        return graph

    graph = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch, beams in ((3, 4), (2, 2), (5, 3), (4, 16), (2, 20)):
        given = torch.randn(batch, LK, D), torch.randn(batch, D), torch.empty(beams)
        results = []
        for call in (graph, model):
            torch.manual_seed(1)
            results.append(call(*given))
        torch.testing.assert_close(*results)
    assert len(made) == 2  # up to 16 queries per sequence, and more
