"""Tools change ``energy_layer``: the result is that of the equally changed plain layer, or an
error."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from oracle import DEVICE
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from additive_attn import AdditiveAttention, PlainAdditiveAttention

D, H = 6, 8
of_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="values of other devices are not read")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapter(nn.Module):
    """A LoRA wrapper as adapters write it: the frozen base plus a trained low-rank term."""

    def __init__(self, base, dropout=0.0):
        super().__init__()
        self.base, self.down, self.up = (
            base.requires_grad_(False),
            nn.Linear(H, 2),
            nn.Linear(2, 1),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


class Offloaded:
    """Keeps weights on the meta device until forward runs, as accelerate's hooks do."""

    def __init__(self, layer):
        self.state = {name: p.detach().clone() for name, p in layer.named_parameters()}
        self.layer, self.forward = layer, layer.forward

    def __call__(self, x):
        return torch.func.functional_call(self.bare, self.state, (x,))

    @classmethod
    def put(cls, layer):
        hook = cls(layer)
        hook.bare = copy.deepcopy(layer)
        layer.forward = hook
        for name in hook.state:
            setattr(layer, name, nn.Parameter(hook.state[name].to("meta"), requires_grad=False))


def old_weight_norm(m):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(m.energy_layer)


def half_hook(m):
    m.energy_layer.register_forward_hook(lambda module, args, out: 0.5 * out)


def pre_hook(m):
    m.energy_layer.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def patched_forward(m):
    forward = m.energy_layer.forward
    m.energy_layer.forward = lambda x: 3 * forward(x)


def subclass(m):
    layer = Doubled(H, 1)
    layer.load_state_dict(m.energy_layer.state_dict())
    m.energy_layer = layer


def adapter(m):
    torch.manual_seed(1)
    m.energy_layer = Adapter(m.energy_layer)


def two_linears(m):
    torch.manual_seed(1)
    m.energy_layer = nn.Sequential(nn.Linear(H, 5), nn.Linear(5, 1))


def no_bias(m):
    m.energy_layer.bias = None


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


TOOLS = {
    "nothing": lambda m: None,
    "old weight_norm": old_weight_norm,
    "weight_norm": lambda m: parametrizations.weight_norm(m.energy_layer),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m.energy_layer),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.energy_layer),
    "parametrization": lambda m: parametrize.register_parametrization(
        m.energy_layer, "weight", Negated()
    ),
    "prune": lambda m: prune.l1_unstructured(m.energy_layer, "weight", 0.5),
    "forward hook": half_hook,
    "forward pre-hook": pre_hook,
    "patched forward": patched_forward,
    "subclass": subclass,
    "adapter": adapter,
    "two linears": two_linears,
    "no bias": no_bias,
    "offloaded": lambda m: Offloaded.put(m.energy_layer),
    "frozen": lambda m: m.energy_layer.requires_grad_(False),
}


def pair(tool, seed=0):
    torch.manual_seed(seed)
    plain = PlainAdditiveAttention(D, H).double()
    layer = AdditiveAttention(D, H).double()
    layer.load_state_dict(plain.state_dict())
    for each in (layer, plain):
        torch.manual_seed(2)  # spectral_norm starts from random vectors
        tool(each)
    return layer.double(), plain.double()


def way_of(name, layer, inputs):
    query, key, value = inputs
    if name == "forward" or isinstance(layer, PlainAdditiveAttention):
        return layer(query, key, value)
    memory = layer.project(key, value)
    steps = [layer.step(query[:, i], memory) for i in range(query.shape[1])]
    return tuple(torch.stack(each, 1) for each in zip(*steps, strict=True))


# In training each call of spectral_norm makes another power iteration. The plain layer has no
# steps and is called once, so only forward can be compared.
TRAINED = [(tool, "forward") for tool in TOOLS]
TRAINED += [(tool, "step") for tool in TOOLS if not tool.endswith("spectral_norm")]


