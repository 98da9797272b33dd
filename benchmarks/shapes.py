"""What is measured: sizes of published models, a scaling series, masks, the smallest call."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    module: bool = False
    is_causal: bool = False
    window: tuple[int, int] | None = None
    half_lengths: bool = False
    dropout_p: float = 0.0
    modes: tuple[str, ...] = ("forward", "full")

    @property
    def options(self) -> str:
        parts = []
        if self.module:
            parts.append("module")
        if self.is_causal:
            parts.append("causal")
        if self.window is not None:
            parts.append(f"window {self.window[0]}+{self.window[1]}")
        if self.half_lengths:
            parts.append("half lengths")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        return ", ".join(parts)

    def __str__(self) -> str:
        shape = self.batch, self.query_len, self.key_len, self.hidden, self.value_dim
        return f"{shape} {self.options}".rstrip()


def square(length: int, **options: object) -> Case:
    return replace(Case(1, length, length, 128, 128), **options)  # type: ignore[arg-type]


SMALL = [Case(1, 1, 10, 32, 20), Case(1, 1, 10, 32, 20, module=True)]

STEPS = [
    Case(32, 1, 270, 128, 512),  # Tacotron 2, one decoder step
    Case(30, 1, 750, 320, 320),  # ESPnet speech recognition, one decoder step
    Case(64, 1, 400, 512, 512),  # pointer-generator summarisation, one decoder step
    Case(1280, 1, 66, 1024, 1024),  # PyTorch's TensorExpr benchmark, attention layer
    Case(1, 16, 100_000, 256, 512),  # multiple-instance pooling over a whole slide
]

LAYERS = [
    Case(32, 50, 50, 1024, 1024),  # GNMT, a quarter of its batch
    Case(128, 50, 50, 1024, 1024),  # GNMT
    Case(128, 10, 128, 1024, 1024),  # PyTorch's TensorExpr benchmark
    Case(256, 256, 256, 64, 64),  # Keras's own benchmark of AdditiveAttention
]

SCALING = [square(2**power) for power in range(9, 15)]

MASKS = [
    square(4096),
    square(4096, is_causal=True),
    square(8192),
    square(8192, window=(64, 64)),
    Case(16, 512, 512, 128, 128),
    Case(16, 512, 512, 128, 128, half_lengths=True),
    Case(16, 512, 512, 128, 128, dropout_p=0.1),
]

SUITES: dict[str, list[Case]] = {
    "small": SMALL,
    "steps": STEPS,
    "layers": LAYERS,
    "scaling": SCALING,
    "masks": MASKS,
}

QUICK = [
    SMALL[0],
    replace(STEPS[2], modes=("forward",)),
    square(1024),
]


def parse(text: str) -> list[tuple[str, Case]]:
    """``small,scaling`` or ``1x1024x1024x128x128`` (B x Lq x Lk x H x Dv), or a mixture."""
    chosen: list[tuple[str, Case]] = []
    for name in text.split(","):
        if name in SUITES:
            chosen += [(name, case) for case in SUITES[name]]
            continue
        try:
            batch, query_len, key_len, hidden, value_dim = map(int, name.split("x"))
        except ValueError:
            raise SystemExit(
                f"--shapes got {name!r}; it takes {', '.join(SUITES)} or BxLqxLkxHxDv, "
                "for example 1x1024x1024x128x128"
            ) from None
        chosen.append(("custom", Case(batch, query_len, key_len, hidden, value_dim)))
    return chosen
