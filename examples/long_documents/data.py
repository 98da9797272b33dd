"""Long documents that are on every machine with torch: the Python sources of torch, and of sympy
and networkx, which torch requires. The label is the subpackage that a file belongs to."""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PACKAGES = ("torch", "sympy", "networkx")
CLASSES = 8  # subpackages with the most long files
SHORTEST = 3000  # tokens of a long file
LONGEST = 16384  # of which so many are used
VOCABULARY = 8192  # hashed; 0 is padding
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+|[^\s\w]")
# Imports and comments name the package too plainly.
LEFT_OUT = re.compile(r"^\s*(?:import\b|from\b|#).*$", re.MULTILINE)


class Document(NamedTuple):
    tokens: Tensor  # int64, (n,)
    label: int
    name: str


class Documents(NamedTuple):
    classes: list[str]
    train: list[Document]
    test: list[Document]


def tokenize(text: str) -> Tensor:
    words = TOKEN.findall(LEFT_OUT.sub("", text))[:LONGEST]
    return torch.tensor([1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words])


def long_files() -> dict[str, list[Path]]:
    """Files of each subpackage that may be long enough."""
    found: dict[str, list[Path]] = defaultdict(list)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).rglob("*.py")):
                parts = file.relative_to(folder).parts
                if len(parts) > 1 and file.stat().st_size > 3 * SHORTEST:
                    found[f"{package}.{parts[0]}"].append(file)
    return found


def read_documents(classes: int = CLASSES, most: int = 120) -> Documents:
    """A quarter of the files of each class are for testing, chosen by their names alone."""
    by_class = {}
    largest = sorted(long_files().items(), key=lambda item: -len(item[1]))[: 2 * classes]
    for name, files in largest:
        read = ((file, tokenize(file.read_text("utf-8", "ignore"))) for file in files[:most])
        by_class[name] = [(file, tokens) for file, tokens in read if len(tokens) >= SHORTEST]
    names = sorted(by_class, key=lambda name: -len(by_class[name]))[:classes]
    if len(names) < 2:
        raise SystemExit(
            f"Found no long sources of {', '.join(PACKAGES)}: pip install torch sympy"
        )
    parts: dict[bool, list[Document]] = {True: [], False: []}
    for label, name in enumerate(names):
        for file, tokens in by_class[name]:
            place = "/".join((name, *file.parts[-2:]))
            parts[zlib.crc32(place.encode()) % 4 == 0].append(Document(tokens, label, place))
    return Documents(names, train=parts[False], test=parts[True])


def batches(
    documents: Sequence[Document], size: int, length: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens (B, L), lengths and labels. With a generator in random order, and a random stretch of
    each document; otherwise its first."""
    order = range(len(documents))
    if generator is not None:
        order = torch.randperm(len(documents), generator=generator).tolist()
    for start in range(0, len(documents), size):
        some = [documents[i] for i in order[start : start + size]]
        tokens = torch.zeros(len(some), length, dtype=torch.int64)
        for row, document in zip(tokens, some, strict=True):
            spare, first = len(document.tokens) - length, 0
            if generator is not None and spare > 0:
                first = int(torch.randint(spare + 1, (), generator=generator))
            stretch = document.tokens[first : first + length]
            row[: len(stretch)] = stretch
        lengths = (tokens > 0).sum(1)
        yield tokens, lengths, torch.tensor([document.label for document in some])
