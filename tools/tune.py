"""Times other block sizes of the Triton kernels than those in ``backends/triton/tiles.py``.

    python -m tools.tune                                   a few shapes (minutes)
    python -m tools.tune --shapes 1x8192x8192x128x128 --modes full
    python -m tools.tune --take results.csv                what won, to backends/triton/tuned.py

An offline tool: the package never tunes itself. One choice is changed at a time, every result is
checked against fp64 before it is timed, and all choices are timed round-robin. ``--take`` keeps,
of each function, the choice that is faster on average over the shapes where it was timed, by more
than noise and nowhere slower by as much; ``tiles.py`` reads what it writes. In Triton's
interpreter (ADDITIVE_ATTN_CPU=triton TRITON_INTERPRET=1, --device cpu) it shows that every choice
computes the same; its times mean nothing.
"""

from __future__ import annotations

import ast
import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from additive_attn.backends.triton import plans, tiles, tuned
from benchmarks import measure
from benchmarks.arguments import parser_of
from benchmarks.cases import Case, make_inputs, parse
from benchmarks.providers import PROVIDERS, Runner
from benchmarks.rows import RESULTS, machine

SHAPES = "1x4096x4096x128x128,8x512x512x256x256,32x50x50x1024x1024,1x16x100000x256x512"
COLUMNS = ["shape", "mode", "name", "changes", "median_ms", "ratio", "note"]
OWN = "as it is"
NOISE = 0.03  # of a ratio

# What replaces a number of ``tiles``, or changes the fields of what a function of it returns.
CHOICES: dict[str, list[Any]] = {
    "WORKSPACE_ELEMENTS": [2**power for power in (22, 23, 25, 26)],
    "score_tile": [{"RM": 4, "TM": 16}, {"RN": 2}, {"RN": 2, "TN": 32}, {"TM": 16}],
    "attend_tile": [{"RN": 8}, {"TN": 8}, {"RM": 8}, {"RM": 4}, {"RM": 2}, {"TM": 16}],
    "attend_columns": [32, 64, 128],
    "gradient_tile": [{"RX": 4}, {"TX": 4, "TF": 8}, {"TX": 2, "TF": 16}],
    "key_sum_tile": [{"TILES": 4}, {"FEATURES": 64}, {"BLOCK": 32}, {"num_warps": 2}],
    "GRADIENT_REGISTERS": [255, 128],
}  # fmt: skip
# Those that matter in backward alone.
BACKWARD = {
    "WORKSPACE_ELEMENTS", "score_tile", "gradient_tile", "key_sum_tile",
    "GRADIENT_REGISTERS",
}  # fmt: skip


@contextmanager
def chosen(name: str, change: Any) -> Iterator[None]:
    kept = getattr(tiles, name)
    setattr(tiles, name, tiles.changed(kept, change))
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
    turn = OWN, ""

    def begin(label: tuple[str, str]) -> None:
        """Discards the launch plans of another choice, which hold its tiles."""
        nonlocal turn
        if label != turn:
            plans.forget()
            turn = label

    def as_it_is() -> object:
        begin((OWN, ""))
        return call()

    actions: dict[tuple[str, str], Callable[[], object]] = {(OWN, ""): as_it_is}
    notes: dict[tuple[str, str], str] = {}

    def under(name: str, change: Any, runner: Runner) -> Callable[[], object]:
        plans.forget()
        with chosen(name, change):
            reference.check(f"{name} {change}", runner, mode)

        def action() -> object:
            begin((name, repr(change)))
            with chosen(name, change):
                return call()

        return action

    for name, choices in CHOICES.items():
        if not hasattr(tiles, name) or (name in BACKWARD and mode == "forward"):
            continue
        for change in choices:
            label = name, repr(change)
            try:
                actions[label] = under(name, change, runner)
            except AssertionError:
                raise
            except Exception as error:
                # For example too much shared memory: the choice is not available here.
                notes[label] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    with torch.set_grad_enabled(mode == "full"):
        samples = measure.interleave(actions, device, budget, rounds)
    medians = {label: measure.quantiles(seconds)[0] for label, seconds in samples.items()}
    own = medians[OWN, ""]
    for (name, changes), median in sorted(medians.items(), key=lambda item: item[1]):
        yield {"name": name, "changes": changes, "median_ms": f"{median:.5g}",
               "ratio": f"{median / own:.3f}", "note": ""}  # fmt: skip
    for (name, changes), note in notes.items():
        yield {"name": name, "changes": changes, "median_ms": "", "ratio": "", "note": note}


def winners(rows: list[dict[str, str]]) -> dict[str, Any]:
    """The changes to take, by what they change."""
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row["name"] != OWN:
            ratio = float(row["ratio"]) if row["ratio"] else math.inf
            ratios[row["name"], row["changes"]].append(ratio)
    best: dict[str, tuple[float, Any]] = {}
    for (name, changes), found in ratios.items():
        mean = math.prod(found) ** (1 / len(found))
        if mean < 1 - NOISE and max(found) < 1 + NOISE and mean < best.get(name, (1.0,))[0]:
            best[name] = mean, ast.literal_eval(changes)
    return {name: changes for name, (_, changes) in best.items()}


def take(path: Path, to: Path) -> None:
    with path.open(newline="") as file:
        found = winners(list(csv.DictReader(file)))
    text = to.read_text()
    line = f"TUNED: dict[str, Any] = {found!r}\n"
    to.write_text(re.sub(r"^TUNED.*\n", lambda _: line, text, flags=re.MULTILINE))
    print(f"{to}: {line}", end="")


def main() -> None:
    parser = parser_of("tools.tune", __doc__)
    parser.add_argument("--shapes", default=SHAPES, help="suites or BxLqxLkxHxDv, by commas")
    parser.add_argument("--modes", default="forward,full", help="forward, full or both")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each choice")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per choice")
    parser.add_argument("--output", type=Path, help="csv file (results/MACHINE/tuning.csv)")
    parser.add_argument("--take", type=Path, metavar="CSV", help="make the winners the package's")
    arguments = parser.parse_args()
    if arguments.take:
        take(arguments.take, Path(tuned.__file__))
        return
    device = torch.device(arguments.device)
    path = arguments.output
    if path is None:
        folder = re.sub(r"[^a-z0-9]+", "-", str(machine(device)["name"]).lower()).strip("-")
        path = RESULTS / folder / "tuning.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as output:
        writer = csv.DictWriter(output, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for _, case in parse(arguments.shapes):
            for mode in arguments.modes.split(","):
                print(f"{case} {mode}")
                for row in tune(case, mode, device, arguments.budget, arguments.rounds):
                    writer.writerow({"shape": str(case), "mode": mode, **row})
                    output.flush()
                    time = f"{row['ratio']:>6} {row['median_ms']:>9} ms"
                    print(f"  {time}  {row['name']} {row['changes']} {row['note']}", flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
