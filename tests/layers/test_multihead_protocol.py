"""Several heads: errors, the protocol of nn.Module, and torch's transforms."""

from __future__ import annotations

import copy

import pytest
import torch
from heads import F64, HEADS, E, N, S, made, padded, plain_heads
from oracle import DEVICE
from torch import fx, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.utils import prune

from additive_attn import MultiheadAdditiveAttention

# Errors


def refused(error, sentence, call):
    with pytest.raises(error, match=sentence):
        call()


def test_what_a_constructor_refuses():
    make = MultiheadAdditiveAttention
    refused(
        ValueError, "embed_dim is 7 and num_heads is 2, but embed_dim must be", lambda: make(7, 2)
    )
    refused(ValueError, "hidden_dim is 9 and num_heads is 2", lambda: make(8, 2, hidden_dim=9))
    refused(ValueError, r"num_heads is 0.* at least 1", lambda: make(8, 0))
    refused(ValueError, "embed_dim is -8, but the number of features must", lambda: make(-8, 2))
    refused(TypeError, "num_heads is 2.0, a float, but must be an integer", lambda: make(8, 2.0))
    refused(ValueError, "kdim is 0", lambda: make(8, 2, kdim=0))
    refused(ValueError, "dropout is 2", lambda: make(8, 2, dropout=2))


X, Y = torch.randn(N, 4, E, dtype=F64), torch.randn(N, S, E, dtype=F64)
BAD = {
    "rank of key": (ValueError, "must have 3 dims, .N, L, E., or all three 2", (X, Y[0], Y), {}),
    "rank of value": (ValueError, "must have 3 dims", (X, Y, Y[0]), {}),
    "unbatched": (ValueError, "or all three 2, .L, E., unbatched", (X[0], Y, Y), {}),
    "one dim": (ValueError, "query .8,., key", (X[0, 0], Y[0, 0], Y[0, 0]), {}),
    "features": (ValueError, "key has 3 features, but .* kdim=8", (X, Y[..., :3], Y), {}),
    "lengths": (ValueError, "each key belongs to one value", (X, Y, Y[:, 1:]), {}),
    "batch": (ValueError, "dim 0, batch_first=True. must be the same", (X, Y[:2], Y[:2]), {}),
    "order": (
        ValueError, "pass batch_first=False", (X.mT.reshape(4, N, E), Y[:2, :3], Y[:2, :3]), {}
    ),
    "dtype": (TypeError, "query is torch.float32, but the parameters", (X.float(), Y, Y), {}),
    "token ids": (TypeError, "Embed token ids", (X.long(), X.long(), X.long()), {}),
    "no tensor": (TypeError, "value is a NoneType", (X, Y, None), {}),
    "mask's rank": (
        ValueError, "attn_mask has shape .4,., but must be .L, S. = .4, 7. or .N . num_heads",
        (X, Y, Y), {"attn_mask": torch.zeros(4, dtype=torch.bool)},
    ),
    "mask's shape": (
        ValueError, "attn_mask has shape .5, 4, 7.", (X, Y, Y),
        {"attn_mask": torch.zeros(5, 4, 7, dtype=torch.bool)},
    ),
    "mask's dtype": (
        TypeError, "attn_mask is torch.int64, but must be None, a bool tensor .True = do not",
        (X, Y, Y), {"attn_mask": torch.zeros(4, 7, dtype=torch.int64)},
    ),
    "mask of float32": (
        TypeError, "attn_mask is torch.float32.*True = do not attend", (X, Y, Y),
        {"attn_mask": torch.zeros(4, 7)},
    ),
    "padding's rank": (
        ValueError, "key_padding_mask has shape .7,., but must be .N, S. = .3, 7.", (X, Y, Y),
        {"key_padding_mask": torch.zeros(7, dtype=torch.bool)},
    ),
    "unbatched padding": (
        ValueError, "must be .S,., unbatched, = .7,.", (X[0], Y[0], Y[0]),
        {"key_padding_mask": torch.zeros(1, 7, dtype=torch.bool)},
    ),
    "unbatched mask": (
        ValueError, "or .N . num_heads, L, S. = .2, 4, 7.", (X[0], Y[0], Y[0]),
        {"attn_mask": torch.zeros(5, 4, 7, dtype=torch.bool)},
    ),
    "padding's type": (
        TypeError, "key_padding_mask is a list", (X, Y, Y), {"key_padding_mask": [[True] * 7] * 3}
    ),
    "padding's dtype": (
        TypeError, "key_padding_mask is torch.float16.*True = do not attend", (X, Y, Y),
        {"key_padding_mask": torch.zeros(3, 7, dtype=torch.float16)},
    ),
    "hint": (ValueError, "is_causal says what attn_mask is", (Y, Y, Y), {"is_causal": True}),
}  # fmt: skip


