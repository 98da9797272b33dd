"""Compares each feature of the GPU's kernels with the plain formula in float64: in Triton's
interpreter, or on a GPU with ADDITIVE_ATTN_TEST_DEVICE=cuda."""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DEVICE,
    INPUTS,
    SCORED,
    assert_layout_free,
    assert_same,
    check_against_plain,
    fused,
    fused_scores,
    generator,
    gradients,
    make,
    plain_scores,
    random_upstream,
)

from additive_attn import additive_attention, additive_scores
from additive_attn.backends.plain import blocks
from additive_attn.backends.triton import arguments, tiles
from additive_attn.ops import dispatch
from additive_attn.spec.dropout import draw_seed

pytestmark = pytest.mark.triton


SHAPES = [
    ((), 1, 1, 1, 1),
    ((2,), 1, 40, 33, 17),
    ((1, 2), 2, 15, 3, 5),
    ((2,), 5, 65, 4, 16),
    ((), 33, 64, 65, 1),
    ((), 65, 31, 100, 70),
    # The sums of the values are in memory.
    ((2,), 5, 150, 6, 70),
    ((), 30, 70, 5, 150),
    # The reduced index is so long that it is split over programs.
    ((2,), 1, 300, 6, 5),
    ((), 2, 530, 3, 2),
    ((), 530, 3, 3, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_around_tiles(shape):
    batch, *sizes = shape
    check_against_plain([make(batch, *sizes)])


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        pytest.param(100, torch.float32, id="70-100"),
        pytest.param(200, torch.float32, id="70-200"),
        pytest.param(
            100, torch.bfloat16, id="16 bits",
            marks=pytest.mark.skipif(
                "config.option.compiled == '90'",
                reason="the emulator of PTX has no transposed operands of wgmma",
            ),
        ),
    ],
)  # fmt: skip
def test_sizes_of_large_tiles(values, dtype, monkeypatch):
    """Tiles of many rows. The sums of the values are in registers, or in memory. Forward alone,
    since the kernels of a backward are the same for other sizes."""
    monkeypatch.setattr(arguments, "processors", lambda device: 1)
    tile = tiles.attend_tile(70, 96, False, values, 1, dtype.itemsize)
    assert tile.rows == 64
    in_memory = tiles.attend_columns(values, False, tile, dtype.itemsize) < values
    assert in_memory == (values > 100 or dtype == torch.bfloat16)
    cases = [make((), 70, 140, 72, values, dtype=dtype, seed=seed) for seed in range(2)]
    check_against_plain(cases, upstream_of=())


@pytest.mark.parametrize("values", [65, 129])
def test_sizes_of_16_bits_in_memory(values):
    """No word of an odd number of values, from an odd place, is read beyond their memory."""
    room = make((), 5, 9, 8, values, dtype=torch.bfloat16)
    case = {**room, "value": torch.empty(9 * values + 1, dtype=torch.bfloat16)[1:].view(9, values)}
    case["value"].copy_(room["value"])
    check_against_plain([case], upstream_of=())


@pytest.mark.parametrize("hidden", [10, 70])
@pytest.mark.parametrize("queries", [1, 9])
def test_small_energies_at_a_large_scale(queries, hidden):
    """The test passes only if the relative error of tanh(x) near 0 is as small as PyTorch's."""
    cases = [make((), queries, 20, hidden, 5, spread=1e-3, seed=seed) for seed in range(4)]
    check_against_plain(cases, scale=1000.0)


@pytest.mark.parametrize("hidden", [10, 70])
def test_all_magnitudes_in_one_call(hidden):
    cases = [make((), 9, 20, hidden, 5, seed=seed) for seed in range(4)]
    for case in cases:
        case["query"] *= 10 ** torch.linspace(-1, 2.3, 9)[:, None]
        case["key"] *= 10 ** torch.linspace(2.3, -1, 20)[:, None]
    check_against_plain(cases)


@pytest.mark.parametrize("large", ["query", "key"])
def test_one_row_or_key_alone_is_large(large):
    case = make((), 9, 20, 10, 5)
    case[large][3] *= 1000.0
    check_against_plain([case])


