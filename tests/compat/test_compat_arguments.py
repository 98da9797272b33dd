"""The layers of other code bases accept the arguments of the originals. Where a call fails, a
sentence names an argument that does not fit."""

from __future__ import annotations

import functools
import inspect
import re

import pytest
import torch
from oracle import assert_sentence

from additive_attn.compat import coqui, espnet, espnet_heads, gnmt, opennmt, speechbrain, tacotron2

B, LK, D, H = 2, 5, 6, 4
X, Q, W = torch.randn(B, LK, D), torch.randn(B, D), torch.rand(B, LK)
LENGTHS, IGNORED = torch.tensor([5, 3]), torch.zeros(B, LK, dtype=torch.bool)
STATES = dict(enc_hs_pad=X, enc_hs_len=[5, 3], dec_z=Q)
ENCODED = dict(enc_states=X, enc_len=LENGTHS, dec_states=Q)
STEP = dict(
    attention_hidden_state=Q, memory=X, processed_memory=torch.randn(B, LK, H),
    attention_weights_cat=torch.rand(B, 2, LK), mask=IGNORED,
)  # fmt: skip


def gnmt_layer():
    layer = gnmt.BahdanauAttention(D, D, H, batch_first=True)
    layer.set_mask(LENGTHS, X)
    return layer


def coqui_layer():
    layer = coqui.OriginalAttention(
        D, D, H, True, 3, 3, windowing=False, norm="softmax", forward_attn=False,
        trans_agent=False, forward_attn_mask=False,
    )  # fmt: skip
    layer.init_states(X)
    return layer


CALLS = {
    "AttAdd": (lambda: espnet.AttAdd(D, D, H), STATES | dict(att_prev=None, scaling=2.0)),
    "AttLoc": (
        lambda: espnet.AttLoc(D, D, H, 3, 2), STATES | dict(att_prev=W, scaling=2.0),
    ),
    "AttCov": (lambda: espnet.AttCov(D, D, H), STATES | dict(att_prev_list=[W])),
    "AttCovLoc": (lambda: espnet.AttCovLoc(D, D, H, 3, 2), STATES | dict(att_prev_list=[W])),
    "AttLocRec": (lambda: espnet.AttLocRec(D, D, H, 3, 2), STATES | dict(att_prev_states=None)),
    "AttMultiHeadAdd": (
        lambda: espnet_heads.AttMultiHeadAdd(D, D, 2, H, H), STATES | dict(att_prev=None),
    ),
    "AttMultiHeadLoc": (
        lambda: espnet_heads.AttMultiHeadLoc(D, D, 2, H, H, 3, 2), STATES | dict(att_prev=[W, W]),
    ),
    "BahdanauAttention": (gnmt_layer, dict(query=torch.randn(B, 3, D), keys=X)),
    "BahdanauAttention step": (gnmt_layer, dict(query=Q, keys=X)),
    "GlobalAttention": (
        lambda: opennmt.GlobalAttention(D, attn_type="mlp"),
        dict(src=Q, enc_out=X, src_len=LENGTHS, coverage=None),
    ),
    "ContentBasedAttention": (lambda: speechbrain.ContentBasedAttention(D, D, H, D), ENCODED),
    "LocationAwareAttention": (
        lambda: speechbrain.LocationAwareAttention(D, D, H, D, 3, 2), ENCODED,
    ),
    "Attention": (lambda: tacotron2.Attention(D, D, H, 3, 3), STEP),
    "_Attention": (lambda: tacotron2._Attention(D, D, H, 3, 3), STEP),
    "OriginalAttention": (
        coqui_layer, dict(query=Q, inputs=X, processed_inputs=torch.randn(B, LK, H), mask=None),
    ),
}  # fmt: skip


def others(good):
    bad = [None, [1.5], "no", {}]
    if isinstance(good, torch.Tensor):
        bad += [good.to(torch.complex64), good[None, None], good.flatten()[0], good.to_sparse(),
                good.to("meta"), good.double(), good.long()]  # fmt: skip
    return bad


def refused(call, names):
    """Returns the error of a call, which must be a sentence with one of the names; "" if it
    succeeds."""
    try:
        call()
    except Exception as error:
        text = str(error)
        assert isinstance(error, (TypeError, ValueError, RuntimeError)), repr(error)
        assert set(names) & set(re.findall(r"\w+", text)), text
        assert_sentence(text)
        return text
    return ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    make, good = CALLS[name]
    make()(**good)
    failed = 0
    for argument, value in good.items():
        for bad in others(value):
            layer = make()
            failed += refused(functools.partial(layer, **good | {argument: bad}), good) != ""
    assert failed > 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in CALLS if hasattr(CALLS[name][0](), "reset")])
def test_other_sequences_without_reset(name):
    make, good = CALLS[name]
    layer, other = make(), dict(good)
    layer(**good)
    for n, x in good.items():
        if isinstance(x, torch.Tensor):
            other[n] = torch.cat([x, x[:1]])
        elif n == "enc_hs_len":
            other[n] = [*x, 4]
        elif isinstance(x, list):
            other[n] = [torch.cat([each, each[:1]]) for each in x]
    text = refused(functools.partial(layer, **other), good)
    assert re.search(r"\(3, 5, 6\), but holds .*\(2, 5\)\. Call reset", text), text
    layer.reset()
    layer(**other)


@pytest.mark.parametrize("argument,bad", [
    ("mask", IGNORED[:, 1:]), ("mask", IGNORED[:, :1]), ("mask", IGNORED.repeat(2, 1)),
    ("enc_hs_len", [LK + 1, 3]), ("enc_hs_len", [-1, 3]), ("enc_hs_len", [3]*3),
])  # fmt: skip
def test_masks_and_lengths_of_other_keys(argument, bad):
    """The originals raise for these masks and lengths, which would mask other keys here."""
    for name, (make, good) in CALLS.items():
        if argument in good and "Original" not in name:
            assert refused(functools.partial(make(), **good | {argument: bad}), good), name


