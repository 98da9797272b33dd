"""Phone and word error rates of a saved model on held-out words.

    python examples/g2p/evaluate.py examples/g2p/runs/fused.pt

Takes a few minutes. Appends one row per decoding method to runs/results.csv, which git
ignores, and prints that table; --publish appends to the results.csv of the README.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arguments import RUNS, parser_with
from data import Dictionary, Pronunciation, decode_phones, encode_words, read_dictionary, select
from model import Pronouncer, load
from tqdm import tqdm

PUBLISHED = Path(__file__).with_name("results.csv")
COLUMNS = "layer hidden epochs seed decode PER WER words minutes machine".split()


@dataclass
class ErrorRates:
    per: float
    wer: float
    words: int

    def __str__(self) -> str:
        return f"PER {self.per:.2f} %  WER {self.wer:.2f} %  ({self.words} words)"


def pronounce(
    model: Pronouncer, words: list[str], beam: int = 1, chunk: int = 100
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
    # None: a bar on a terminal only, for a file would fill with its copies.
    hidden = None if progress else True
    for word, guess in tqdm(found, total=len(dictionary), unit="word", disable=hidden):
        distance, length = min((edit_distance(guess, p), len(p)) for p in dictionary[word])
        errors, phones, wrong = errors + distance, phones + length, wrong + (distance > 0)
    model.train(training)
    return ErrorRates(100 * errors / phones, 100 * wrong / len(dictionary), len(dictionary))


def append_results(path: Path, rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS] * is_new + rows)


def markdown(path: Path) -> str:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = parser_with(__doc__, "--beam", "--layer", "--dictionary", "--device", "--threads")
    parser.add_argument("model", type=Path, help="a file that train.py saved")
    parser.add_argument("--part", choices=["validation", "test"], default="test")
    parser.add_argument("--publish", action="store_true", help="append to the README's table")
    args = parser.parse_args()
    model, facts = load(args.model, args.layer)
    model.to(args.device)
    words = select(read_dictionary(args.dictionary), args.part)
    rows: list[list[object]] = []
    for beam, decode in ((1, "greedy"), (args.beam, f"beam {args.beam}")):
        print(f"{args.part}, {decode}, {len(words)} words ...", flush=True)
        rates = error_rates(model, words, beam, progress=True)
        print(f"{args.part}, {decode}: {rates}", flush=True)
        trained = [model.config.layer, model.config.hidden, facts["epochs"], facts["seed"]]
        found = [f"{rates.per:.2f}", f"{rates.wer:.2f}", rates.words]
        rows.append(
            [*trained, decode, *found, f"{facts['minutes']:.1f}", facts.get("machine", "")]
        )
    if args.part == "test":
        path = PUBLISHED if args.publish else RUNS / "results.csv"
        append_results(path, rows)
        print(f"{os.path.relpath(path)}:\n{markdown(path)}")


if __name__ == "__main__":
    main()
