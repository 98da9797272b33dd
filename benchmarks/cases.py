"""What is measured: sizes of published models, a scaling series, masks, the smallest call."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from additive_attn import PlainAdditiveAttention

EVERYBODY: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One problem: query ``(B, Lq, H)``, key ``(B, Lk, H)``, value ``(B, Lk, Dv)``.

    With ``module`` the whole layer is measured, projections included, on unbatched inputs of Dv
    features. ``half_lengths`` gives sequence b the length Lk/2 + b mod (Lk/2).
    """

    batch: int
    query_len: int
    key_len: int
    hidden: int
    value_dim: int
    what: str = ""
    module: bool = False
    is_causal: bool = False
    window: tuple[int, int] | None = None
    half_lengths: bool = False
    dropout_p: float = 0.0
    modes: tuple[str, ...] = ("forward", "full")
    providers: tuple[str, ...] = EVERYBODY

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.query_len, self.key_len, self.hidden, self.value_dim

    @property
    def options(self) -> str:
        parts = ["module"] * self.module + ["causal"] * self.is_causal
        if self.window is not None:
            parts.append(f"window {self.window[0]}+{self.window[1]}")
        parts += ["half lengths"] * self.half_lengths
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        return ", ".join(parts)

    def __str__(self) -> str:
        return f"{self.shape} {self.options}".rstrip()


def square(length: int, **options: object) -> Case:
    case = Case(1, length, length, 128, 128, f"self-attention, L = {length}")
    return replace(case, **options)  # type: ignore[arg-type]


SPEED = [
    Case(1, 1, 10, 32, 20, "smallest call"),
    Case(1, 1, 10, 32, 20, "smallest call of the layer", module=True),
    Case(32, 1, 270, 128, 512, "speech synthesis, decoder step (Tacotron 2)"),
    Case(30, 1, 750, 320, 320, "speech recognition, decoder step (ESPnet)"),
    Case(64, 1, 400, 512, 512, "summarisation, decoder step"),
    Case(1280, 1, 66, 1024, 1024, "attention step of PyTorch's TensorExpr benchmark"),
    Case(128, 10, 128, 1024, 1024, "attention of PyTorch's TensorExpr benchmark"),
    Case(128, 50, 50, 1024, 1024, "translation, training (GNMT)"),
    Case(256, 256, 256, 64, 64, "benchmark of Keras's AdditiveAttention"),
    Case(1, 16, 100_000, 256, 512, "pooling of 100,000 instances"),
    square(1024),
]
TWO = ("fused", "pytorch path", "dot product")
SCALING = [square(2**power) for power in range(9, 14)] + [square(2**14, providers=TWO)]
OURS = ("fused", "pytorch path")
BATCH = Case(16, 512, 512, 128, 128, "16 sequences of 512", providers=OURS)
MASKS = [
    square(4096, providers=OURS),
    square(4096, providers=OURS, is_causal=True),
    square(8192, providers=OURS),
    square(8192, providers=OURS, window=(64, 64)),
    BATCH,
    replace(BATCH, half_lengths=True),
    replace(BATCH, dropout_p=0.1),
]
GPU = [
    square(4096),
    Case(8, 512, 512, 64, 64, "8 sequences of 512"),
    Case(32, 50, 50, 1024, 1024, "translation, training"),
    next(case for case in SPEED if case.shape == (64, 1, 400, 512, 512)),
    SPEED[0],
    next(case for case in SPEED if case.key_len == 100_000),
    Case(1, 8, 10, 32, 20, "8 queries of 10 keys"),
    square(512),
]
# What a user of plain PyTorch meets between the rows above: small and medium calls with options.
OPTIONS = [
    Case(*shape, what, providers=("plain", *OURS), **options)
    for what, shapes, choices in (
        (
            "small call",
            [(1, 1, 10, 32, 20), (8, 1, 10, 32, 20), (8, 5, 20, 32, 20), (16, 12, 40, 32, 32)],
            ({}, {"half_lengths": True}, {"is_causal": True}, {"dropout_p": 0.1}),
        ),
        ("small call of the layer", [(1, 8, 10, 32, 20)], ({"module": True},)),
        (
            "medium call",
            [(16, 64, 64, 64, 64), (20, 50, 50, 100, 100), (8, 100, 100, 128, 128)],
            ({}, {"half_lengths": True}, {"is_causal": True}, {"dropout_p": 0.1}),
        ),
    )
    for options in choices
    for shape in shapes
]
QUICK = [SPEED[0], replace(SPEED[4], modes=("forward",)), square(1024)]

