"""Times other block sizes of the Triton kernels than those in ``backends/triton/tiles.py``.

    python -m tools.tune                                   a few shapes (minutes)
    python -m tools.tune --shapes 1x8192x8192x128x128 --modes full

An offline tool: the package never tunes itself. One choice is changed at a time, every result is
checked against fp64 before it is timed, and all choices run in turns. What wins by more than noise
on several shapes belongs into ``tiles.py``. In Triton's interpreter (ADDITIVE_ATTN_CPU=triton
TRITON_INTERPRET=1, --device cpu) it shows that every choice computes the same; its times say
nothing.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from additive_attn.backends.triton import tiles
from benchmarks import measure
from benchmarks.cases import Case, make_inputs, parse
from benchmarks.providers import PROVIDERS, Runner
from benchmarks.rows import RESULTS, machine

SHAPES = "1x4096x4096x128x128,8x512x512x256x256,32x50x50x1024x1024,1x16x100000x256x512"


def gradient(RX: int, TX: int, RH: int, TH: int) -> dict[str, int]:
    return {"RX": RX, "TX": TX, "RH": RH, "TH": TH, "num_warps": TX * TH // 32}


def values(BM: int, BN: int, BD: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BM": BM, "BN": BN, "BD": BD, "num_warps": num_warps, "num_stages": num_stages}


LONG = 24  # shorter rows or columns have tiles of their own, which are left alone

# What replaces an attribute of ``tiles``: a number, or what a function returns.
CHOICES: dict[str, list[Any]] = {
    "WORKSPACE_ELEMENTS": [2**power for power in (21, 22, 24, 25)],
    "score_tile": [
        tiles.Tile(*sizes)
        for sizes in ((4, 16, 4, 8), (4, 8, 4, 16), (4, 8, 4, 32), (2, 16, 4, 16), (4, 16, 2, 16))
    ],
    "value_tile": [
        values(*sizes)
        for sizes in ((64, 32, 32, 4, 2), (64, 32, 64, 4, 1), (64, 32, 64, 8, 2),
                      (64, 16, 64, 4, 1), (32, 32, 32, 4, 1))
    ],
    "gradient_tile": [
        gradient(*sizes)
        for sizes in ((4, 16, 2, 16), (2, 16, 4, 16), (1, 32, 8, 8), (2, 16, 4, 8), (2, 32, 2, 8))
    ],
}  # fmt: skip


@contextmanager
def chosen(name: str, choice: Any) -> Iterator[None]:
    kept = getattr(tiles, name)

    def function(length: int, *rest: Any) -> Any:
        return choice if length >= LONG else kept(length, *rest)

    setattr(tiles, name, function if callable(kept) else choice)
    try:
        yield
    finally:
        setattr(tiles, name, kept)


def tune(
    case: Case, mode: str, device: torch.device, budget: float, rounds: int
) -> Iterator[dict[str, object]]:
    """A row per choice; ``ratio`` is its time over that of the package's own choice."""
    inputs = make_inputs(case, torch.float32, device)
    reference = measure.Reference(case, inputs)
    fused = next(provider for provider in PROVIDERS if provider.name == "fused")
    runner = fused.runner(case, inputs)
    assert runner is not None
    call = measure.action(runner, inputs, mode)
    reference.check("the package's choice", runner, mode)
    own = "as it is"
    actions: dict[str, Callable[[], object]] = {own: call}
    notes: dict[str, str] = {}

    def under(name: str, choice: Any, runner: Runner) -> Callable[[], object]:
        with chosen(name, choice):
            reference.check(f"{name} {choice}", runner, mode)

        def action() -> object:
            with chosen(name, choice):
                return call()

        return action

    for name, choices in CHOICES.items():
        if name == "gradient_tile" and mode == "forward":
            continue
        for choice in choices:
            label = f"{name} = {choice}"
            try:
                actions[label] = under(name, choice, runner)
            except AssertionError:
                raise
            except Exception as error:
                # Too much shared memory, say: the choice is not to be had here.
                notes[label] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    with torch.set_grad_enabled(mode == "full"):
        samples = measure.interleave(actions, device, budget, rounds)
    medians = {label: measure.quantiles(seconds)[0] for label, seconds in samples.items()}
    for label, median in sorted(medians.items(), key=lambda item: item[1]):
        yield {"choice": label, "median_ms": f"{median:.5g}",
               "ratio": f"{median / medians[own]:.3f}", "note": ""}  # fmt: skip
    for label, note in notes.items():
        yield {"choice": label, "median_ms": "", "ratio": "", "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", default=SHAPES, help="suites or BxLqxLkxHxDv, by commas")
    parser.add_argument("--modes", default="forward,full", help="forward, full or both")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each choice")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per choice")
    parser.add_argument("--output", type=Path, help="csv file (results/MACHINE/tuning.csv)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    path = arguments.output
    if path is None:
        folder = re.sub(r"[^a-z0-9]+", "-", str(machine(device)["name"]).lower()).strip("-")
        path = RESULTS / folder / "tuning.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as output:
        writer = csv.DictWriter(
            output, ["shape", "mode", "choice", "median_ms", "ratio", "note"], lineterminator="\n"
        )
        writer.writeheader()
        for _, case in parse(arguments.shapes):
            for mode in arguments.modes.split(","):
                print(f"{case} {mode}")
                for row in tune(case, mode, device, arguments.budget, arguments.rounds):
                    writer.writerow({"shape": str(case), "mode": mode, **row})
                    output.flush()
                    time = f"{row['ratio']:>6} {row['median_ms']:>9} ms"
                    print(f"  {time}  {row['choice']} {row['note']}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