@pytest.mark.parametrize("numbers", [[LK + 1, 3], [-1, 3]], ids=str)
def test_lengths_for_keys_on_another_device(numbers):
    """A list is checked before it is copied to a device. Here meta tensors replace a GPU's."""
    layer = espnet.AttAdd(D, D, H).to("meta")
    call = functools.partial(layer, X.to("meta"), numbers, Q.to("meta"), None)
    assert refused(call, ["lengths"])


@pytest.mark.parametrize(
    "cls",
    [espnet.AttAdd, espnet.AttLoc, espnet_heads.AttMultiHeadLoc, gnmt.BahdanauAttention,
     speechbrain.LocationAwareAttention, tacotron2.Attention, tacotron2._Attention,
     coqui.OriginalAttention],
)  # fmt: skip
def test_constructors(cls):
    parameters = list(inspect.signature(cls).parameters.values())
    given = {x.name: 3 for x in parameters if x.annotation == "int"}
    given |= {x.name: False for x in parameters if x.annotation == "bool"}
    given |= {"norm": "softmax"} if cls is coqui.OriginalAttention else {}
    for name in [x.name for x in parameters if x.annotation == "int"]:
        for bad in (None, [3], "3", 2.5):
            call = functools.partial(cls, **given | {name: bad})
            assert refused(call, [name]) or (cls is coqui.OriginalAttention and "location" in name)


def resized(good):
    """Yields tensors with one dim of another size, also without entries."""
    for dim in range(good.dim()):
        size = good.shape[dim]
        for other in {0, 1, size - 1, size + 1, 2 * size} - {size}:
            shape = [*good.shape[:dim], other, *good.shape[dim + 1 :]]
            yield torch.zeros(shape, dtype=good.dtype)


@pytest.mark.interpreter(name=["AttLoc", "AttCov", "BahdanauAttention", "Attention"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_sizes(name):
    """Tensors of another number of features, keys, location channels or sequences raise a sentence
    of the package, and no error of torch or the kernel."""
    make, good = CALLS[name]
    failed, raw = 0, ("mat1", "csrc", "unflatten", "size of tensor", "zip()", "Expected", "Given")
    for argument, value in good.items():
        if isinstance(value, torch.Tensor):
            bad = [*resized(value), value[None]]
        elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
            first, *rest = value
            bad = [[], value * 3, *([x, *rest] for x in resized(first)), first]
            bad += [[x, *rest] for x in (first.double(), first.to("meta"), first[0, 0])]
        else:
            bad = [[], [1], [5, 3, 2], [None, 3]] if isinstance(value, list) else []
        for x in bad:
            if name == "OriginalAttention" and argument == "inputs":
                continue  # init_states was called with other inputs
            call = functools.partial(make(), **good | {argument: x})
            text = refused(call, [*good, "mask", "keys", "key_padding_mask"])
            assert not any(word in text for word in raw), text
            failed += text != ""
    assert failed > 10


@pytest.mark.parametrize("name", [name for name in CALLS if name != "OriginalAttention"])
def test_shapes_alone_and_empty_batches(name):
    make, good = CALLS[name]

    def changed(x, how):
        if isinstance(x, list) and isinstance(x[0], torch.Tensor):
            return [how(each) for each in x]
        return how(x) if isinstance(x, torch.Tensor) else x

    layer = make()
    expected = layer(**good)[0].shape
    with torch.no_grad():
        if "Bahdanau" not in name:
            options = {n: changed(x, lambda x: x.to("meta")) for n, x in good.items()}
            assert make().to("meta")(**options)[0].shape == expected
            options = {n: changed(x, lambda x: x[:0]) for n, x in good.items()}
            if "enc_hs_len" in good:
                options["enc_hs_len"] = []
            assert make()(**options)[0].shape[0] == 0


@pytest.mark.parametrize(
    "cls",
    [espnet.AttAdd, espnet.AttLoc, espnet.AttCov, espnet.AttCovLoc, espnet.AttLocRec,
     espnet_heads.AttMultiHeadAdd, espnet_heads.AttMultiHeadLoc, gnmt.BahdanauAttention,
     speechbrain.ContentBasedAttention, speechbrain.LocationAwareAttention, tacotron2.Attention,
     tacotron2._Attention, tacotron2.LocationLayer, coqui.OriginalAttention, coqui.LocationLayer],
)  # fmt: skip
def test_constructors_of_no_size(cls):
    """Negative numbers of filters, channels and features raise, and zeros where there must be
    one."""
    parameters = list(inspect.signature(cls).parameters.values())
    given = {x.name: 3 for x in parameters if x.annotation == "int"}
    given |= {x.name: x.name == "location_attention" for x in parameters if x.annotation == "bool"}
    given |= {"norm": "softmax"} if cls is coqui.OriginalAttention else {}
    for name in [x.name for x in parameters if x.annotation == "int"]:
        for bad in (-1, -3, 0):
            call = functools.partial(cls, **given | {name: bad})
            assert refused(call, [name, "attention_kernel_size"]) or bad == 0, name


def test_sizes_follow_the_layer():
    """Copies and pickles have these sizes too, also of a layer of a subclass, and of one whose
    modules have changed."""
    import copy
    import pickle

    layer = espnet.AttLoc(D, D, H, 3, 2)
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(
            (ValueError, RuntimeError), match=rf"where eprojs is {D} in this layer"
        ):
            twin(torch.randn(B, LK, D + 1), [5, 3], Q, None)
