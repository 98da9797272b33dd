"""The cases of decoders that are measured, and the speeds that are required."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.decoders import calls
from benchmarks.decoders.hoisting import hoisting
from benchmarks.decoders.loops import Loop, loop_problem
from benchmarks.decoders.originals import Layer, Location
from benchmarks.decoders.problem import Problem

COMPILED = "torch.compile"
ONCE = "fused"  # keys projected once
EACH = "fused, keys at each step"


@dataclass(frozen=True)
class Bar:
    """``ours`` takes at most 1 / ``ratio`` of the time of ``other``."""

    other: str
    ratio: float
    ours: str = "fused"


@dataclass(frozen=True)
class Case:
    """``sizes`` are B, Lk, H, Dv and T, or the shape of a single call. ``part`` names the measured
    part of a decoder."""

    name: str
    what: str
    part: str
    sizes: tuple[int, ...]
    make: Callable[..., Problem]
    arguments: tuple[Any, ...]
    bars: tuple[Bar, ...] = ()
    mode: str = "full"
    group: str = "layers"

    def build(self, quick: bool = False) -> Problem:
        """``quick``: tiny sizes, which only show that the problem runs."""
        if not quick:
            return self.make(*self.arguments)
        return self.make(*map(quick_size, self.arguments))

    def of_steps(self, steps: int) -> Case:
        """Returns the same loop with so many steps. Cases without steps are unchanged."""
        loop = self.arguments[0]
        if not isinstance(loop, Loop):
            return self
        sizes = (*self.sizes[:4], steps)
        return replace(self, sizes=sizes, arguments=(replace(loop, steps=steps),))


def quick_size(argument: Any) -> Any:
    if isinstance(argument, Loop):
        return replace(argument, batch=2, keys=9, steps=3)
    return min(argument, 8) if isinstance(argument, int) else argument


def bars(plain: float, compiled: float, ours: str = "fused") -> tuple[Bar, ...]:
    return Bar("plain", plain, ours), Bar(COMPILED, compiled, ours)


def loop_case(name: str, what: str, loop: Loop, *asked: Bar, group: str = "layers") -> Case:
    layer = loop.layer
    hidden = layer.hidden_dim if layer else loop.pointer
    values = (layer.value_dim or layer.memory_dim) if layer else loop.pointer
    part = "decoder" if loop.cell_dim else "attention"
    sizes = loop.batch, loop.keys, hidden, values, loop.steps
    return Case(name, what, part, sizes, loop_problem, (loop,), asked, group=group)


# Facts of published code: the sizes, the layers with a bias, the inputs of the location term.
ESPNET = Layer(320, 320, 320, key_bias=True, energy_bias=True, scale=2.0, weighted_sum="sum")
ESPNET_LOCATION = Location(("previous",), 10, 201, uniform=True)
ESPNET_HEADS = replace(ESPNET, query_bias=True, key_bias=False, scale=320**-0.5, value_dim=320)
SPEECHBRAIN = Layer(1024, 512, 1024, query_bias=True, key_bias=True, output_dim=512)
SPEECHBRAIN_LOCATION = Location(("previous",), 10, 201, bias=True, uniform=True, detached=True)
TACOTRON = Layer(
    1024, 512, 128, location=Location(("previous", "cumulative"), filters=32, kernel_size=31)
)
POINTER_GENERATOR = Layer(512, 512, 512, query_bias=True, location=Location(("cumulative",)))
JOEYNMT = Layer(512, 1024, 512)
GNMT = Layer(1024, 1024, 1024, normalize=True)

ESPNET_LOOP = Loop(16, 400, 40, ESPNET)
ESPNET_ATTLOC = replace(ESPNET, location=ESPNET_LOCATION)
SPEECHBRAIN_LOOP = Loop(8, 300, 40, SPEECHBRAIN)
HEADS_LOOP = Loop(16, 400, 40, ESPNET_HEADS, heads=4)
HEADS_ATTLOC = replace(ESPNET_HEADS, location=ESPNET_LOCATION, scale=2.0)

# The four decoders of the documentation: as a whole, and their attention alone.
WHOLE = {
    "tacotron2": (
        "speech synthesis (Tacotron 2), location",
        Loop(32, 150, 200, TACOTRON, input_dim=256, cell_dim=1024),
    ),
    "espnet": (
        "speech recognition (ESPnet), location",
        Loop(16, 400, 40, ESPNET_ATTLOC, input_dim=320, cell_dim=320),
    ),
    "pointer-generator": (
        "summarisation (pointer-generator), coverage",
        Loop(
            16, 400, 100, POINTER_GENERATOR, input_dim=128, feeds=128, cell_dim=256,
            cell_state=True, coverage=True,
        ),
    ),
    "gnmt": (
        "translation (GNMT), content",
        Loop(64, 50, 50, GNMT, input_dim=1024, cell_dim=1024),
    ),
}  # fmt: skip


def alone(loop: Loop) -> Loop:
    return replace(loop, input_dim=0, cell_dim=0, feeds=0, cell_state=False, coverage=False)


DECODERS = [
    loop_case(f"{name}-{part}", what, made, group="decoders")
    for name, (what, loop) in WHOLE.items()
    for part, made in (("decoder", loop), ("attention", alone(loop)))
]
LOOPS = [
    loop_case("attadd", "ESPnet AttAdd", ESPNET_LOOP, *bars(3.5, 2.3)),
    loop_case(
        "attloc", "ESPnet AttLoc", replace(ESPNET_LOOP, layer=ESPNET_ATTLOC), *bars(4, 3)
    ),
    loop_case("attmultiheadadd", "ESPnet AttMultiHeadAdd", HEADS_LOOP, *bars(3.5, 3.5)),
    loop_case(
        "attmultiheadloc", "ESPnet AttMultiHeadLoc", replace(HEADS_LOOP, layer=HEADS_ATTLOC),
        *bars(3, 3),
    ),
    loop_case(
        "speechbrain-content", "SpeechBrain content", SPEECHBRAIN_LOOP, *bars(2.5, 2)
    ),
    loop_case(
        "speechbrain-location", "SpeechBrain location",
        replace(SPEECHBRAIN_LOOP, layer=replace(SPEECHBRAIN, location=SPEECHBRAIN_LOCATION)),
        *bars(3.5, 2.8),
    ),
    loop_case(
        "pointer-generator", "pointer-generator, coverage",
        replace(WHOLE["pointer-generator"][1], batch=8, steps=50), *bars(3.5, 2),
    ),
    loop_case("joeynmt", "JoeyNMT", Loop(64, 40, 40, JOEYNMT), *bars(2, 1.6)),
    loop_case(
        "tacotron2", "Tacotron 2", Loop(32, 150, 50, TACOTRON), *bars(2, 1.8)
    ),
    loop_case(
        "pointer-network", "pointer network, glimpse and pointer",
        Loop(128, 50, 50, None, pointer=128), *bars(1.2, 1, EACH), *bars(2, 1.6, ONCE),
    ),
]  # fmt: skip

# Whole decoders of the code bases without one above. Keys are projected once, in the originals
# too.
CODE_BASES = [
    loop_case(f"{name}-decoder", what, loop, *bars(1, 1), group="codebases")
    for name, what, loop in (
        ("attadd", "ESPnet AttAdd", replace(ESPNET_LOOP, input_dim=320, cell_dim=320)),
        (
            "speechbrain-content", "SpeechBrain content",
            replace(SPEECHBRAIN_LOOP, input_dim=128, cell_dim=1024),
        ),
        (
            "speechbrain-location", "SpeechBrain location",
            replace(
                SPEECHBRAIN_LOOP, input_dim=128, cell_dim=1024,
                layer=replace(SPEECHBRAIN, location=SPEECHBRAIN_LOCATION),
            ),
        ),
        ("joeynmt", "JoeyNMT", Loop(64, 40, 40, JOEYNMT, input_dim=512, cell_dim=512)),
        (
            "opennmt", "OpenNMT-py, input feed",
            Loop(64, 40, 40, Layer(500, 500, 500, query_bias=True), input_dim=500, cell_dim=500),
        ),
        ("d2l", "d2l", Loop(64, 9, 9, Layer(256, 256, 256), input_dim=256, cell_dim=256)),
        (
            "tutorial", "PyTorch tutorial",
            Loop(
                32, 10, 10, Layer(128, 128, 128, True, True, True), input_dim=128, cell_dim=128
            ),
        ),
        *(
            (
                f"coqui-{name}", f"Coqui TTS, {name}",
                Loop(32, 150, 50, TACOTRON, input_dim=256, cell_dim=1024, coqui=weights),
            )
            for name, weights in (
                ("softmax", ("softmax", False)), ("sigmoid", ("sigmoid", False)),
                ("forward", ("softmax", True)),
            )
        ),
    )
]  # fmt: skip
COQUI = [
    replace(
        case, name=case.name.removesuffix("-decoder"), part="attention", group="layers",
        arguments=(alone(case.arguments[0]),),
    )
    for case in CODE_BASES
    if case.name.startswith("coqui")
]  # fmt: skip

SIZES = {
    "tacotron": (32, 150, 128, 512, 50),
    "espnet": (16, 400, 320, 320, 40),
    "joeynmt": (64, 40, 512, 1024, 40),
    "speechbrain": (8, 300, 1024, 512, 40),
}
CALLS = [
    *(
        Case(
            f"pooling-{b}", "pooling with a learned query", "call", (b, keys, hidden, values, 1),
            calls.pooling, (b, keys, hidden, values), bars(vs_plain, vs_compiled),
        )
        for b, keys, hidden, values, vs_plain, vs_compiled in (
            (3520, 20, 200, 300, 1.2, 1.1), (1, 15000, 256, 1024, 1.1, 1.05),
        )
    ),
    *(
        Case(
            f"operators-{name}", f"operators of a content loop ({name})", "operators", sizes,
            calls.operators, sizes, (Bar("gradients at each step", 2.5),),
        )
        for name, sizes in SIZES.items()
    ),
    *(
        Case(
            f"step-{sizes[0]}", "step, forward", "call", (*sizes, 1),
            calls.step, sizes, (Bar("function", 1.0),), "forward",
        )
        for sizes in ((32, 270, 128, 512), (64, 400, 512, 512))
    ),
    Case(
        "step-bf16", "step with a memory in bfloat16, forward", "call", (64, 400, 512, 512, 1),
        calls.half_step, (64, 400, 512, 512), (Bar("fused, float32", 1.6),), "forward",
    ),
    *(
        Case(
            f"half-{mode}", f"self-attention in 16 bits, {mode}", "call",
            (1, 1024, 128, 128, 1024), calls.half, (1, 1024, 128, 128, mode),
            tuple(Bar("fused, float32", 0.95, f"fused, {x}") for x in ("bfloat16", "float16")),
            mode,
        )
        for mode in ("forward", "full")
    ),
    Case(
        "beams", "5 beams of one memory, step, forward", "call", (16, 400, 512, 512, 5),
        calls.beams, (16, 5, 400, 512, 512), (Bar("fused, copied memory", 2.5),), "forward",
    ),
    *(
        Case(
            f"scores-{b}-{rows}-{mode}", f"raw scores, {mode}", "call", (b, keys, hidden, 0, rows),
            calls.scores, (b, rows, keys, hidden, mode),
            (Bar("plain", 2), Bar("fused attention", 1.0)), mode,
        )
        for b, rows, keys, hidden in ((128, 1, 50, 128), (16, 1, 400, 320), (64, 50, 50, 1024))
        for mode in ("forward", "full")
    ),
]  # fmt: skip
HOISTING = [
    Case(
        f"hoisting-{name}", f"keys projected at each step or once, as in {what}", "attention",
        sizes, hoisting, sizes,
        (
            Bar("plain, keys at each step", 1.0, EACH),
            Bar("plain, keys at each step", 1.5, "plain"),
            Bar("plain, keys at each step", 2.0),
        ),
        group="hoisting",
    )
    for name, what, sizes in (
        ("d2l", "d2l", (64, 40, 256, 256, 40)),
        ("opennmt", "OpenNMT-py", (64, 40, 500, 500, 40)),
    )
]  # fmt: skip
CALLS = [replace(case, group="calls") for case in CALLS]
CASES = {case.name: case for case in [*LOOPS, *COQUI, *CALLS, *DECODERS, *CODE_BASES, *HOISTING]}
