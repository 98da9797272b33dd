"""replace_attention: the modules that it swaps, and those that it leaves, with the reason."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType

import loops
import pytest
import test_coqui
import test_espnet
import test_espnet_heads
import test_opennmt
import test_speechbrain
import test_tacotron2
import torch
from loops import SIZES
from torch import nn

from additive_attn.compat import gnmt, replace_attention, tacotron2


class Attention(nn.Module):
    """NVIDIA's layer, written from its formula."""

    def __init__(self):
        super().__init__()
        ours = test_tacotron2.make(tacotron2.Attention)
        self._modules.update(ours._modules)

    def forward(
        self, attention_hidden_state, memory, processed_memory, attention_weights_cat, mask
    ):
        plain = test_tacotron2.Plain(self)
        return plain(attention_hidden_state, memory, processed_memory, attention_weights_cat, mask)


class Decoder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, given):
        return test_tacotron2.decode(self.attention, given)


def test_a_swap_keeps_all_but_the_computation():
    model = Decoder(Attention()).double()
    attention, calls = model.attention, []
    attention.register_forward_hook(lambda *a: calls.append(1))
    attention.eval()
    parameters = list(model.parameters())
    expected = loops.run(model.eval(), lambda x, given: x(given), loops.inputs())
    before = len(calls)
    swaps = replace_attention(model)
    assert [(x.name, x.swapped, x.reason) for x in swaps] == [("attention", True, "")]
    assert "swapped" in str(swaps[0]) and len(calls) == before
    assert model.attention is attention and not attention.training
    assert isinstance(attention, Attention) and isinstance(attention, tacotron2.Attention)
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
    found = loops.run(model, lambda x, given: x(given), loops.inputs())
    torch.testing.assert_close(found, expected)
    assert attention._leases is not None and len(calls) == 2 * before
    assert not replace_attention(model)[0].swapped  # "of this package already"


def test_a_swapped_model_copies_and_pickles():
    model = Decoder(Attention()).double()
    replace_attention(model)
    expected = model(loops.inputs())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.attention, tacotron2.Attention)
        assert isinstance(copied.attention, Attention)
        torch.testing.assert_close(copied(loops.inputs()), expected)


class Derived(Attention):
    pass


class Doubled(Attention):
    __qualname__ = __name__ = "Attention"

    def forward(
        self, attention_hidden_state, memory, processed_memory, attention_weights_cat, mask
    ):
        out, weights = super().forward(
            attention_hidden_state, memory, processed_memory, attention_weights_cat, mask
        )
        return 2 * out, weights


Doubled.__name__ = "Attention"


def other_signature():
    class Attention(nn.Module):
        def forward(self, query, key):
            return query

    return Attention()


def parametrized():
    layer = Attention()
    nn.utils.parametrizations.weight_norm(layer.v.linear_layer)
    return layer


def on_meta():
    return Attention().to("meta")


def with_own_forward():
    layer = Attention()
    layer.forward = layer.forward
    return layer


def with_more_parameters():
    layer = Attention()
    layer.adapter = nn.Linear(2, 2)
    return layer


LEFT = {
    "derived": (Derived, "derived from Attention"),
    "doubled": (Doubled, "trial did not give the same"),
    "signature": (other_signature, "forward takes (self, query, key)"),
    "parametrized": (parametrized, "parameters differ from ours: v.linear_layer"),
    "meta": (on_meta, "no values yet"),
    "forward": (with_own_forward, "forward has been replaced"),
    "more": (with_more_parameters, "adapter.bias"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left(case):
    make, reason = LEFT[case]
    layer = make()
    cls = type(layer)
    (swap,) = replace_attention(layer)
    assert not swap.swapped and reason in swap.reason, swap.reason
    assert type(layer) is cls and "left" in str(swap)


class BahdanauAttention(nn.Module):
    """GNMT's layer, written from its formula."""

    def __init__(self):
        super().__init__()
        layer = gnmt.BahdanauAttention(5, 6, 8)
        self._modules.update(layer._modules)
        self._parameters.update(layer._parameters)
        self.normalize = self.batch_first = False
        self.normalize_scalar = self.normalize_bias = None
        self.mask = None

    set_mask = gnmt.BahdanauAttention.set_mask

    def forward(self, query, keys):
        keys = keys.transpose(0, 1)
        q = self.linear_q(query[:, None] if query.dim() == 2 else query.transpose(0, 1))
        context, weights = loops.plain(
            q, self.linear_k(keys)[:, None], keys[:, None], self.linear_att, self.mask[:, None]
        )
        if query.dim() == 2:
            return context[:, 0], weights[:, 0]
        return context.transpose(0, 1), weights.transpose(0, 1)


def test_gnmt():
    layer = BahdanauAttention()
    (swap,) = replace_attention(layer)
    assert swap.swapped, swap.reason
    assert isinstance(layer, gnmt.BahdanauAttention) and isinstance(layer, BahdanauAttention)


def test_no_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        replace_attention([])
    assert replace_attention(nn.Linear(2, 2)) == []


def sources(package: str, file: str) -> ModuleType:
    return loops.project(package, file)


def espnet(tests):
    module = sources("espnet", "nets/pytorch_backend/rnn/attentions.py")
    return [(getattr(module, name)(*tests.DIMS, *tests.CASES[name]), tests.decode)
            for name in tests.CASES]  # fmt: skip


def speechbrain():
    module, tests = sources("speechbrain", "nnet/attention.py"), test_speechbrain
    return [(getattr(module, name)(*tests.DIMS, *tests.CASES[name]), tests.decode)
            for name in tests.CASES]  # fmt: skip


def torchaudio():
    layer = sources("torchaudio", "models/tacotron2.py")._Attention(
        SIZES.query, SIZES.memory, SIZES.hidden, 4, 5
    )
    return [(layer, lambda x, given: test_tacotron2.decode(x, given, loops.padding()))]


def onmt():
    module = sources("onmt", "modules/global_attention.py")
    return [(module.GlobalAttention(6, cover, "mlp"), test_opennmt.decode)
            for cover in (False, True)]  # fmt: skip


def coqui():
    module = sources("TTS", "tts/layers/tacotron/attentions.py")
    return [(test_coqui.make(module.OriginalAttention, **options), test_coqui.decode)
            for options in (*test_coqui.CASES, *test_coqui.INFERENCE)]  # fmt: skip


PROJECTS = {
    "espnet": lambda: espnet(test_espnet), "heads": lambda: espnet(test_espnet_heads),
    "speechbrain": speechbrain, "torchaudio": torchaudio, "onmt": onmt, "coqui": coqui,
}  # fmt: skip


@pytest.mark.parametrize("project", PROJECTS)
def test_layers_of_projects(project):
    sizes = test_opennmt.SQUARE if project == "onmt" else SIZES
    given = loops.inputs(sizes, torch.float32)
    for layer, decode in PROJECTS[project]():
        with torch.no_grad():
            expected = decode(copy.deepcopy(layer), given)
            (swap,) = replace_attention(layer)
            assert swap.swapped, swap.reason
            torch.testing.assert_close(decode(layer, given), expected, atol=1e-5, rtol=1e-4)


def test_options_that_are_not_additive():
    module = sources("onmt", "modules/global_attention.py")
    for options, reason in (
        ({"attn_type": "dot"}, "'dot'"),
        ({"attn_type": "mlp", "attn_func": "sparsemax"}, "'sparsemax'"),
    ):
        (swap,) = replace_attention(module.GlobalAttention(6, **options))
        assert not swap.swapped and reason in swap.reason
