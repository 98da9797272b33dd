"""Random calls of the Triton kernels: combinations of sizes, dtypes, batch dims, layouts, masks
and outputs. They find elements that no program or a wrong one writes, which differ much from plain
PyTorch in float64. Other tests judge roundings."""

from __future__ import annotations

import math
import random

import pytest
import torch
from layouts import every_second_feature, every_third_row, surrounded, transposed, unaligned
from oracle import error
from paths import DEVICE

from additive_attn.backends.triton import arguments, plans, prepare, tiles
from additive_attn.ops import dispatch
from additive_attn.spec.call import Call, lse_dtype

pytestmark = pytest.mark.triton

NEAR = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}
LAYOUTS = (every_second_feature, every_third_row, surrounded, transposed, unaligned)
SEEDS = [
    pytest.param(range(16), id="some"),
    pytest.param(range(16, 64), id="many", marks=pytest.mark.sweep),
]


class Draw(random.Random):
    """Draws the arguments of one call."""

    def __init__(self, seed):
        super().__init__(seed)
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.dtype = self.choice((torch.float32, *NEAR))
        self.full = self.choice(((), (1,), (2,), (2, 2), (3, 1), (self.size(2),)))
        self.rows = self.size(1, 1, 2, 5, 9)
        self.keys = self.size(1, 3, 17, 40, 70)
        self.hidden = self.size(1, 4, 33, 72, 130, 260)
        self.values = self.size(1, 5, 17, 40)

    def size(self, *sizes):
        return 0 if self.some(0.05) else self.choice(sizes)

    def some(self, share=0.5):
        return self.random() < share

    def batch(self):
        """Returns the batch dims of one tensor. A dim may be 1, and the first ones may be left
        out."""
        sizes = [n if self.some(0.7) else 1 for n in self.full]
        return sizes[self.randrange(len(sizes) + 1) if self.some(0.2) else 0 :]

    def normal(self, *shape, spread=1.0, dtype=None):
        x = spread * torch.randn(shape, generator=self.generator, device="cpu")
        x = x.to(DEVICE, self.dtype if dtype is None else dtype)
        return self.choice(LAYOUTS)(x) if x.dim() > 1 and self.some() else x

    def integers(self, most, *shape):
        return torch.randint(0, most + 1, shape, generator=self.generator, device="cpu").to(DEVICE)

    def one_of(self, size):
        return self.choice((size, size, min(size, 1)))

    def mask(self, rows):
        """Returns a bool mask, a float one with masked pairs or without, or None."""
        mask = self.normal(*self.batch(), self.one_of(rows), self.one_of(self.keys))
        allowed = mask < self.choice((-9.0, 0.3, 1.0))
        return self.choice((None, None, allowed, mask.masked_fill(~allowed, -math.inf), mask))

    def ranges(self, rows):
        """Returns lengths and starts, with the same shape if there are both."""
        shape = *self.batch(), self.one_of(rows)
        return [self.integers(self.keys + 1, *shape) if self.some(0.3) else None for _ in range(2)]

    def dropout(self):
        if self.some(0.7):
            return None, 0.0
        return self.integers(2**40, *self.batch()), self.choice((0.2, 0.8, 1.0))

    def needs(self, count):
        """Returns which gradients are needed. All numbers of gradients are equally likely."""
        chosen = self.sample(range(count), self.randint(1, count))
        return [n in chosen for n in range(count)]

    def call(self):
        spread = self.choice((0.1, 1.0, 5.0))
        window = self.choice(((-1, -1),) * 3 + ((-1, 0), (4, -1), (2, 7)))
        query = self.normal(*self.batch(), self.rows, self.hidden, spread=spread)
        key = self.normal(*self.batch(), self.keys, self.hidden, spread=spread)
        value = self.normal(*self.batch(), self.keys, self.values)
        heads = self.batch() if self.some(0.3) else ()
        weight = self.normal(*heads, self.hidden, spread=2 / max(self.hidden, 1) ** 0.5)
        table = blocks = None
        if self.rows and self.keys and self.some(0.2):
            blocks = self.integers(1, 2, 4, 16).bool()
            table = self.integers(3, *self.batch(), -(-self.rows // 4), -(-self.keys // 16)).int()
        return Call(
            query, key, value, weight, self.mask(self.rows), *self.ranges(self.rows), table,
            blocks, *window, *self.dropout(), self.choice((1.0, 1.0, -0.5, 0.0)),
        )  # fmt: skip

    def upstream(self, outputs):
        """Returns gradients of some outputs. Empty rows have none of lse."""
        given = [self.normal(*x.shape, dtype=x.dtype) if self.some(0.6) and x.numel() else None
                 for x in outputs]  # fmt: skip
        if len(given) == 3 and given[2] is not None:
            given[2] = given[2].masked_fill(outputs[2].isinf(), 0.0)
        return given


@pytest.fixture
def host(monkeypatch):
    """Splits calls as for few or many multiprocessors, and for small or large workspaces."""

    def chosen(draw):
        plans.forget()
        number = draw.choice((1, 4, 132))
        for module in (arguments, prepare):
            monkeypatch.setattr(module, "processors", lambda device: number)
        monkeypatch.setattr(tiles, "SMALL_PAIRS", draw.choice((0, 2**22)))
        monkeypatch.setattr(tiles, "WORKSPACE_ELEMENTS", draw.choice((2**11, 2**24, 2**24)))

    yield chosen
    monkeypatch.undo()
    plans.forget()


def doubled(arguments):
    return [
        x.to(torch.float64, copy=True)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in arguments
    ]


def compare(draw, names, operator, *arguments):
    """Compares the results of an operator with plain PyTorch's, and returns them."""
    others = doubled(arguments)
    ours = getattr(torch.ops.additive_attn, operator)(*arguments)
    exact = dispatch.PLAIN[operator](*others)
    if len(names) == 1:
        ours, exact = [ours], [exact]
    if operator == "step_backward" and arguments[-1] is not None:  # an output
        names, ours, exact = (*names, "dk"), (*ours, arguments[-1]), (*exact, others[-1])
    for name, mine, best in zip(names, ours, exact, strict=True):
        finite = best[best.isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        difference = error(mine, best)
        assert difference <= NEAR[draw.dtype] * (1 + largest), f"{name}: {difference:.3g}"
    return ours


def attention(draw):
    call = draw.call()
    outputs = compare(draw, ("out", "weights", "lse"), "forward", *call, draw.some())
    upstream, needs = draw.upstream(outputs), draw.needs(5)
    names = ("dq", "dk", "dv", "dw", "dmask")
    compare(draw, names, "backward", *upstream, *call, outputs[2], *needs)


def scores(draw):
    call = draw.call()
    scored = call.query, call.key, call.weight, *call.masking, call.scale
    (found,) = compare(draw, ("scores",), "scores", *scored)
    upstream, needs = draw.normal(*found.shape), draw.needs(4)
    compare(draw, ("dq", "dk", "dw", "dmask"), "scores_backward", upstream, *scored, *needs)


def step(draw):
    draw.rows = 1
    call, location = draw.call(), (None, None)
    if draw.some(0.7):
        filters = draw.choice((1, 5, 17))
        of_weight = draw.batch() if draw.some(0.2) else ()
        location = (
            draw.normal(*draw.batch(), filters, draw.keys),
            draw.normal(*of_weight, filters, draw.hidden, spread=filters**-0.5),
        )
    arguments = *call[:4], None, *location, *call[4:6], *call.options
    out, weights, lse = compare(draw, ("out", "weights", "lse"), "step", *arguments)
    upstream, grad_key = draw.upstream((out, weights, lse)), None
    if location[0] is not None and draw.some():
        shape = draw.choice((lse.shape[:-1], call.key.shape[:-2]))
        grad_key = draw.normal(*shape, *call.key.shape[-2:], dtype=lse_dtype(draw.dtype))
    names = ("dq", "dscores", "kept", "dlocation", "dlocation_weight", "dw")
    compare(draw, names, "step_backward", *upstream, *arguments, weights, lse, grad_key)


@pytest.mark.parametrize("kind", [attention, scores, step])
@pytest.mark.parametrize("seeds", SEEDS)
def test_random_calls(kind, seeds, host):
    wrong = []
    for seed in seeds:
        draw = Draw(seed)
        host(draw)
        try:
            kind(draw)
        except Exception as problem:  # all of them are reported
            wrong.append(f"{seed}: {type(problem).__name__}: {problem}")
    assert not wrong, "\n".join(wrong)
