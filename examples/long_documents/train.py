"""Train a classifier of documents of several thousand tokens, on the CPU, in minutes.

    python examples/long_documents/train.py                  documents of 4096 tokens
    python examples/long_documents/train.py --tokens 256     their beginnings alone
    python examples/long_documents/train.py --demo           half a minute, fewer documents

The class of a source file is its subpackage of torch, sympy or networkx. Prints the accuracy on
files that were not trained on after every second epoch.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from data import VOCABULARY, Document, Documents, batches, read_documents
from model import Classifier
from torch import nn

try:
    from tqdm import tqdm
except ImportError:  # plain lines without it

    def tqdm(rows, **_):
        return rows


COLUMNS = ["tokens", "seed", "epoch", "loss", "accuracy", "files"]


@torch.no_grad()
def accuracy(model: Classifier, documents: Sequence[Document], size: int, length: int) -> float:
    model.eval()
    right = 0
    for tokens, lengths, labels in batches(documents, size, length, None):
        right += int((model(tokens, lengths).argmax(1) == labels).sum())
    return right / len(documents)


def train(documents: Documents, options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = Classifier(VOCABULARY, len(documents.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05)
    per_epoch = -(-len(documents.train) // options.batch_size)
    total, done, start = options.epochs * per_epoch, 0, time.perf_counter()
    for epoch in range(options.epochs):
        model.train()
        losses = []
        some = batches(documents.train, options.batch_size, options.tokens, generator)
        for tokens, lengths, labels in tqdm(some, total=per_epoch, leave=False):
            for group in optimizer.param_groups:  # linear warm-up, then linear decay
                group["lr"] = options.lr * min(10 * (done + 1) / total, 1 - done / total)
            loss = nn.functional.cross_entropy(model(tokens, lengths), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            done += 1
        if (options.epochs - epoch) % 2 == 0:
            continue
        right = accuracy(model, documents.test, options.batch_size, options.tokens)
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, accuracy on "
              f"{len(documents.test)} other files {right:.1%}, "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        if options.csv:
            numbers = [round(sum(losses) / len(losses), 4), round(right, 4), len(documents.test)]
            row = [options.tokens, options.seed, epoch + 1, *numbers]
            new = not options.csv.exists()
            with options.csv.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, row] if new else [row])


def is_table(path: Path) -> bool:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return next(csv.reader(file), None) == COLUMNS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of each document (4096)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help=f"add {', '.join(COLUMNS)}")
    parser.add_argument("--demo", action="store_true", help="four classes, three epochs")
    options = parser.parse_args()
    if min(options.tokens, options.epochs, options.batch_size) < 1:
        parser.error("--tokens, --epochs and --batch-size are 1 or more")
    if not 0 <= options.lr < float("inf"):
        parser.error(f"--lr is {options.lr}, but must be a finite number of 0 or more")
    if options.csv and (options.csv.is_dir() or not options.csv.parent.is_dir()):
        parser.error(f"--csv: no file can be made at {options.csv}")
    if options.csv and options.csv.exists() and not is_table(options.csv):
        parser.error(f"--csv: {options.csv} is no table of this script")
    if options.demo:
        options.epochs = min(options.epochs, 3)
    return options


def main() -> None:
    options = parse_arguments()
    documents = read_documents(*((4, 24) if options.demo else ()))
    labels = [document.label for document in documents.test]
    most = max(labels.count(label) for label in set(labels)) / len(labels)
    print(f"{len(documents.train)} files to train on, {len(labels)} others, of "
          f"{', '.join(documents.classes)}. The most frequent class: {most:.1%}.")  # fmt: skip
    tokens, model = options.tokens, Classifier(VOCABULARY, 2)
    layer = model.layers[0].attention
    size = options.batch_size * tokens**2 * layer.energy.numel() * 4
    print(f"{tokens} tokens each. A layer that keeps all energies would build a tensor of "
          f"{size / 1e9:,.1f} GB in each of {len(model.layers)} layers, and in fp32.")  # fmt: skip
    train(documents, options)


if __name__ == "__main__":
    main()
