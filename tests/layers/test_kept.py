"""A memory keeps the caller's values, and copies of the other tensors. A step computes with the
memory's tensors as they are when it runs, after any kind of write to them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from decoders import LK, B, D, H, K, build
from oracle import DEVICE, assert_sentence

from additive_attn import AdditiveAttention, MultiheadAdditiveAttention

F64 = torch.float64
KINDS = pytest.mark.parametrize("kind", ["content", "tacotron", "pointer", "heads"])
MODES = pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__
)


def made(kind, **options):
    options = {"dtype": F64} | options
    if kind == "content":
        return AdditiveAttention(D, H, key_dim=K, **options)
    if kind == "heads":
        options = {"batch_first": True} | options
        return MultiheadAdditiveAttention(D, 2, kdim=K, vdim=7, hidden_dim=H, **options)
    return build(kind, **options)


def stepped(layer, query, memory):
    if isinstance(layer, (AdditiveAttention, MultiheadAdditiveAttention)):
        return layer.step(query, memory)
    return layer.step(query, memory, layer.initial_state(memory))[:2]


def ordinary(memory):
    """Returns a memory of the same tensors without prepared keys."""
    return memory._replace(key=memory.key)


@KINDS
@MODES
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("order", ["batch_first", "time_first"])
@pytest.mark.parametrize("field", ["key", "value", "lengths", "attn_mask"])
def test_what_the_memory_holds_may_be_written_to(kind, mode, beams, order, field):
    layer = made(kind, batch_first=order == "batch_first")
    key, value = torch.randn(B, LK, K, dtype=F64), torch.randn(B, LK, 7, dtype=F64)
    if order == "time_first":
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    padding = torch.arange(LK) >= torch.tensor([LK, 5, 1])[:, None]
    masking = {"key_padding_mask": padding} if field == "attn_mask" else {"lengths": [LK, 4, 2]}
    query = torch.randn(B * beams, D, dtype=F64)
    with mode():
        memory = layer.project(key, value, **masking).expand(beams)
        before = [x.clone() for x in stepped(layer, query, memory)]
        with torch.no_grad():
            tensor = getattr(memory, field)
            if field in ("key", "value"):
                tensor.mul_(0.5)
            else:
                tensor.copy_(tensor.flip(0))
        expected = stepped(layer, query, ordinary(memory))
        found = stepped(layer, query, memory)
    torch.testing.assert_close(found, expected)
    assert any(not torch.equal(x, y) for x, y in zip(before, expected, strict=True))


@KINDS
@pytest.mark.usefixtures("steps_leave_records")
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("field", ["key", "value", "lengths", "attn_mask"])
def test_what_a_step_has_read_may_not_be_written_to_before_backward(kind, beams, field):
    layer = made(kind)
    padding = torch.arange(LK) >= torch.tensor([LK, 5, 1])[:, None]
    masking = {"key_padding_mask": padding} if field == "attn_mask" else {"lengths": [LK, 4, 2]}
    key, value = torch.randn(B, LK, K, dtype=F64), torch.randn(B, LK, 7, dtype=F64)
    memory = layer.project(key, value, **masking).expand(beams)
    context, _ = stepped(layer, torch.randn(B * beams, D, dtype=F64), memory)
    with torch.no_grad():
        getattr(memory, field).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.sum().backward()


@pytest.mark.skipif(DEVICE != "cpu", reason="tests autocast on the CPU")
@MODES
@pytest.mark.parametrize("field", ["key", "value"])
@pytest.mark.parametrize("how", ["autocast", "narrow"])
def test_also_where_it_is_kept_in_another_dtype(mode, field, how):
    layer = made("content", dtype=torch.float32)
    key, value, query = torch.randn(B, LK, K), torch.randn(B, LK, 7), torch.randn(B, D)
    dtype = torch.bfloat16 if how == "narrow" else None
    with mode(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=how == "autocast"):
        memory = layer.project(key, value, dtype=dtype)
        stepped(layer, query, memory)
        with torch.no_grad():
            getattr(memory, field).mul_(0.5)
        expected = stepped(layer, query, ordinary(memory))
        torch.testing.assert_close(stepped(layer, query, memory), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(DEVICE != "cpu", reason="tests autocast on the CPU")
@MODES
def test_also_where_only_its_steps_run_under_autocast(mode):
    layer, query = made("tacotron", dtype=torch.float32), torch.randn(2 * B, D)
    with mode():
        memory = layer.project(torch.randn(B, LK, K), torch.randn(B, LK, 7)).expand(2)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            stepped(layer, query, memory)
            with torch.no_grad():
                memory.value.mul_(0.5)
            expected = stepped(layer, query, ordinary(memory))
            found = stepped(layer, query, memory)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("change", ["energy_layer.weight", "query_layer.bias", "energy_offset"])
@pytest.mark.parametrize("casts", [False, True], ids=["", "autocast"])
def test_parameters_without_versions(change, casts):
    """Parameters of a layer that was made in inference mode count no versions."""
    key, value, query = torch.randn(B, LK, K), torch.randn(B, LK, 7), torch.randn(B, D)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=casts):
        layer = made("content", dtype=torch.float32, normalize=True)
        memory = layer.project(key, value)
        stepped(layer, query, memory)
        layer.get_parameter(change).add_(torch.rand(H))
        expected = stepped(layer, query, ordinary(memory))
        torch.testing.assert_close(stepped(layer, query, memory), expected, rtol=1e-2, atol=1e-2)


@KINDS
@MODES
@pytest.mark.parametrize("masking", ["lengths", "key_padding_mask", "unbatched"])
def test_what_the_caller_passed_may_be_written_to(kind, mode, masking):
    """Values are an exception: they are not copied, since they are as large as the keys."""
    layer, query = made(kind), torch.randn(B, D, dtype=F64)
    key, value = torch.randn(B, LK, K, dtype=F64), torch.randn(B, LK, 7, dtype=F64)
    given = torch.tensor([LK, 5, 1])
    if masking == "key_padding_mask":
        given = torch.arange(LK) >= given[:, None]
    if masking == "unbatched":
        key, value, query, given = key[0], value[0], query[0], given[1]
    name = "lengths" if masking == "unbatched" else masking
    with mode():
        memory = layer.project(key, value, **{name: given})
        expected = [x.clone() for x in stepped(layer, query, memory)]
        for tensor in (key, given):
            tensor.zero_()
        torch.testing.assert_close(list(stepped(layer, query, memory)), expected)
        assert kind == "heads" or memory.value.data_ptr() == value.data_ptr()


def test_the_first_state_is_two_tensors():
    for kind in ("tacotron", "attloc", "pointer", "attcov"):
        layer = made(kind)
        state = layer.initial_state(layer.project(torch.randn(B, LK, K, dtype=F64)))
        state.cumulative.add_(1.0)
        assert not torch.equal(state.previous, state.cumulative)


def write_without_version(parameter, how):
    """Writes to a parameter without raising its version."""
    change = torch.rand_like(parameter)
    before = parameter._version
    if how == "data":
        parameter.data.add_(change)
    elif how == "NumPy":
        view = parameter.detach().numpy()
        view += change.numpy()
    else:
        parameter.grad = change
        torch.optim.SGD([parameter], lr=1.0, fused=True).step()
    assert parameter._version == before


@pytest.mark.skipif(DEVICE != "cpu", reason="values of other devices are not read")
@MODES
@pytest.mark.parametrize("how", ["data", "NumPy", "optimizer"])
@pytest.mark.parametrize(
    "kind,options,casts,change",
    [
        ("content", {"normalize": True}, False, name)
        for name in ("energy_layer.weight", "energy_gain", "energy_offset", "query_layer.bias",
                     "query_layer.weight")
    ]
    + [("content", {"normalize": True}, True, "energy_gain"),
       ("content", {}, False, "energy_layer.weight"),
       ("content", {}, True, "energy_layer.weight"),
       ("tacotron", {}, True, "energy_layer.weight"),
       ("heads", {}, False, "in_proj_bias"),
       ("heads", {}, True, "energy_weight")],
)  # fmt: skip
def test_writes_without_a_new_version(mode, how, kind, options, casts, change):
    """Fused optimizers are among the writers that raise no version."""
    layer, query = made(kind, dtype=torch.float32, **options), torch.randn(B, D)
    parameter = layer.get_parameter(change)
    with mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=casts):
        memory = layer.project(torch.randn(B, LK, K), torch.randn(B, LK, 7))
        before = stepped(layer, query, memory)
        with torch.inference_mode(False):
            write_without_version(parameter, how)
        expected = stepped(layer, query, ordinary(memory))
        found = stepped(layer, query, memory)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    assert not torch.allclose(before[1], expected[1], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "kind,rows,hooked",
    [
        *product(["content", "heads"], ["one", "several", "beams"], [False]),
        *product(["tacotron", "pointer"], ["one", "beams"], [False, True]),
    ],
)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("to", [F64, torch.float16, torch.bfloat16, "meta"], ids=str)
def test_a_layer_that_is_converted_after_it_projected(kind, rows, hooked, narrow, to):
    """The error names both dtypes or devices, and says what to call."""
    layer = made(kind, dtype=torch.float32)
    if hooked:  # the term is added to the keys
        layer.get_submodule(layer._term_layer).register_forward_hook(lambda m, given, out: out)
    dtype = torch.bfloat16 if narrow else None
    memory = layer.project(torch.randn(B, LK, K), torch.randn(B, LK, 7), dtype=dtype)
    memory = memory.expand(2 if rows == "beams" else 1)
    query = {"one": (B, D), "several": (B, 3, D), "beams": (2 * B, D)}[rows]
    layer.to(to)
    if to == memory.key.dtype:
        stepped(layer, torch.randn(query).to(to), memory)
        return
    with pytest.raises(RuntimeError if to == "meta" else TypeError) as caught:
        stepped(layer, torch.randn(query).to(to), memory)
    text = str(caught.value)
    wanted = (str(memory.key.device), "meta") if to == "meta" else (str(memory.key.dtype), str(to))
    assert all(x in text for x in (*wanted, f"{type(layer).__name__}.step", "Call project again"))
    assert_sentence(text)