SUITES = {
    "speed": SPEED, "scaling": SCALING, "masks": MASKS, "options": OPTIONS, "gpu": GPU,
    "quick": QUICK,
}  # fmt: skip
# What the figure and the tables of the README are made from.
FIRST_PAGE = "first-page"


def parse(text: str) -> list[tuple[str, Case]]:
    """``speed,scaling`` or ``1x1024x1024x128x128`` (B x Lq x Lk x H x Dv), or a mixture, as
    suites and cases."""
    chosen: list[tuple[str, Case]] = []
    for name in text.split(","):
        if name == FIRST_PAGE:
            chosen += parse("speed,scaling,masks")
        elif name in SUITES:
            known = {case for _, case in chosen}
            chosen += [(name, case) for case in SUITES[name] if case not in known]
        else:
            try:
                sizes = [int(size) for size in name.split("x")]
                chosen.append(("custom", Case(*sizes)))  # type: ignore[arg-type]
                assert len(sizes) == 5 and min(sizes) > 0
            except (ValueError, TypeError, AssertionError):
                raise SystemExit(
                    f"{name!r} is no suite and no shape; {', '.join([FIRST_PAGE, *SUITES])} and "
                    "BxLqxLkxHxDv are, for example 1x1024x1024x128x128."
                ) from None
    return chosen


def name_of(shape: tuple[int, ...], options: str) -> str:
    """What a shape is, for rows without a description."""
    known = {
        (case.shape, case.options): case.what
        for suite in reversed(SUITES.values())
        for case in suite
    }
    return known.get((shape, options), "")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. ``blocked`` is the dense form of its masks, True = do not attend."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    grad_out: Tensor
    lengths: Tensor | None = None
    blocked: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def pick(self, batches: Tensor, rows: Tensor) -> Inputs:
        """The same problem for a few sequences and a few of their queries."""
        if self.query.dim() == 2:
            return self
        blocked = self.blocked
        if blocked is not None:
            blocked = blocked[batches] if blocked.shape[0] > 1 else blocked
            blocked = blocked[:, rows] if blocked.shape[1] > 1 else blocked
        return replace(
            self,
            query=self.query[batches][:, rows],
            key=self.key[batches],
            value=self.value[batches],
            grad_out=self.grad_out[batches][:, rows],
            lengths=None if self.lengths is None else self.lengths[batches],
            blocked=blocked,
        )

    def double(self) -> Inputs:
        tensors = {each.name: getattr(self, each.name) for each in fields(self)[:5]}
        return replace(
            self,
            **{name: tensor.double() for name, tensor in tensors.items()},
            state={name: tensor.double() for name, tensor in self.state.items()},
        )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    if case.module:
        layer = PlainAdditiveAttention(case.value_dim, case.hidden).to(device, dtype)
        lengths_of = (case.query_len, case.key_len, case.key_len)
        query, key, value = (randn(length, case.value_dim) for length in lengths_of)
        weight, grad_out = randn(case.hidden), randn(case.query_len, case.value_dim)
        return Inputs(query, key, value, weight, grad_out, state=layer.state_dict())

    blocked = lengths = None
    row = torch.arange(case.query_len, device=device)[:, None]
    column = torch.arange(case.key_len, device=device)[None, :]
    if case.is_causal:
        blocked = (column > row)[None]
    elif case.window is not None:
        left, right = case.window
        blocked = ((column < row - left) | (column > row + right))[None]
    elif case.half_lengths:
        half = case.key_len // 2
        lengths = half + torch.arange(case.batch, device=device) % half
        blocked = column >= lengths[:, None, None]
    return Inputs(
        query=randn(case.batch, case.query_len, case.hidden),
        key=randn(case.batch, case.key_len, case.hidden),
        value=randn(case.batch, case.key_len, case.value_dim),
        weight=randn(case.hidden) / case.hidden**0.5,
        grad_out=randn(case.batch, case.query_len, case.value_dim),
        lengths=lengths,
        blocked=blocked,
    )