@pytest.mark.parametrize("error,sentence,given,options", BAD.values(), ids=BAD.keys())
def test_what_a_call_refuses(error, sentence, given, options):
    layer = made()
    refused(error, sentence, lambda: layer(*given, **options))
    layer.eval().requires_grad_(False)
    refused(error, sentence, lambda: layer(*given, **options))


def test_what_steps_refuse():
    layer, other = made(), made(hidden_dim=4)
    memory = layer.project(Y)
    refused(TypeError, "needs a ProjectedMemory", lambda: layer.step(X[:, 0], (Y, Y)))
    refused(ValueError, "needs 3 queries: 1 for each of", lambda: layer.step(X[:2, 0], memory))
    refused(ValueError, "query has 5 features", lambda: layer.step(X[:, 0, :5], memory))
    refused(ValueError, "one query per sequence", lambda: layer.step(X[None], memory))
    refused(ValueError, "a memory that this layer", lambda: other.step(X[:, 0], memory))
    refused(TypeError, "query is a list", lambda: layer.step([1.0], memory))
    for name in ("key", "value"):
        wrong = memory._replace(**{name: None})
        refused(TypeError, f"{name} is a NoneType", lambda wrong=wrong: layer.step(X[:, 0], wrong))
    refused(
        ValueError, "MultiheadAdditiveAttention.project got key", lambda: layer.project(Y[0, 0])
    )
    refused(ValueError, "each key belongs to one value", lambda: layer.project(Y, Y[:, 1:]))
    refused(
        ValueError, "lengths holds values from 0 to 8", lambda: layer.project(Y, lengths=[8, 0, 1])
    )
    padding = torch.zeros(3, 7, dtype=torch.float16)
    refused(
        TypeError, "key_padding_mask is torch.float16.*True = do not attend",
        lambda: layer.project(Y, key_padding_mask=padding),
    )  # fmt: skip
    refused(TypeError, "A memory is kept in", lambda: layer.project(Y, dtype=torch.float32))


# Parameters


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 5, "vdim": 4}, {"add_bias_kv": True, "bias": False}]
)
def test_parameters_are_those_of_nn_multihead_attention(options):
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(E, HEADS, **options)
    torch.manual_seed(1)
    ours = MultiheadAdditiveAttention(E, HEADS, **options)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys() | {"energy_weight"}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    nn.init.constant_(ours.out_proj.weight, 0.0)
    missing = ours.load_state_dict(expected, strict=False)
    assert missing.missing_keys == ["energy_weight"] and not missing.unexpected_keys
    assert torch.equal(ours.out_proj.weight, theirs.out_proj.weight)
    theirs.load_state_dict(found, strict=False)
    assert ours.energy_weight.abs().max() <= (E // HEADS) ** -0.5
    for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "batch_first", "dropout"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_hidden_dim_is_the_width_of_queries_and_keys():
    layer = made(hidden_dim=6)
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == {
        "in_proj_weight": (2 * 6 + E, E), "in_proj_bias": (2 * 6 + E,), "out_proj.bias": (E,),
        "out_proj.weight": (E, E), "energy_weight": (HEADS, 3),
    }  # fmt: skip
    assert "embed_dim=8, num_heads=2, batch_first=True, hidden_dim=6" in repr(layer)


def test_meta_reset_and_skip_init():
    layer = MultiheadAdditiveAttention(E, HEADS, device="meta", add_bias_kv=True)
    layer.to_empty(device=DEVICE)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 7.0)
    layer.reset_parameters()
    assert all((p != 7.0).all() for n, p in layer.named_parameters() if n != "out_proj.weight")
    assert not layer.out_proj.bias.any()
    nn.utils.skip_init(MultiheadAdditiveAttention, E, HEADS).load_state_dict(
        MultiheadAdditiveAttention(E, HEADS).state_dict()
    )