def masking(kind, queries, keys):
    g = generator(1)
    return {
        "bool": dict(attn_mask=torch.rand(2, queries, keys, generator=g) > 0.4),
        "float": dict(attn_mask=torch.randn(queries, keys, generator=g)),
        "float per key": dict(attn_mask=torch.randn(keys, generator=g)),
        "float per entry": dict(attn_mask=torch.randn(2, queries, 1, generator=g)),
        "lengths": dict(lengths=torch.tensor([5, keys])),
        "lengths per row": dict(lengths=torch.arange(2 * queries).view(2, queries)),
        "causal": dict(is_causal=True),
        "window": dict(window=(3, 2)),
    }[kind]


MASKS = [
    "bool", "float", "float per key", "float per entry", "lengths", "lengths per row", "causal",
    "window",
]  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_one_query(kind):
    check_against_plain([make((2,), 1, 150, 9, 5)], scale=0.3, **masking(kind, 1, 150))


@pytest.mark.parametrize(
    "mask,workspace",
    [((12, 5), 900), ((2, 1, 1, 5), 3200), ((2, 2, 12, 5), 3200), (None, 700)],
    ids=["rows", "entries", "all", "none"],
)
def test_a_workspace_smaller_than_the_problem(mask, workspace, monkeypatch):
    """Rows and entries are computed in several parts; the window of the last rows lies beyond the
    last key."""
    triton_tiles = pytest.importorskip("additive_attn.backends.triton.tiles")
    monkeypatch.setattr(triton_tiles, "WORKSPACE_ELEMENTS", workspace)
    masking = dict(window=(3, 2)) if mask is None else dict(attn_mask=torch.randn(mask))
    batch, queries, keys = ((), 40, 9) if mask is None else ((2, 2), 12, 5)
    check_against_plain([make(batch, queries, keys, 7, 5)], **masking)


def test_parts_without_keys(monkeypatch):
    """All rows of the last parts have a window beyond the last key."""
    triton_tiles = pytest.importorskip("additive_attn.backends.triton.tiles")
    monkeypatch.setattr(triton_tiles, "WORKSPACE_ELEMENTS", 700)
    case = make((), 70, 16, 7, 5)
    check_against_plain([case], window=(3, 2))
    check_against_plain(
        [case], function=fused_scores, formula=plain_scores, upstream_of=("scores",), window=(3, 2)
    )


@pytest.mark.parametrize("dtype,values", [(torch.float32, 5), (torch.float64, 40)], ids=str)
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(strange, dtype, values):
    """Such values reach only the rows that attend to them, also under dropout. Their product with
    a weight of 0 is NaN; the larger scale makes most weights 0."""
    case = make((), 20, 37, 7, values, dtype=dtype)
    case["value"][[3, 34], [1, 2]] = strange
    if dtype == torch.float64:
        case["value"][:, 3] *= 1e300
    mask = torch.rand(20, 37, generator=generator(1)) > 0.5
    seed = draw_seed(torch.device(DEVICE))
    for chosen, dropout_p, scale in ((None, 0.0, 1.0), (seed, 0.5, 1.0), (None, 0.0, 1000.0)):
        options = mask, *(None,) * 4, -1, -1, chosen, dropout_p, scale, False
        arguments = *case.values(), *options
        torch.testing.assert_close(
            dispatch.forward(*arguments)[0], blocks.forward(*arguments)[0], equal_nan=True
        )


