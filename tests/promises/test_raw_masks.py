"""Arguments of the raw operators: plain PyTorch raises for the masks that the kernel raises for,
and the kernels raise for inputs whose sizes do not agree, since they would read beyond them."""

from __future__ import annotations

import pytest
import torch
from oracle import ON_KERNEL, make

from additive_attn.ops import dispatch

ROWS, KEYS = 6, 10
INPUTS = make((2,), ROWS, KEYS, 4, 3)
GOOD = {
    "attn_mask": torch.rand(2, ROWS, KEYS) < 0.7,
    "lengths": torch.tensor([[9], [5]]),
    "starts": torch.tensor([[1], [2]]),
    "block_table": torch.tensor([[1, 2, 3], [0, 1, 2]], dtype=torch.int32),
    "block_tiles": torch.rand(2, 4, 4) < 0.6,
}
TOGETHER = {"block_table": "block_tiles", "block_tiles": "block_table"}


def others(good):
    """Yields other dtypes, devices and shapes; and numbers out of range, which are no error."""
    for dtype in (
        torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8,
        torch.bool, torch.complex64,
    ):  # fmt: skip
        yield good.to(dtype)
    yield from (None, good.to("meta"), good.to_sparse(), good.new_empty(0), good.new_zeros(()))
    yield from (good[None], good.expand(3, *good.shape), torch.cat([good, good], -1))
    yield from (good[..., :-1], good[..., :0], good[..., :1], good[..., :-1, :])
    yield good[:1].expand(3, *good.shape[1:])
    if good.dtype in (torch.int32, torch.int64):
        yield from (good - 5, good + 1000, torch.full_like(good, torch.iinfo(good.dtype).max))


def outcome(operators, name, masking):
    """Returns the results, or None if the operator raised."""
    query, key, value, weight = INPUTS.values()
    masks = *(masking.get(each) for each in GOOD), -1, -1
    scored, call = (query, key, weight, *masks, 1.0), (query, key, value, weight, *masks)
    arguments = {
        "forward": (*call, None, 0.0, 1.0, True),
        "backward": (
            torch.ones(2, ROWS, 3), None, None, *call, None, 0.0, 1.0, torch.zeros(2, ROWS),
            *[True] * 4, False,
        ),
        "scores": scored,
        "scores_backward": (torch.ones(2, ROWS, KEYS), *scored, *[True] * 3, False),
    }  # fmt: skip
    try:
        results = operators[name](*arguments[name])
    except RuntimeError as error:
        assert str(error)
        return None
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.interpreter(name=["forward", "scores_backward"])
@pytest.mark.skipif(not ON_KERNEL, reason="there is no kernel to compare with")
@pytest.mark.parametrize("name", ["forward", "backward", "scores", "scores_backward"])
@pytest.mark.parametrize("argument", GOOD)
def test_plain_pytorch_refuses_what_the_kernel_refuses(argument, name):
    kernel = {name: getattr(dispatch, f"{name}_directly")}
    refused = 0
    for other in others(GOOD[argument]):
        masking = {argument: other}
        if argument in TOGETHER:
            masking[TOGETHER[argument]] = GOOD[TOGETHER[argument]]
        with torch.no_grad():
            ours = outcome(kernel, name, masking)
            plain = outcome(dispatch.PLAIN, name, masking)
        assert (ours is None) == (plain is None), other
        refused += ours is None
        for mine, theirs in zip(ours or (), plain or (), strict=True):
            torch.testing.assert_close(mine, theirs, check_dtype=False)
    assert refused >= 5


@pytest.mark.kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["forward", "backward", "scores", "scores_backward"])
def test_inputs_whose_sizes_do_not_agree_are_refused(name, monkeypatch):
    operators = {name: getattr(dispatch, f"{name}_directly")}
    assert outcome(operators, name, {}) is not None
    for argument, x in INPUTS.items():
        other = x[:, 1:] if argument == "value" else x[..., 1:]
        with monkeypatch.context() as patch:
            patch.setitem(INPUTS, argument, other)
            refused = outcome(operators, name, {}) is None
        assert refused == (argument != "value" or not name.startswith("scores")), argument
