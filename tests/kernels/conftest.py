from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import emulation
import pytest
import torch


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """Replaces Triton's driver and the device by ones that record launches and run nothing."""
    pytest.importorskip("triton", minversion="3.6")
    from additive_attn.backends import triton as operators
    from tools import mock_driver

    if (
        torch.cuda.is_available()
        or torch.version.hip is not None
        or operators.interpreted()
        or emulation.installed()
        or shutil.which("cc") is None
    ):
        pytest.skip("a mock driver needs a C compiler, and replaces the driver of a GPU")
    with mock_driver.installed() as driver:
        yield driver


@pytest.fixture
def planning(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enables launch plans for CPU tensors, and removes all plans."""
    from additive_attn.backends.triton import plans

    monkeypatch.setattr(plans, "on_cpu", True)
    plans.forget()
    yield
    monkeypatch.undo()
    plans.forget()
