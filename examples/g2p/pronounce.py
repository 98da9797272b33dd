"""Pronounce words with a saved model.

    python examples/g2p/pronounce.py gradient philharmonic
    python examples/g2p/pronounce.py --plot alignment.png knowledge
    python examples/g2p/pronounce.py                   reads words from standard input

The words are read in any case and must consist of the letters a to z. Of the words named on the
command line, one that cannot be read makes the exit status 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from arguments import RUNS, parser_with, picture
from data import LETTERS, Pronunciation, encode_phones, encode_words
from evaluate import pronounce
from model import Pronouncer, load


def unreadable(word: str) -> str | None:
    """Why the model cannot read `word`, or None if it can."""
    if not word:
        return "The word is empty: type at least one letter."
    strange = sorted(set(word) - set(LETTERS))
    if not strange:
        return None
    listed = " ".join(strange)
    return f"{word!r} contains {listed}, but the model reads only the letters a to z: respell it."


def align(model: Pronouncer, word: str, phones: Pronunciation) -> torch.Tensor:
    """Attention weights (phones, letters) while the model says `phones`."""
    letters, lengths = encode_words([word])
    model.eval()
    with torch.no_grad():
        _, weights = model(letters, lengths, encode_phones([phones])[:, :-1], need_weights=True)
    return weights[0, : len(phones)]


def plot_alignment(model: Pronouncer, word: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    from additive_attn import plot_attention

    ((_, phones),) = pronounce(model, [word], beam=5)
    figure, axes = plt.subplots(layout="constrained")
    plot_attention(align(model, word, phones), list(word), list(phones), ax=axes, title=word)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def newest_model() -> Path:
    saved = RUNS.glob("*.pt")
    return max(saved, key=lambda path: path.stat().st_mtime, default=RUNS / "fused.pt")


def typed_words() -> Iterable[str]:
    if sys.stdin.isatty():
        print("Type words, Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        yield from line.split()


def main() -> None:
    parser = parser_with(__doc__, "--beam", "--layer")
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--model", type=Path, help="default: the newest in runs/")
    parser.add_argument(
        "--plot", type=picture, metavar="FILE", help="draw how the first word aligns"
    )
    args = parser.parse_args()
    model, _ = load(args.model or newest_model(), args.layer)
    readable, problems = [], 0
    for typed in args.words or typed_words():
        word = typed.lower()
        problem = unreadable(word)
        if problem:
            problems += 1
            print(problem, file=sys.stderr)
            continue
        readable.append(word)
        ((_, phones),) = pronounce(model, [word], args.beam)
        print(f"{word}  {' '.join(phones)}", flush=True)
    if args.plot and readable:
        plot_alignment(model, readable[0], Path(args.plot))
        print(f"alignment of {readable[0]!r}: {args.plot}")
    elif args.plot:
        raise SystemExit(f"No word could be read, so {args.plot} is not drawn.")
    if args.words and problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