@pytest.mark.parametrize("tool,way", TRAINED)
def test_trains_as_the_plain_layer(tool, way):
    layer, plain = pair(TOOLS[tool])
    inputs = [torch.randn(2, n, D, dtype=torch.float64) for n in (3, 5, 5)]
    target = torch.randn(2, 3, D, dtype=torch.float64)
    for each in (layer, plain):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.5)
        each.seen = []
        for _ in range(3):
            out, weights = way_of(way, each, inputs)
            each.seen.append((out, weights))
            optimizer.zero_grad()
            ((out - target).square().sum() + weights.square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(layer.seen, plain.seen)
    for (name, ours), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")
        if ours.requires_grad:
            assert ours.grad is not None, name


def test_a_checkpoint_under_old_weight_norm():
    layer, plain = pair(old_weight_norm)
    state = {name: torch.randn_like(x) for name, x in plain.state_dict().items()}
    layer.load_state_dict(state), plain.load_state_dict(state)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x, x), plain(x, x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_called_and_read_weights_agree(dtype):
    """The weight of a module that is called (output minus bias) is as exact as the plain layer's
    score."""
    layer, plain = AdditiveAttention(D, 64), PlainAdditiveAttention(D, 64)
    plain.load_state_dict(layer.state_dict())
    hooked = copy.deepcopy(layer)
    hooked.energy_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 50, D)
    exact = plain.double()(*[x.to(dtype).double()] * 3)[1]
    layer, hooked, plain, x = layer.to(dtype), hooked.to(dtype), plain.to(dtype), x.to(dtype)
    errors = [
        (weights.double() - exact).abs().max()
        for weights in (layer(x, x)[1], hooked(x, x)[1], plain(x, x, x)[1])
    ]
    assert errors[1] <= 2 * max(errors[0], errors[2])


def test_an_adapter_merges():
    layer, _ = pair(adapter)
    layer.eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    before = layer(x, x)
    a, base = layer.energy_layer, layer.energy_layer.base
    with torch.no_grad():
        base.weight += a.up.weight @ a.down.weight
    layer.energy_layer = base
    torch.testing.assert_close(layer(x, x), before)


@pytest.mark.skipif(DEVICE != "cpu", reason="computes on the CPU")
def test_quantised_layers():
    """In eight bits the layer loses no more accuracy than the plain layer."""
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    plain, layer = PlainAdditiveAttention(16, 32), AdditiveAttention(16, 32)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 16)
    exact = plain(x, x, x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (quantize_dynamic(each, {nn.Linear}) for each in (layer, plain))
    error = (theirs(x, x, x)[0] - exact).abs().max()
    assert (ours(x, x)[0] - exact).abs().max() <= 2 * error


NOT_AFFINE = {
    "tanh": lambda: nn.Sequential(nn.Linear(H, 1), nn.Tanh()),
    "relu": lambda: nn.Sequential(nn.ReLU(), nn.Linear(H, 1)),
    "gelu": lambda: nn.Sequential(nn.Linear(H, 4), nn.GELU(), nn.Linear(4, 1)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(H, 1)),
    "adapter with dropout": lambda: Adapter(nn.Linear(H, 1), 0.5),
    "clamp": lambda: nn.Sequential(nn.Linear(H, 1), nn.Hardtanh(-0.5, 0.5)),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_other_functions_are_refused(name):
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    layer.energy_layer = NOT_AFFINE[name]()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"energy_layer is a .* no affine function"):
            layer(x, x)
    if "dropout" in name:
        layer.eval()
        layer(x, x)
        with pytest.raises(ValueError, match="no affine function"):
            layer.train()(x, x)


class Bottleneck(nn.Module):
    """An adapter whose last Linear starts at zero, so that it starts as the affine base."""

    def __init__(self, base, inner):
        super().__init__()
        self.base, self.inner, self.up = base, inner, nn.Linear(H, 1)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.inner(x))


def test_dropout_that_has_no_effect_yet_is_refused():
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    layer.energy_layer = Bottleneck(layer.energy_layer, nn.Dropout(0.3))
    with pytest.raises(ValueError, match="no affine function"):
        layer(x, x)


def test_what_training_makes_another_function_is_refused():
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    layer.energy_layer = Bottleneck(layer.energy_layer, nn.ReLU())
    optimizer = torch.optim.SGD(layer.energy_layer.up.parameters(), lr=10.0)
    layer(x, x)[0].square().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="no affine function"):
        layer(x, x)


def test_a_submodule_put_in_later_is_checked():
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    layer.energy_layer = nn.Sequential(nn.Identity(), layer.energy_layer)
    layer(x, x)
    layer.energy_layer[0] = nn.Softplus()
    with pytest.raises(ValueError, match="no affine function"):
        layer(x, x)


def hooked(m, function):
    handle = m.energy_layer.register_forward_hook(lambda module, args, out: function(out))
    return handle.remove


