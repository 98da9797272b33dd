"""The README is true: its Python code runs, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="README.md is not here")


def test_python_code_runs():
    """The blocks run in order and in one namespace, as a reader would type them."""
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        # Blank lines in front make tracebacks show line numbers of the README.
        lines_before = text.count("\n", 0, block.start(1))
        code = compile("\n" * lines_before + block[1], str(README), "exec")
        exec(code, namespace)
        # Annotated results of the replacement example, which readers rely on.
        if "# (1, 20) and (1, 10)" in block[1]:
            assert namespace["out"].shape == (1, 20)
            assert namespace["weights"].shape == (1, 10)


def test_links_within_the_project():
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://)([^)]+)\)", text)
    headings = [re.sub(r"[^\w\- ]", "", h) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for target in targets:
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), f"README.md links to {path}, which is missing"
        assert path or anchor in anchors, f"README.md links to #{anchor}, which is no heading"
