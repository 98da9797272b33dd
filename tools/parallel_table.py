"""Traffic and time of a step whose sequence is sharded over devices, from formulas.

python -m tools.parallel_table     prints the table of docs/parallel.md

Nothing here is measured on several machines. Time per pair and feature comes from csv files of
benchmarks/results; the constants below are assumptions, each with its name.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from benchmarks.arguments import parser_of

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

POSITIONS = 2**20  # queries and keys of one sequence
HEADS = 16
FEATURES = 64  # H and Dv, per head
ELEMENT_BYTES = 2  # bfloat16
DEVICES = (8, 64, 512)

GPU_LINK = 50e9  # bytes per second and direction: 400 Gbit/s for each device
CPU_LINK = 1.25e9  # 10 Gbit/s for each process
# Per second and for all lanes of an H100: multiprocessors, schedulers, lanes, clock.
GPU_INSTRUCTIONS = 132 * 4 * 32 * 1.755e9


class Machine(NamedTuple):
    name: str
    forward: float  # seconds per pair and feature
    backward: float
    link: float  # bytes per second


class Step(NamedTuple):
    """Of one device."""

    shard: float  # bytes of its keys and values
    forward_bytes: float  # that it sends, and as many that it receives
    backward_bytes: float
    computing: float  # seconds, forward and backward
    sending: float
    together: float  # where the exchange of a block overlaps computing with another


def step(machine: Machine, devices: int) -> Step:
    """Forward sends a shard of keys and values to every other device. Backward sends it again, and
    gradients back."""
    shard = POSITIONS / devices * HEADS * 2 * FEATURES * ELEMENT_BYTES
    pairs = (POSITIONS / devices) ** 2 * HEADS * FEATURES  # of a block, times features
    forward, backward = pairs * machine.forward, pairs * machine.backward
    sent = shard / machine.link
    exchanges = devices - 1
    return Step(
        shard=shard,
        forward_bytes=exchanges * shard,
        backward_bytes=2 * exchanges * shard,
        computing=devices * (forward + backward),
        sending=exchanges * 3 * sent,
        together=forward + backward + exchanges * (max(forward, sent) + max(backward, 2 * sent)),
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def gpu() -> Machine:
    """Its instructions at the rate at which they start: a bound that no kernel reaches."""
    in_all = {
        row["kernel"]: float(row["in_all_per_tanh"]) / GPU_INSTRUCTIONS
        for row in rows(RESULTS / "machine-code.csv")  # the last one: of the newest Triton
        if row["target"] == "sm_90" and row["in_all_per_tanh"] and row["dtype"] == "float32"
    }
    forward, backward = in_all["forward in all"], in_all["backward in all"]
    return Machine("GPU, bound by instructions", forward, backward, GPU_LINK)


def cpu() -> Machine:
    """As measured with two threads."""
    times = {
        row["mode"]: float(row["median_ms"]) / 1e3 / (float(row["Lq"]) * float(row["Lk"]) * 128)
        for row in rows(RESULTS / "amd-epyc-avx512-2t" / "scaling.csv")
        if row["provider"] == "fused" and row["Lq"] == "4096" and row["H"] == "128"
    }
    forward = times["forward"]
    return Machine("CPU process, measured", forward, times["full"] - forward, CPU_LINK)


def main() -> None:
    parser_of("tools.parallel_table", __doc__).parse_args()
    print("| device | devices | keys and values each | sent forward | sent backward | computing | "
          "sending | together |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for machine in (gpu(), cpu()):
        for devices in DEVICES:
            x = step(machine, devices)
            sizes = " | ".join(f"{n / 1e6:,.0f} MB" for n in x[:3])
            times = " | ".join(f"{n:,.0f} s" if n >= 100 else f"{n:.3g} s" for n in x[3:])
            print(f"| {machine.name} | {devices} | {sizes} | {times} |")


if __name__ == "__main__":
    main()
