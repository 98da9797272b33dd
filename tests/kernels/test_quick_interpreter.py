"""What quick_interpreter.py computes is what Triton's interpreter computes."""

from __future__ import annotations

import itertools

import paths
import pytest
import quick_interpreter
import torch

triton = pytest.importorskip("triton", minversion="3.6")
tl = pytest.importorskip("triton.language")

if paths.DEVICE != "cpu" or paths.emulation.installed():
    pytest.skip("nothing runs in the interpreter", allow_module_level=True)

DTYPES = [tl.int1, tl.int32, tl.int64, tl.float16, tl.float32, tl.float64]
SHAPES = [(), (4,), (2, 1, 4)]
NUMBERS = [True, 2, 2**31, 0.1, 0.0, 1e300, tl.constexpr(3), tl.constexpr(0.5)]
COMPUTED = ("_binary", "_address", "_where", "_cast", "_item", "_load")


@triton.jit
def kernel(place, body: tl.constexpr):
    body(place)


def same(ours, theirs):
    assert ours.type == theirs.type and ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape and ours.numel.value == theirs.numel.value
    first, second = ours.handle.data, theirs.handle.data
    if ours.dtype == tl.int1:  # Triton's may be integers in memory
        first, second = first.astype(bool), second.astype(bool)
    assert first.dtype == second.dtype and first.shape == second.shape
    assert first.tobytes() == second.tobytes()


@pytest.fixture
def compare(monkeypatch):
    """Runs a body in which Triton, too, computes whatever it can. Returns how often it did."""
    count = 0

    def checked(factory):
        def made(core, interpreter, original, *more):
            quick = factory.__wrapped__(core, interpreter, original, *more)

            def call(*operands, **options):
                nonlocal count
                if "_semantic" in options:
                    return quick(*operands, **options)
                try:
                    semantic = interpreter.interpreter_semantic
                    theirs = original(*operands, **options, _semantic=semantic)
                except Exception:
                    theirs = None
                if theirs is None:
                    with pytest.raises(Exception):  # noqa: B017
                        quick(*operands, **options)
                    raise TypeError
                for _ in range(2):  # the second is quick
                    same(quick(*operands, **options), theirs)
                count += 1
                return theirs

            return call

        return made

    def run(body, memory):
        for name in COMPUTED:
            factory = getattr(quick_interpreter, name)
            monkeypatch.setattr(quick_interpreter, name, checked(factory))
        with paths._interpreted():
            kernel[(1,)](memory, body)
        return count

    return run


def tried(function, *operands, **options):
    try:
        return function(*operands, **options)
    except TypeError:
        return None


def tensor(dtype, shape):
    """-1, 0, 1, 2, or -1 alone."""
    x = (tl.arange(0, 4) - 1) if shape else tl.program_id(0) - 1
    for _ in shape[1:]:
        x = x[None, :]
    return tl.broadcast_to(x, shape).to(dtype) if shape else x.to(dtype)


def tensors():
    return [tensor(dtype, shape) for dtype in DTYPES for shape in SHAPES]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", quick_interpreter.BINARY)
def test_operators(name, compare):
    def body(place):
        for x, y in itertools.product(tensors(), [*tensors(), *NUMBERS, place]):
            for each in (f"__{name}__", f"__r{name}__"):
                if hasattr(tl.tensor, each):
                    tried(getattr(tl.tensor, each), x, y)

    assert compare(body, torch.zeros(4)) > 50


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64], ids=str
)
def test_addresses_and_loads(dtype, compare):
    def body(place):
        numbers = [tensor(tl.int32, shape) + 1 for shape in SHAPES]
        numbers += [tensor(tl.int64, shape) + 1 for shape in SHAPES]
        places = [place, *(place + number for number in numbers)]
        for at, number in itertools.product(places, [*numbers, 2, tl.constexpr(-1)]):
            at + number
        others = [None, 0, 0.5, tensor(tl.float32, ()), tensor(tl.float32, (4,))]
        for at in places:
            tl.load(at)
            for shape, other in itertools.product(SHAPES, others):
                if shape == () or at.shape:
                    tried(tl.load, at, mask=tensor(tl.int1, shape), other=other)

    assert compare(body, torch.arange(8).to(dtype)) > 50