# Transforms


def test_gradcheck():
    layer = made(add_bias_kv=True)
    x = torch.randn(2, 3, E, dtype=F64, requires_grad=True)
    mask = torch.randn(3, 3, dtype=F64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, mask, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return functional_call(layer, given, (x, x, x), {"attn_mask": mask})

    torch.autograd.gradcheck(call, (x, mask, *parameters), fast_mode=True)
    torch.autograd.gradgradcheck(call, (x, mask, *parameters), fast_mode=True)
    (jacobian,) = torch.autograd.functional.jacobian(
        lambda x: call(x, mask, *parameters)[0].sum(0), (x,)
    )
    torch.testing.assert_close(jacrev(lambda x: call(x, mask, *parameters)[0].sum(0))(x), jacobian)


def test_vmap():
    layer, x = made(), torch.randn(5, 2, 3, E, dtype=F64)
    padding = torch.rand(5, 2, 3) < 0.3

    def call(x, padding):
        return layer(x, x, x, padding)

    expected = [torch.stack(y) for y in zip(*map(call, x, padding), strict=True)]
    torch.testing.assert_close(list(vmap(call)(x, padding)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_and_autocast(dtype):
    layer, x = made(dtype=torch.float32), torch.randn(N, S, E)
    expected = layer(x, x, x, padded())[0]
    small = copy.deepcopy(layer).to(dtype)
    masks = padded(), torch.zeros(N, S, dtype=dtype).masked_fill(padded(), -torch.inf)
    for mask in masks:
        out, weights = small(*[x.to(dtype)] * 3, mask)
        assert out.dtype == weights.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    with torch.autocast(DEVICE, dtype):
        for mask in (padded(), torch.zeros(N, S).masked_fill(padded(), -torch.inf)):
            out, _ = layer(x, x, x, mask)
            assert out.dtype == dtype
            torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
        memory = layer.project(x, key_padding_mask=padded())
        stepped = layer.step(x[:, 0], memory)[0]
    torch.testing.assert_close(stepped.float(), expected[:, 0], atol=0.05, rtol=0.05)
    out.sum().backward()
    assert layer.in_proj_weight.grad.dtype == torch.float32


def test_a_mask_that_is_read_beside_another_default_device():
    layer, x = made(), torch.randn(N, S, E, dtype=F64)
    later = torch.ones(S, S, dtype=torch.bool).triu(1)
    expected = layer(x, x, x, attn_mask=later, is_causal=True)
    with torch.device("meta"):
        found = layer(x, x, x, attn_mask=later, is_causal=True)
    torch.testing.assert_close(found, expected)


def test_compile_with_dynamic_lengths():
    layer, lengths = made(dropout=0.1).eval(), [(2, 5, 6), (3, 7, 4)]

    def call(query, key, padding, mask):
        return layer(query, key, key, padding, attn_mask=mask)

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, rows, keys in lengths:
        given = [torch.randn(batch, n, E, dtype=F64) for n in (rows, keys)]
        given += [torch.rand(batch, keys) < 0.3, torch.rand(batch * HEADS, rows, keys) < 0.3]
        with torch._dynamo.config.patch(error_on_recompile=batch == 3):
            results = [each(*given) for each in (compiled, call)]
        torch.testing.assert_close(*results)
    parameters = list(layer.parameters())
    ours, theirs = (torch.autograd.grad(out.square().sum(), parameters) for out, _ in results)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.sweep
def test_compile_of_steps():
    layer, query, key = made(), torch.randn(N, 2, E, dtype=F64), torch.randn(N, S, E, dtype=F64)

    def call(query, key, padding):
        memory = layer.project(key, key_padding_mask=padding)
        return [layer.step(x, memory)[0] for x in query.unbind(1)]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, padded()), call(query, key, padded()))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = made(dropout=0.1)

    def forward(self, x, padding):
        out, weights = self.inner(x, x, x, key_padding_mask=padding)
        memory = self.inner.project(x)
        return out, weights, self.inner.step(x[:, 0], memory)[0]


def test_export_trace_and_symbolic_trace():
    model = Model().eval()
    given = torch.randn(N, S, E, dtype=F64), padded()
    expected = model(*given)
    torch.testing.assert_close(torch.export.export(model, given).module()(*given), expected)
    traced = fx.symbolic_trace(model)
    torch.testing.assert_close(traced(*given), expected)
    torch.testing.assert_close(torch.jit.trace(model, given)(*given), expected)
    refused(TypeError, "Trace a model that holds it", lambda: fx.symbolic_trace(model.inner))


@pytest.mark.usefixtures("steps_leave_records")
def test_tools_that_change_its_parameters():
    layer, x = made(), torch.randn(N, S, E, dtype=F64)
    memory = layer.project(x)
    nn.utils.parametrizations.weight_norm(layer, "in_proj_weight")
    with torch.no_grad():
        layer.parametrizations.in_proj_weight.original0.mul_(2.0)
    expected = plain_heads(layer, x, x, x)
    torch.testing.assert_close(layer(x, x, x), expected)
    torch.testing.assert_close(layer.step(x[:, 0], layer.project(x))[0], expected[0][:, 0])
    assert memory.prepared is not None
    layer.out_proj = nn.Sequential(layer.out_proj, nn.Tanh())
    torch.testing.assert_close(layer(x, x, x)[0], expected[0].tanh())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("tool", ["weight_norm", "spectral_norm", "l1_unstructured", "twice"])
@pytest.mark.parametrize("name", ["energy_weight", "in_proj_weight", "in_proj_bias", "bias_v"])
def test_what_pre_hooks_make_of_parameters_is_new_in_steps_too(tool, name):
    torch.manual_seed(0)
    layer, x = made(add_bias_kv=True).eval(), torch.randn(N, S, E, dtype=F64)
    if "norm" in tool:
        if not name.endswith("_weight"):
            return
        getattr(nn.utils, tool)(layer, name)
    else:
        for _ in range(1 + (tool == "twice")):
            prune.l1_unstructured(layer, name, 0.3)
    state = {n: p if n.endswith("mask") else torch.randn_like(p)
             for n, p in layer.state_dict().items()}  # fmt: skip
    layer.load_state_dict(state)
    parameters = list(layer.parameters())
    for _ in range(2):
        memory = layer.project(x)
        steps = torch.stack([layer.step(x[:, i], memory)[0] for i in range(S)], 1)
        ours = torch.autograd.grad(steps.square().sum(), parameters)
        out = layer(x, x, x)[0]
        torch.testing.assert_close(out, plain_heads(layer, x, x, x)[0])
        torch.testing.assert_close(steps, out)
        expected = torch.autograd.grad(out.square().sum(), parameters)
        torch.testing.assert_close(ours, expected)
        torch.optim.SGD(parameters, 0.1).step()


@pytest.mark.skipif(DEVICE != "cpu", reason="quantised products are the CPU's")
def test_quantised():
    layer, x = made(dtype=torch.float32).eval(), torch.randn(N, S, E)
    with torch.no_grad():
        expected = layer(x, x, x)[0]
        quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
        assert type(quantised.out_proj) is not nn.Linear
        torch.testing.assert_close(quantised(x, x, x)[0], expected, atol=0.05, rtol=0.1)


def test_checkpointing():
    layer, x = made(dropout=0.3), torch.randn(N, S, E, dtype=F64, requires_grad=True)

    def call(x):
        return layer(x, x, x, need_weights=False)[0]

    def again(x):
        return torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)

    results = []
    for each in (call, again):
        torch.manual_seed(2)
        loss = each(x).square().sum()
        results.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    torch.testing.assert_close(*results)
