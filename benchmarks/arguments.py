"""Command lines of benchmarks and tools."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter


def parser_of(module: str, text: str | None) -> ArgumentParser:
    """A parser whose help shows the docstring of the module as it is laid out."""
    return ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=RawDescriptionHelpFormatter,
    )