def test_choices_casts_and_dims(compare):
    def body(place):
        for x in tensors():
            for dtype in DTYPES:
                x.to(dtype)
                tl.cast(x, dtype)
                tried(x.to, dtype, bitcast=True)
                tried(tl.cast, 3, dtype), tried(tl.cast, 2**40, dtype)
            for places in ((None,), (None, slice(None)), (slice(None), None, None)):
                if len(x.shape) == sum(place is not None for place in places):
                    x[places]
            for shape in SHAPES:
                y = tensor(x.dtype, shape)
                z = y / y  # NaN at 0
                tl.minimum(x, y), tl.maximum(y, 1.5), tl.minimum(y, z), tl.maximum(z, y)
                tl.minimum(1, y), tl.maximum(1, z)
                for condition in (tensor(tl.int1, (4,)), tensor(tl.int1, (2, 1, 4))):
                    for other in (y, 0, 0.5, tensor(tl.float64, ())):
                        tl.where(condition, x, other), tl.where(condition, other, x)
                for condition in (True, False, tl.constexpr(True)):
                    tl.where(condition, x, y), tl.where(condition, y, z)

    assert compare(body, torch.zeros(4)) > 500


@triton.jit
def sort_kernel(x, out, DESCENDING: tl.constexpr):
    i = 8 * tl.arange(0, 4)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out + i, tl.sort(tl.load(x + i), descending=DESCENDING))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize("descending", [True, False])
def test_sort(descending, dtype):
    x = torch.randint(-9, 9, (4, 8)).to(dtype)
    out = torch.empty_like(x)
    with paths._interpreted():
        sort_kernel[(1,)](x, out, descending)
    assert torch.equal(out, x.sort(descending=descending).values)


@triton.jit
def combine(x, n, y, m):
    return 0.5 * x - y, n ^ (m + 1)


@triton.jit
def reduce_kernel(x, n, out, counts, AXIS: tl.constexpr, KEEP: tl.constexpr):
    i = 16 * tl.arange(0, 2)[:, None, None] + 4 * tl.arange(0, 4)[None, :, None]
    i += tl.arange(0, 4)[None, None, :]
    a, b = tl.reduce((tl.load(x + i), tl.load(n + i)), AXIS, combine, keep_dims=KEEP)
    if AXIS == 0:
        at = tl.arange(0, 16).reshape([1, 4, 4] if KEEP else [4, 4])
    else:
        at = tl.arange(0, 8).reshape(([2, 1, 4] if AXIS == 1 else [2, 4, 1]) if KEEP else [2, 4])
    tl.store(out + at, a)
    tl.store(counts + at, b)


@triton.jit
def reduce_row_kernel(x, n, out, counts, KEEP: tl.constexpr):
    i = tl.arange(0, 8)
    a, b = tl.reduce((tl.load(x + i), tl.load(n + i)), 0, combine, keep_dims=KEEP)
    at = tl.arange(0, 1) if KEEP else 0
    tl.store(out + at, a)
    tl.store(counts + at, b)


@pytest.mark.parametrize("keep_dims", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_reductions(axis, keep_dims):
    """Along a dim of three, or along the only one."""
    x, n = torch.randn(8 if axis is None else (2, 4, 4)), torch.arange(32)
    n = n[: x.numel()].view_as(x)
    total, count = x.select(axis or 0, 0), n.select(axis or 0, 0)
    for i in range(1, x.shape[axis or 0]):
        total = 0.5 * total - x.select(axis or 0, i)
        count = count ^ (n.select(axis or 0, i) + 1)
    out, counts = torch.empty_like(total), torch.empty_like(count)
    with paths._interpreted():
        if axis is None:
            reduce_row_kernel[(1,)](x, n, out, counts, keep_dims)
        else:
            reduce_kernel[(1,)](x, n, out, counts, axis, keep_dims)
    assert torch.equal(out, total) and torch.equal(counts, count)