@pytest.mark.parametrize("queries,keys", [(5, 21), (1, 150), (24, 40)])
def test_dropout_is_that_of_every_backend(queries, keys, monkeypatch):
    """Forward and backward keep the same weights, for any boundaries between the parts of a
    problem."""
    triton_tiles = pytest.importorskip("additive_attn.backends.triton.tiles")
    monkeypatch.setattr(triton_tiles, "WORKSPACE_ELEMENTS", 1024)
    seed = draw_seed(torch.device(DEVICE))
    case = make((2,), queries, keys, 9, 5)
    inputs = (*case.values(), *(None,) * 5, 6, 2, seed, 0.4, 0.3)

    expected = blocks.forward(*inputs, True)
    for ours, theirs in zip(dispatch.forward(*inputs, True), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    upstream = [torch.randn_like(x) for x in expected]
    arguments = (*upstream, *inputs, expected[2], True, True, True, True, False)
    expected = blocks.backward(*arguments)
    for ours, theirs in zip(dispatch.backward(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def captured(step):
    """Returns a graph of ``step``, and the tensors that it writes its results to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@on_gpu
@pytest.mark.parametrize("kind", [*MASKS, "none"])
@pytest.mark.parametrize("queries", [1, 40])
def test_cuda_graph(queries, kind):
    """Neither forward nor backward waits for the device, which a capture forbids."""
    case = make((2,), queries, 50, 9, 5)
    options = {} if kind == "none" else masking(kind, queries, 50)
    leaves = {name: x.clone().requires_grad_() for name, x in case.items()}
    upstream = torch.randn(2, queries, 5)

    def step():
        out = additive_attention(*leaves.values(), **options)
        return out, *torch.autograd.grad(out, list(leaves.values()), upstream)

    graph, results = captured(step)
    with torch.no_grad():
        for x in leaves.values():
            x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, expected in zip(results, step(), strict=True):
        assert_same(ours, expected, "replayed")


@on_gpu
@pytest.mark.parametrize("queries", [1, 40])
def test_cuda_graph_draws_other_weights(queries):
    """A replay drops other weights than the one before."""
    case = make((2,), queries, 50, 9, 5)
    graph, out = captured(lambda: additive_attention(*case.values(), dropout_p=0.5))
    graph.replay()
    before = out.clone()
    graph.replay()
    assert not torch.equal(out, before)


@on_gpu
@pytest.mark.parametrize("queries", [1, 40])
def test_another_stream(queries):
    case = make((64,), queries, 500, 64, 64)
    expected = additive_attention(*case.values())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late = {name: x.clone() for name, x in case.items()}
        out = additive_attention(*late.values())
    stream.synchronize()
    assert_same(out, expected, "out")


@on_gpu
def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make((2,), 5, 20, 9, 5)
    outs = [additive_attention(*(x.to(f"cuda:{i}") for x in case.values())) for i in (0, 1)]
    assert outs[1].device.index == 1
    assert_same(outs[1].cpu(), outs[0].cpu(), "out")


@pytest.mark.parametrize("queries", [1, 5])
def test_offsets_beyond_int32(queries):
    """A few pages of 8 GB of addresses are touched on a CPU."""
    case = make((2,), queries, 9, 7, 5, dtype=torch.float16)
    # torch.empty is not used, since the tests fill its memory.
    room = torch.frombuffer(mmap.mmap(-1, 2**33 + 2**21), dtype=torch.float16).to(DEVICE)
    far = dict(case)
    far["key"] = room.as_strided((2, 9, 7), (2**31 + 16, 7, 1)).copy_(case["key"])
    far["value"] = room[10**6 :].as_strided((2, 9, 5), (5, 2**28, 1)).copy_(case["value"])
    options = (None, None, None, None, None, -1, -1, None, 0.0, 1.0)
    expected = dispatch.forward(*case.values(), *options, True)
    for ours, theirs in zip(
        dispatch.forward(*far.values(), *options, True), expected, strict=True
    ):
        assert_same(ours, theirs)
    upstream = [torch.randn_like(x) for x in expected]

    def backward(inputs):
        arguments = (*upstream, *inputs.values(), *options, expected[2])
        return dispatch.backward(*arguments, True, True, True, True, False)

    for ours, theirs in zip(backward(far), backward(case), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("queries", [1, 5])
def test_lengths_out_of_range(queries):
    """The host does not read lengths, so kernels clamp them to the keys."""
    case = make((3,), queries, 9, 7, 5, dtype=torch.float16).values()
    given, meant = torch.tensor([[-3], [4], [2**40]]), torch.tensor([[0], [4], [9]])

    def run(lengths):
        arguments = (*case, None, lengths, None, None, None, -1, -1, None, 0.0, 1.0)
        outputs = dispatch.forward(*arguments, True)
        arguments = (*outputs, *arguments, outputs[2])
        return *outputs, *dispatch.backward(*arguments, True, True, True, True, False)

    for ours, expected in zip(run(given), run(meant), strict=True):
        assert_same(ours, expected)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("needs", [(True,) * 5, (False,) * 5, (False, True, False, True, False)])
def test_opcheck(needs, queries):
    """The results of the operators have the shapes that traces expect, and share no memory."""
    case = make((2,), queries, 65, 4, 16).values()
    inputs = (*case, torch.randn(queries, 65), None, None, None, None, -1, -1, None, 0.0, 1.0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(dispatch.forward, (*inputs, needs[0]), test_utils=checks)
    out, _, lse = dispatch.forward(*inputs, False)
    arguments = (torch.randn_like(out), None, None, *inputs, lse, *needs)
    torch.library.opcheck(dispatch.backward, arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("begins", ["entries", "tensors"])
@pytest.mark.parametrize("queries", [1, 6])
def test_what_begins_between_16_bytes(queries, begins, dtype):
    """The strides of rows are multiples of 16 bytes, so that 16 bytes could be loaded at once, but
    the rows begin between such addresses."""
    case = make((3,), queries, 40, 32, 32, dtype=dtype)

    def placed(x):
        rows = F.pad(x, (0, 16)).flatten(-2)
        if begins == "entries":
            rows = F.pad(rows, (0, 1), value=torch.nan)[..., :-1]
        else:
            rows = F.pad(rows.flatten(), (1, 0), value=torch.nan)[1:].view(rows.shape)
        return rows.unflatten(-1, (x.shape[-2], -1))[..., : x.shape[-1]]

    def elsewhere(inputs):
        weight = inputs["weight"]
        return fused({n: x if x is weight else placed(x) for n, x in inputs.items()})

    upstream = random_upstream(fused(case))
    for ours, other in zip(
        gradients(elsewhere, case, upstream), gradients(fused, case, upstream), strict=True
    ):
        assert_layout_free(ours, other)


@pytest.mark.parametrize("shape", [((2,), 1, 300, 6, 5), ((), 65, 31, 100, 70)], ids=str)
def test_repeats_to_the_bit(shape):
    case = make(*shape)
    upstream = random_upstream(fused(case))
    first, second = (gradients(fused, case, upstream) for _ in range(2))
    for ours, again in zip(first, second, strict=True):
        for name in ours:
            assert_same(ours[name], again[name], name)


@pytest.mark.parametrize("wide", [False, True], ids=["f32", "f64"])
@pytest.mark.parametrize("scores", [False, True], ids=["out", "scores"])
@pytest.mark.parametrize("queries", [1, 5])
def test_gradients_of_some_arguments_alone(queries, scores, wide):
    inputs = make((2,), queries, 20, 9, 6, dtype=torch.float64 if wide else torch.float32)
    names = SCORED if scores else INPUTS

    def gradients_of(wanted):
        x = {n: inputs[n].detach().requires_grad_(n in wanted) for n in names}
        total = additive_scores(**x) if scores else additive_attention(**x)
        found = torch.autograd.grad(total.square().sum(), [x[n] for n in wanted])
        return dict(zip(wanted, found, strict=True))

    together = gradients_of(names)
    for count in range(1, len(names)):
        for wanted in itertools.combinations(names, count):
            for name, alone in gradients_of(wanted).items():
                torch.testing.assert_close(alone, together[name], msg=f"{name} of {wanted}")


def test_backward_under_autocast():
    """Some programs, and compiled graphs, run backward under autocast: nothing is rounded to 16
    bits."""
    arguments = (
        *make((2,), 5, 65, 4, 16).values(), None, None, None, None, None, -1, -1, None, 0.0, 1.0,
    )  # fmt: skip
    outputs = dispatch.forward(*arguments, True)
    arguments = (*outputs, *arguments, outputs[2], True, True, True, True, False)
    expected = dispatch.backward(*arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = dispatch.backward(*arguments)
    for ours, other in zip(found, expected, strict=True):
        assert_same(ours, other)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make((), 2, 3, 3, 2, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(
        lambda *x: additive_attention(*x, need_weights=True, need_lse=True), inputs, fast_mode=True
    )
