"""Train a pronouncer on the CMU Pronouncing Dictionary.

    python examples/g2p/train.py                    the full training, fused layer: half an hour
    python examples/g2p/train.py --layer plain      the same with the layer written out
    python examples/g2p/train.py --time-limit 20    within 20 minutes
    python examples/g2p/train.py --demo             about a minute; it pronounces words by then

Reports the error rates on the validation words after every epoch and saves the model.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from itertools import islice

import torch
from arguments import RUNS, command, number, output, parser_with, positive
from data import PAD, Batch, Dictionary, Pairs, read_dictionary, select
from evaluate import error_rates, pronounce
from model import Config, Pronouncer, save
from pronounce import plot_alignment
from torch import nn
from tqdm import tqdm

# Of the validation part, so never trained on.
SAMPLES = ["physics", "foreign", "knapsack", "doorknobs", "toughness", "philosophical"]
WARMUP = 0.04
CLIP = 1.0
DEMO = {"hidden": 128, "epochs": 1, "dropout": 0.0, "label_smoothing": 0.0, "time_limit": 1.2}


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then linear decay to 0 at `progress` = 1."""
    return peak * max(0.0, min(progress / WARMUP, (1 - progress) / (1 - WARMUP)))


def make_optimizer(model: Pronouncer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-4)


def train_step(
    model: Pronouncer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    lr: float,
    label_smoothing: float,
) -> float:
    """One update; returns the loss per phone, in nats."""
    logits, _ = model(batch.letters, batch.lengths, batch.phones[:, :-1])
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1),
        batch.phones[:, 1:].flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
    )
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss.item()


def show_samples(model: Pronouncer) -> None:
    model.eval()
    for word, phones in sorted(pronounce(model, SAMPLES)):
        print(f"    {word:<14} {' '.join(phones)}")


def parse_arguments() -> argparse.Namespace:
    options = ["--batch-size", "--hidden", "--dropout", "--lr", "--seed", "--device", "--threads"]
    parser = parser_with(__doc__, *options, "--dictionary")
    parser.add_argument("--layer", choices=["plain", "fused"], default="fused")
    parser.add_argument("--demo", action="store_true", help="small, short, with a plot")
    parser.add_argument("--epochs", type=positive, default=12)
    parser.add_argument("--label-smoothing", type=number(float, 0, 1), default=0.1)
    parser.add_argument(
        "--time-limit",
        type=number(float, 1e-3),
        default=math.inf,
        metavar="MINUTES",
        help="the learning rate falls in step, so that a run cut short still ends well",
    )
    parser.add_argument("--save", type=output, help="default: runs/LAYER.pt beside this file")
    args = parser.parse_args()
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    args.save = args.save or RUNS / ("demo.pt" if args.demo else f"{args.layer}.pt")
    return args


def train(
    model: Pronouncer, words: Dictionary, held_out: Dictionary, args: argparse.Namespace
) -> None:
    device = torch.device(args.device)
    pairs = Pairs(words)
    order = torch.Generator().manual_seed(args.seed)
    optimizer = make_optimizer(model)
    per_epoch = -(-len(pairs) // args.batch_size)
    step, start, progress = 0, time.perf_counter(), 0.0
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
    print(f"{len(pairs)} pronunciations of {len(words)} words, {per_epoch} batches an epoch")
    for epoch in range(1, args.epochs + 1):
        model.train()
        losses = []
        bar = tqdm(
            pairs.batches(args.batch_size, order),
            f"epoch {epoch}/{args.epochs}",
            total=per_epoch,
            unit="batch",
            disable=None,
        )
        for batch in bar:
            step += 1
            minutes = (time.perf_counter() - start) / 60
            progress = max(step / (args.epochs * per_epoch), minutes / args.time_limit)
            if progress >= 1:
                break
            lr = learning_rate(progress, args.lr)
            losses.append(train_step(model, optimizer, batch.to(device), lr, args.label_smoothing))
            recent = sum(losses[-50:]) / len(losses[-50:])
            bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
            if step % max(1, per_epoch // 6) == 0:
                tqdm.write(f"batch {step}: loss {recent:.3f}")
        bar.close()
        minutes = (time.perf_counter() - start) / 60
        rates = error_rates(model, held_out)
        loss = sum(losses) / max(1, len(losses))
        print(f"epoch {epoch}: loss {loss:.4f}, validation {rates}, {minutes:.1f} min", flush=True)
        done = f"{(epoch - 1) + len(losses) / per_epoch:.4g}"
        save(args.save, model, epochs=done, seed=args.seed, minutes=minutes, machine=machine)
        if progress >= 1:
            break
    print(f"saved {os.path.relpath(args.save)}")


def main() -> None:
    args = parse_arguments()
    dictionary = read_dictionary(args.dictionary)
    words, held_out = select(dictionary, "train"), select(dictionary, "validation")
    torch.manual_seed(args.seed)
    config = Config(args.layer, args.hidden, args.dropout)
    model = Pronouncer(config).to(args.device)
    if args.demo:
        held_out = dict(islice(held_out.items(), 0, None, 6))
        print(f"before training: validation {error_rates(model, held_out)}")
        show_samples(model)
    train(model, words, held_out, args)
    if args.demo:
        show_samples(model)
        path = args.save.with_suffix(".png")
        plot_alignment(model.cpu(), SAMPLES[-1], path)
        print(f"alignment of {SAMPLES[-1]!r}: {os.path.relpath(path)}")
    print("next:", command("pronounce.py", "--model", args.save, SAMPLES[0]))
    print("  or:", command("evaluate.py", args.save))


if __name__ == "__main__":
    main()