def pre_hooked(m, function):
    handle = m.energy_layer.register_forward_pre_hook(lambda module, args: (function(args[0]),))
    return handle.remove


def patched(m, function):
    forward = nn.Linear.forward
    m.energy_layer.forward = lambda x: function(forward(m.energy_layer, x))
    return lambda: None


def hooked_inside(m, function):
    if type(m.energy_layer) is nn.Linear:
        m.energy_layer = nn.Sequential(m.energy_layer)
    return m.energy_layer[0].register_forward_hook(lambda module, args, out: function(out)).remove


def of_another_class(m, function):
    class Other(nn.Linear):
        def forward(self, x):
            return function(super().forward(x))

    m.energy_layer.__class__ = Other
    return lambda: None


def hooked_everywhere(m, function):
    def hook(module, args, out):
        return function(out) if module is m.energy_layer else out

    return nn.modules.module.register_module_forward_hook(hook).remove


@pytest.mark.parametrize(
    "change",
    [hooked, pre_hooked, patched, hooked_inside, of_another_class, hooked_everywhere],
)
def test_what_takes_the_place_of_a_checked_hook_is_checked(change):
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    remove = change(layer, lambda x: 0.5 * x)
    layer(x, x)
    remove()
    remove = change(layer, lambda x: torch.tanh(3 * x))
    try:
        with pytest.raises(ValueError, match="no affine function"):
            layer(x, x)
    finally:
        remove()


@pytest.mark.parametrize(
    "way",
    [
        "optimizer",
        "fused optimizer",
        pytest.param(".data", marks=of_the_cpu),
        "another parameter",
    ],
)
def test_a_hook_that_training_makes_another_function_is_refused(way):
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    linear = layer.energy_layer
    linear.register_forward_hook(lambda module, args, out: out.clamp(-9, 9))
    layer(x, x)[0].sum().backward()
    if way.endswith("optimizer"):
        linear.weight.grad = torch.full_like(linear.weight, -100.0)
        fused = way.startswith("fused") and DEVICE == "cpu"
        torch.optim.SGD(linear.parameters(), 1.0, fused=fused).step()
    elif way == ".data":
        linear.weight.data.add_(100)
    else:
        linear.weight = nn.Parameter(linear.weight.detach() + 100)
    with pytest.raises(ValueError, match="no affine function"):
        layer(x, x)


@pytest.mark.parametrize(
    "tool",
    [
        lambda m, name: parametrize.register_parametrization(m, name, Negated()),
        lambda m, name: prune.l1_unstructured(m, name, 0.5),
        lambda m, name: prune.custom_from_mask(m, name, torch.zeros_like(getattr(m, name))),
    ],
    ids=["parametrization", "prune", "all pruned"],
)
@pytest.mark.parametrize("name", ["energy_gain", "energy_offset"])
def test_tools_on_the_parameters_of_normalize(name, tool):
    torch.manual_seed(0)
    layer, x = AdditiveAttention(D, H, normalize=True).double(), torch.randn(2, 5, D).double()
    tool(layer, name)
    state = {n: p if n.endswith("mask") else torch.randn_like(p)
             for n, p in layer.state_dict().items()}  # fmt: skip
    layer.load_state_dict(state)
    memory = layer.project(x)
    steps = [layer.step(x[:, i], memory)[1] for i in range(5)]
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(torch.stack(steps, 1).square().sum(), parameters)
    weights = layer(x, x)[1]
    v = layer.energy_layer.weight.squeeze(0)
    energy = torch.tanh(
        layer.query_layer(x)[:, :, None] + layer.energy_offset + layer.key_layer(x)[:, None]
    )
    expected = (energy @ (layer.energy_gain * v / v.norm())).softmax(-1)
    torch.testing.assert_close(torch.stack(steps, 1), expected)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), parameters))


@pytest.mark.parametrize(
    "module,shape",
    [(nn.Linear(H, 2), r"\(2, 8\)"), (nn.Linear(4, 1), r"\(1, 4\)"), (nn.Identity(), r"\(9, 8\)")],
    ids=["two outputs", "fewer features", "Identity"],
)
def test_other_shapes_are_refused(module, shape):
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    layer.energy_layer = module
    with pytest.raises(ValueError, match=f"energy_layer is a {type(module).__name__}.*{shape}"):
        layer(x, x)


