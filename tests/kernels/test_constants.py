"""Constants of C++, Triton and Python agree."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from additive_attn.spec import dropout

CSRC = Path(__file__).parents[2] / "csrc"
NUMBER = r"-?\d[\d.]*(?:e[-+]?\d+)?"


@pytest.fixture(scope="module")
def cpp():
    if not CSRC.is_dir():
        pytest.skip("the sources of the kernel are not here")
    files = (path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp", ".inc"))
    return "\n".join(path.read_text() for path in files)


def triton_tanh():
    pytest.importorskip("triton")
    numerics = pytest.importorskip("additive_attn.backends.triton.numerics")
    return inspect.getsource(numerics.tanh.fn)


def constant(cpp, *names):
    """Returns the integer of the first of these names that C++ defines."""
    for name in names:
        found = re.search(rf"constexpr\s+(?:int|auto)\s+{name}\s*=\s*(\d+)", cpp)
        if found:
            return int(found[1])
    raise AssertionError(f"csrc defines none of {names}")


def test_coefficients_of_tanh(cpp):
    source = triton_tanh().partition("x > 9.0")[2]
    for name, variable in (("numerator", "z"), ("denominator", "y")):
        (listed,) = re.findall(rf"float {name}\[\] = {{(.*?)}};", cpp)
        expected = [float(x.rstrip("f")) for x in listed.split(",")]
        lines = [line for line in source.splitlines() if re.match(rf"\s+{variable} = ", line)]
        ours = [float(x) for line in lines for x in re.findall(rf"(?<![\w]){NUMBER}", line)]
        assert ours == expected, name


def test_ranges(cpp):
    prepare_rows = pytest.importorskip("additive_attn.backends.triton.prepare_rows")
    (ranges,) = re.findall(r"struct Range<float> {(.*?)};", cpp, re.DOTALL)
    values = {name: float(x) for name, x in re.findall(rf"(\w+) = ({NUMBER})f", ranges)}
    assert prepare_rows.SAFE.value == values["safe"]
    clamped = re.findall(rf"x > ({NUMBER})", triton_tanh())
    assert [float(x) for x in clamped] == [values["saturated"]]


def test_limits_of_the_forms(cpp):
    tiles = pytest.importorskip("additive_attn.backends.triton.tiles")
    limit = constant(cpp, "kDifferenceMaxFeatures", "difference_max_features", "features_few")
    assert limit == tiles.DIFFERENCE_MAX_FEATURES


def test_philox(cpp):
    """Triton's generator has the same constants, since test_triton.py compares its words."""
    numbers = [int(x, 16) for x in re.findall(r"0x([0-9A-F]{8})u", cpp)]
    assert set(dropout._MULTIPLIERS + dropout._WEYL) <= set(numbers)
    (rounds,) = re.findall(r"round < (\d+)", cpp)
    assert int(rounds) == dropout._ROUNDS
