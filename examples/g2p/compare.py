"""Train the same model on the plain and on the fused layer, from the same seed.

    python examples/g2p/compare.py --steps 300

Both start from identical parameters and get identical batches and dropout, so the loss curves
differ by rounding only. Prints the largest difference; draws both curves and their difference.
Takes two minutes on one core.
"""

from __future__ import annotations

import time
from itertools import count, islice
from pathlib import Path
from statistics import median

import torch
from arguments import RUNS, parser_with, picture, positive
from data import Batch, Dictionary, Pairs, read_dictionary, select
from model import Config, Pronouncer
from torch import Tensor
from tqdm import tqdm
from train import learning_rate, make_optimizer, train_step


def first_batches(words: Dictionary, size: int, steps: int, seed: int) -> list[Batch]:
    pairs, order = Pairs(words), torch.Generator().manual_seed(seed)
    epochs = (batch for _ in count() for batch in pairs.batches(size, order))
    return list(islice(epochs, steps))


class Run:
    """One of the two trainings, advanced step by step beside the other."""

    def __init__(self, config: Config, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Pronouncer(config)
        self.optimizer = make_optimizer(self.model)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def advance(self, batch: Batch, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        start = time.perf_counter()
        self.losses.append(train_step(self.model, self.optimizer, batch, lr, 0.1))
        self.seconds.append(time.perf_counter() - start)


def plot(plain: Tensor, fused: Tensor, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, layout="constrained")
    above.plot(plain, label="plain", linewidth=3, alpha=0.4)
    above.plot(fused, label="fused", linewidth=1)
    above.set_ylabel("loss per phone (nats)")
    above.legend()
    below.plot((fused - plain).abs(), ".", markersize=3)
    below.set_yscale("symlog", linthresh=1e-7)
    below.set_ylim(bottom=0)
    below.set_ylabel("|fused - plain|")
    below.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = ["--batch-size", "--hidden", "--dropout", "--lr", "--seed", "--threads"]
    parser = parser_with(__doc__, *options, "--dictionary")
    parser.set_defaults(hidden=128)
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--plot", type=picture, default=str(RUNS / "compare.png"), metavar="FILE")
    args = parser.parse_args()
    words = select(read_dictionary(args.dictionary), "train")
    batches = first_batches(words, args.batch_size, args.steps, args.seed)
    runs = {
        layer: Run(Config(layer, args.hidden, args.dropout), args.seed)
        for layer in ("plain", "fused")
    }
    other = runs["fused"].model.state_dict()
    for name, value in runs["plain"].model.state_dict().items():
        if not torch.equal(value, other[name]):
            raise SystemExit(f"The two models start with different {name}: nothing to compare.")

    for step, batch in enumerate(tqdm(batches, unit="batch", disable=None), start=1):
        lr = learning_rate(step / args.steps, args.lr)
        for run in runs.values():
            # The same dropout for both.
            run.advance(batch, lr, args.seed + step)

    plain, fused = (torch.tensor(run.losses) for run in runs.values())
    difference = (fused - plain).abs()
    print(f"{'step':>6} {'plain':>10} {'fused':>10} {'difference':>11}")
    for i in sorted({0, *range(args.steps - 1, 0, -max(1, args.steps // 10))}):
        print(f"{i + 1:>6} {plain[i]:>10.6f} {fused[i]:>10.6f} {difference[i]:>11.1e}")
    print(f"largest difference of the losses over {args.steps} steps: {difference.max():.1e}")
    for layer, run in runs.items():
        print(f"{layer}: {1e3 * median(run.seconds):.1f} ms per step (median)")
    plot(plain, fused, Path(args.plot))
    print(f"curves: {args.plot}")


if __name__ == "__main__":
    main()