@pytest.mark.filterwarnings("ignore")
def test_quantisation_aware_training():
    """A fake-quantised energy_layer raises, since it would round the scores after their sum.
    Fake-quantised projections are called."""
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    layer, plain = pair(TOOLS["nothing"])
    x = torch.randn(2, 5, D)
    for each in (layer.float(), plain.float()):
        each.qconfig = get_default_qat_qconfig("fbgemm")
    with pytest.raises(ValueError, match=r"Quantisation-aware .* energy_layer.qconfig = None"):
        prepare_qat(layer)(x, x)
    for each in (layer, plain):
        each.energy_layer.qconfig = None
    ours, theirs = prepare_qat(layer), prepare_qat(plain)
    for _ in range(3):  # each call updates the observed ranges
        torch.testing.assert_close(ours(x, x), theirs(x, x, x))


@pytest.mark.parametrize(
    "kind", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_backward_hooks_are_refused(kind):
    """Gradients do not pass through energy_layer, so such a hook would not be called."""
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    getattr(layer.energy_layer, kind)(lambda *_: None)
    with pytest.raises(ValueError, match="energy_layer has backward hooks"):
        layer(x, x)


@pytest.mark.parametrize("tool", ["nothing", "forward hook", "adapter", "old weight_norm"])
def test_shapes_alone(tool):
    from torch._subclasses import FakeTensorMode

    layer, _ = pair(TOOLS[tool])
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x), mode.from_tensor(x))[0].shape == x.shape
    if tool != "old weight_norm":  # its hook creates a tensor on the CPU
        layer.to("meta")
        assert layer(x.to("meta"), x.to("meta"))[1].shape == (2, 5, 5)


@pytest.mark.parametrize("tool", ["nothing", "forward hook", "weight_norm", "adapter"])
def test_autocast(tool):
    layer, plain = pair(TOOLS[tool])
    layer.float(), plain.float()
    x = torch.randn(2, 5, D)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, theirs = layer(x, x)[1], plain(x, x, x)[1]
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs.float(), atol=0.02, rtol=0.02)


def test_weights_on_meta_are_refused():
    layer, x = AdditiveAttention(D, H), torch.randn(2, 5, D)
    layer.energy_layer.to("meta")
    with pytest.raises(RuntimeError, match="weight is on meta"):
        layer(x, x)


@pytest.mark.parametrize("tool", ["old weight_norm", "forward hook", "adapter", "weight_norm"])
def test_compiles(tool):
    layer, plain = pair(TOOLS[tool])
    x = torch.randn(2, 5, D, dtype=torch.float64)
    compiled = torch.compile(lambda x: layer(x, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x, x, x))
    ours = torch.autograd.grad(compiled(x)[0].square().sum(), layer.query_layer.weight)
    theirs = torch.autograd.grad(plain(x, x, x)[0].square().sum(), plain.query_layer.weight)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", ["forward", "step"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_of_all_modules_are_called_for_the_linears(kind, way):
    layer, _ = pair(TOOLS["nothing"])
    seen, x = [], torch.randn(2, 5, D, dtype=torch.float64)
    register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *_: seen.append(module))
    try:
        way_of(way, layer, (x, x, x))[0].sum().backward()
    finally:
        handle.remove()
    assert set(seen) >= {layer.query_layer, layer.key_layer, layer.energy_layer}


@pytest.mark.parametrize("name", ["query_layer", "key_layer"])
@pytest.mark.parametrize("hook", ["forward", "pre", "patched", "replaced", "no parameter"])
def test_projections_are_called_where_something_hooks_into_them(name, hook):
    def tool(m):
        linear = getattr(m, name)
        if hook == "forward":
            linear.register_forward_hook(lambda module, args, out: 0.5 * out)
        elif hook == "pre":
            linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        elif hook == "patched":
            forward = linear.forward
            linear.forward = lambda x: 3 * forward(x)
        elif hook == "replaced":
            setattr(m, name, nn.Sequential(linear, nn.Tanh()))
        else:
            weight = linear.weight.detach() * 2
            del linear.weight
            linear.weight = weight

    layer, plain = pair(tool)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x, x), plain(x, x, x))


def test_random_numbers_are_left_alone():
    layer, _ = pair(half_hook)
    x, state = torch.randn(2, 5, D, dtype=torch.float64), torch.get_rng_state()
    layer(x, x)
    assert torch.equal(torch.get_rng_state(), state)
